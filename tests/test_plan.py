"""--plan: the stages before anything trains, checked against what then happens."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, events
from test_operations import apply, live_run

import train_orchestrated
from orchestrate.training import plan
from orchestrate.training.run.optimizers import OPTIMIZERS
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused

GROWS = [
    {"name": "set_grad_accum", "value": 4, "trigger_loss": 3.0, "max_wait_iters": 5},
    {"name": "freeze_layer", "value": "block.0", "max_wait_iters": 2},
    {"name": "stack_layers", "value": {"n_layer": 4}, "max_wait_iters": 1, "reevaluate": True},
    {"name": "set_dropout", "value": 0.1},
    {"name": "stack_layers", "value": [0, 1, 2, 3, 3], "at_tokens": 1500},
    {"name": "widen_embd", "value": 32, "trigger_plateau": {"evals": 1, "min_delta": 5.0}, "max_wait_iters": 30},
    {"name": "set_sequence_length", "value": 8},
]


def planned(tmp_path, data, schedule, capsys, *options, **keys):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(schedule))
    capsys.readouterr()
    code = train_orchestrated.main([*arguments(data, tmp_path / "none", schedule=path, **keys), *options])
    return code, capsys.readouterr().out


def test_stages(data, tmp_path, capsys):
    code, out = planned(tmp_path, data, GROWS, capsys, "--plan=json")
    assert code == 0 and not (tmp_path / "none").exists()
    stages = json.loads(out)["stages"]
    assert [s["n_layer"] for s in stages] == [2, 2, 2, 4, 4, 5, 5, 5]
    assert [s["n_embd"] for s in stages] == [16] * 6 + [32] * 2
    assert [s["tokens_per_iter"] for s in stages] == [128] + [256] * 6 + [128]
    assert [s["keeps_function"] for s in stages] == [None, True, True, True, True, False, True, True]
    assert [s["rewraps"] for s in stages] == [0, 0, 1, 1, 0, 1, 1, 0]
    assert stages[2]["trainable"] < stages[2]["parameters"] == stages[0]["parameters"]
    assert stages[2]["optimizer_bytes"] == stages[0]["optimizer_bytes"], "frozen parameters keep their moments"
    assert stages[3]["changes"]["model.n_layer"] == [2, 4]
    assert all(s["activation_bytes"] > 0 and s["flops_per_token"] > 0 for s in stages)
    _, table = planned(tmp_path, data, GROWS, capsys, "--plan")
    assert "CHANGES" in table and "7 entries, no errors; 4 re-wraps" in table and "guess" in table


def test_recompiles_are_guessed_only_where_something_compiles(data, tmp_path, capsys):
    schedule = [
        {"name": "set_batch_size", "value": 8},
        {"name": "set_batch_size", "value": 2},
        {"name": "stack_layers", "value": {"n_layer": 4}},
        {"name": "freeze_layer", "value": "block.*"},
        {"name": "set_dropout", "value": 0.1},
        {"name": "set_dropout", "value": 0.2},
        {"name": "widen_mlp", "value": {"width": 80, "layers": "mlp.0"}},
    ]
    _, out = planned(tmp_path, data, schedule, capsys, "--plan=json", compile=True)
    assert [s["recompiles"] for s in json.loads(out)["stages"]] == [0, 3, 0, 0, 1, 2, 0, 1]
    _, out = planned(tmp_path, data, schedule, capsys, "--plan=json", compile=False)
    assert {s["recompiles"] for s in json.loads(out)["stages"]} == {0}


def test_all_errors_at_once_with_their_places(data, tmp_path, capsys):
    bad = [
        {"name": "stack_layers", "value": [0, 5]},
        {"name": "widen_embd", "value": 24},
        {"name": "add_heads", "value": 1},
        {"name": "widen_mlp", "value": {"width": 128, "how": "duplicate"}, "over": 5},
        {"name": "extend_context", "value": 8},
        {"name": "set_sequence_length", "value": 5},
        {"name": "drop_layers", "value": [0, 1]},
        {"name": "untie_head", "over": 3},
        {"name": "stack_layers", "value": {"n_layer": 4, "how": "sideways"}},
    ]
    with pytest.raises(Refused) as parsed:
        planned(tmp_path, data, bad, capsys, "--plan")
    assert [p.split(": ", 1)[1] for p in parsed.value.problems] == [
        "entry 8: untie_head: `over` moves a number or fades new weights in; untie_head does neither",
        "entry 9: stack_layers: value.how must be 'identity', 'identity_copy', 'copy', 'cycle', 'depth_up_scaling' or "
        "'random', got 'sideways'",
    ]
    with pytest.raises(Refused) as whole:
        planned(tmp_path, data, bad[:7], capsys, "--plan")
    assert len(whole.value.problems) == 7
    assert all(f"entry {n}" in problem for n, problem in enumerate(whole.value.problems, 1))


def test_a_failing_reshape_is_found_before_the_run(data, tmp_path, capsys, monkeypatch):
    from orchestrate.model import growth

    def broken(*args):
        raise RuntimeError("does not fit")

    monkeypatch.setattr(growth, "widen_mlp", broken)
    with pytest.raises(Refused, match="entry 1: widen_mlp 128: RuntimeError: does not fit"):
        planned(tmp_path, data, [{"name": "widen_mlp", "value": 128}], capsys, "--plan")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_memory_of_parameters_and_optimizer_is_what_a_run_has(data, tmp_path, optimizer):
    """Within 15 %, at the start and after every kind of change."""
    steps = [
        ("freeze_layer", "mlp.0"),
        ("stack_layers", {"n_layer": 3, "how": "copy"}),
        ("set_attn_lora_rank", 4),
        ("widen_embd", 32),
        ("merge_lora_weights", None),
        ("reset_moments", None),
    ]
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"name": n, "value": v} if v is not None else {"name": n} for n, v in steps]))
    config = TrainConfig(
        dataset=str(data), schedule=str(path), n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4,
        gradient_accumulation_steps=2, bias=True, device="cpu", compile=False, shrunken_vocab_size=0,
        optimizer=optimizer,
    )  # fmt: skip
    rows = plan.make(config, {}, 1).rows
    run = live_run(data, model={"vocab_size": rows[0].settings.model.vocab_size}, optimizer=optimizer)
    for row, (name, value) in zip(rows, [(None, None), *steps], strict=True):
        if name:
            apply(run, name, value)
            run.step()
        optimizer = sum(t.nbytes for m in run.optimizer.state_by_name().values() for t in m.values())
        model = sum(p.nbytes * (2 if p.requires_grad else 1) for p in run.model.parameters())
        assert row.model_bytes == pytest.approx(model, rel=0.15), name
        assert row.optimizer_bytes == pytest.approx(optimizer, rel=0.15), name
        assert row.parameters == sum(p.numel() for p in run.model.parameters())
        assert row.trainable == sum(p.numel() for p in run.model.parameters() if p.requires_grad)


def test_against_a_run_says_when_its_own_entries_fired(data, tmp_path, capsys, tiny):
    code, out = tiny(GROWS, max_iters=20)
    assert code == 0
    fired = {e["entry"]: f"{e['iter']}: {e['reason']}" for e in events(out, "operation")}
    assert len(fired) == 7
    _, text = planned(tmp_path, data, GROWS, capsys, "--plan=json", "--against", str(out))
    against = json.loads(text)["against"]
    assert {int(n): when for n, when in against.items()} == fired
    _, text = planned(
        tmp_path, data, GROWS + [{"name": "stop", "trigger_loss": 0.1}], capsys, "--plan", f"--against={out}"
    )
    assert "not by iteration 20" in text and "as recorded" in text


def test_against_a_run_knows_its_metrics(data, tmp_path, capsys, tiny):
    """What fired on logged numbers in the run fires there in the replay; a name that its lines lack is told."""
    schedule = [
        {"name": "set_grad_clip", "value": 0.5, "trigger": {"metric": "loss", "plateau": {"evals": 2, "min_delta": 9}}},
        {"name": "adjust_batch_size", "value": {"target": 1.0, "max_batch_size": 4}, "max_wait_iters": 1},
        {"name": "set_weight_decay", "value": 0.0, "trigger": {"metric": "tokens_per_second", "above": 1}, "over": 2},
        {"name": "set_dropout", "value": 0.1, "trigger": {"metric": "machine.host_memory", "above": 1e6}},
        {"name": "stop", "trigger": {"metric": "grad_norm", "below": 99}, "max_wait_iters": 5},
    ]
    code, out = tiny(schedule, max_iters=20, log_interval=2)
    assert code == 0
    fired = {e["entry"]: f"{e['iter']}: {e['reason']}" for e in events(out, "operation")}
    assert [int(when.split(":")[0]) for when in fired.values()] == [6, 7, 8, 8, 8]
    _, text = planned(tmp_path, data, schedule, capsys, "--plan=json", f"--against={out}")
    planned_ = json.loads(text)
    assert {int(n): when for n, when in planned_["against"].items()} == fired
    assert "entries [2]: adjust_batch_size is decided on the machine; shown unchanged" in planned_["notes"]
    whens = [stage["when"] for stage in planned_["stages"]]
    assert whens[1] == "loss plateau evals=2 min_delta=9.0" and whens[3] == "tokens_per_second above 1"
    assert whens[5] == "max_wait_iters 5 or grad_norm below 99"
    unknown = [{"name": "stop", "trigger": {"metric": "machine.device_memory", "above": 1}}]
    _, text = planned(tmp_path, data, unknown, capsys, "--plan", f"--against={out}")
    assert "not by iteration 8" in text and f"{out} has no values of machine.device_memory" in text


@pytest.mark.parametrize(
    ("on_error", "third"), [("skip", "8: iteration 8 (at_iter 8)"), ("stop", "not by iteration 0: the run stops there")]
)
def test_against_a_run_tells_of_an_entry_that_comes_in_an_order_that_fails(
    data, tmp_path, capsys, tiny, on_error, third
):
    """There is no mlp.3 before the layers are stacked, which the order of the latest times has first."""
    _, out = tiny(max_iters=9)
    freeze = {"name": "freeze_layer", "value": "mlp.3", "trigger_loss": 99.0, "on_error": on_error}
    grow = [{"name": "stack_layers", "value": {"n_layer": 4}, "at_iter": 5}, {"name": "stop", "at_iter": 8}]
    schedule = {"tracks": {"a": [freeze], "b": grow}}
    code, text = planned(tmp_path, data, schedule, capsys, "--plan=json", f"--against={out}")
    against = json.loads(text)["against"]
    assert code == 0 and against["1"].startswith("0: fails: no layer is called 'mlp.3'") and against["3"] == third


def test_against_needs_a_run_and_a_plan(data, tmp_path, capsys):
    with pytest.raises(Refused, match="cannot be read"):
        planned(tmp_path, data, [], capsys, "--plan", f"--against={tmp_path / 'nowhere'}")
    with pytest.raises(Refused, match="give --plan too"):
        planned(tmp_path, data, [], capsys, f"--against={tmp_path}")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval"}\n')
    with pytest.raises(Refused, match="metrics.jsonl:1: not a line of metrics"):
        planned(tmp_path, data, [], capsys, "--plan", f"--against={tmp_path}")


def test_124m_to_1_5b_is_planned_within_2_gib(tmp_path):
    """On the meta device: the largest stage alone would need 6 GB of weights."""
    for name in ("train.bin", "val.bin"):
        np.zeros(2000, dtype=np.uint16).tofile(tmp_path / name)
    (tmp_path / "s.yaml").write_text(
        "- {name: stack_layers, value: {n_layer: 24, how: cycle}}\n"
        "- {name: widen_embd, value: 1536}\n"
        "- {name: widen_mlp, value: 6144}\n"
        "- {name: stack_layers, value: {n_layer: 48}, over: 500}\n"
    )
    script = (
        "import resource, sys; sys.argv = ['x']; import train_orchestrated as t;"
        f"code = t.run(['config/train_gpt2.py', '--dataset={tmp_path}', '--schedule={tmp_path / 's.yaml'}',"
        "'--plan=json']);"
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    code, kilobytes = map(int, done.stderr.split())
    assert code == 0 and kilobytes < 2 * 2**20
    stages = json.loads(done.stdout)["stages"]
    assert stages[0]["parameters"] == 124_373_760 and stages[-1]["parameters"] == 1_437_943_296


def test_a_context_longer_than_the_data_is_refused_before_training(tiny, data, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps([{"name": "extend_context", "value": 4096, "at_iter": 9}]))
    schedule = json.loads((tmp_path / "s.json").read_text())
    with pytest.raises(Refused, match=r"entry 1: extend_context 4096: .*val.bin: \d+ tokens are too few"):
        tiny(schedule)
    given = arguments(data, tmp_path / "run", schedule=tmp_path / "s.json")
    with pytest.raises(Refused, match="too few for block_size 4096"):
        train_orchestrated.main([*given, "--plan"])


def test_the_deepest_model_is_planned_in_seconds(data, tmp_path, capsys, monkeypatch):
    """4096 layers: the model is made once, on meta, without torch's initial values (of processor time, 10 s)."""
    from orchestrate.training.schedule import stages

    made = []

    class Counted(stages.GPT):
        def __init__(self, config):
            made.append(config.n_layer)
            super().__init__(config)

    monkeypatch.setattr(stages, "GPT", Counted)
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", None)
    started = time.process_time()
    code, _ = planned(tmp_path, data, [{"name": "set_lr", "value": 1e-3}], capsys, "--plan=json", n_layer=4096)
    assert code == 0 and made == [4096] and time.process_time() - started < 10


