"""The report: what is told of a run folder made by hand, the page that draws it, and a browser that opens the page."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import train_orchestrated
from orchestrate.tools import report
from orchestrate.tools.main import run as command
from orchestrate.training.report import data as told
from orchestrate.training.report import drawing, write
from orchestrate.training.report.data import Series, duration, mark, read_story, thinned
from orchestrate.training.report.page import names_of, page, plotly_js
from orchestrate.training.schedule.file import Schedule
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store.run_folder import EVENTS, METRICS, event, line

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 \"'"

BEGINS = {
    "config": {"dataset": "tiny"},
    "settings": {"model": {"n_layer": 2, "n_embd": 16, "n_head": 2, "block_size": 2, "vocab_size": 9}},
    "world_size": 2, "device": "cpu", "dtype": "float32", "torch": "2.13", "python": "3.12",
    "parameters_total": 100, "parameters_trainable": 90, "tokens_per_iter": 16,
}  # fmt: skip
SCHEDULE = [
    {"name": "set_lr", "value": 0.5, "at_iter": 10, "desc": "bold", "guard": {"within_iters": 10}},
    {"name": "set_attn_lora_rank", "value": 2, "trigger_loss": 3.4, "reevaluate": True},
    {"name": "stop", "at_iter": 99},
]


def metrics(kind: str, iteration: int, seconds: float, value: float | None, **more) -> dict:
    loss = "loss" if kind == "train" else "val_loss"
    batch = {"lr": 1e-3, "batch_size": 4, "grad_accum": 2, "sequence_length": 2}
    return {"kind": kind, "iter": iteration, "tokens": 16 * iteration, "seconds": seconds, loss: value, **batch, **more}


def operation(iteration: int, entry: int | None, name: str, value, **more) -> dict:
    return {
        "kind": "operation", "iter": iteration, "entry": entry, "name": name, "value": value, "reason": "it was time",
        "desc": "", "over": None, "settings_before": {}, "settings_after": {}, "val_loss_before": None,
        "val_loss_after": None, "seconds": 0.25, "parameters_total": 100, "parameters_trainable": 90, **more,
    }  # fmt: skip


PARTS = {"seconds_by_part": {"data": 0.5, "forward_backward": 2.0}}
LINES = [
    metrics("eval", 0, 1.0, 5.0),
    metrics("train", 10, 2.0, 4.0, **PARTS),
    metrics("eval", 10, 2.5, 4.0),
    metrics("train", 20, 3.5, 9.0, void=True, **PARTS),
    metrics("eval", 20, 4.0, 8.0, void=True),
    metrics("train", 20, 5.0, 3.5, bits_per_byte=1.25, **PARTS),
    metrics("eval", 20, 5.5, 3.4),
    metrics("eval", 20, 5.6, 3.3, why="after an operation"),
    metrics("train", 30, 7.0, None),
    metrics("eval", 30, 7.2, 3.2),
]
HAPPENED = [
    (1000.0, {"kind": "start", "iter": 0, **BEGINS}),
    (1002.5, {"kind": "decision", "iter": 10, "entry": 1, "name": "set_lr", "reason": "iteration 10"}),
    (1002.6, operation(10, 1, "set_lr", 0.5, desc="bold", void=True)),
    (1004.0, {"kind": "rollback", "iter": 10, "from_iter": 20, "reason": "guard: val loss 8.0000 > 4.0500",
              "checkpoint": "iter_000000010_before_entry_1", "entry": 1, "name": "set_lr", "val_loss_before": 4.0,
              "val_loss": 8.0}),
    (1004.5, {"kind": "checkpoint", "iter": 10, "path": "checkpoints/iter_000000010", "reason": "x", "seconds": 0.1}),
    (1005.6, {"kind": "decision", "iter": 20, "entry": 2, "name": "set_attn_lora_rank", "reason": "val loss"}),
    (1005.7, operation(20, 2, "set_attn_lora_rank", 2, val_loss_before=3.4, val_loss_after=3.3, parameters_total=120,
                       parameters_trainable=20, settings_before={"model.n_layer": 2, "reshapes_asked": 0},
                       settings_after={"model.n_layer": 3, "reshapes_asked": 1})),
    (5000.0, {"kind": "resume", "iter": 25, "checkpoint": "/x/iter_000000025", "problems": ["iter_26 is damaged"],
              "set_aside": [], **BEGINS, "parameters_total": 120, "parameters_trainable": 20}),
    (5000.1, {"kind": "override", "iter": 25, "key": "eval_interval", "before": 5, "after": 10, "applied": True,
              "reason": "--eval_interval"}),
    (5000.1, {"kind": "override", "iter": 25, "key": "beta1", "before": 0.9, "after": 0.9, "applied": False,
              "reason": "as it was"}),
    (5001.0, {"kind": "decision", "iter": 30, "entry": 2, "name": "set_attn_lora_rank", "reason": "guard: within"}),
    (5001.0, {"kind": "decision", "iter": 30, "entry": 2, "name": "set_attn_lora_rank", "reason": "reached"}),
    (5001.0, {"kind": "samples", "iter": 30, "texts": [{"prompt": "a", "text": "ab"}]}),
    (5001.5, {"kind": "end", "iter": 30, "reason": "max_iters", "best_val_loss": 3.2, "not_fired": [3]}),
]  # fmt: skip


def made(folder: Path, measured=LINES, happened=HAPPENED, schedule=SCHEDULE) -> Path:
    """A run folder of these lines; the events have the fields that they must have."""
    folder.mkdir(parents=True)
    (folder / METRICS).write_text("".join(line(record) + "\n" for record in measured), "utf-8")
    for _, record in happened:
        event(record["kind"], {key: value for key, value in record.items() if key not in ("kind", "void")})
    (folder / EVENTS).write_text("".join(line({**r, "time": t}) + "\n" for t, r in happened), "utf-8")
    if schedule is not None:
        (folder / "schedule.yaml").write_text(json.dumps(schedule), "utf-8")
    return folder


@pytest.fixture
def story(tmp_path):
    return read_story(made(tmp_path / "run"))


# ---------------------------------------------------------------------------------------------- what is told


def points(series: Series) -> list[tuple[float, float, float, float]]:
    return list(zip(*(series.at[axis].tolist() for axis in told.AXES), series.values.tolist(), strict=True))


def test_series_are_in_order_and_what_was_taken_back_is_apart(story):
    assert points(story.of("loss")) == [(10, 160, 2, 4), (20, 320, 5, 3.5)], "null is no number"
    assert points(story.of("loss", void=True)) == [(20, 320, 3.5, 9)]
    assert points(story.of("val_loss")) == [
        (0, 0, 1, 5), (10, 160, 2.5, 4), (20, 320, 5.5, 3.4), (20, 320, 5.6, 3.3), (30, 480, 7.2, 3.2),
    ]  # fmt: skip
    assert points(story.evaluations) == [(0, 0, 1, 5), (10, 160, 2.5, 4), (20, 320, 5.5, 3.4), (30, 480, 7.2, 3.2)]
    assert points(story.of("bits_per_byte")) == [(20, 320, 5, 1.25)]
    assert story.of("sequences").values.tolist() == [8.0] * 7 and story.of("tokens_per_iter").values[0] == 16
    assert story.of("batch_size") is None and story.of("iter") is None


def test_each_branch_that_was_left_is_parted_from_the_next(tmp_path):
    measured = [
        metrics("train", 1, 1.0, 1.0),
        metrics("train", 2, 2.0, 2.0, void=True),
        metrics("train", 3, 3.0, 3.0, void=True),
        metrics("train", 2, 4.0, 4.0, void=True),
        metrics("train", 2, 5.0, 5.0),
    ]
    values = read_story(made(tmp_path / "run", measured)).of("loss", void=True).values
    assert [None if math.isnan(v) else v for v in values] == [2.0, 3.0, None, 4.0]


def test_times_by_part_are_per_iteration_and_their_sum_counts_everything(story):
    assert points(story.of("seconds_by_part.data")) == [(10, 160, 2, 0.05), (20, 320, 5, 0.5)]
    assert story.seconds_by_part == {"data": 1.5, "forward_backward": 6.0}


def test_parameters_are_steps_up_to_the_last_line(story):
    assert [(x, y) for x, _, _, y in points(story.of("parameters_total"))] == [
        (0, 100), (20, 120), (25, 120), (30, 120),
    ]  # fmt: skip
    assert story.of("parameters_trainable").values.tolist() == [90, 20, 20, 20]


def test_markers_have_a_place_on_every_axis(story):
    found = [(m.kind, m.at["iter"], m.at["tokens"], round(m.at["seconds"], 6), m.void) for m in story.markers]
    assert found == [
        ("start", 0, 0, 0, False),
        ("operation", 10, 160, 2.6, True),
        ("rollback", 20, 320, 4.0, False),
        ("checkpoint", 10, 160, 4.5, False),
        ("operation", 20, 320, 5.7, False),
        # After 3994.3 seconds without the run its clock goes on: half way between the lines of 20 and 30.
        ("resume", 25, 400, 6.3, False),
        ("override", 25, 400, 6.4, False),
        ("guard", 30, 480, 7.3, False),
        ("ramp", 30, 480, 7.3, False),
        ("end", 30, 480, 7.8, False),
    ]
    titles = {m.kind: (m.title, m.details) for m in story.markers}
    assert titles["rollback"] == (
        "back to iteration 10 from 20",
        ("[1] set_lr is taken back", "guard: val loss 8.0000 > 4.0500", "val loss 4.0000 -> 8.0000"),
    )
    assert titles["operation"][0] == "[2] set_attn_lora_rank 2"
    assert "val loss 3.4000 -> 3.3000" in titles["operation"][1] and "model.n_layer 2 -> 3" in titles["operation"][1]
    assert titles["resume"][1][0] == "passed over: iter_26 is damaged"
    assert titles["override"][0] == "eval_interval 5 -> 10"


def test_what_was_taken_back_lies_between_its_own_lines_and_where_the_ways_part(tmp_path):
    measured = [
        {**metrics("train", 10, 2.0, 4.0), "tokens": 1000},
        {**metrics("train", 20, 3.0, 4.0, void=True), "tokens": 1320},
        {**metrics("train", 20, 4.0, 4.0), "tokens": 5000},
    ]
    happened = [HAPPENED[0], (1002.5, operation(15, 1, "stop", None, void=True)), (1003.5, operation(15, 2, "stop", 1))]
    story = read_story(made(tmp_path / "run", measured, happened))
    assert [(m.void, m.at["tokens"]) for m in story.markers] == [(False, 0), (True, 1160), (False, 3000)]


def test_operations_say_what_they_cost_and_what_the_loss_did(story):
    first, second = story.operations
    assert (first.entry, first.what, first.desc, first.void, first.losses) == ("1", "set_lr 0.5", "bold", True, None)
    assert first.around == (None, None), "what was taken back has no evaluations beside it"
    assert second.losses == (3.4, 3.3) and second.around == (3.4, 3.2) and second.seconds == 0.25
    assert second.changes == ("model.n_layer 2 -> 3",) and (second.parameters, second.trainable) == (120, 20)


def test_an_operation_before_the_first_and_after_the_last_evaluation(tmp_path):
    happened = [(1000.0 + i, operation(i, None, "stop", None)) for i in (0, 5, 30, 31)]
    rows = read_story(made(tmp_path / "run", LINES[1:], happened)).operations
    assert [row.around for row in rows] == [(None, 4.0), (None, 4.0), (3.2, None), (3.2, None)]


def test_the_plan_beside_what_happened(story):
    assert [(row.number, row.what, row.when, row.desc) for row in story.plan] == [
        (1, "set_lr 0.5", "at_iter 10; guard: val_loss, 10 iterations, then revert", "bold"),
        (2, "set_attn_lora_rank 2", "trigger_loss 3.4", ""),
        (3, "stop", "at_iter 99", ""),
    ]
    assert [row.happened for row in story.plan] == [
        "iteration 10: it was time (taken back); taken back at 20: guard: val loss 8.0000 > 4.0500",
        "iteration 20: it was time; iteration 30: guard: within",
        "",
    ]


def test_a_repeated_entry_is_one_row_of_the_plan_and_each_round_an_operation(tmp_path):
    plan = {"tracks": {"rate": [{"name": "change_lr", "value": 0.5, "max_wait_iters": 5, "repeat": 9, "after": "b"}],
                       "other": [{"name": "stop", "at_iter": 99, "label": "b"}]}}  # fmt: skip

    def round_of(number: int) -> dict:
        return {"entry": 1, "name": "change_lr", "track": "rate", "round": number, "rounds": 9}

    happened = [HAPPENED[0]]
    for number in range(1, 8):
        happened.append((1000.0 + number, operation(number, **{**round_of(number), "value": 0.5})))
    ends = {"kind": "decision", "iter": 8, "reason": "the repetition ends: val loss 2 <= 3", **round_of(8), "step": 8}
    story = read_story(made(tmp_path / "run", happened=[*happened, (1010.0, ends)], schedule=plan))
    assert [row.when for row in story.plan] == [
        "max_wait_iters 5; after b; 9 rounds; track rate",
        "at_iter 99; track other",
    ]
    said = story.plan[0].happened.split("; ")
    assert said[0] == "round 1, iteration 1: it was time" and said[3] == "2 more" and len(said) == 7
    assert said[-1] == "iteration 8: the repetition ends: val loss 2 <= 3"
    assert [row.entry for row in story.operations][:2] == ["1 (round 1 of 9)", "1 (round 2 of 9)"]
    assert story.markers[1].title == "[1 (round 1 of 9)] change_lr 0.5" and story.markers[-1].kind == "repetition"


@pytest.mark.parametrize(
    "text, said",
    [
        (b"- {name: of_my_own}", "unknown operation 'of_my_own'"),
        (b"\xff", "cannot be read"),
        (b"- {name: set_lr", "not YAML"),
    ],
)
def test_a_schedule_that_cannot_be_read_is_a_note(tmp_path, text, said):
    folder = made(tmp_path / "run", schedule=None)
    assert read_story(folder).plan == [] and read_story(folder).notes == []
    (folder / "schedule.yaml").write_bytes(text)
    story = read_story(folder)
    assert story.plan == [] and said in story.notes[0] and len(story.operations) == 2


def test_a_schedule_in_json_that_is_no_yaml(tmp_path):
    folder = made(tmp_path / "run", schedule=None)
    (folder / "schedule.yaml").write_text('[\n\t{"name": "stop"}\n]')
    assert [row.what for row in read_story(folder).plan] == ["stop"]


def test_facts_and_the_end(story):
    assert story.state == "ended at iteration 30: max_iters" and story.ended
    expected = {
        "iterations": "30", "tokens": "480", "time": "7.2 s", "best val loss": "3.2000 at iteration 30",
        "last val loss": "3.2000", "parameters": "120, 20 trainable", "starts": "2", "data": "tiny",
        "model": "2 layers, 16 wide, 2 heads, 2 tokens, 9 words", "machine": "2 x cpu, float32, torch 2.13",
        "checkpoints": "none",
    }  # fmt: skip
    assert story.facts == expected and story.notes == []
    assert [(t.iter, t.prompt, t.text) for t in story.texts] == [(30, "a", "ab")]


@pytest.mark.parametrize(
    "last, state, ended",
    [
        ([], "no end is recorded: it is under way, or was killed", False),
        ([{"kind": "emergency", "iter": 9, "reason": "Stopped: x"}], "died at iteration 9: Stopped: x", True),
        ([{"kind": "end", "iter": 9, "reason": "signal 15", "best_val_loss": None}], "ended at iteration 9: signal 15",
         True),
    ],
)  # fmt: skip
def test_a_run_that_has_not_ended_well(tmp_path, last, state, ended):
    story = read_story(made(tmp_path / "run", happened=[*HAPPENED[:-1], *((6000.0, record) for record in last)]))
    assert (story.state, story.ended) == (state, ended)


def test_what_cannot_be_read_is_told(tmp_path):
    folder = made(tmp_path / "run", [{**LINES[0], "iter": 10**400}, *LINES])
    with open(folder / METRICS, "a") as file:
        file.write("no line\n")
    story = read_story(folder)
    assert story.notes == [
        "1 line of metrics.jsonl cannot be read and is left out",
        "1 lines of metrics.jsonl hold numbers that cannot be and are left out",
    ]
    assert len(story.of("val_loss").values) == 5


@pytest.mark.parametrize("made_of", [{}, {METRICS: "{}\n"}, {EVENTS: ""}])
def test_a_folder_without_a_run_is_refused(tmp_path, made_of):
    for name, text in made_of.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(Refused, match="not a run folder, or nothing is logged in it yet") as refused:
        read_story(tmp_path)
    assert ("1 lines of metrics.jsonl cannot be read" in str(refused.value)) == (METRICS in made_of)


def test_metrics_alone_are_enough(tmp_path):
    folder = made(tmp_path / "run", schedule=None)
    (folder / EVENTS).unlink()
    story = read_story(folder)
    assert story.markers == [] and "there are no events" in story.notes[0] and len(story.of("loss").values) == 2


# ---------------------------------------------------------------------------------------------- long runs


def series(values, name="loss") -> Series:
    at = {axis: np.arange(len(values), dtype=float) for axis in told.AXES}
    return Series(name, False, at, np.array(values, dtype=float))


def test_a_long_series_keeps_its_extremes_and_ends(monkeypatch):
    monkeypatch.setattr(told, "MOST_POINTS", 10)
    values = np.sin(np.arange(1000.0))
    values[[123, 777]] = -50, 60
    short = thinned(series(values))
    assert len(short.values) <= 12 and short.values.min() == -50 and short.values.max() == 60
    assert short.at["iter"][0] == 0 and short.at["iter"][-1] == 999
    assert np.array_equal(short.values, values[short.at["iter"].astype(int)])
    assert (np.diff(short.at["iter"]) > 0).all()
    assert thinned(series(values[:10])).values.tolist() == values[:10].tolist()


def test_a_gap_of_a_long_series_stays(monkeypatch):
    monkeypatch.setattr(told, "MOST_POINTS", 4)
    short = thinned(series([1, 2, 3, 4, math.nan, 5, 6, 7, math.nan, math.nan, math.nan, math.nan, math.nan]))
    assert [None if math.isnan(v) else v for v in short.values] == [1, None, 6, 7, None, None]


def test_times_of_a_long_run_are_means(monkeypatch):
    monkeypatch.setattr(told, "MOST_BUCKETS", 2)
    short = thinned(series([1, 2, 3, 10, 20, 30], "seconds_by_part.data"))
    assert short.values.tolist() == [2, 20] and short.at["iter"].tolist() == [2, 5]


def test_many_markers_become_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(told, "MOST_MARKERS", 3)
    saved = {"kind": "checkpoint", "path": "p", "reason": "r", "seconds": 0.1}
    happened = [HAPPENED[0], *((1001.0 + i, {**saved, "iter": i}) for i in range(9))]
    story = read_story(made(tmp_path / "run", happened=happened))
    assert [m.at["iter"] for m in story.markers] == [0, 0, 4, 8]
    assert story.notes == ["3 of 9 markers of the kind checkpoint are shown"]


def test_places_between_measurements():
    line = series([1.0, 3.0])
    assert mark(line, "iter", 0.5) == 2.0 and mark(line, "iter", 1.0) == 3.0
    assert mark(line, "iter", 1.01) is None and mark(line, "iter", -0.01) is None


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 s"), (12.34, "12.3 s"), (60, "1 min 0 s"), (3661, "1 h 1 min"), (90000, "1 d 1 h"), (86399, "23 h 59 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# ---------------------------------------------------------------------------------------------- the page


def facts_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_panels_known_and_unknown(story):
    names = {p["title"]: [t["name"] for t in p["traces"]] for p in drawing.panels([story])}
    assert names["loss (nats per token)"] == ["val_loss", "loss", "loss", "val_loss"]
    assert names["seconds per iteration, by part"] == ["seconds_by_part.data", "seconds_by_part.forward_backward"]
    assert names["bits_per_byte"] == ["bits_per_byte"] and names["parameters"][1] == "parameters_trainable"
    assert list(names)[:2] == ["loss (nats per token)", "learning rate"]


@pytest.mark.parametrize(
    "name, title",
    [
        ("val_loss/other", "loss (nats per token)"),
        ("eval/adder_accuracy", "task scores"),
        ("analysis.rank.0", "analysis"),
        ("coverage/a", "share of the data seen"),
        ("step_lr", "learning rate"),
        ("seconds_by_part.new", "seconds per iteration, by part"),
    ],
)
def test_where_a_metric_is_drawn(story, name, title):
    one = replace(story, series=[series([1.0], name)], seconds_by_part={"new": 1.0})
    assert [p["title"] for p in drawing.panels([one])] == [title]


def test_runs_are_compared_where_all_have_come(story):
    other = replace(story, evaluations=Series("val_loss", False, {a: np.array([0.0, 240]) for a in told.AXES},
                                              np.array([6.0, 2.0])))  # fmt: skip
    compared = drawing.comparison([story, other])
    places, rows = compared["tokens"]
    assert places == [60, 120, 180, 240] and rows[1] == [5, 4, 3, 2]
    # Of the first: 5.0 at 0, 4.0 at 160, 3.4 at 320.
    assert rows[0] == pytest.approx([4.625, 4.25, 3.925, 3.7])
    assert compared["seconds"][0] == pytest.approx([1.8, 3.6, 5.4, 7.2])
    assert drawing.comparison([replace(story, evaluations=None)]) == {}
    assert drawing.comparison([story, replace(story, evaluations=None)])["tokens"][1][1] == [None] * 4


def test_the_page_is_one_file_that_loads_nothing(story):
    text = page([story])
    own = text.replace(plotly_js(), "")
    assert len(text) - len(own) == len(plotly_js()) > 10**6, "one copy"
    assert not re.search(r"(https?:|//\w|\bsrc\s*=|@import|url\()", own)
    assert "default-src 'none'" in own and 'http-equiv="refresh"' not in own
    assert 'content="7"' in page([story], reload_seconds=7)
    facts = facts_of(text)
    assert len(facts["markers"]) == 10 and facts["last"] == {"iter": 30, "tokens": 480, "seconds": 7.2}
    for said in ("the plan, and what happened", "3.4000 \u2192 3.3000", "not fired", "where the time went"):
        assert said in own


def test_hostile_text_stays_text(tmp_path):
    hostile = [
        (1000.0, {"kind": "start", "iter": 0, **BEGINS, "config": {"dataset": HOSTILE}, "device": HOSTILE}),
        (1001.0, operation(10, 1, HOSTILE, HOSTILE, desc=HOSTILE, reason=HOSTILE, settings_after={HOSTILE: HOSTILE})),
        (1002.0, {"kind": "samples", "iter": 10, "texts": [{"prompt": HOSTILE, "text": HOSTILE}]}),
        (1003.0, {"kind": "error", "iter": 10, "message": HOSTILE}),
        (1004.0, {"kind": "end", "iter": 10, "reason": HOSTILE, "best_val_loss": None}),
    ]
    plan = [{"name": "set_lr", "value": 1.0, "desc": HOSTILE}]
    measured = [*LINES, {**LINES[0], "iter": 40, HOSTILE: 1.0, f"val_loss/{HOSTILE}": 1.0}]
    folder = made(tmp_path / "<img src=x onerror=alert(3)>", measured, hostile, plan)
    for text in (page([read_story(folder)]), page([read_story(folder), read_story(made(tmp_path / "other"))])):
        own = text.replace(plotly_js(), "")
        assert own.count("<script") == own.count("</script>") == 3 and "<img" not in own
        assert "&lt;img src=x onerror=alert(2)&gt;" in own and "&lt;img src=x onerror=alert(3)&gt;" in own
        assert HOSTILE in facts_of(text)["markers"][1]["title"]


def test_runs_of_one_name_are_told_apart(tmp_path, story):
    named = [replace(story, folder=tmp_path / one) for one in ("a/run", "b/run", "c")]
    assert names_of(named) == ["a/run", "b/run", f"{tmp_path.name}/c"]
    assert names_of(named[:1]) == ["run"]


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_writes_a_report(tmp_path, capsys):
    one, other = made(tmp_path / "one"), made(tmp_path / "other")
    assert report.main([str(one)]) == 0 and capsys.readouterr().out == f"report: {one / 'report.html'}\n"
    assert facts_of((one / "report.html").read_text("utf-8"))["runs"] == ["one"]
    assert report.main([str(one), str(other), "--out", str(tmp_path / "new" / "both.html")]) == 0
    text = (tmp_path / "new" / "both.html").read_text("utf-8")
    assert facts_of(text)["runs"] == ["one", "other"] and "Validation loss at equal tokens" in text
    assert not (other / "report.html").exists()


@pytest.mark.parametrize(
    "given, said",
    [
        (["{none}"], "there is no such folder"),
        (["{run}", "{run}/../run"], "is given twice"),
        (["{run}", "--follow", "--every", "0"], "--every 0.0: must be more than 0"),
        (["{run}", "--out", "{run}/metrics.jsonl/x.html"], "cannot be written"),
        (["{run}", "--operations", "{none}"], "cannot be read"),
    ],
)
def test_bad_input_of_the_command_is_one_message(tmp_path, given, said, capsys):
    run = made(tmp_path / "run")
    arguments = [text.format(run=run, none=tmp_path / "none") for text in given]
    assert command("report", arguments) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1 and "report:" not in told.out


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(["run", "--fast"])
    assert ended.value.code == 2 and "--fast" in capsys.readouterr().err


def test_a_damaged_log_that_cannot_be_read_is_refused(tmp_path, capsys):
    folder = made(tmp_path / "run")
    (folder / METRICS).unlink()
    (folder / METRICS).mkdir()
    assert command("report", [str(folder)]) == 2 and "metrics.jsonl: cannot be read" in capsys.readouterr().err


def test_without_plotly_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert command("report", [str(made(tmp_path / "run"))]) == 2
    told = capsys.readouterr().err
    assert "a report needs plotly: pip install" in told and "[report]" in told
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_report_follows_a_run_to_its_end(tmp_path, capsys):
    folder, said = made(tmp_path / "run", happened=HAPPENED[:-1]), []

    def say(text: str) -> None:
        said.append(text)
        assert 'http-equiv="refresh" content="1"' in (tmp_path / "page.html").read_text("utf-8")
        with open(folder / EVENTS, "a") as file:
            file.write(line({**HAPPENED[-1][1], "time": 5001.5}) + "\n")

    assert write.follow(lambda: [read_story(folder)], tmp_path / "page.html", 0.01, lambda: 0, say) == 0
    assert len(said) == 1 and "run at iteration 30" in said[0]
    assert "http-equiv" not in (tmp_path / "page.html").read_text("utf-8").split("Security-Policy")[1]


def test_following_ends_with_a_signal(tmp_path):
    folder, told = made(tmp_path / "run", happened=HAPPENED[:-1]), []
    stop = threading.Event()
    ended = write.follow(
        lambda: [read_story(folder)], tmp_path / "page.html", 60.0, lambda: 15 * stop.is_set(),
        lambda text: (told.append(text), stop.set()),
    )  # fmt: skip
    assert ended == 15 and len(told) == 1 and "no end is recorded" in (tmp_path / "page.html").read_text("utf-8")


# ---------------------------------------------------------------------------------------------- at the end of a run


def test_every_run_ends_with_a_report(tiny, capsys):
    code, out = tiny([{"name": "set_lr", "value": 5e-3, "at_iter": 4}], report=True)
    assert code == 0 and capsys.readouterr().out.splitlines()[-1] == f"report: {out / 'report.html'}"
    facts = facts_of((out / "report.html").read_text("utf-8"))
    assert [m["title"] for m in facts["markers"] if m["kind"] == "operation"] == ["[1] set_lr 0.005"]
    assert [m["kind"] for m in facts["markers"]][-1] == "end"
    lengths = {t["name"]: t for p in facts["panels"] for t in p["traces"]}["sequence_length"]
    assert set(lengths["y"]) == {16.0}


def test_a_run_without_plotly_ends_well(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    code, out = tiny(report=True)
    last = capsys.readouterr().out.splitlines()[-1]
    assert code == 0 and last.startswith("no report.html: a report needs plotly: pip install")
    assert not (out / "report.html").exists()


def test_whatever_a_report_meets_the_run_ends_well(tiny, monkeypatch, capsys):
    def broken(*given):
        raise RuntimeError("surprise")

    monkeypatch.setattr(write, "read_story", broken)
    code, _ = tiny(report=True)
    assert code == 0 and "no report.html: RuntimeError: surprise" in capsys.readouterr().out


def test_a_run_may_go_without(tiny, capsys):
    code, out = tiny()
    assert code == 0 and not (out / "report.html").exists() and "report" not in capsys.readouterr().out


def test_a_long_run_does_not_wait_for_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "LONGEST_AT_THE_END", 10)
    folder, said = made(tmp_path / "run"), []
    write.at_the_end(folder, Schedule(), said.append)
    assert "orchestrate report" in said[0] and not (folder / "report.html").exists()


def test_an_evaluation_alone_writes_no_report(tiny, data):
    _, out = tiny()
    given = ["--init_from=resume", f"--out_dir={out}", "--eval_only=True", "--report=True"]
    assert train_orchestrated.main(given) == 0 and not (out / "report.html").exists()


# ---------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    found, driver = next(filter(None, map(shutil.which, write.BROWSERS)), None), shutil.which("chromedriver")
    if found is None or driver is None:
        pytest.skip("there is no Chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def opened(browser, path: Path, width: int = 1200, theme: str = "light", part: str = "") -> None:
    """Open a page at a width and in a theme, and wait until it is drawn."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get("about:blank")
    browser.get(path.as_uri() + part)
    drawn(browser, part[1:] or "iter")


