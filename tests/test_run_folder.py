"""What a run folder says, read back: every kind of line, void ones, and what is none of ours."""

from __future__ import annotations

import json

import pytest
from conftest import state_of

from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint, run_folder
from orchestrate.training.store.run_folder import (
    EVENT_KINDS,
    METRICS_KINDS,
    SavedCheckpoint,
    event,
    read_lines,
    read_run,
)

TRAIN = {"kind": "train", "iter": 1, "tokens": 16, "seconds": 0.5, "loss": 2.5}
EVAL = {"kind": "eval", "iter": 1, "tokens": 16, "seconds": 0.5, "val_loss": None}


def text(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_run_that_went_back(tiny):
    """Void lines are there and marked; without them each iteration stands once."""
    hurts = {"name": "set_lr", "value": 3.0, "at_iter": 5, "guard": {"max_increase": 0.05, "within_iters": 4,
             "then": "revert"}}  # fmt: skip
    _, out = tiny([hurts])
    run = read_run(out)
    train = [[m["iter"] for m in record.metrics if m["kind"] == "train"] for record in (run, run.valid)]
    assert train == [[*range(1, 9), *range(6, 13)], [*range(1, 13)]]
    assert [e["kind"] for e in run.events if e.get("void")] == ["operation"], "it went back to after the decision"
    assert [e["entry"] for e in run.valid.events if e["kind"] == "rollback"] == [1]
    assert run.config["max_iters"] == 12 and run.foreign == {"metrics.jsonl": 0, "events.jsonl": 0}
    assert run.checkpoints[0] == SavedCheckpoint(
        "iter_000000012", 12, run.valid.metrics[-1]["val_loss"], latest=True, best=True
    )


def test_checkpoints_are_told_newest_first_and_the_damaged_left_out(tmp_path):
    for iteration, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        state = state_of(iter=iteration, last_val_loss=loss, last_eval_iter=iteration)
        checkpoint.save(tmp_path, state, {}, {}, keep_last=9, keep_best=9)
    (tmp_path / "checkpoints" / "iter_000000001" / "manifest.json").unlink()
    assert read_run(tmp_path).checkpoints == [
        SavedCheckpoint("iter_000000003", 3, 2.0, latest=True, best=False),
        SavedCheckpoint("iter_000000002", 2, 1.0, latest=False, best=True),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[]",
        b"[" * 5000,
        b'{"kind": "train"}',
        text({**TRAIN, "kind": "other"})[:-1],
        text({**TRAIN, "kind": ["train"]})[:-1],
        text({**TRAIN, "iter": -1})[:-1],
        text({**TRAIN, "iter": 1.0})[:-1],
        text({**TRAIN, "iter": True})[:-1],
        text({**TRAIN, "loss": "2.5"})[:-1],
        text({**TRAIN, "loss": float("nan")})[:-1],
        text({**TRAIN, "x": float("nan")})[:-1],
        text(TRAIN)[:-1].replace(b"0.5", b"1e999"),
        b"\xff" + text(TRAIN)[:-1],
        b" " * 200 + text(TRAIN)[:-1],
    ],
)
def test_what_is_no_line_of_metrics_is_counted(tmp_path, monkeypatch, line):
    monkeypatch.setattr(run_folder, "LONGEST_LINE", 100)
    assert len(text(TRAIN)) < 100
    (tmp_path / "metrics.jsonl").write_bytes(text(TRAIN) + line + b"\n" + text(EVAL))
    run = read_run(tmp_path)
    assert run.metrics == [TRAIN, EVAL] and run.foreign == {"metrics.jsonl": 1, "events.jsonl": 0}
    assert run.events == [] and run.config is None and run.checkpoints == []


@pytest.mark.parametrize("cut", range(1, 70))
def test_a_line_that_is_being_written_is_passed_over(tmp_path, cut):
    (tmp_path / "metrics.jsonl").write_bytes((text(TRAIN) + text(EVAL))[:-cut])
    assert len(text(EVAL)) > 69 and read_run(tmp_path).metrics == ([TRAIN, EVAL] if cut == 1 else [TRAIN])
    assert not read_run(tmp_path).foreign["metrics.jsonl"]


def test_lines_keep_their_numbers(tmp_path):
    (tmp_path / "log").write_bytes(text(TRAIN, {}, EVAL))
    assert list(read_lines(tmp_path / "log", METRICS_KINDS)) == [(1, TRAIN), (2, None), (3, EVAL)]


def test_a_reader_has_limits(tmp_path):
    with pytest.raises(Refused, match="there is no such folder"):
        read_run(tmp_path / "none")
    (tmp_path / "metrics.jsonl").write_bytes(text(TRAIN, TRAIN, TRAIN))
    assert len(read_run(tmp_path, most_lines=3).metrics) == 3
    with pytest.raises(Refused, match="metrics.jsonl: more than 2 lines"):
        read_run(tmp_path, most_lines=2)


def test_an_event_has_the_fields_of_its_kind():
    made = event("signal", {"iter": 3, "signal": 15})
    assert set(made) == {"kind", "iter", "signal", "time"} and made["time"] > 1.7e9
    with pytest.raises(TypeError, match=r"unknown: \['signal', 'singal'\]"):
        event("signal", {"iter": 3, "singal": 15})
    with pytest.raises(KeyError):
        event("surprise", {"iter": 3})


def test_every_field_of_a_line_says_what_it_is():
    """docs can be made from them: each kind has a docstring, and its name is the kind's."""
    for name, kind in {**METRICS_KINDS, **EVENT_KINDS}.items():
        assert kind.__doc__ and kind.__name__.lower() == name