LANGUAGE = {
    "tracks": {
        "rate": [{"name": "change_lr", "value": 0.5, "trigger_loss": 9.0, "repeat": 2}],
        "model": [
            {"name": "set_dropout", "value": 0.1, "at_iter": 3, "label": "drops"},
            {"name": "stop", "all_of": [{"at_iter": 8}, {"trigger_loss": 9.0}]},
        ],
    },
    "operations": [
        {"name": "set_grad_clip", "value": 0.5, "after": "drops", "max_wait_iters": 2},
        {"name": "set_weight_decay", "value": 0.0, "max_wait_iters": 1,
         "repeat": {"times": 3, "until": {"metric": "loss", "below": 99.0}}},
    ],
}  # fmt: skip


def test_a_plan_of_tracks_and_rounds(data, tmp_path, capsys):
    code, out = planned(tmp_path, data, LANGUAGE, capsys, "--plan=json")
    found = json.loads(out)
    stages = found["stages"]
    assert code == 0 and [(s["track"], s["entry"], s["round"], s["rounds"]) for s in stages] == [
        ("", None, 1, 1), ("model", 2, 1, 1), ("", 4, 1, 1), ("", 5, 1, 3), ("", 5, 2, 3), ("", 5, 3, 3),
        ("rate", 1, 1, 2), ("rate", 1, 2, 2), ("model", 3, 1, 1),
    ]  # fmt: skip
    whens = [stage["when"] for stage in stages]
    assert whens[2] == "after drops: max_wait_iters 2" and whens[8] == "(at_iter 8 and trigger_loss 9)"
    assert whens[3:5] == ["max_wait_iters 1", "max_wait_iters 1, not once loss below 99"]
    assert found["notes"][-2].startswith("the tracks go side by side")
    assert found["notes"][-1] == "entries [5]: all their rounds are shown, and `until` may end them before"
    _, table = planned(tmp_path, data, LANGUAGE, capsys, "--plan")
    head, _, *lines = table.splitlines()
    assert head.split()[:3] == ["entry", "track", "operation"] and lines[0].split()[:3] == ["2", "model", "set_dropout"]
    assert lines[3].startswith("5 (round 2 of 3)") and "8 entries, no errors" in table
    _, plain = planned(tmp_path, data, [{"name": "stop"}], capsys, "--plan")
    assert "track" not in plain


