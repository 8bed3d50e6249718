"""A host that learns one step late what became of a step decides, saves, restores and ends nothing before it knows.

A GPU is such a place. Here a CPU run is told to read its flags late, as a GPU run does.
"""

from __future__ import annotations

import json

import pytest
import torch
from conftest import arguments, assert_same_tensors, events, lines, on_ranks, tensors
from test_operations import live_run

import train_orchestrated
from orchestrate.training.run import run as run_module
from orchestrate.training.run.run import Run
from orchestrate.training.run.sickness import Diagnosis
from orchestrate.training.schedule.orchestrator import Orchestrator
from orchestrate.training.session.session import Session
from orchestrate.training.settings.errors import Stopped


@pytest.fixture
def late(monkeypatch):
    """Every run reads the outcome of a step after the next one."""
    monkeypatch.setattr(run_module, "Diagnosis", lambda ranks, progress, late: Diagnosis(ranks, progress, late=True))


def state(out) -> dict:
    return json.loads((out / "checkpoints" / "latest" / "state.json").read_text())


def losses(out) -> list:
    return [(m["iter"], m["loss"]) for m in lines(out / "metrics.jsonl") if m["kind"] == "train" and not m.get("void")]


def test_the_answer_comes_one_step_late_and_settling_waits_for_it(data, late, tmp_path):
    run = live_run(data, steps=3, inject="nan@4", out_dir=str(tmp_path))
    assert run.step().sick is None and run.diagnosis.pending
    assert run.step().sick is None, "it is told after the next step"
    told = run.step().sick
    assert told is not None and told.cause == "not finite" and told.at.iter == 4 and told.at.cursor.sample == 32
    assert str(told) == "not finite in the step after iteration 4, samples 32 to 39"
    assert run.diagnosis.settle() is None and not run.diagnosis.pending


def test_a_healthy_run_is_the_same_late_or_not(tiny, late, monkeypatch):
    schedule = [
        {"name": "set_lr", "value": 5e-3, "at_iter": 2, "over": 3},
        {"name": "set_attn_lora_rank", "value": 2, "at_iter": 6, "reevaluate": True},
    ]
    _, one = tiny(schedule, out="late")
    monkeypatch.undo()
    _, other = tiny(schedule, out="now")
    assert_same_tensors(tensors(one), tensors(other))
    fields = ("kind", "iter", "tokens", "loss", "grad_norm", "val_loss", "lr", "step_lr", "batch_size", "coverage")
    logs = [[{k: m.get(k) for k in fields} for m in lines(out / "metrics.jsonl")] for out in (one, other)]
    assert logs[0] == logs[1], "the lines that were written late are of their own steps, and in order"


def test_the_loss_is_read_after_the_next_step(data, late, tmp_path, monkeypatch):
    """No line of metrics is written, and no number read, between a step and the next where nothing is decided."""
    order = []
    real_step, real_write = Run.step, Session._write_step

    def step(run, near=False):
        order.append(("step", run.progress.iter))
        return real_step(run, near)

    def write(session):
        if session._unwritten:
            order.append(("line", session._unwritten[0]["iter"]))
        real_write(session)

    monkeypatch.setattr(Run, "step", step)
    monkeypatch.setattr(Session, "_write_step", write)
    assert train_orchestrated.main(arguments(data, tmp_path / "run", max_iters=4, eval_interval=4)) == 0
    assert order == [
        ("step", 0), ("step", 1), ("line", 1), ("step", 2), ("line", 2), ("step", 3), ("line", 3), ("line", 4)
    ]  # fmt: skip


@pytest.mark.parametrize("fault", ["oom@5", "oom@3", "oom@11", "oom@0"])
def test_out_of_memory_loses_no_batch(tiny, late, fault):
    """oom@3 and oom@7 strike right before an evaluation and its save, oom@11 in the last step of the run."""
    code, out = tiny(inject=fault)
    assert code == 0
    (event,) = [e for e in events(out, "operation") if e["entry"] is None]
    assert event["settings_after"] == {"batch_size": 2, "grad_accum": 4}
    assert event["iter"] == int(fault[4:]), "told where it happened"
    assert state(out)["progress"]["cursor"]["sample"] == 12 * 8 and state(out)["progress"]["iter"] == 12
    taken = {name: float(t) for name, t in tensors(out).items() if name.endswith("|step")}
    assert set(taken.values()) == {12.0}, "every batch has reached the weights"


