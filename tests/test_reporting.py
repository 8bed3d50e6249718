"""The JSON lines after a crash, after going back to an earlier checkpoint, and the console."""

from __future__ import annotations

import json
import os
import shutil

from conftest import lines

from orchestrate.training.store.reporting import Reporter
from orchestrate.training.store.run_folder import EVENTS, METRICS, Lines, clean, line, rewind


def train(reporter, iteration: int) -> None:
    reporter.metrics("train", iter=iteration, tokens=16 * iteration, seconds=0.5, loss=2.0)


def operation(reporter, iteration: int, name: str) -> None:
    reporter.event(
        "operation", iter=iteration, entry=1, name=name, value=None, reason="", desc="", over=None, settings_before={},
        settings_after={}, val_loss_before=None, val_loss_after=None, seconds=0.0, parameters_total=1,
        parameters_trainable=1,
    )  # fmt: skip


def test_nan_and_infinity_become_null():
    assert clean({"a": float("nan"), "b": [float("inf"), 1.5], 3: (True, None)}) == {
        "a": None,
        "b": [None, 1.5],
        "3": [True, None],
    }


def test_a_piece_of_a_line_that_a_crash_left_is_cut(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"kind": "a"}\n{"kind": "b", "val')
    log = Lines(path)
    log.write(line({"kind": "c", "val_loss": float("inf")}))
    log.close()
    assert path.read_text().endswith('"val_loss": null}\n')
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_rewind_cuts_metrics_and_voids_the_course_but_not_what_befell_the_process(tmp_path):
    reporter = Reporter(tmp_path, 10, 0, None)
    train(reporter, 1)
    operation(reporter, 1, "set_lr")
    sizes = reporter.sizes()
    train(reporter, 2)
    operation(reporter, 2, "stop")
    reporter.event("signal", iter=2, signal=15)
    reporter.close()
    with open(tmp_path / EVENTS, "ab") as file:
        file.write(b'{"kind": "operation", "it')

    rewind(tmp_path, sizes)
    assert [json.loads(line)["iter"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1]
    found = [json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()]
    assert [(e["kind"], e["iter"], e.get("void", False)) for e in found] == [
        ("operation", 1, False),
        ("operation", 2, True),
        ("signal", 2, False),
    ]


def test_on_a_terminal_there_is_a_bar_and_elsewhere_plain_lines(tmp_path, monkeypatch, capsys):
    plain = Reporter(None, 100, 0, tmp_path / "run.log")
    plain.progress(5, loss="2.5", next="[1] stop")
    plain.close()
    assert capsys.readouterr().out == "iter 5: loss 2.5, next [1] stop\n"
    assert (tmp_path / "run.log").read_text() == "iter 5: loss 2.5, next [1] stop\n"

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = Reporter(None, 100, 0, None)
    bar.progress(50, loss="1.5", next="[2] set_lr 0.1")
    bar.close()
    shown = capsys.readouterr().err
    assert "50/100" in shown and "loss 1.5, next [2] set_lr 0.1" in shown


def test_a_line_that_has_no_room_is_left_out_and_told(tmp_path, monkeypatch, capsys):
    """The disk takes half a line: no half line stays, a person is told once, and later lines are written again."""
    reporter = Reporter(tmp_path, 9, 0, None)
    real = os.write
    train(reporter, 1)
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[: len(data) // 2]))
    for i in (2, 3):
        train(reporter, i)
    monkeypatch.undo()
    train(reporter, 4)
    reporter.close()
    assert [line["iter"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 4]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "cannot be written to (No space left" in told[0] and "2 lines are lost" in told[1]
    (event,) = lines(tmp_path / "events.jsonl")
    assert event["kind"] == "error" and event["iter"] == 4 and "2 lines are lost" in event["message"]


def test_a_removed_console_log_is_made_anew_and_said(tmp_path, capsys):
    reporter = Reporter(tmp_path, 9, 0, tmp_path / "logs" / "run.log")
    reporter.say("before")
    shutil.rmtree(tmp_path / "logs")
    train(reporter, 3)
    reporter.say("after")
    reporter.close()
    told = f"warning: {tmp_path}/logs/run.log was removed: a new one is begun"
    assert capsys.readouterr().out.splitlines() == ["before", "after", told]
    assert (tmp_path / "logs" / "run.log").read_text().splitlines() == ["after", told]
    (event,) = lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["iter"]) == ("error", 3) and "run.log was removed" in event["message"]


def test_a_console_log_without_room_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    reporter = Reporter(tmp_path, 9, 0, tmp_path / "run.log")
    monkeypatch.setattr(os, "write", lambda handle, data: 0)
    reporter.say("lost")
    monkeypatch.undo()
    reporter.say("kept")
    reporter.close()
    assert (tmp_path / "run.log").read_text().splitlines()[0] == "kept"
    assert "run.log cannot be written to" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_anew_for_a_while(tmp_path, capsys):
    """The file number of the removed log never becomes another file's: nothing of ours is written into that."""
    folder = tmp_path / "run"
    folder.mkdir()
    reporter = Reporter(folder, 9, 0, None)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    train(reporter, 1)
    with open(tmp_path / "other", "w") as other:
        train(reporter, 2)
        other.flush()
    assert (tmp_path / "other").read_text() == ""
    folder.unlink()
    train(reporter, 3)
    reporter.close()
    assert [line["iter"] for line in lines(folder / "metrics.jsonl")] == [3]
    assert "2 lines are lost" in capsys.readouterr().out


def test_what_a_resume_changes_is_told_briefly(tiny, resume, tmp_path, capsys):
    _, out = tiny([{"name": "set_lr", "value": 1e-3, "at_iter": 2 + n} for n in range(3)], max_iters=3)
    path = tmp_path / "new.json"
    path.write_text(json.dumps([{"name": "set_lr", "value": 1e-3, "at_iter": 2}, {"name": "set_lr", "value": 1e-3,
                                "at_iter": 3}, {"name": "stop", "at_iter": 9}]))  # fmt: skip
    capsys.readouterr()
    assert resume(out, schedule=path, max_iters=4) == 0
    assert "override: schedule 1 entry (set_lr) -> 1 entry (stop) (--schedule)" in capsys.readouterr().out


def test_a_metric_that_this_machine_does_not_have_is_told_once(tiny, capsys):
    tiny([{"name": "stop", "trigger": {"metric": "machine.device_memory", "above": 1}}], max_iters=3)
    told = [line for line in capsys.readouterr().out.splitlines() if "machine.device_memory" in line]
    assert told == [
        "warning: machine.device_memory has no value on this machine, and the schedule or early stopping asks for it"
    ]