SAID = {
    "tracks": {
        "a track with quite a long name": [
            {"name": "stack_layers", "value": {"n_layer": 4, "how": "cycle", "where": "interleave"}, "label": "deeper",
             "trigger_loss": 2.5, "max_wait_iters": 500, "reevaluate": True, "on_error": "skip",
             "guard": {"max_increase": 0.1, "within_iters": 60, "then": "keep"}},
            {"name": "freeze_layer", "value": ["block.0", "block.1"], "after": "deeper", "max_wait_iters": 20},
            {"name": "set_grad_accum", "value": 8, "over": 10, "style": "power", "exponent": 0.5},
        ],
        "rate": [{"name": "change_lr", "value": 0.5, "trigger_plateau": {"evals": 3}, "repeat": 2}],
    }
}  # fmt: skip


def test_the_table_fits_100_columns_and_says_all_of_each_entry(data, tmp_path, capsys, tiny):
    _, text = planned(tmp_path, data, SAID, capsys, "--plan")
    lines = text.splitlines()
    stages, details = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert max(map(len, (line for line in lines if not line.startswith(("note: ", "warning: "))))) == 100
    assert stages[0].split() == "entry track operation layers width parameters trainable tokens/iter".split()
    assert [line.split()[-1] for line in stages[1:5]] == ["128", "13,056", "6,848", "512"]
    assert stages[2].split()[-3:] == ["4", "13,056", "13,056"], "what is as in the stage before is left out"
    assert stages[5].startswith("4 (round 1 of 2)") and stages[5].endswith("change_lr 0.5"), "nothing else differs"
    said = " ".join(" ".join(details).split())
    for part in (
        'stack_layers {"n_layer": 4, "how": "cycle", "where": "interleave"}: trigger_loss 2.5 or max_wait_iters 500; '
        "guard val_loss +0.1 within 60 iterations, else keep; reevaluate; on_error skip; label deeper model.n_layer "
        "2 -> 4, model.n_hidden [64, 64] -> [4 x 64]",
        "function CHANGES 2 freeze_layer",
        "after deeper: max_wait_iters 20 block.0-1 frozen",
        "set_grad_accum 8: at once; over 10 iterations (power 0.5) grad_accum 2 -> 8",
    ):
        assert part in said, part
    assert said.startswith(
        "start MFLOP/token 0.0; model 54.8 KB; optimizer 54.8 KB; activations* 165.1 KB 1 stack_layers"
    )
    assert "iterations (power 0.5) grad_accum 2 -> 8 4 (round 1 of 2)" in said, "costs as before are left out"
    assert "on_error stop" not in said and "reshapes_asked" not in said
    _, wide = planned(tmp_path, data, SAID, capsys, "--plan", "--wide")
    rows = wide.splitlines()
    assert rows[0].split("activations*")[1].split() == "re-wraps recompiles* function entry says changes".split()
    assert rows[5].endswith("learning_rate 0.01 -> 0.005, min_lr 0.001 -> 0.0005") and " 6,848 " in rows[5]
    assert len(wide.splitlines()) == 1 + 6 + 2 + sum(line.startswith(("note: ", "warning: ")) for line in rows)
    code, out = tiny(SAID, max_iters=6)
    assert code == 0
    _, text = planned(tmp_path, data, SAID, capsys, "--plan", f"--against={out}")
    assert "label deeper; fires at* not by iteration 6" in " ".join(text.split())
    _, wide = planned(tmp_path, data, SAID, capsys, "--plan", "--wide", f"--against={out}")
    assert wide.split("layers")[0].split()[-1] == "at*" and "fires at* not by" not in wide