def drawn(browser, axis: str) -> None:
    until = time.monotonic() + 30
    while browser.execute_script("return document.body.dataset.drawn") != axis:
        assert time.monotonic() < until, browser.get_log("browser")
        time.sleep(0.05)


WIDER = "return document.documentElement.scrollWidth - innerWidth"


def lane_markers(browser) -> int:
    """Markers in the rows of what happened: those of plotly's second subplot."""
    return browser.execute_script(
        "return document.querySelectorAll('.panel.first .subplot.xy2 .scatterlayer .points path').length"
    )


def test_in_a_browser(browser, tmp_path):
    folder = made(tmp_path / "<b>&run")
    report.main([str(folder)])
    opened(browser, folder / "report.html")
    assert browser.get_log("browser") == []
    assert lane_markers(browser) == 10 and browser.title == "<b>&run"
    assert browser.execute_script(WIDER) <= 0
    page_colour = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(page_colour) == "rgb(255, 255, 255)"
    hover = "return document.querySelector('.panel.first .js-plotly-plot, .panel.first > div').data.at(-1).hovertext"
    assert any("end: max_iters" in text for text in browser.execute_script(hover))
    # Another axis moves the markers, and the place is kept where the page loads itself anew.
    browser.find_element("css selector", "input[value=tokens]").click()
    drawn(browser, "tokens")
    xs = "return document.querySelector('.panel.first > div').data.flatMap(t => t.yaxis === 'y2' ? t.x : [])"
    assert sorted(browser.execute_script(xs)) == [0, 160, 160, 320, 320, 400, 400, 480, 480, 480]
    assert browser.execute_script("return location.hash") == "#tokens"
    browser.find_element("id", "log").click()
    kind = "return document.querySelector('.panel.first > div').layout.yaxis.type"
    assert browser.execute_script(kind) == "log" and browser.get_log("browser") == []