def test_two_steps_in_a_row_out_of_memory(tiny, late, monkeypatch):
    monkeypatch.setattr(Orchestrator, "acts", lambda self, evaluated, look_at_clock: False)  # nothing is due between
    code, out = tiny(inject="oom@5,oom@6")
    assert code == 0
    told = [e["settings_after"]["batch_size"] for e in events(out, "operation") if e["entry"] is None]
    assert told == [2], "one size smaller is enough for both"
    taken = {name: float(t) for name, t in tensors(out).items() if name.endswith("|step")}
    assert set(taken.values()) == {12.0}


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        # 2 -> 8 micro-steps of 4 over 6 iterations; from iteration 4 on twice as many of 2.
        ({"name": "set_grad_accum", "value": 8}, [8, 8, 16, 16, 16, 24, 32, (2, 16)]),
        # 4 -> 8 sequences in each of 2 micro-steps; from there on 2 -> 4 in each of 4.
        ({"name": "set_batch_size", "value": 8}, [8, 8, 10, 10, 12, 12, 16, (4, 4)]),
        # 4 -> 7: nothing divides both, so micro-batches are one sequence.
        ({"name": "set_batch_size", "value": 7}, [8, 8, 8, 10, 12, 12, 12, (1, 14)]),
    ],
)
def test_a_ramp_of_the_batch_goes_the_same_way_in_smaller_pieces(tiny, operation, expected):
    code, out = tiny([{**operation, "over": 6, "at_iter": 1}], inject="oom@4", max_iters=8)
    assert code == 0
    found = [(e["batch_size"], e["grad_accum"]) for e in lines(out / "metrics.jsonl") if e["kind"] == "train"]
    assert [*(size * accum for size, accum in found[:-1]), found[-1]] == expected


def test_a_save_right_after_a_sick_step_knows_of_it(tiny, resume, late, monkeypatch):
    """The checkpoint asked for after the failed step holds its batch: a resume does not leave it out."""
    schedule = [{"name": "save_checkpoint", "at_iter": 6}]
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        real = Session.save

        def dies(self, why, required=True, mark=""):
            real(self, why, required, mark)
            if why == "asked for by the schedule":
                raise KeyboardInterrupt

        patched.setattr(Session, "save", dies)
        tiny(schedule, inject="oom@5")
    out = tiny.folder("run")
    assert state(out)["progress"]["iter"] == 6 and state(out)["settings"]["batch_size"] == 2
    assert {float(t) for n, t in tensors(out).items() if n.endswith("|step")} == {6.0}
    assert resume(out) == 0
    assert {float(t) for n, t in tensors(out).items() if n.endswith("|step")} == {12.0}


def test_another_sequence_length_right_after_a_failed_step(tiny, late):
    schedule = [{"name": "set_sequence_length", "value": 8, "at_iter": 6}]
    code, out = tiny(schedule, inject="oom@5")
    assert code == 0
    cursor = state(out)["progress"]["cursor"]
    assert cursor == {"block_size": 16, "length": 8, "sample": 6 * 8 * 2 + 6 * 8}
    assert [e["iter"] for e in events(out, "operation")] == [5, 6], "memory first, then the schedule"
    assert {float(t) for n, t in tensors(out).items() if n.endswith("|step")} == {12.0}


def test_going_back_with_an_answer_pending(tiny, late):
    """The step after the sick one was made before anybody knew; it is gone with the way that was left."""
    code, out = tiny(inject="nan@6", on_sick_step="rollback")
    assert code == 0
    (back,) = events(out, "rollback")
    assert back["iter"] == 4 and "not finite in the step after iteration 6" in back["reason"]
    assert [i for i, _ in losses(out)] == list(range(1, 13)) and all(loss is not None for _, loss in losses(out))


def test_a_run_that_stays_sick_stops_though_every_step_is_settled(tiny, late):
    """With something to decide at every boundary, no answer is left for the step after: that one says nothing."""
    with pytest.raises(Stopped, match="sick_step_limit 3"):
        tiny(inject="nan@5,nan@6,nan@7,nan@8", sick_step_limit=3, eval_interval=1)
    actions = [e["action"] for e in events(tiny.folder("run"), "error") if "action" in e]
    assert actions == ["skip", "skip", "stop"]