def test_colour_is_for_terminals_and_marks_what_differs(data, tmp_path, capsys, monkeypatch):
    _, plain = planned(tmp_path, data, SAID, capsys, "--plan")
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, coloured = planned(tmp_path, data, SAID, capsys, "--plan")
    assert "\x1b" not in plain and "\x1b[1m    13,056\x1b[0m" in coloured and "\x1b[1mblock.0-1 frozen" in coloured
    assert "\x1b[1;33mwarning: " in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).split() == plain.split()
    _, wide = planned(tmp_path, data, SAID, capsys, "--plan", "--wide")
    assert "\x1b[2m    13,056\x1b[0m" in wide, "dim where it is as before"


def test_a_long_value_is_cut_in_tables_and_whole_in_json(data, tmp_path, capsys):
    shrinks = {"name": "resize_vocabulary", "value": {"size": 2, "map": [0, 1] * 200}}
    schedule = [{"name": "resize_vocabulary", "value": 400}, shrinks]
    _, text = planned(tmp_path, data, schedule, capsys, "--plan", "--wide")
    assert "0, 1, 0, 1" in text and "..." in text and max(map(len, text.splitlines())) < 900
    _, text = planned(tmp_path, data, schedule, capsys, "--plan=json")
    assert text.count("0, 1, 0, 1") > 50