@pytest.mark.parametrize("theme, page_colour, ink", [("light", 255, "#1c2126"), ("dark", 20, "#e4e8ec")])
def test_on_a_phone_in_light_and_dark(browser, tmp_path, theme, page_colour, ink):
    folder = made(tmp_path / ("a-very-long-name-of-a-run-" * 5))
    report.main([str(folder)])
    opened(browser, folder / "report.html", 360, theme, "#seconds")
    assert browser.execute_script(WIDER) <= 0 and browser.get_log("browser") == []
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert colour.startswith(f"rgb({page_colour}, ")
    font = "return document.querySelector('.panel.first > div').layout.font.color"
    assert browser.execute_script(font) == ink and lane_markers(browser) == 10


def test_hostile_text_does_nothing_in_a_browser(browser, tmp_path):
    link = '<a href="https://example.org">x</a>' + HOSTILE
    happened = [HAPPENED[0], (1001.0, operation(10, 1, link, link, desc=link)), (1002.0, HAPPENED[-1][1])]
    folder = made(tmp_path / "run", [*LINES, {**LINES[0], "iter": 40, link: 1.0}], happened)
    report.main([str(folder)])
    opened(browser, folder / "report.html")
    assert browser.get_log("browser") == [], "no alert, nothing refused by the policy"
    assert browser.execute_script("return document.querySelectorAll('a[href], img[src=x]').length") == 0
    shown = browser.execute_script("return [...document.querySelectorAll('h3')].map(h => h.textContent)")
    assert any('<a href="https:' in title for title in shown)


