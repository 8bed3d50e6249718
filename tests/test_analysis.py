"""Analyses: numbers by hand and by oracles, the run the same to the bit with and without, and metrics that decide."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, assert_same_tensors, events, lines, on_ranks, sources, tensors
from test_metrics import clip, on
from test_sample_prompts import _runs

import train_orchestrated
from orchestrate.data.files import packed
from orchestrate.model.config import LoraSpec, ModelConfig
from orchestrate.model.gpt import GPT, init_weights
from orchestrate.training.report.data import read_story
from orchestrate.training.report.drawing import panels
from orchestrate.training.run import analysis
from orchestrate.training.run.analysis import (
    NoiseScale,
    attention_entropy,
    effective_rank,
    isotropy,
    mean_cosine,
    noise_estimates,
    sketch,
    weight_values,
)
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.run import Run
from orchestrate.training.session.start import model_config_from, settings_from
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.metrics import ANALYSED
from orchestrate.training.settings.records import Progress
from orchestrate.training.store import checkpoint


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- numbers of tensors


def test_effective_rank_of_matrices_with_known_singular_values():
    q, _ = torch.linalg.qr(normal(9, 9))
    u, _ = torch.linalg.qr(normal(30, 9, seed=1))
    equal = torch.tensor([2.0] * 5 + [0.0] * 4, dtype=torch.float64)
    assert effective_rank((u * equal) @ q) == pytest.approx(5, rel=1e-6)
    assert effective_rank(((u * equal) @ q).T.float()) == pytest.approx(5, rel=1e-3)
    # Three quarters and a quarter: exp(3/4 log(4/3) + 1/4 log 4).
    two = torch.tensor([3.0, 1.0] + [0.0] * 7, dtype=torch.float64)
    assert effective_rank((u * two) @ q) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert effective_rank(torch.zeros(3, 4)) == 0.0 and effective_rank(torch.ones(7, 4)) == pytest.approx(1, rel=1e-5)


def test_a_large_matrix_is_projected(monkeypatch):
    monkeypatch.setattr(analysis, "LARGEST", 40)
    of_rank_3 = normal(60, 3) @ normal(3, 300, seed=1)
    small = effective_rank(of_rank_3)
    assert 20 < effective_rank(normal(60, 300)) <= 40 == pytest.approx(effective_rank(torch.eye(40)))
    assert effective_rank(normal(60, 300)) == effective_rank(normal(60, 300))
    monkeypatch.setattr(analysis, "LARGEST", 1024)
    assert 1 < small <= 3.001 and small == pytest.approx(effective_rank(of_rank_3), rel=0.15)


def test_embedding_geometry_by_hand():
    assert mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 5.0], [-2.0, 0.0]])) == pytest.approx(-1 / 3)
    assert mean_cosine(torch.tensor([[1.0, 2.0], [2.0, 4.0]])) == pytest.approx(1)
    assert mean_cosine(torch.ones(1, 3)) == 1.0
    # Along the axes Z is 2 cosh(a) + 2 and 2 cosh(b) + 2.
    rows = torch.tensor([[1.5, 0.0], [-1.5, 0.0], [0.0, 0.5], [0.0, -0.5]])
    wanted = (2 * math.cosh(0.5) + 2) / (2 * math.cosh(1.5) + 2)
    assert isotropy(rows) == pytest.approx(wanted)
    # Not symmetric: both ways count, so the sign that a solver gives an eigenvector does not.
    assert isotropy(torch.tensor([[1.0], [2.0]])) == pytest.approx(
        (math.exp(-1) + math.exp(-2)) / (math.exp(1) + math.exp(2))
    )
    assert isotropy(torch.tensor([[800.0], [-800.0]])) == pytest.approx(1), "nothing overflows"


def test_isotropy_of_many_columns(monkeypatch):
    monkeypatch.setattr(analysis, "LARGEST", 16)
    assert isotropy(0.1 * normal(500, 20)) > 0.8 > 0.2 > isotropy(0.1 * normal(500, 20) + 1)


def test_attention_entropy():
    q, k = torch.zeros(2, 4, 5, 3), normal(2, 2, 5, 3).float()
    assert attention_entropy(q, k) == pytest.approx(math.log(5), rel=1e-6)
    causal = sum(math.log(n) for n in range(1, 6)) / 5
    assert attention_entropy(q, k, causal=True) == pytest.approx(causal, rel=1e-6)
    seen = torch.eye(5).bool() | torch.eye(5).bool().roll(1, 1)
    assert attention_entropy(q, k, seen) == pytest.approx(math.log(2), rel=1e-6)
    added = torch.zeros(2, 1, 5, 5).masked_fill(~seen, -torch.inf)
    assert attention_entropy(q, k, added) == pytest.approx(math.log(2), rel=1e-6)
    # Scores 3 and 0 after the division by the root of the head size, in every other head as in its group.
    q, k = torch.full((1, 2, 2, 4), 1.0), torch.zeros(1, 1, 2, 4)
    k[0, 0, 1] = 1.5
    p = math.exp(3) / (1 + math.exp(3))
    assert attention_entropy(q, k) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-5)


def test_attention_entropy_of_long_sequences_is_of_some_queries():
    q, k = torch.zeros(1, 1, 505, 2), normal(1, 1, 505, 2).float()
    places = [8 * n for n in range(64)]
    wanted = sum(math.log(place + 1) for place in places) / 64
    assert attention_entropy(q, k, causal=True) == pytest.approx(wanted, rel=1e-6)
    seen = (torch.arange(505) <= torch.arange(505)[:, None])[None]
    assert attention_entropy(q, k, seen) == pytest.approx(wanted, rel=1e-6)


def test_a_sketch_keeps_distances():
    weights = {"a": normal(400, 1024), "b": normal(77, 13, seed=1), "c": normal(5, seed=2)}
    moved = {name: value + 0.01 * normal(*value.shape, seed=9) for name, value in weights.items()}
    ratio = float((sketch(moved) - sketch(weights)).norm() / sketch(weights).norm())
    assert ratio == pytest.approx(0.01, rel=0.12)
    one = {**weights, "a": weights["a"].clone()}
    one["a"][:, 5] += 1  # one column: what a table of hashes by column would put into one sum
    assert float((sketch(one) - sketch(weights)).norm()) == pytest.approx(20, rel=0.12)
    assert float((sketch({"a": weights["c"]}) - sketch({"b": weights["c"]})).norm()) > 0, "each name has its own signs"


# ---------------------------------------------------------------------------------------------- the noise


def test_noise_estimates_by_hand():
    """|G|^2 = 3 and tr(Sigma) = 40 give squared norms of 3 + 40/4 and 3 + 40/20."""
    assert noise_estimates(13.0, 4, 5.0, 20) == pytest.approx((3, 40))


def test_noise_estimates_are_unbiased():
    """Gradients drawn with a known mean and variance."""
    true, sigma, generator = torch.linspace(-1, 1, 50), 3.0, torch.Generator().manual_seed(3)
    tokens = true + sigma * torch.randn(4000, 24, 50, generator=generator)
    big, small = (tokens[:, :n].mean(1).square().sum(1) for n in (24, 6))
    squared, trace = noise_estimates(small, 6, big, 24)
    for found, wanted in ((squared, float(true.square().sum())), (trace, 50 * sigma**2)):
        error = float(found.std()) / math.sqrt(len(found))
        assert abs(float(found.mean()) - wanted) < 4 * error < 0.1 * wanted


def run_of(data, ranks=None, **keys) -> Run:
    config = TrainConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 3,
                            "gradient_accumulation_steps": 4, "device": "cpu", "compile": False, "decay_lr": False,
                            "learning_rate": 0.01, "analyze_interval": 5, **keys})  # fmt: skip
    shape = model_config_from(config, 29)
    model, settings = GPT(shape), settings_from(config, shape)
    init_weights(model, 1)
    return Run(config, settings, Progress.start(settings), model, sources(data), ranks or Ranks("cpu"),
               torch.device("cpu"))  # fmt: skip


def by_hand(run: Run, world_size: int, together: bool = False) -> tuple[float, float]:
    """Estimates from the next batch, from gradients of single micro-steps computed apart.

    Args:
        together: the first micro-steps of the ranks count as one.
    """
    s, cursor = run.settings, run.progress.cursor
    names = run.optimizer.names
    sums, counts = [], []
    for micro in range(s.grad_accum):
        batch = run.batches.load(cursor.skip(micro * s.batch_size), s.batch_size)
        loss = run.model(batch.x, batch.y).sum
        parameters = dict(run.model.named_parameters())
        sums.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [parameters[n] for n in names])]))
        counts.append(int((batch.y != -1).sum()))
    big = float((sum(sums) / sum(counts)).square().sum())
    first = list(zip(sums, counts, strict=True))[:world_size]
    if together:
        first = [(sum(g for g, _ in first), sum(n for _, n in first))]
    pairs = [noise_estimates(float((g / n).square().sum()), n, big, sum(counts)) for g, n in first]
    return tuple(np.mean(pairs, axis=0))


@pytest.fixture(scope="module")
def masked(data, tmp_path_factory):
    """The same text; three of four targets count, in stretches."""
    folder = tmp_path_factory.mktemp("masked") / "tiny"
    shutil.copytree(data, folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "masks": ["train", "val"]}))
    for split in ("train", "val"):
        size = (folder / f"{split}.bin").stat().st_size // 2
        (folder / f"{split}.mask.bin").write_bytes(packed(np.arange(size) % 97 > 24))
    return folder


def test_a_step_sees_its_first_micro_step(data):
    run = run_of(data, grad_clip=0.01)
    wanted = by_hand(run, 1)
    run.step()
    squared, trace, weight = run.noise.values()
    assert weight == pytest.approx(0.01) and (squared / weight, trace / weight) == pytest.approx(wanted, rel=1e-4)
    again = by_hand(run, 1)
    run.step()
    after = run.noise.values()
    assert after[1] == pytest.approx(0.99 * trace + 0.01 * again[1], rel=1e-4) and after[2] == pytest.approx(0.0199)


def test_frozen_parameters_and_adapters_have_no_part(data):
    for keys in ({"frozen_layers": "wte,mlp.*"}, {"attn_lora_rank": 2}):
        run = run_of(data, **keys)
        wanted = by_hand(run, 1)
        run.step()
        squared, trace, weight = run.noise.values()
        assert (squared / weight, trace / weight) == pytest.approx(wanted, rel=1e-4)


def test_targets_that_do_not_count_are_no_tokens(masked):
    run = run_of(masked)
    wanted = by_hand(run, 1)
    run.step()
    squared, trace, weight = run.noise.values()
    assert (squared / weight, trace / weight) == pytest.approx(wanted, rel=1e-4)


def test_a_sick_step_tells_nothing(data):
    run = run_of(data)
    run.step()
    before = run.noise.values()
    with torch.no_grad():
        run.model.transformer["ln_f"].weight[0] = math.nan
    run.step(near=True)
    assert run.noise.values() == before and not run.near.healthy


@pytest.mark.parametrize("sums", [(0.0, 0.5, 0.1), (-0.1, 0.5, 0.1), (0.5, -0.1, 0.1), (0.0, 0.0, 0.0)])
def test_there_is_no_noise_scale_while_an_estimate_is_not_positive(data, sums):
    run = run_of(data)
    run.noise = NoiseScale(run.device, sums)
    found = analysis.Analysis()
    analysis._of_noise(run, found)
    assert not found.values and ("no step" if not any(sums) else "hides") in found.absent["grad_noise_scale"]
    run.noise = NoiseScale(run.device, (0.5, 192.0, 0.1))
    analysis._of_noise(run, found)
    assert found.values == {"grad_noise_scale": 384.0, "grad_noise_ratio": 2.0}, "3 sequences of 16 tokens, 4 times"


def test_a_scaled_loss_makes_no_difference(data):
    run = run_of(data)
    wanted = by_hand(run, 1)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run.step()
    squared, trace, weight = run.noise.values()
    assert (squared / weight, trace / weight) == pytest.approx(wanted, rel=1e-3)


def test_why_there_is_no_noise_scale():
    def why(grad_accum: int, world_size: int = 1, sharded: bool = False) -> str:
        ranks = SimpleNamespace(world_size=world_size, sharded=sharded)
        return NoiseScale.why_not(SimpleNamespace(settings=SimpleNamespace(grad_accum=grad_accum), ranks=ranks))

    assert "needs grad_accum 2" in why(1) and "grad_accum 4" in why(2, 2, True)
    assert why(2) == why(2, 2) == why(4, 2, True) == ""


# ---------------------------------------------------------------------------------------------- of a run


def test_gradients_and_updates_of_layers(data):
    run = run_of(data, frozen_layers="mlp.0", grad_clip=0.01)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.step(near=True)
    found = analysis.analyze(run)
    norms, ratios = found.by_layer["grad_norm_by_layer"], found.by_layer["update_ratio_by_layer"]
    assert list(norms) == list(ratios) == ["wte", "wpe", "attn.0", "attn.1", "mlp.1"]
    moved, size = [], []
    for layer in norms:
        path = {"wte": "transformer.wte.", "wpe": "transformer.wpe."}.get(layer)
        path = path or f"transformer.h.{layer[-1]}.{layer[:-2]}."
        own = [(p.detach() - before[n], before[n]) for n, p in run.model.named_parameters() if n.startswith(path)]
        moved.append(sum(float(d.square().sum()) for d, _ in own))
        size.append(sum(float(b.square().sum()) for _, b in own))
        assert ratios[layer] == pytest.approx(math.sqrt(moved[-1] / size[-1]), rel=1e-4)
    assert found.values["update_ratio"] == pytest.approx(math.sqrt(sum(moved) / sum(size)), rel=1e-4)
    other = run_of(data, frozen_layers="mlp.0", grad_clip=0.0, learning_rate=0.0)
    norm = float(other.step(near=True).grad_norm)
    vectors = [p for p in other.optimizer.parameters if p.dim() < 2]
    together = math.sqrt(sum(value**2 for value in norms.values()))
    assert vectors and 0.5 * norm < together < norm, "before clipping, and of matrices"
    assert set(analysis.analyze(run).absent) == {"update_ratio"}, "once a step"


def test_drift_is_from_one_analysis_to_the_next(data):
    run = run_of(data)
    assert set(analysis.analyze(run).absent) == {"drift", "grad_noise_scale", "update_ratio"}
    before = [p.detach().clone() for p in run.model.parameters()]
    for _ in range(5):
        run.step()
    moved = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(run.model.parameters(), before, strict=True))
    )
    wanted = moved / math.sqrt(sum(float(b.square().sum()) for b in before))
    assert analysis.analyze(run).values["drift"] == pytest.approx(wanted, rel=0.15)
    assert analysis.analyze(run).values["drift"] == 0.0
    run.progress.sketch_of = "other"
    assert "other weights" in analysis.analyze(run).absent["drift"]


def test_ranks_are_of_what_computes():
    """q, k and v apart; an adapter counts as if merged; and no weight is touched."""
    shape = ModelConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8,
                        lora={"attn.0": LoraSpec(2, 4.0), "wte": LoraSpec(1, 1.0)})  # fmt: skip
    model = GPT(shape)
    init_weights(model, 3)
    parameters = dict(model.named_parameters())
    path = "transformer.h.0.attn.c_attn"
    with torch.no_grad():
        parameters[f"{path}.base_layer.weight"].zero_()
        for name in ("A", "B"):
            parameters[f"{path}.lora_{name}.default.weight"].copy_(
                normal(*parameters[f"{path}.lora_{name}.default.weight"].shape).float()
            )
        parameters["transformer.h.0.attn.c_proj.base_layer.weight"].copy_(torch.eye(8))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    found = weight_values(model)
    delta = parameters[f"{path}.lora_B.default.weight"] @ parameters[f"{path}.lora_A.default.weight"]
    wanted = [effective_rank(delta[8 * n : 8 * n + 8]) for n in range(3)] + [8.0]
    assert found["rank/attn"] == pytest.approx(sum(wanted) / 4, rel=1e-3) and max(wanted[:3]) <= 2.001
    mlp = [effective_rank(parameters[f"transformer.h.0.mlp.{m}.weight"]) for m in ("c_fc", "c_proj")]
    assert found["rank/mlp"] == pytest.approx(sum(mlp) / 2)
    assert_same_tensors(dict(model.named_parameters()), before)


def test_entropy_of_a_run_by_an_oracle(data):
    run = run_of(data, n_layer=3)
    with torch.no_grad():
        for block in run.model.transformer["h"]:
            block.attn.c_attn.weight[:16] = 0  # queries of zeros look at all alike
    wanted = sum(math.log(n) for n in range(1, 17)) / 16
    assert run.model.training
    assert analysis.analyze(run).values["attention_entropy"] == pytest.approx(wanted, rel=1e-5)
    assert run.model.training


# ---------------------------------------------------------------------------------------------- not disturbing


def losses(out) -> list[tuple]:
    return [(m["kind"], m["iter"], m.get("loss", m.get("val_loss"))) for m in lines(out / "metrics.jsonl")]


def analysed(out) -> dict[int, dict[str, float]]:
    return {m["iter"]: {name: m[name] for name in ANALYSED if name in m} for m in lines(out / "metrics.jsonl")
            if m["kind"] == "eval" and "rank/attn" in m}  # fmt: skip


def test_the_run_is_the_same_to_the_bit_also_over_a_resume(data, tiny, resume, capsys):
    keys = dict(dropout=0.1, gradient_accumulation_steps=3, max_iters=20)
    assert tiny(out="with", analyze_interval=6, **keys)[0] == 0
    shown = capsys.readouterr().out
    assert tiny(out="without", **keys)[0] == 0
    out, other, cut = (tiny.folder(name) for name in ("with", "without", "cut"))
    assert_same_tensors(tensors(out), tensors(other))
    assert losses(out) == losses(other) and not analysed(other)
    found = analysed(out)
    assert list(found) == [0, 8, 12, 20], "the first evaluation in each 6 iterations, and the last"
    assert set(found[0]) == set(ANALYSED) - {"drift", "update_ratio", "grad_noise_scale", "grad_noise_ratio"}
    late = set(ANALYSED) - {"grad_noise_scale", "grad_noise_ratio"}
    assert all(late <= set(found[i]) for i in (8, 12, 20)) and re.search(r"step 8: rank/attn \d", shown)
    line = next(m for m in lines(out / "metrics.jsonl") if m["kind"] == "eval" and m["iter"] == 8)
    assert set(line["grad_norm_by_layer"]) == {"wte", "wpe", "attn.0", "attn.1", "mlp.0", "mlp.1"}

    # Killed between two evaluations: what is measured afterwards is what would have been.
    given = arguments(data, cut, analyze_interval=6, save_interval=3, inject="kill@10", **keys)
    assert subprocess.run([sys.executable, ROOT / "train_orchestrated.py", *given], timeout=120).returncode == -9
    assert resume(cut) == 0 and events(cut, "resume")[0]["iter"] == 9
    assert_same_tensors(tensors(out), tensors(cut))
    assert analysed(cut) == found

    # A signal cuts the evaluation at 12 short: the start after it knows nothing of the step before.
    assert tiny(out="cut2", analyze_interval=6, inject="term@11", **keys)[0] == 143
    capsys.readouterr()
    assert resume(tiny.folder("cut2")) == 0
    shown = capsys.readouterr().out
    assert "update_ratio has no value: no healthy step has been looked at right before this evaluation" in shown
    assert_same_tensors(tensors(out), tensors(tiny.folder("cut2")))
    del found[12]["update_ratio"]
    assert analysed(tiny.folder("cut2")) == found


def test_a_growth_and_a_rollback(tiny):
    """Where the model has other weights there is no drift; what a rollback takes back, it takes back of this too."""
    guard = {"max_increase": 0.0, "within_iters": 3, "then": "revert"}
    schedule = [{"name": "widen_mlp", "value": {"times": 2}, "at_iter": 6},
                {"name": "set_lr", "value": 30.0, "at_iter": 12, "guard": guard}]  # fmt: skip
    code, out = tiny(schedule, analyze_interval=4, max_iters=20, decay_lr=False)
    assert code == 0 and events(out, "rollback")[0]["iter"] == 12
    found = analysed(out)
    assert "drift" in found[4] and "drift" not in found[8] and "drift" in found[12]
    state = json.loads((out / "checkpoints" / "latest" / "state.json").read_text())
    assert len(state["progress"]["sketch"]) == 1021 and state["progress"]["noise"][2] > 0
    assert found[16]["drift"] < 1, "from iteration 12, before the rate that was taken back"


def test_the_step_before_is_known_also_by_tokens(tiny):
    """Evaluations every 300 tokens of 128 an iteration, and one at the end; a schedule makes the batch larger."""
    schedule = [{"name": "set_grad_accum", "value": 4, "at_iter": 6}]
    code, out = tiny(schedule, analyze_interval=1, eval_interval_tokens=300, max_iters=11)
    found = analysed(out)
    assert code == 0 and list(found) == [0, 3, 5, 7, 8, 9, 11]
    assert all(("update_ratio" in numbers) == (at > 0) for at, numbers in found.items())
    by_iter = {at: numbers["grad_noise_scale"] / numbers["grad_noise_ratio"] for at, numbers in found.items()
               if "grad_noise_scale" in numbers}  # fmt: skip
    assert by_iter and all(tokens == pytest.approx(128 if at <= 5 else 256) for at, tokens in by_iter.items())


def test_the_report_draws_them(tiny):
    _, out = tiny(analyze_interval=4, gradient_accumulation_steps=4)
    titles = {panel["title"]: [trace["name"] for trace in panel["traces"]] for panel in panels([read_story(out)])}
    assert sorted(titles["rank"]) == ["rank/attn", "rank/mlp"] and len(titles["embedding"]) == 3
    assert {"drift", "attention_entropy", "update_ratio", "grad_norm_by_layer"} <= titles.keys()
    assert "update_ratio_by_layer.attn.1" in titles["update_ratio_by_layer"]


def test_one_micro_step_has_no_noise_scale(tiny, capsys):
    code, out = tiny(gradient_accumulation_steps=1, analyze_interval=4, max_iters=8)
    assert code == 0 and not any("grad_noise_scale" in found for found in analysed(out).values())
    shown = capsys.readouterr().out
    assert shown.count("grad_noise_scale has no value: it compares micro-steps, and there is one") == 1


def test_eval_only_analyses_a_checkpoint(tiny, capsys):
    _, out = tiny(max_iters=4)
    capsys.readouterr()
    given = ["--init_from=resume", f"--out_dir={out}", "--eval_only=True", "--analyze_interval=1"]
    assert train_orchestrated.main(given) == 0 and "step 4: rank/attn" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- deciding


def test_a_trigger_and_against(tiny, tmp_path, data, capsys):
    keys = dict(max_iters=16, analyze_interval=4, gradient_accumulation_steps=4)
    _, out = tiny([clip(0.5, **on("drift", above=1e-9))], **keys)
    (fired,) = events(out, "operation")
    assert fired["iter"] == 4 and fired["reason"].startswith("drift ")
    path = tmp_path / "s.json"
    path.write_text(json.dumps([clip(0.5, **on("update_ratio", above=1e-9))]))
    capsys.readouterr()
    given = arguments(data, tmp_path / "new", schedule=path, **keys)
    assert train_orchestrated.main([*given, "--plan", f"--against={out}"]) == 0
    assert "4: update_ratio " in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(early_stopping_metric="rank/mlp", early_stopping_patience=1),
         "early_stopping_metric: rank/mlp comes with analyses, and analyze_interval is 0"),
        (dict(schedule=[clip(**on("grad_noise_ratio", above=1.0))]),
         "entry 1: set_grad_clip.*: grad_noise_ratio comes with analyses"),
        (dict(schedule=[clip(at_iter=3, guard={"metric": "drift", "max_increase": 0.1})]),
         "entry 1: set_grad_clip.*: drift comes with analyses"),
        (dict(analyze_interval=-1), "analyze_interval must be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_what_is_refused(data, tmp_path, more, message):
    if schedule := more.pop("schedule", None):
        (tmp_path / "s.json").write_text(json.dumps(schedule))
        more["schedule"] = tmp_path / "s.json"
    with pytest.raises(Refused, match=message):
        train_orchestrated.main(arguments(data, tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- on several ranks


def _noise_on(rank: int, data, parallel: str, accum: int) -> tuple:
    ranks = Ranks("cpu", parallel=parallel)
    run = run_of(data, ranks, gradient_accumulation_steps=accum, parallel=parallel)
    run.step(near=True)
    values = run.noise.values()
    found = analysis.analyze(run)
    return values, found.values, found.by_layer, run.progress.sketch


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_count_the_targets_of_each(masked, parallel):
    one, other = on_ranks(_noise_on, masked, parallel, 4)
    assert one == other
    squared, trace, weight = one[0]
    wanted = by_hand(run_of(masked), 2, together=parallel == "fsdp")
    assert (squared / weight, trace / weight) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("parallel, accum", [("ddp", 2), ("ddp", 4), ("fsdp", 4), ("fsdp", 2)])
def test_ranks_see_what_one_process_would(data, parallel, accum):
    one, other = on_ranks(_noise_on, data, parallel, accum)
    assert one == other, "the same numbers on every rank"
    alone = run_of(data, gradient_accumulation_steps=accum)
    squared, trace, weight = one[0]
    if (parallel, accum) == ("fsdp", 2):
        assert weight == 0 and "grad_noise_scale" not in one[1]
    else:
        wanted = by_hand(alone, 2, together=parallel == "fsdp")
        assert (squared / weight, trace / weight) == pytest.approx(wanted, rel=1e-4)
    alone.step(near=True)
    found = analysis.analyze(alone)
    for name in set(ANALYSED) - {"drift", "grad_noise_scale", "grad_noise_ratio"}:
        assert one[1][name] == pytest.approx(found.values[name], rel=1e-4), name
    for name, layers in found.by_layer.items():
        assert one[2][name] == pytest.approx(layers, rel=1e-3)
    assert one[3] == pytest.approx(alone.progress.sketch, abs=1e-4)


def test_two_ranks_and_shards_are_not_disturbed(data, tmp_path):
    some = dict(max_iters=10, gradient_accumulation_steps=2)
    commands = {
        (parallel, every): arguments(data, tmp_path / f"{parallel}_{every}", parallel=parallel, analyze_interval=every,
                                     **some)
        for parallel in ("ddp", "fsdp") for every in (0, 3)
    }  # fmt: skip
    assert on_ranks(_runs, list(commands.values()), seconds=300) == [[0] * 4] * 2
    for parallel in ("ddp", "fsdp"):
        one, other = tmp_path / f"{parallel}_0", tmp_path / f"{parallel}_3"
        assert losses(one) == losses(other) and list(analysed(other)) == [0, 4, 8, 10]
        loaded = [checkpoint.load(out / "checkpoints" / "latest") for out in (one, other)]
        assert_same_tensors(*(dict(parts.model) for parts in loaded))
        for name, moments in loaded[0].optimizer.items():
            assert_same_tensors(dict(moments), dict(loaded[1].optimizer[name]))