def test_wide_is_a_form_of_the_table(data, tmp_path, capsys):
    for options in (["--wide"], ["--wide", "--plan=json"]):
        with pytest.raises(Refused, match="--wide is a form of the table"):
            planned(tmp_path, data, [], capsys, *options)


def copy_of(data, tmp_path, **meta):
    shutil.copytree(data, tmp_path / "copy")
    path = tmp_path / "copy" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **meta}))
    return tmp_path / "copy"


def without_tokens(data, tmp_path):
    folder = copy_of(data, tmp_path)
    (folder / "val.bin").unlink()
    return folder


def with_broken_meta(data, tmp_path):
    folder = copy_of(data, tmp_path)
    (folder / "meta.json").write_text('{"vocab_size": ')
    return folder


@pytest.mark.parametrize(
    ("made", "keys", "expected"),
    [
        (lambda data, tmp_path: tmp_path / "nothere", {}, "dataset .*nothere: no train.bin and val.bin"),
        (without_tokens, {}, "dataset .*copy: no train.bin and val.bin"),
        (with_broken_meta, {}, "meta.json: not JSON"),
        (lambda data, tmp_path: copy_of(data, tmp_path, vocab_size="many"), {}, "meta.json: vocab_size must be"),
        (lambda data, tmp_path: copy_of(data, tmp_path, vocab_size=5), {}, "token id 22 is beyond .* vocabulary of 5"),
        (lambda data, tmp_path: data, {"device": "cuda"}, "device: got 'cuda', but .* sees no CUDA device here"),
        (lambda data, tmp_path: data, {"device": "tpu"}, "device: got 'tpu', allowed: auto, cpu"),
        (lambda data, tmp_path: data, {"eval_mixture": "{'other': 1}"}, "other"),
    ],
)
def test_what_cannot_start_is_an_error_of_the_plan(data, tmp_path, capsys, monkeypatch, made, keys, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refused, match=expected):
        train_orchestrated.main([*arguments(made(data, tmp_path), tmp_path / "none", **keys), "--plan"])
    assert not (tmp_path / "none").exists()