@pytest.mark.parametrize("answers_late", [False, True])
def test_a_step_made_again_with_success_ends_the_row_of_sick_ones(tiny, request, answers_late):
    if answers_late:
        request.getfixturevalue("late")
    code, out = tiny(inject="nan@5,oom@6,nan@7", sick_step_limit=2)
    assert code == 0
    assert [e["action"] for e in events(out, "error") if "action" in e] == ["skip", "skip"]
    assert state(out)["progress"]["sick_steps"] == 0


def test_a_sick_last_step_is_acted_on_before_the_end(tiny, late):
    code, out = tiny(inject="nan@11", on_sick_step="rollback")
    assert code == 0
    assert events(out, "rollback")[0]["from_iter"] == 12 and events(out, "end")[0]["iter"] == 12


@pytest.mark.parametrize("fault", ["", "nan@7"])
def test_an_early_stop_on_a_logged_metric_knows_of_the_last_step(tiny, late, fault):
    """Lines come at 2, 4, 6 and 8; the step that ends at 8 may be sick."""
    keys = {"early_stopping_metric": "loss", "early_stopping_patience": 3, "early_stopping_min_delta": 9.0}
    code, out = tiny(max_iters=100, eval_interval=100, log_interval=2, inject=fault, **keys)
    (end,) = events(out, "end")
    assert (code, end["iter"], end["reason"]) == (0, 8, "early stop: no gain in 3 values of loss")
    assert len(events(out, "error")) == bool(fault)


def test_an_exception_with_an_answer_pending_saves_the_state_before_the_sick_step(tiny, resume, late, monkeypatch):
    real = Run.step

    def fails(run, near=False):
        result = real(run, near)
        if run.progress.iter == 6:
            raise RuntimeError("the cable")
        return result

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the cable"):
        patched.setattr(Run, "step", fails)
        tiny(inject="nan@5")
    out = tiny.folder("run")
    assert state(out)["progress"]["iter"] == 5 and state(out)["progress"]["cursor"]["sample"] == 5 * 8
    assert resume(out) == 0
    assert {float(t) for n, t in tensors(out).items() if n.endswith("|step")} == {12.0}


def _late_on_two(rank: int, data: str, out: str, fault: str):
    run_module.Diagnosis = lambda ranks, progress, late: Diagnosis(ranks, progress, late=True)
    return train_orchestrated.main(arguments(data, out, inject=fault))


@pytest.mark.parametrize("fault", ["oom@7:rank1", "nan@11:rank1"])
def test_two_ranks_learn_late_together(data, tmp_path, fault):
    out = tmp_path / "run"
    assert on_ranks(_late_on_two, str(data), str(out), fault) == [0, 0]
    steps = {float(t) for n, t in tensors(out).items() if n.endswith("|step")}
    assert steps == ({12.0} if fault.startswith("oom") else {11.0})


# ---------------------------------------------------------------------------------------------- float16


def test_a_spike_in_float16_is_not_applied(data, tmp_path):
    run = live_run(data, steps=0, dtype="float16", spike_sigma=4.0, inject="spike@25", out_dir=str(tmp_path))
    run.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)  # low enough that the spike does not overflow
    for _ in range(25):
        assert run.step().sick is None
    weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    moments = {n: {k: v.clone() for k, v in m.items()} for n, m in run.optimizer.state_by_name().items()}
    result = run.step()
    assert result.sick is not None and result.sick.cause == "spike" and torch.isfinite(result.grad_norm)
    assert all(torch.equal(p, weights[n]) for n, p in run.model.named_parameters())
    for n, m in run.optimizer.state_by_name().items():
        assert all(torch.equal(v, moments[n][k]) for k, v in m.items()), n
    assert run.step().sick is None


def test_an_overflow_in_float16_is_the_scalers_business(data, tmp_path):
    run = live_run(data, steps=0, dtype="float16", inject="nan@2", out_dir=str(tmp_path))
    scale = run.scaler.get_scale()
    assert [run.step().sick for _ in range(4)] == [None] * 4
    assert run.scaler.get_scale() < scale
