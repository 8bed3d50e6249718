"""What a GPU does differently: kernels, types, compiling, memory that runs out. Skipped where there is none.

    python -m pytest -m cuda

Everything here is also tested on a CPU elsewhere, with a double where a GPU behaves otherwise (test_sickness.py).
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import assert_same_tensors, events, lines, tensors
from test_operations import live_run
from test_resume import SCHEDULE, stop_at

from orchestrate.training.run.optimizers import OPTIMIZERS
from orchestrate.training.run.run import Run
from orchestrate.training.settings.errors import OperationFailed

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]
GPU = {"device": "cuda", "dtype": "float32"}


def losses(out) -> list[float]:
    return [m["loss"] for m in lines(out / "metrics.jsonl") if m["kind"] == "train" and not m.get("void")]


def test_a_step_on_the_gpu_is_the_step_on_the_cpu(tiny):
    _, gpu = tiny(out="gpu", **GPU)
    _, cpu = tiny(out="cpu", device="cpu")
    assert losses(gpu) == pytest.approx(losses(cpu), abs=5e-3)  # TF32 multiplies with 10 bits of mantissa
    assert losses(gpu)[-1] < losses(gpu)[0] - 0.3


def test_a_whole_schedule(tiny):
    code, out = tiny(SCHEDULE, **GPU)
    assert code == 0 and [e["entry"] for e in events(out, "operation")] == list(range(1, len(SCHEDULE) + 1))
    assert all(math.isfinite(loss) for loss in losses(out))


@pytest.mark.parametrize("iteration", [2, 5, 8])
def test_resume_is_bitwise(iteration, tiny, resume, monkeypatch):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        _, whole = tiny(SCHEDULE, out="whole", **GPU)
        with monkeypatch.context() as patched:
            stop_at(patched, iteration)
            code, out = tiny(SCHEDULE, **GPU)
        assert code == 128 + 10
        assert resume(out) == 0
        assert_same_tensors(tensors(out), tensors(whole))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_types_learn(tiny, resume, dtype):
    _, exact = tiny(out="exact", **GPU)
    _, out = tiny(out=dtype, device="cuda", dtype=dtype, max_iters=8)
    assert resume(out, max_iters=12) == 0
    skipped = sum(loss is None for loss in losses(out))
    assert skipped <= 2 and losses(out)[-1] == pytest.approx(losses(exact)[-1], abs=0.2)
    kinds = {t.dtype for t in tensors(out).values()}
    assert kinds == {torch.float32}, "weights and moments stay float32"


@pytest.mark.timeout(600)
def test_compiled_blocks_follow_a_schedule(tiny):
    """Numbers that change recompile nothing; the losses are those of the eager run to rounding."""
    schedule = [
        {"name": "set_lr", "value": 5e-3, "at_iter": 2},
        {"name": "set_weight_decay", "value": 0.05, "at_iter": 4},
        {"name": "stack_layers", "value": {"times": 2}, "at_iter": 6},
    ]
    _, eager = tiny(schedule, out="eager", **GPU)
    _, out = tiny(schedule, out="compiled", compile=True, **GPU)
    assert losses(out) == pytest.approx(losses(eager), abs=1e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fused_optimizer_heeds_its_veto(data, tmp_path, optimizer):
    run = live_run(data, device="cuda", inject="nan@4", out_dir=str(tmp_path), optimizer=optimizer)
    assert run.optimizer.note == "" and run.optimizer.parameters[0].device.type == "cuda"
    run.step()
    run.diagnosis.settle()
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    moments = {n: {k: v.clone() for k, v in m.items()} for n, m in run.optimizer.state_by_name().items()}
    assert run.step().sick is None, "on a GPU nobody has waited to know"
    sick = run.diagnosis.settle()
    assert sick is not None and sick.cause == "not finite" and sick.at.iter == 4
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())
    for n, parts in run.optimizer.state_by_name().items():
        assert all(torch.equal(v, moments[n][k]) for k, v in parts.items()), n


@pytest.mark.parametrize("fault", ["oom@5", "oom@3", "oom@11"])
def test_injected_out_of_memory_loses_no_batch(tiny, fault):
    code, out = tiny(inject=fault, **GPU)
    assert code == 0
    state = json.loads((out / "checkpoints" / "latest" / "state.json").read_text())
    assert state["progress"]["cursor"]["sample"] == 12 * 8
    assert {float(t) for n, t in tensors(out).items() if n.endswith("|step")} == {12.0}


def test_memory_that_really_runs_out(tiny):
    """A batch that does not fit becomes the same batch in pieces that do."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 600 * 2**20 / total))
    try:
        code, out = tiny(batch_size=4096, gradient_accumulation_steps=1, max_iters=2, block_size=64, n_embd=128, **GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 0
    pieces = [e["settings_after"] for e in events(out, "operation")]
    assert pieces and pieces[-1]["batch_size"] * pieces[-1]["grad_accum"] == 4096


def test_an_operation_that_runs_out_of_memory_leaves_the_run(data):
    from orchestrate.training.operations import make

    run = live_run(data, device="cuda")
    before = run.fingerprint()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 8 * 2**20) / total))
    try:
        operation = make("widen_mlp", {"value": 2**17})
        with pytest.raises(OperationFailed, match="OutOfMemoryError"):
            run.adopt(operation.plan(run.settings), operation.reshape)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.fingerprint() == before
    run.step()


def test_the_host_does_not_wait_for_a_step(data, monkeypatch):
    """Between two boundaries at which something is decided, no step asks the device for a number."""
    run = live_run(data, device="cuda", steps=5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            Run.step(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_texts_of_the_gpu_are_those_of_the_cpu(tiny, capsys):
    """The random numbers are the host's, so in float32 only a near tie can tell the two apart."""
    import sample

    _, out = tiny(sample_prompts=["To be", "q"], sample_tokens=30, **GPU)
    assert [len(text["text"]) for text in events(out, "samples")[-1]["texts"]] == [35, 31]
    capsys.readouterr()
    given = [f"--out_dir={out}", "--start=To be", "--num_samples=3", "--max_new_tokens=30", "--top_p=0.9",
             "--repetition_penalty=1.1", "--dtype=float32"]  # fmt: skip
    told = []
    for device in ("cuda", "cpu"):
        assert sample.main([*given, f"--device={device}"]) == 0
        told.append(capsys.readouterr().out.split("---------------\n"))
    assert len(told[0]) == 4 and sum(one == other for one, other in zip(*told, strict=True)) >= 3
    assert sample.main([*given, "--device=cuda", "--dtype=bfloat16"]) == 0