def test_two_runs_in_a_browser(browser, tmp_path):
    report.main([str(made(tmp_path / "a")), str(made(tmp_path / "b")), f"--out={tmp_path / 'both.html'}"])
    opened(browser, tmp_path / "both.html")
    assert lane_markers(browser) == 20 and browser.get_log("browser") == []


def test_a_picture(tmp_path, capsys):
    if not any(map(shutil.which, write.BROWSERS)):
        pytest.skip("there is no Chromium on this machine")
    folder = made(tmp_path / "run")
    assert report.main([str(folder), "--png", str(tmp_path / "new" / "run.png")]) == 0
    content = (tmp_path / "new" / "run.png").read_bytes()
    assert content.startswith(b"\x89PNG") and "picture: " in capsys.readouterr().out
    # The losses and the parameters; what else there could be stays as it is.
    assert struct.unpack(">II", content[16:24]) == (2400, 2 * (75 + 555 + 275))
    assert len(content) > 30_000, "something is drawn"


def test_a_picture_without_a_browser_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command("report", [str(made(tmp_path / "run")), "--png", str(tmp_path / "x.png")]) == 2
    assert "is drawn by Chromium or Chrome" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("script, said", [("exit 3", "exit code 3"), ("echo no display >&2", "no display")])
def test_a_browser_that_draws_nothing_is_told(tmp_path, monkeypatch, capsys, script, said):
    (tmp_path / "chromium").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "chromium").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert command("report", [str(made(tmp_path / "run")), "--png", str(tmp_path / "x.png")]) == 2
    told = capsys.readouterr().err
    assert "drew nothing" in told and said in told