def test_a_data_set_that_an_entry_asks_for_is_there(data, tmp_path, capsys):
    with pytest.raises(Refused, match="entry 1: set_dataset .*nothere.*no train.bin"):
        planned(tmp_path, data, [{"name": "set_dataset", "value": str(tmp_path / "nothere")}], capsys, "--plan")


def test_a_plan_says_that_its_out_dir_is_taken(data, tmp_path, capsys, tiny):
    _, out = tiny([], max_iters=1)
    capsys.readouterr()
    assert train_orchestrated.main([*arguments(data, out), "--plan"]) == 0
    assert "note: a start is refused as it is: out_dir" in capsys.readouterr().out
    assert train_orchestrated.main(["--init_from=resume", f"--out_dir={out}", "--plan"]) == 0
    assert "refused" not in capsys.readouterr().out


def test_against_a_run_says_when_each_round_of_each_track_fired(data, tmp_path, capsys, tiny):
    code, out = tiny(LANGUAGE, max_iters=12)
    assert code == 0
    fired = {(e["entry"], e.get("round")): f"{e['iter']}: {e['reason']}" for e in events(out, "operation")}
    assert [(at.split(":")[0], *key) for key, at in fired.items()] == [
        ("0", 1, 1), ("0", 1, 2), ("3", 2, None), ("5", 4, None), ("6", 5, 1), ("8", 3, None),
    ]  # fmt: skip
    _, text = planned(tmp_path, data, LANGUAGE, capsys, "--plan=json", "--against", str(out))
    named = {f"{n} (round {r} of {2 if n == 1 else 3})" if r else str(n): at for (n, r), at in fired.items()}
    ended = dict.fromkeys(["5 (round 2 of 3)", "5 (round 3 of 3)"], "not at all: its repetition ends before")
    assert json.loads(text)["against"] == {**named, **ended}
    _, table = planned(tmp_path, data, LANGUAGE, capsys, "--plan", "--against", str(out))
    assert "its repetition ends before" in table


def test_a_plan_of_a_resume_goes_on_where_the_tracks_stand(data, tmp_path, capsys, tiny):
    code, out = tiny(LANGUAGE, max_iters=5)
    assert code == 0
    capsys.readouterr()
    given = ["--init_from=resume", f"--out_dir={out}", "--plan=json", f"--against={out}"]
    assert train_orchestrated.main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(s["entry"], s["round"]) for s in found["stages"]][1:] == [(5, 1), (5, 2), (5, 3), (3, 1)]
    assert "4 entries have fired" in found["notes"][0]


def warned(tmp_path, data, schedule, capsys, **keys) -> list[str]:
    code, out = planned(tmp_path, data, schedule, capsys, "--plan=json", **keys)
    assert code == 0
    return [warning.split(": entry ")[-1] for warning in json.loads(out)["warnings"]]


