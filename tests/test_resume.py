"""Resume is bitwise equal to never having stopped, at every kind of boundary; overrides take effect or are refused."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from conftest import arguments, assert_same_tensors, events, lines, tensors, write_data
from fuzzing import seal

import train_orchestrated
from orchestrate.model.config import Fade, ModelConfig
from orchestrate.training.run import out_of_memory
from orchestrate.training.run.run import Run
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.settings.errors import OperationFailed, Refused
from orchestrate.training.settings.records import Settings

# One of every kind of change, chains included: entries 3 and 4 fire in one round with a checkpoint between them.
SCHEDULE = [
    {"name": "set_lr", "value": 5e-3, "at_iter": 1, "over": 4, "style": "cosine"},
    {"name": "set_attn_lora_rank", "value": 2, "max_wait_iters": 1, "reevaluate": True},
    {"name": "set_dropout", "value": 0.2},
    {"name": "save_checkpoint", "max_wait_iters": 1},
    {"name": "freeze_layer", "value": "mlp.0", "max_wait_iters": 0},
    {"name": "set_batch_size", "value": 8, "trigger_loss": 99.0, "over": 3},
    {"name": "set_layer_lora_rank", "value": ["attn.*", 1], "max_wait_iters": 2, "reevaluate": True},
    {"name": "merge_lora_weights", "max_wait_iters": 1},
    {
        "name": "unfreeze_layer",
        "value": "mlp.0",
        "trigger_plateau": {"evals": 1, "min_delta": 9.0},
        "max_wait_iters": 3,
    },
]

# The model grows in every direction, masked and not, with adapters that start anew and moments that are forgotten.
GROWTH = [
    {"name": "set_sequence_length", "value": 8},
    {"name": "stack_layers", "value": {"n_layer": 3, "how": "random"}, "at_iter": 1, "over": 3},
    {"name": "widen_mlp", "value": 80, "max_wait_iters": 1},
    {"name": "set_attn_lora_rank", "value": 2, "max_wait_iters": 0},
    {"name": "widen_embd", "value": 32, "max_wait_iters": 1, "reevaluate": True},
    {"name": "relora", "value": {"warmup_iters": 2}, "max_wait_iters": 1},
    {"name": "add_heads", "value": 8, "max_wait_iters": 1},
    {"name": "untie_head"},
    {"name": "resize_vocabulary", "value": {"size": 40, "noise": 0.1}, "max_wait_iters": 1, "over": 2},
    {"name": "extend_context", "value": 32, "max_wait_iters": 1},
    {"name": "reset_moments", "value": "mlp.*"},
]
SCHEDULES = {"settings": SCHEDULE, "growth": GROWTH}
# Triggers and guards on the lines of metrics, which come every second iteration.
LOSS_STAYS = {"metric": "loss", "plateau": {"evals": 1, "min_delta": 9.0}}
METRICS = [
    {"name": "set_grad_clip", "value": 0.5, "trigger": LOSS_STAYS},
    {"name": "set_lr", "value": 5e-3, "trigger": {"metric": "grad_norm", "below": 99.0},
     "guard": {"metric": "loss", "max_increase": 99.0, "within_iters": 3}},
    {"name": "set_dropout", "value": 0.1, "trigger": {"metric": "coverage", "above": 0.0}},
    {"name": "set_lr", "value": 3.0, "max_wait_iters": 1,
     "guard": {"metric": "loss", "max_increase": 0.05, "within_iters": 4}},
    {"name": "set_attn_lora_rank", "value": 2, "trigger": LOSS_STAYS},
    {"name": "set_weight_decay", "value": 0.0, "trigger": {"metric": "val_loss", "below": 99.0}},
]  # fmt: skip
# Three queues: rounds that a metric may end, a guarded one that is taken back, chains with a checkpoint inside.
TRACKS = {
    "tracks": {
        "rate": [
            {"name": "change_lr", "value": 0.8, "max_wait_iters": 2, "over": 2, "repeat": 2},
            {"name": "set_lr", "value": 3.0, "max_wait_iters": 1, "guard": {"within_iters": 4}},
            {"name": "set_min_lr", "value": 1e-4},
        ],
        "model": [
            {"name": "set_dropout", "value": 0.1, "all_of": [{"trigger_loss": 99.0}, {"max_wait_iters": 1}],
             "reevaluate": True, "label": "drops"},
            {"repeat": 2, "do": [
                {"name": "set_attn_lora_rank", "value": 2, "max_wait_iters": 2},
                {"name": "save_checkpoint"},
                {"name": "merge_lora_weights", "max_wait_iters": 2, "reevaluate": True},
            ]},
        ],
    },
    "operations": [
        {"name": "change_grad_accum", "value": 2, "after": "drops", "max_wait_iters": 2},
        {"name": "set_weight_decay", "value": 0.01, "max_wait_iters": 2,
         "repeat": {"times": 9, "until": {"metric": "step_lr", "below": 99.0}}},
        {"name": "freeze_layer", "value": "mlp.0"},
    ],
}  # fmt: skip
METRICS_KEYS = {"log_interval": 2, "max_iters": 16, "early_stopping_metric": "loss", "early_stopping_patience": 9}
# Heads of a size of their own, normed: they grow with everything else.
QK_NORM = {"qk_norm": True, "head_size": 6}


def stop_at(monkeypatch, iteration: int, polls: int = 0) -> None:
    """Behave as if SIGUSR1 had come at this iteration, `polls` polls after its first (inside an evaluation)."""
    count = {"n": 0}
    original = Run.step

    def poll(self):
        if self.at == iteration:
            count["n"] += 1
            if count["n"] > polls:
                self._agreed = int(signal.SIGUSR1)
        return self._agreed

    def step(run, near=False):
        result = original(run, near)
        SignalWatch.at = run.progress.iter
        return result

    SignalWatch.at = 0
    monkeypatch.setattr(SignalWatch, "poll", poll)
    monkeypatch.setattr(Run, "step", step)


def compare(one, other) -> None:
    assert_same_tensors(tensors(one), tensors(other))
    fields = ("kind", "iter", "loss", "val_loss", "lr", "batch_size", "grad_norm", "coverage", "why")
    streams = [
        [{k: record.get(k) for k in fields} for record in lines(folder / "metrics.jsonl")] for folder in (one, other)
    ]
    assert streams[0] == streams[1]
    fired = [[(e["entry"], e["iter"], e["reason"]) for e in events(folder, "operation")] for folder in (one, other)]
    assert fired[0] == fired[1] and len(fired[0]) in (len(SCHEDULE), len(GROWTH))


def run_whole(folder, data, schedule, **keys):
    (folder / "s.json").write_text(json.dumps(schedule))
    assert train_orchestrated.main(arguments(data, folder / "run", schedule=folder / "s.json", **keys)) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    """The run that never stopped, with everything that the schedule does."""
    return run_whole(tmp_path_factory.mktemp("whole"), data, SCHEDULE)


@pytest.fixture(scope="module")
def uninterrupted_growth(tmp_path_factory, data):
    return run_whole(tmp_path_factory.mktemp("grown"), data, GROWTH, **QK_NORM)


@pytest.mark.parametrize("iteration", range(1, 12))
def test_stopped_at_any_iteration_while_growing(iteration, uninterrupted_growth, tiny, resume, monkeypatch):
    stop_at(monkeypatch, iteration)
    code, out = tiny(GROWTH, **QK_NORM)
    assert code == 128 + signal.SIGUSR1
    monkeypatch.undo()
    assert resume(out) == 0
    compare(out, uninterrupted_growth)


@pytest.fixture(scope="module")
def uninterrupted_tracks(tmp_path_factory, data):
    whole = run_whole(tmp_path_factory.mktemp("tracks"), data, TRACKS, max_iters=16)
    assert [(e["iter"], e["entry"], e.get("round")) for e in events(whole, "operation")] == [
        (1, 4, None), (2, 1, 1), (3, 5, 1), (3, 6, 1), (3, 8, None), (4, 1, 2), (6, 3, None), (6, 7, 1), (6, 9, 1),
        (6, 10, None), (8, 5, 2), (8, 6, 2), (10, 7, 2),
    ]  # fmt: skip
    (back,) = events(whole, "rollback")
    assert (back["entry"], back["track"], back["iter"]) == (2, "rate", 5)
    return whole


@pytest.mark.parametrize("iteration", range(1, 16))
def test_stopped_at_any_iteration_of_several_tracks(iteration, uninterrupted_tracks, tiny, resume, monkeypatch):
    with monkeypatch.context() as patched:
        stop_at(patched, iteration)
        code, out = tiny(TRACKS, max_iters=16)
    assert code == 128 + signal.SIGUSR1
    assert resume(out) == 0
    assert_same_tensors(tensors(out), tensors(uninterrupted_tracks))
    known = []
    for folder in (out, uninterrupted_tracks):
        state = json.loads((folder / "checkpoints/latest/state.json").read_text())["orchestrator"]
        for queue in state["position"]["queues"].values():
            queue["since"].pop("seconds")
        for mark in state["position"]["marks"].values():
            mark.pop("seconds")
        kinds = ("operation", "decision", "rollback")
        known.append((state, [(e["kind"], e["entry"], e["iter"], e["reason"]) for kind in kinds
                              for e in events(folder, kind)]))  # fmt: skip
    assert known[0] == known[1]


def test_a_resume_takes_other_tracks_and_rounds_but_not_of_what_has_fired(tiny, tmp_path, resume):
    first = {"name": "set_dropout", "value": 0.1, "at_iter": 2, "repeat": 2}
    _, out = tiny({"tracks": {"a": [first, {"name": "stop", "max_wait_iters": 2}]}})
    path = tmp_path / "new.json"
    path.write_text(json.dumps({"tracks": {"b": [], "a": [{**first, "value": 0.2}]}}))
    with pytest.raises(Refused, match=r"entry 1 \(round 1 of 2\) has fired already and must stay as it was") as refused:
        resume(out, schedule=path)
    assert len(refused.value.problems) == 3, "two rounds and the entry behind"
    with pytest.raises(Refused, match="entry 1 .* has fired already"):
        path.write_text(json.dumps([first]))
        resume(out, schedule=path)
    stop = {"name": "stop", "max_wait_iters": 2, "label": "stopped"}
    later = {"name": "set_grad_clip", "value": 0.5, "after": "stopped", "max_wait_iters": 3}
    new = {"tracks": {"b": [later], "a": [first, stop, {"name": "set_dropout", "value": 0.3, "max_wait_iters": 5}]}}
    path.write_text(json.dumps(new))
    assert resume(out, schedule=path) == 0
    fired = [(e["iter"], e["entry"]) for e in events(out, "operation")]
    assert fired == [(2, 1), (2, 1), (4, 2), (7, 1), (9, 4)]
    (override,) = [e for e in events(out, "override") if e["key"] == "schedule"]
    assert override["before"] == [] and [e["name"] for e in override["after"]] == ["set_grad_clip", "set_dropout"]
    assert resume(out, schedule="") == 0
    assert resume(out, schedule=path, max_iters=14) == 0 and len(events(out, "operation")) == 5


@pytest.fixture(scope="module")
def uninterrupted_metrics(tmp_path_factory, data):
    whole = run_whole(tmp_path_factory.mktemp("metrics"), data, METRICS, **METRICS_KEYS)
    assert [e["entry"] for e in events(whole, "operation")] == [1, 2, 3, 5, 6] and events(whole, "rollback")
    return whole


@pytest.mark.parametrize("iteration, polls", [*((n, 0) for n in range(1, 16)), (4, 1), (8, 1), (8, 2)])
def test_stopped_at_any_iteration_while_metrics_decide(
    iteration, polls, uninterrupted_metrics, tiny, resume, monkeypatch
):
    """With polls: inside the evaluation that stands between a line of metrics and the round that looks at it."""
    with monkeypatch.context() as patched:
        stop_at(patched, iteration, polls)
        code, out = tiny(METRICS, **METRICS_KEYS)
    assert code == 128 + signal.SIGUSR1
    assert resume(out) == 0
    assert_same_tensors(tensors(out), tensors(uninterrupted_metrics))
    kinds, known = ("operation", "decision", "rollback"), []
    for folder in (out, uninterrupted_metrics):
        state = json.loads((folder / "checkpoints/latest/state.json").read_text())
        state["orchestrator"]["position"]["queues"][""]["since"].pop("seconds")
        course = [(kind, e["entry"], e["iter"], e["reason"]) for kind in kinds for e in events(folder, kind)]
        known.append((course, state["orchestrator"], state["progress"]["evals_without_gain"]))
    assert known[0] == known[1]


@pytest.mark.parametrize("iteration", range(12))
def test_stopped_at_any_iteration(iteration, uninterrupted, tiny, resume, monkeypatch):
    with monkeypatch.context() as patched:
        stop_at(patched, iteration)
        code, out_dir = tiny(SCHEDULE)
    assert code == 128 + signal.SIGUSR1
    assert resume(out_dir) == 0
    compare(out_dir, uninterrupted)


@pytest.mark.parametrize("iteration, polls", [(4, 1), (8, 2), (2, 1), (12, 1)])
def test_stopped_inside_an_evaluation(iteration, polls, uninterrupted, tiny, resume, monkeypatch):
    with monkeypatch.context() as patched:
        stop_at(patched, iteration, polls)
        code, out_dir = tiny(SCHEDULE)
    assert code == 128 + signal.SIGUSR1
    assert resume(out_dir) == 0
    assert_same_tensors(tensors(out_dir), tensors(uninterrupted))


def test_killed_between_two_entries_of_a_chain(uninterrupted, tiny, resume, monkeypatch, tmp_path):
    """The checkpoint that entry 4 asks for lies between entries; nothing after it survives."""
    from orchestrate.training.session.session import Session

    original = Session.save

    def save_and_die(session, why):
        original(session, why)
        if why == "asked for by the schedule":
            raise KeyboardInterrupt  # as a kill: no emergency checkpoint

    with monkeypatch.context() as patched:
        patched.setattr(Session, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            tiny(SCHEDULE)
    out_dir = tmp_path / "run"
    assert len(events(out_dir, "operation")) == 4
    assert resume(out_dir) == 0
    compare(out_dir, uninterrupted)


def test_killed_at_an_older_checkpoint_takes_back_what_came_after(uninterrupted, tiny, resume, monkeypatch, tmp_path):
    original = Run.step

    def die(run, near=False):
        if run.progress.iter == 7:
            raise KeyboardInterrupt
        return original(run, near)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "step", die)
        with pytest.raises(KeyboardInterrupt):
            tiny(SCHEDULE)
    out_dir = tmp_path / "run"
    assert lines(out_dir / "metrics.jsonl")[-1]["iter"] == 7
    assert resume(out_dir) == 0
    compare(out_dir, uninterrupted)
    assert any(record.get("void") for record in lines(out_dir / "events.jsonl"))


def test_longer_runs_go_on_from_their_end(tiny, resume):
    _, whole = tiny(max_iters=16, eval_interval=20)
    _, part = tiny(out="part", max_iters=8, eval_interval=20)
    assert resume(part, max_iters=16) == 0
    assert_same_tensors(tensors(part), tensors(whole))
    assert [e["key"] for e in events(part, "override")] == ["max_iters"]


# ---------------------------------------------------------------------------------------------- what ends a run


def test_an_exception_leaves_an_emergency_checkpoint(tiny, resume, monkeypatch, tmp_path):
    original = Run.step

    def fail(run, near=False):
        if run.progress.iter == 5:
            raise RuntimeError("the cable")
        return original(run, near)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "step", fail)
        with pytest.raises(RuntimeError, match="the cable"):
            tiny()
    out_dir = tmp_path / "run"
    assert events(out_dir, "error")[0]["message"] == "RuntimeError: the cable"
    assert events(out_dir, "emergency")[0]["path"].endswith("iter_000000005")
    assert resume(out_dir) == 0
    _, whole = tiny(out="whole")
    assert_same_tensors(tensors(out_dir), tensors(whole))


def test_a_failing_operation_ends_the_run_after_a_checkpoint_or_is_skipped(tiny, resume, monkeypatch, tmp_path):
    from orchestrate.training.operations.lora import SetAttentionLoraRank

    def broken(self, model, target, generator):
        raise MemoryError("no room")

    monkeypatch.setattr(SetAttentionLoraRank, "reshape", broken)
    entry = {"name": "set_attn_lora_rank", "value": 2, "at_iter": 5}
    with pytest.raises(OperationFailed, match="entry 1 .* failed and the run is as before.*MemoryError: no room"):
        tiny([entry])
    out_dir = tmp_path / "run"
    assert events(out_dir, "emergency")[0]["iter"] == 5 and not events(out_dir, "operation")
    code, skipping = tiny([{**entry, "on_error": "skip"}, {"name": "set_lr", "value": 1e-3}], out="skip")
    assert code == 0 and events(skipping, "error")[0]["on_error"] == "skip"
    assert [e["name"] for e in events(skipping, "operation")] == ["set_lr"]
    monkeypatch.undo()
    assert resume(out_dir) == 0
    assert [e["name"] for e in events(out_dir, "operation")] == ["set_attn_lora_rank"]


def test_stop_and_early_stopping(tiny, resume):
    code, out_dir = tiny([{"name": "stop", "at_iter": 6}, {"name": "set_lr", "value": 1e-3}])
    assert code == 0 and events(out_dir, "end")[0] | {"iter": 6, "not_fired": [2]} == events(out_dir, "end")[0]
    assert resume(out_dir) == 0 and events(out_dir, "end")[-1]["iter"] == 12
    code, out_dir = tiny(out="early", max_iters=100, early_stopping_patience=2, early_stopping_min_delta=9.0)
    (end,) = events(out_dir, "end")
    assert code == 0 and end["iter"] == 8 and "early stop" in end["reason"]


# ---------------------------------------------------------------------------------------------- overrides


def test_overrides_take_effect_and_are_logged(tiny, resume):
    _, out_dir = tiny([{"name": "set_lr", "value": 5e-3, "at_iter": 2}], max_iters=6)
    assert resume(out_dir, max_iters=9, learning_rate=1e-3, batch_size=2, dropout=0.1, grad_clip=0.5) == 0
    overrides = {e["key"]: e for e in events(out_dir, "override")}
    assert set(overrides) == {"max_iters", "learning_rate", "batch_size", "dropout", "grad_clip"}
    assert overrides["learning_rate"] | {"before": 5e-3, "after": 1e-3, "applied": True} == overrides["learning_rate"]
    state = json.loads((out_dir / "checkpoints/latest/state.json").read_text())
    assert state["settings"]["learning_rate"] == 1e-3 and state["settings"]["batch_size"] == 2
    assert state["progress"]["cursor"]["sample"] == 6 * 8 + 3 * 4
    assert json.loads((out_dir / "config.json").read_text())["learning_rate"] == 1e-3


def test_what_a_resume_sets_is_not_moved_by_a_ramp_any_more(tiny, resume):
    """The ramp of change_lr goes on with min_lr alone, 1e-3 -> 5e-4 in 8 iterations from 2 on."""
    _, out_dir = tiny([{"name": "change_lr", "value": 0.5, "over": 8, "at_iter": 2}], max_iters=6)
    assert resume(out_dir, max_iters=8, learning_rate=3e-3, weight_decay=0.2) == 0
    reasons = {e["key"]: e["reason"] for e in events(out_dir, "override")}
    assert reasons["learning_rate"].endswith("; the ramp of entry 1 (change_lr) ends with it")
    assert "ramp" not in reasons["weight_decay"]
    state = json.loads((out_dir / "checkpoints/latest/state.json").read_text())
    assert state["settings"]["learning_rate"] == 3e-3
    assert state["settings"]["min_lr"] == pytest.approx(1e-3 - 5e-4 * 6 / 8)
    assert list(state["orchestrator"]["ramps"][0]["fields"]) == ["min_lr"]


def test_a_ramp_of_the_batch_is_resumed_in_smaller_pieces_where_memory_ran_out(tiny, resume):
    """2 -> 8 micro-steps of 4 over 4 iterations from 2 on; 4 -> 16 of 2 after the resume."""
    _, out_dir = tiny([{"name": "set_grad_accum", "value": 8, "over": 4, "at_iter": 2}], max_iters=4)
    out_of_memory.note(str(out_dir), 4)
    assert resume(out_dir, max_iters=7) == 0
    found = [(e["batch_size"], e["grad_accum"]) for e in lines(out_dir / "metrics.jsonl") if e["kind"] == "train"]
    assert found[4:] == [(2, 8), (2, 12), (2, 16)]


def test_the_same_command_again_does_not_undo_the_schedule(tiny, resume):
    _, out_dir = tiny([{"name": "set_lr", "value": 5e-3, "at_iter": 2}], max_iters=6)
    assert resume(out_dir, max_iters=8, learning_rate=1e-2) == 0
    (kept,) = [e for e in events(out_dir, "override") if e["key"] == "learning_rate"]
    assert not kept["applied"] and "schedule has changed it" in kept["reason"]
    state = json.loads((out_dir / "checkpoints/latest/state.json").read_text())
    assert state["settings"]["learning_rate"] == 5e-3


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"n_layer": 3}, "n_layer cannot change on resume from 2 to 3"),
        ({"block_size": 8}, "block_size cannot change"),
        ({"head_size": 4}, "head_size cannot change on resume from 0 to 4"),
        ({"rotary_scale": 2.0}, "rotary_scale cannot change .*; an operation of a schedule can change it"),
        ({"qk_norm": True}, "qk_norm cannot change on resume from False to True: .* no operation changes it$"),
        ({"bias": True}, "trained with it, and no operation changes it$"),
        ({"attn_bias": "qkv"}, "attn_bias cannot change on resume from 'none' to 'qkv': .* no operation changes it$"),
        ({"use_rotary_embeddings": True}, "trained with it, and no operation changes it$"),
        ({"rotary_llama3_factor": 8.0}, "trained with it, and no operation changes it$"),
        ({"attn_lora_rank": 4}, "an operation of a schedule can change it"),
        ({"seed": 5}, "samples would repeat"),
        ({"dataset": "elsewhere"}, "dataset elsewhere: no train.bin and val.bin"),
    ],
)
def test_a_shape_that_differs_is_refused(tiny, resume, keys, message):
    _, out_dir = tiny(max_iters=4)
    before = (out_dir / "events.jsonl").read_text()
    with pytest.raises(Refused, match=message):
        resume(out_dir, **keys)
    assert (out_dir / "events.jsonl").read_text() == before


def test_a_new_schedule_may_change_what_has_not_fired(tiny, resume, tmp_path):
    first = [{"name": "set_lr", "value": 5e-3, "at_iter": 2}, {"name": "set_grad_clip", "value": 0.5, "at_iter": 90}]
    _, out_dir = tiny(first, max_iters=6)
    path = tmp_path / "new.json"
    path.write_text(json.dumps([first[0], {"name": "set_weight_decay", "value": 0.0, "at_iter": 7}]))
    assert resume(out_dir, schedule=path, max_iters=9) == 0
    assert [(e["name"], e["iter"]) for e in events(out_dir, "operation")] == [("set_lr", 2), ("set_weight_decay", 7)]
    path.write_text(json.dumps([{**first[0], "value": 1e-3}]))
    with pytest.raises(Refused, match="entry 1 has fired already"):
        resume(out_dir, schedule=path)


def test_nothing_to_resume_and_nothing_overwritten(tiny, resume, tmp_path):
    with pytest.raises(Refused, match="no complete checkpoint"):
        resume(tmp_path / "none")
    tiny(max_iters=4)
    with pytest.raises(Refused, match="holds the checkpoints of a run"):
        tiny(max_iters=4)


def test_another_data_set_in_the_same_place_is_refused(tmp_path, resume):
    folder = write_data(tmp_path / "d")
    assert train_orchestrated.main(arguments(folder, tmp_path / "run", max_iters=4)) == 0
    raw = bytearray((folder / "train.bin").read_bytes())
    raw[10] ^= 1
    (folder / "train.bin").write_bytes(raw)
    with pytest.raises(Refused, match="fingerprints differ"):
        resume(tmp_path / "run", max_iters=6)
    assert resume(tmp_path / "run", max_iters=6, allow_changed_data=True) == 0


def test_fp16_scaler_state_is_saved(tiny, resume):
    """float16 on the CPU exercises the same GradScaler as on a GPU."""
    _, whole = tiny(dtype="float16", max_iters=8)
    state = json.loads((whole / "checkpoints/latest/state.json").read_text())
    assert state["scaler"]["scale"] > 0 and state["scaler"]["_growth_tracker"] > 0
    _, part = tiny(out="part", dtype="float16", max_iters=4)
    assert resume(part, max_iters=8) == 0
    assert_same_tensors(tensors(part), tensors(whole))


def test_eval_only_writes_nothing(tiny, capsys, tmp_path):
    assert tiny(eval_only=True)[0] == 0
    assert "val loss" in capsys.readouterr().out and not (tmp_path / "run").exists()
    tiny(max_iters=4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train_orchestrated.main([f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--eval_only"]) == 0
    assert "val loss" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_a_signal_ends_an_evaluation_alone_with_its_code(tiny, monkeypatch):
    """There is nothing to save, so only the exit code tells a script that no loss came out."""
    original = Run.evaluate_each

    def evaluate_each(run, poll):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(run, poll)

    monkeypatch.setattr(Run, "evaluate_each", evaluate_each)
    assert tiny(eval_only=True, eval_iters=4)[0] == 143


def test_signals_are_handled_by_name(tiny):
    """A real signal to this process, in the middle of the run."""
    original = Run.step

    def step(run, near=False):
        if run.progress.iter == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, near)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "step", step)
        code, out_dir = tiny()
    assert code == 128 + signal.SIGTERM
    assert [e["signal"] for e in events(out_dir, "signal")] == [15]
    assert (out_dir / "checkpoints/latest/manifest.json").exists() and torch.is_tensor(
        next(iter(tensors(out_dir).values()))
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---------------------------------------------------------------------------------------------- older versions

# What the version before the shape was only the shape wrote at iteration 5 (checkpoint format 2).
OLD_MODEL = {
    "block_size": 16, "vocab_size": 23, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 16, "head_size": 8,
    "n_hidden": [64, 128], "dropout": 0.1375, "bias": False, "norm": "layernorm", "norm_eps": 1e-05,
    "activation": "gelu", "position": "learned", "rotary_base": 10000.0, "rotary_scale": 1.0, "tie_weights": True,
    "lora": {"attn.0": {"rank": 2, "alpha": 8.0}, "attn.1": {"rank": 2, "alpha": 8.0}},
    "fading": {"mlp.1": {"known": 64, "share": 0.3333333333333333}},
}  # fmt: skip
OLD_SETTINGS = {
    "model": OLD_MODEL, "batch_size": 4, "grad_accum": 2, "learning_rate": 0.01, "min_lr": 0.001, "warmup_iters": 2,
    "lr_decay_iters": 12, "decay_lr": True, "lr_schedule": "cosine", "wsd_decay_fraction": 0.2, "weight_decay": 0.1,
    "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "eval_interval": 4, "eval_iters": 3, "log_interval": 1,
    "lora_alpha": 8.0, "sequence_length": 16, "frozen": [], "lr_restarts": 0, "rewarm_iters": 0, "rewarms": 0,
    "reshapes_asked": 0, "vocabulary_map": [], "checkpoints_asked": 0, "stops_asked": 0,
}  # fmt: skip
OLD_RAMPS = [
    {"entry": 1, "name": "set_dropout", "start_iter": 2, "over": 8, "style": "linear",
     "fields": {"model.dropout": [0.1, 0.2]}},
    {"entry": 3, "name": "widen_mlp", "start_iter": 3, "over": 6, "style": "linear",
     "fields": {"model.fading.mlp.1": [0.0, 1.0]}},
]  # fmt: skip


def test_a_state_of_an_older_version_goes_on(tiny, resume):
    """Dropout and fades lay in the model's shape then: read, they are the run that this version makes by itself."""
    schedule = [
        {"name": "set_dropout", "value": 0.2, "at_iter": 2, "over": 8},
        {"name": "set_attn_lora_rank", "value": 2, "at_iter": 2},
        {"name": "widen_mlp", "value": {"times": 2, "how": "random", "layers": ["mlp.1"]}, "at_iter": 3, "over": 6},
    ]
    _, whole = tiny(schedule, out="whole", dropout=0.1)
    _, out = tiny(schedule, out="old", dropout=0.1, max_iters=5)
    path = out / "checkpoints" / "latest" / "state.json"
    state = json.loads(path.read_text())
    settings = Settings.from_json(OLD_SETTINGS)
    assert settings.dropout == 0.1375 and settings.fading == {"mlp.1": Fade(64, 1 / 3)}
    assert state["settings"].pop("mixture") == {state["config"]["dataset"]: 1.0}
    now = {name: value for name, value in settings.to_json().items() if name != "mixture"}
    assert now == state["settings"], "the recorded state is the one that this version comes to"
    assert ModelConfig.from_json(OLD_MODEL) == settings.model
    state["settings"], state["orchestrator"]["ramps"] = OLD_SETTINGS, OLD_RAMPS
    path.write_text(json.dumps(state))
    seal(path.parent)
    assert resume(out, max_iters=12) == 0
    assert_same_tensors(tensors(out), tensors(whole))
    ended = Settings.from_json(json.loads(path.read_text())["settings"])
    assert ended.dropout == 0.2 and ended.fading == {}
