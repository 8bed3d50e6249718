"""orchestrate watch: facts pinned by hand on made run folders, the text of the view, and the view on a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import events

from orchestrate.tools import main as commands
from orchestrate.tools.watch import application, parse, plot, summary, view
from orchestrate.training.report.data import Series
from orchestrate.training.report.live import Live, Watcher
from orchestrate.training.schedule.triggers import TRIGGERS
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Elapsed, Measured

WRITTEN = 1_000_000.0
"""When the made folders were written to last."""


def start(**more) -> dict:
    return {
        "kind": "start", "iter": 0, "time": 5.0, "config": {}, "settings": {"model": {"n_layer": 2}}, "world_size": 1,
        "device": "cpu", "dtype": "float32", "torch": "2", "python": "3", "parameters_total": 10,
        "parameters_trainable": 10, "tokens_per_iter": 8, **more,
    }  # fmt: skip


def step(iteration: int, loss: float, **more) -> dict:
    return {
        "kind": "train",
        "iter": iteration,
        "tokens": 8 * iteration,
        "seconds": 2.0 * iteration,
        "loss": loss,
        **more,
    }


@pytest.fixture
def made(tmp_path):
    """made(metrics, events, config=...) writes a run folder, at the time WRITTEN."""

    def write(metrics=(), happened=(), name="run", **config) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, lines in (("metrics.jsonl", metrics), ("events.jsonl", happened)):
            if lines is not None:
                text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
                (folder / file).write_text(text, "utf-8")
                os.utime(folder / file, (WRITTEN, WRITTEN))
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def look(folder: Path, age: float = 3.0) -> Live:
    return Watcher(folder, lambda: WRITTEN + age).look()


# ---------------------------------------------------------------------------------------------- facts


def test_a_run_under_way(made):
    machine = {"host_memory": 3 * 2**30, "device_memory": 2**29}
    lines = [step(n, 4.0 - n, lr=0.25, tokens_per_second=1234.5, machine=machine) for n in (1, 2, 3)]
    evaluation = {"kind": "eval", "iter": 3, "tokens": 24, "seconds": 6.0, "val_loss": 1.5}
    live = look(made([*lines, evaluation], [start()], max_iters=12))
    assert live.state == "under way" and live.name == "run" and not live.health and not live.heads
    assert live.facts["iteration"] == "3 of 12 (25 %)"
    assert live.facts["to go"] == "about 18 s at this pace"  # 9 iterations of 2 seconds
    assert (live.facts["last line"], live.facts["tokens"], live.facts["time"]) == ("3 s ago", "24", "6 s")
    assert (live.facts["loss"], live.facts["last val loss"], live.facts["learning rate"]) == ("1", "1.5000", "0.25")
    assert live.facts["tokens/s"] == "1,234"
    assert (live.facts["host memory"], live.facts["device memory"]) == ("3.00 GiB", "0.50 GiB")
    assert "device memory peak" not in live.facts and live.facts["stage"] == "the start"
    assert [list(series.values) for series in live.losses] == [[3.0, 2.0, 1.0], [1.5]]
    assert live.events == ("0  the run begins",)


def test_the_pace_is_that_of_the_last_lines(made):
    slow = [step(n, 1.0) for n in range(1, 30)]
    fast = [{**step(29 + n, 1.0), "seconds": 58.0 + n / 10} for n in range(1, 20)]
    live = look(made([*slow, *fast], [start()], max_iters=148))
    assert live.facts["to go"] == "about 10 s at this pace"  # 100 iterations of 0.1 s; 20 lines, 19 stretches


@pytest.mark.parametrize("age, quiet", [(59, False), (60, False), (61, True), (3600, True)])
def test_a_job_that_was_killed_is_quiet(made, age, quiet):
    live = look(made([step(1, 1.0), step(2, 1.0)], [start()]), age)
    assert live.state.startswith("quiet") is quiet
    assert not quiet or "nothing was written for " in live.state


def test_slow_lines_make_nobody_nervous(made):
    """A line takes 10 seconds here: nothing is said before 200."""
    lines = [{**step(n, 1.0), "seconds": 10.0 * n} for n in (1, 2, 3)]
    folder = made(lines, [start()])
    assert look(folder, 199).state == "under way" and look(folder, 201).state.startswith("quiet")


def test_a_job_that_died_and_one_that_ended(made):
    dead = {"kind": "emergency", "iter": 2, "time": 9.0, "reason": "MemoryError", "saved": False}
    live = look(made([step(1, 1.0), step(2, 1.0)], [start(), dead], max_iters=4), 9999)
    assert live.state == "died at iteration 2: MemoryError" and "to go" not in live.facts
    assert live.events[-1] == "2  emergency: MemoryError"
    over = {"kind": "end", "iter": 2, "time": 9.0, "reason": "max_iters", "best_val_loss": None}
    assert look(made([step(2, 1.0)], [start(), over], "b"), 9999).state == "ended at iteration 2: max_iters"


def test_torn_missing_and_void_lines(made):
    void = [step(3, 9.0, void=True), step(4, 9.5, void=True)]
    folder = made([step(1, 2.0), "{broken\n", step(2, 1.5), *void, step(3, 1.25), '{"kind": "tra'], None, max_iters=6)
    live = look(folder)
    assert [list(series.values) for series in live.losses] == [[2.0, 1.5, 1.25]]
    assert live.facts["iteration"] == "3 of 6 (50 %)" and live.facts["loss"] == "1.25"
    assert live.health[0] == "events.jsonl is missing"
    assert any("1 line of metrics.jsonl cannot be read" in one for one in live.health)


def test_what_has_not_begun(made, tmp_path):
    assert look(tmp_path / "none").state == "not begun: there is no such folder"
    live = look(made([], []))
    assert live.state.startswith("not begun: ") and "nothing is logged" in live.state
    assert view(live) == f"run: {live.state}" and "config" not in live.facts
    assert look(made(None, None, "bare")).state.startswith("not begun")


def test_what_is_new_is_seen_and_what_is_not_is_not_read_again(made, monkeypatch):
    folder, now = made([step(1, 2.0), step(2, 1.5)], [start()], max_iters=10), [WRITTEN + 1]
    watcher = Watcher(folder, lambda: now[0])
    assert watcher.look().facts["iteration"] == "2 of 10 (20 %)"
    now[0] += 5
    with monkeypatch.context() as patch:
        patch.setattr("orchestrate.training.report.live.read_story", lambda folder: pytest.fail("read again"))
        assert watcher.look().facts["last line"] == "6 s ago"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(step(3, 1.0)) + "\n")
    assert watcher.look().facts["iteration"] == "3 of 10 (30 %)"


# ---------------------------------------------------------------------------------------------- what comes next

PLAN = [
    {"name": "set_lr", "value": 0.004, "at_iter": 9, "desc": "lower"},
    {
        "name": "set_lr", "value": 0.002, "trigger_loss": 0.5, "max_wait_iters": 50,
        "trigger_plateau": {"evals": 3, "min_delta": 0.01},
    },
    {"name": "stop"},
]  # fmt: skip


def test_heads_from_the_last_checkpoint_and_from_what_is_recorded_behind_it(tiny):
    _, out = tiny(PLAN, max_iters=16, report=False)
    (out / "events.jsonl").write_text(
        "".join(line for line in (out / "events.jsonl").open() if json.loads(line)["kind"] != "end")
    )
    losses = {m["iter"]: m["val_loss"] for m in map(json.loads, (out / "metrics.jsonl").open()) if "val_loss" in m}
    last = losses[16]
    expected = (
        f"val loss {last:.4f}, {last - 0.5:.4f} from 0.5",
        "waited 7 of 50 iterations",
        "0 of 3 values of val loss without a gain of 0.01",
    )
    assert losses[16] < losses[12] - 0.01
    live = Watcher(out).look()
    (head,) = live.heads
    assert (head.title, head.what, head.near) == ("[2]", "set_lr 0.002", expected)
    assert live.facts["stage"] == "since iteration 9: set_lr 0.004 (lower)"
    newest = sorted((out / "checkpoints").glob("iter_*"))[-1]
    assert newest.name == "iter_000000016"
    shutil.rmtree(newest)
    older = sorted(path for path in (out / "checkpoints").glob("iter_*"))
    while older and older[-1].name > "iter_000000008":
        shutil.rmtree(older.pop())
    if older:  # the entry has fired behind this one
        assert Watcher(out).look().heads[0].near == expected
    shutil.rmtree(out / "checkpoints")
    (head,) = Watcher(out).look().heads  # from the start on
    assert (head.title, head.near) == ("[2]", expected)


def test_an_event_moves_a_queue_on_whatever_its_checkpoint_says(tiny):
    """The checkpoint of iteration 8 does not know of the operation at 9."""
    _, out = tiny(PLAN, max_iters=8, report=False)
    with open(out / "metrics.jsonl", "a") as file:
        for n in (9, 10):
            file.write(json.dumps({"kind": "train", "iter": n, "tokens": 128 * n, "seconds": 5.0, "loss": 1.0}) + "\n")
        file.write(json.dumps({"kind": "eval", "iter": 10, "tokens": 1280, "seconds": 5.0, "val_loss": 0.75}) + "\n")
    fired = {
        "kind": "operation", "iter": 9, "time": 1e10, "entry": 1, "name": "set_lr", "value": 0.004, "reason": "",
        "desc": "", "over": None, "settings_before": {}, "settings_after": {}, "val_loss_before": None,
        "val_loss_after": None, "seconds": 0.0, "parameters_total": 1, "parameters_trainable": 1,
    }  # fmt: skip
    kept = [line for line in (out / "events.jsonl").open() if json.loads(line)["kind"] != "end"]
    (out / "events.jsonl").write_text("".join(kept))
    (head,) = Watcher(out).look().heads
    assert (head.title, head.near) == ("[1]", ("iteration 10 of 9",))
    (out / "events.jsonl").write_text("".join([*kept, json.dumps(fired) + "\n"]))
    (head,) = Watcher(out).look().heads
    assert head.title == "[2]"
    assert head.near[:2] == ("val loss 0.7500, 0.2500 from 0.5", "waited 1 of 50 iterations")


def test_damaged_checkpoints_and_schedules_are_told(tiny):
    _, out = tiny(PLAN, max_iters=8, report=False)
    assert not Watcher(out).look().health
    newest = sorted((out / "checkpoints").glob("iter_*"))[-1]
    os.truncate(newest / "model.safetensors", 10)
    (out / "schedule.yaml").write_text("- {name: nonsense}\n")
    health = "\n".join(Watcher(out).look().health)
    assert "model.safetensors is damaged" in health and "what comes next is not known" in health


def test_looking_on_changes_nothing(tiny):
    _, out = tiny(PLAN, max_iters=4, report=False)
    before = {path: path.lstat().st_mtime_ns for path in out.rglob("*")}
    Watcher(out).look()
    assert {path: path.lstat().st_mtime_ns for path in out.rglob("*")} == before and events(out, "end")


@pytest.mark.parametrize(
    "field, value, near",
    [
        ("trigger_loss", 2.0, "val loss 2.5000, 0.5000 from 2"),
        ("max_wait_iters", 2000, "waited 40 of 2,000 iterations"),
        ("max_wait_tokens", 9000, "waited 400 of 9,000 tokens"),
        ("max_wait_seconds", 60.0, "waited 7 of 60 s"),
        ("at_iter", 1500, "iteration 1,240 of 1,500"),
        ("at_tokens", 20000, "12,400 of 20,000 tokens"),
        ("trigger_plateau", {"evals": 4, "min_delta": 0.1}, "2 of 4 values of val loss without a gain of 0.1"),
        ("trigger", {"metric": "grad_norm", "below": 0.5}, "grad_norm 0.25, 0.25 from 0.5"),
        ("trigger", {"metric": "lr", "above": 0.5}, "lr is not measured yet"),
        (
            "trigger",
            {"metric": "loss", "plateau": {"evals": 9, "min_delta": 0.5}},
            "0 of 9 values of loss without a gain of 0.5",
        ),
        (
            "all_of",
            [{"at_iter": 2000}, {"max_wait_iters": 50}],
            "iteration 1,240 of 2,000 and waited 40 of 50 iterations",
        ),
    ],
)  # fmt: skip
def test_how_near_a_trigger_is(field, value, near):
    elapsed = Elapsed(1240, 12400, 40, 400, 7.2)
    history = {"val_loss": (3.0, 2.5, 2.45, 2.5), "loss": (2.0,)}
    measured = Measured({}, history, {"val_loss": 2.5, "grad_norm": 0.25})
    trigger = TRIGGERS[field](value=value)
    assert trigger.near(elapsed, measured) == near and trigger.fires(elapsed, Measured()) is None


# ---------------------------------------------------------------------------------------------- the text

HOSTILE = "\x1b[2J\x9b31m[bold red]x[/]\u202e\nnext"


def test_hostile_text_is_shown_as_text(made):
    ruin = {"kind": "error", "iter": 1, "time": 9.0, "message": HOSTILE}
    live = look(made([step(1, 1.0), step(2, 1.0)], [start(device=HOSTILE), ruin], name="a\x1b]0;x\x07[red]"))
    for text in (view(live), summary(live)):
        assert not any(character in text for character in "\x1b\x9b\u202e\x07")
    assert "\\x1b[2J\\x9b31m[bold red]x[/]\\u202e next" in view(live, 200) and "a\\x1b]0;x\\x07[red]:" in summary(live)


@pytest.mark.parametrize("width", [40, 57, 100])
def test_no_line_is_wider_than_the_terminal(made, width):
    live = look(made([step(n, 2.0 / n, lr=0.1) for n in range(1, 90)], [start(device="c" * 300)], max_iters=99))
    assert max(map(len, view(live, width).splitlines())) <= width


def test_the_plot():
    def series(iters, values):
        return Series("loss", False, {"iter": np.array(iters, dtype=float)}, np.array(values))

    falling = plot([series([0, 100], [2.0, 1.0])], width=10, rows=2)
    # Two characters of scale and blank, eight of dots: a line from the upper left to the lower right.
    assert falling == ["2 \u2809\u2812\u2824\u28c0", "1 \u2800\u2800\u2800\u2800\u2809\u2812\u2824\u28c0", "  0    100"]
    assert plot([series([7], [1.5])], 20, 2) == ["1.5 \u2801", "1.5", "    7              7"]
    assert plot([], 20) == [] and plot([series([], [])], 20) == []


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_prints_once(made, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "textual", None)
    folder = made([step(1, 1.0), step(2, 1.0)], [start()])
    assert commands.run("watch", ["--once", str(folder), str(folder.parent / "later")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("run: quiet") and "\n\nlater: not begun: there is no such folder\n" in told
    assert commands.run("watch", [str(folder)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: watch: textual") and "'training-orchestrator[watch]', or give --once" in told


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--every=0", "x"], "--every 0.0: must be more than 0"),
        (["--every=nan", "x"], "--every nan"),
        ([__file__], "is a file; a run folder is wanted"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(Refused, match=message):
        parse(arguments)


# ---------------------------------------------------------------------------------------------- on a terminal


def shown(app, name: str) -> str:
    return str(app.query_one(name).render())


async def until(pilot, condition) -> None:
    for _ in range(200):
        await pilot.pause(0.05)
        if condition():
            return
    raise AssertionError("it never came to be")


def test_the_view_renews_itself_and_q_ends_it(made):
    pytest.importorskip("textual", reason="the extra watch is not installed")
    folder = made([step(1, 2.0), step(2, 1.5)], [start(device=HOSTILE)], max_iters=10)

    async def session():
        app = application([Watcher(folder, lambda: WRITTEN)], 0.05)
        async with app.run_test(size=(90, 40)) as pilot:
            await until(pilot, lambda: "2 of 10 (20 %)" in shown(app, "#run"))
            assert "[bold red]x[/]" in shown(app, "#run") and not app.query("#runs")
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(step(3, 1.0)) + "\n")
            await until(pilot, lambda: "3 of 10 (30 %)" in shown(app, "#run"))
            await pilot.press("q")
        return app.return_value

    assert asyncio.run(session()) == 0


def test_several_runs_and_the_chosen_one(made):
    pytest.importorskip("textual", reason="the extra watch is not installed")
    folders = [made([step(1, 2.0), step(2, 1.5)], [start()], name=name) for name in ("one", "[two]")]

    async def session():
        app = application([Watcher(folder, lambda: WRITTEN) for folder in folders], 0.05)
        async with app.run_test(size=(90, 40)) as pilot:
            await until(pilot, lambda: shown(app, "#run").startswith("one: under way"))
            assert [line[:8] for line in shown(app, "#runs").splitlines()] == ["> one: u", "  [two]:"]
            await pilot.press("down")
            await until(pilot, lambda: shown(app, "#run").startswith("[two]: under way"))
            assert shown(app, "#runs").splitlines()[1].startswith("> [two]: under way, 2")
            await pilot.press("j")
            await until(pilot, lambda: shown(app, "#run").startswith("one: "))

    asyncio.run(session())


def test_a_signal_ends_it(made):
    pytest.importorskip("textual", reason="the extra watch is not installed")

    class Signals:
        received = 15

    async def session():
        app = application([Watcher(made([], []))], 0.05, Signals())
        async with app.run_test() as pilot:
            await until(pilot, lambda: app.return_value is not None)
        return app.return_value

    assert asyncio.run(session()) == 143