def test_what_can_hardly_be_meant_is_a_warning(data, tmp_path, capsys):
    def clip(value=0.5, **fields):
        return {"name": "set_grad_clip", "value": value, **fields}

    def found(*schedule, **keys):
        return warned(tmp_path, data, list(schedule), capsys, **{"max_iters": 12, **keys})

    assert found(clip(at_iter=12), clip(0.6, trigger_loss=1.0), clip(0.7, max_wait_iters=5, trigger_loss=0.1)) == []
    assert found(clip(at_iter=13), {"name": "stop"}) == [
        "1: set_grad_clip 0.5: not before iteration 13, and the run ends at 12 (max_iters)",
        "2: stop: not before iteration 13, and the run ends at 12 (max_iters)",
    ]
    assert [text[:1] for text in found(clip(max_wait_iters=7), clip(0.6, max_wait_iters=6))] == ["2"]
    assert found(clip(max_wait_iters=6), clip(0.6, max_wait_iters=6), clip(0.7, at_iter=3, at_tokens=10**9)) == []
    assert found(clip(at_iter=9), clip(0.6, at_iter=8)) == [
        "2: set_grad_clip 0.6: at_iter 8 is over when the entry before it that waits for iteration 9 has fired: it "
        "fires at once then"
    ]
    assert found(clip(at_iter=8), clip(0.6, at_iter=8)) == []
    assert found({"name": "change_lr", "value": 0.5, "at_iter": 3, "repeat": 3}) == [
        "1 (round 2 of 3): change_lr 0.5: at_iter 3 is over in every round but the first"
    ]
    assert found(clip(label="x"), clip(0.6, at_iter=9), clip(0.7, after="x", max_wait_iters=5)) == []
    assert len(found(clip(label="x"), clip(0.6, at_iter=9), clip(0.7, max_wait_iters=5))) == 1
    assert (
        found({**clip(max_wait_iters=7), "repeat": 2}, clip(0.6))
        == [
            "1 (round 2 of 2): set_grad_clip 0.5: changes nothing: what it asks for is in force by then",
            "2: set_grad_clip 0.6: not before iteration 14, and the run ends at 12 (max_iters)",
        ][::-1]
    )
    until = {"times": 3, "until": {"metric": "loss", "below": 1.0}}
    assert all("round" in text for text in found({**clip(max_wait_iters=6), "repeat": until}, clip(0.6)))
    both = [{"at_iter": 20}, {"trigger_loss": 1.0}]
    assert [text[:1] for text in found(clip(all_of=both), clip(0.6, at_iter=20, trigger_loss=3.0))] == ["1", "2"]
    assert found({"name": "unfreeze_layer", "value": "mlp.0"}) == [
        '1: unfreeze_layer "mlp.0": changes nothing: what it asks for is in force by then'
    ]
    assert found({"name": "adjust_batch_size", "value": 0.5}) == []
    ramp = clip(2.0, at_iter=1, over=5)
    assert found(ramp, clip(0.6, max_wait_iters=5)) == []
    assert found(ramp, {"name": "set_dropout", "value": 0.1}, clip(0.6, max_wait_iters=4)) == [
        "1: set_grad_clip 2.0: moves over 5 iterations, and entry 3 takes grad_clip over after 4 at the latest"
    ]
    assert found(ramp, clip(0.6, trigger_loss=1.0)) == []
    often = {"name": "change_lr", "value": 0.9, "max_wait_iters": 2, "over": 3, "repeat": 4}
    (once,) = found(often)
    assert once.startswith("1 (round 1 of 4): change_lr 0.9: moves over 3 iterations, and entry 1 (round 2 of 4) takes")
    (once,) = found({**clip(), "repeat": 4})
    assert once.startswith("1 (round 2 of 4): set_grad_clip 0.5: changes nothing")
    assert warned(tmp_path, data, {"tracks": {"a": [ramp], "b": [clip(0.6, at_iter=2)]}}, capsys) == []
    (nothing,) = found()
    assert nothing.endswith("s.json: the schedule has no entries")
    _, table = planned(tmp_path, data, [clip(at_iter=99)], capsys, "--plan")
    assert "\nwarning: " in table and "not before iteration 99" in table
