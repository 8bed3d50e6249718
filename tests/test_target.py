"""`target_architecture`, and the generator of schedules that grow a model block by block."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, arguments, events

import train_orchestrated
from orchestrate.training.settings.config import resolve
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint

GROW = [
    {"name": "stack_layers", "value": {"n_layer": 3, "how": "identity"}, "at_iter": 2},
    {"name": "widen_mlp", "value": {"width": 80, "layers": ["mlp.1"]}, "at_iter": 3},
    {"name": "resize_vocabulary", "value": {"size": 40}, "at_iter": 4},
]


@pytest.mark.parametrize(
    "target, told",
    [
        ("n_layer=3", []),
        ("n_layer=3, vocab_size=40, n_embd=16, bias=False", []),
        ("{'n_layer': 3, 'tie_weights': True}", []),
        ("n_layer=4", ["target_architecture: n_layer 4 is not reached: the schedule ends at 3"]),
        ("n_layer=2", ["target_architecture: n_layer 2 is not reached: the schedule ends at 3"]),
        (
            "n_embd=32,n_hidden=64,n_layer=3",
            [
                "target_architecture: n_embd 32 is not reached: the schedule ends at 16",
                "target_architecture: n_hidden 64 is not reached: the schedule ends at [64, 80, 64]",
            ],
        ),
        ("n_layers=3", ["target_architecture: 'n_layers' is nothing that a model has; did you mean n_layer?"]),
    ],
)
@pytest.mark.parametrize("more", [[], ["--plan"]])
def test_a_schedule_that_does_not_reach_the_target_is_refused(tiny, data, tmp_path, capsys, target, told, more):
    (tmp_path / "s.json").write_text(json.dumps(GROW))
    given = arguments(data, tmp_path / "run", schedule=tmp_path / "s.json", max_iters=5, target_architecture=target)
    if told:
        with pytest.raises(Refused) as refused:
            train_orchestrated.main([*given, *more])
        assert refused.value.problems == told and not (tmp_path / "run").exists()
        return
    assert train_orchestrated.main([*given, *more]) == 0
    said = capsys.readouterr().out
    if more:
        assert "note: the final model: n_layer 3, n_embd 16, n_head 2, n_kv_head 2, head_size 8, " in said
        assert "n_hidden [64, 80, 64], block_size 16, vocab_size 40, " in said
        assert " parameters, as target_architecture says" in said


def test_a_resume_is_checked_too(tiny, resume):
    _, out = tiny(GROW, max_iters=3)
    with pytest.raises(Refused, match="n_layer 5 is not reached: the schedule ends at 3"):
        resume(out, max_iters=5, target_architecture="n_layer=5")
    assert resume(out, max_iters=5, target_architecture="n_layer=3") == 0
    with pytest.raises(Refused, match="n_layer 5 is not reached: the model stays at 3"):
        resume(out, max_iters=6, target_architecture="n_layer=5")


def test_the_name_that_the_fork_has(tmp_path):
    (tmp_path / "c.py").write_text("target_architecture_config = 'n_layer=12'")
    assert resolve([tmp_path / "c.py"], [])[0].target_architecture == {"n_layer": 12}


# ---------------------------------------------------------------------------------------------- the generator


def generate(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "schedules" / "generate_growth.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("freeze", [0, 2])
def test_what_it_writes_grows_a_model_and_keeps_its_function(tiny, tmp_path, data, freeze):
    """Blocks come every 6 iterations: at 6 and 12; the last merge is at 18."""
    path = tmp_path / "growth.yaml"
    options = ["--target-layers", "3", "--iters-per-layer", "6", "--freeze-iters", str(freeze), "--n-embd", "16"]
    assert generate(*options, "--extra-iters", "1", "--output", str(path)).returncode == 0
    given = arguments(data, tmp_path / "run", schedule=path, n_layer=1, max_iters=19, target_architecture="n_layer=3")
    assert train_orchestrated.main([*given, "--plan"]) == 0
    assert train_orchestrated.main(given) == 0
    done = events(tmp_path / "run", "operation")
    at = [(e["iter"], e["name"], e["value"]) for e in done]
    frozen = [["block.0", "block.1", "wte"]]
    ranks = [["attn.0", "attn.1"], 4], [["attn.0", "attn.1"], 1]
    second = [(12, "stack_layers", {"n_layer": 3, "how": "identity_copy"})]
    if freeze:
        second = [(12, "freeze_layer", *frozen), *second, (14, "unfreeze_layer", *frozen)]
        second += [(14, "set_layer_lora_rank", ranks[0]), (16, "set_layer_lora_rank", ranks[1])]
    else:
        second += [(15, "set_layer_lora_rank", ranks[0]), (18, "set_layer_lora_rank", ranks[1])]
    assert at[-len(second) - 2 :] == [*second, (18, "merge_lora_weights", None), (19, "save_checkpoint", None)]
    assert [i for i, name, _ in at if name == "stack_layers"] == [6, 12]
    for event in done:
        if event["val_loss_after"] is not None:
            assert event["val_loss_after"] == pytest.approx(event["val_loss_before"], abs=1e-5), event["name"]
    trains = {e["iter"]: e["parameters_trainable"] / e["parameters_total"] for e in done if e["name"] == "stack_layers"}
    assert trains[12] == 1 if not freeze else 0.3 < trains[12] < 0.4, "the new block, a third of the model, and ln_f"
    settings = checkpoint.load(checkpoint.find(tmp_path / "run")[0]).state.settings
    assert settings.model.n_layer == 3 and not settings.model.lora and not settings.frozen


def test_it_prints_without_an_output_and_overwrites_nothing(tmp_path):
    printed = generate("--target-layers", "4", "--how", "copy").stdout
    entries = yaml.safe_load(printed)
    assert [e["value"]["n_layer"] for e in entries if e["name"] == "stack_layers"] == [2, 3, 4]
    assert [e["value"] for e in entries if e["name"] == "set_layer_lora_rank"][:2] == [
        [["attn.0"], 192],
        [["attn.0"], 48],
    ]
    kept = tmp_path / "mine.yaml"
    kept.write_text("mine")
    done = generate("--target-layers", "4", "--output", str(kept))
    assert done.returncode == 2 and "mine.yaml: File exists" in done.stderr and kept.read_text() == "mine"
    for wrong in (["--target-layers", "1"], ["--target-layers", "3", "--freeze-iters", "1000"]):
        assert generate(*wrong).returncode == 2
