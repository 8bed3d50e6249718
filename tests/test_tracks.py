"""What a schedule says beyond a list: repetitions, conditions that hold together, `after`, and several tracks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import Driven, clip, on
from test_orchestrator import Host, fired, go, orchestrator
from test_schedule import problems, start

from orchestrate.training.schedule.file import parse_schedule
from orchestrate.training.schedule.orchestrator import Orchestrator
from orchestrate.training.schedule.position import Mark, Position, Queue
from orchestrate.training.schedule.stages import plan_stages
from orchestrate.training.settings.errors import OperationFailed, Refused


def decay(value: float = 0.5, **fields) -> dict:
    return {"name": "set_weight_decay", "value": value, **fields}


def halve(**fields) -> dict:
    return {"name": "change_lr", "value": 0.5, **fields}


def steps(schedule, name: str = "s.json") -> list[tuple]:
    text = schedule if isinstance(schedule, str) else json.dumps(schedule)
    return [
        (e.track, e.number, e.step, e.round, e.rounds, e.line)
        for e in parse_schedule(text, name).entries
    ]  # fmt: skip


def told(run: Driven) -> list[tuple]:
    """What has fired: (iteration, entry, round)."""
    return [(at, f["entry"], f.get("round")) for at, kind, f in run.events if kind == "operation"]


# ---------------------------------------------------------------------------------------------- the file


NESTED_YAML = """
tracks:
  rate:
    - {name: change_lr, value: 0.5}
    - repeat: {times: 2}
      do:
        - name: change_lr
          value: 0.5
        - {name: stop}
  growth:
    - {name: stop, repeat: 2}
operations:
  - {name: stop}
"""


@pytest.mark.parametrize("name", ["s.yaml", "s.json"])
def test_numbers_and_lines_of_what_is_nested(name):
    """Numbers go through the file; a repetition is a step for each round."""
    text, lines = NESTED_YAML, [4, 7, 9, 7, 9, 11, 11, 13]
    if name == "s.json":
        text = """{"tracks": {"rate": [{"name": "change_lr", "value": 0.5},
  {"repeat": 2, "do": [
    {"name": "change_lr",
     "value": 0.5}, {"name": "stop"}]}],
  "growth": [
    {"name": "stop", "repeat": 2}]},
 "operations": [\n\n{"name": "stop"}]}"""
        lines = [1, 3, 4, 3, 4, 6, 6, 9]
    expected = [
        ("rate", 1, 1, 1, 1), ("rate", 2, 2, 1, 2), ("rate", 3, 3, 1, 2), ("rate", 2, 4, 2, 2), ("rate", 3, 5, 2, 2),
        ("growth", 4, 1, 1, 2), ("growth", 4, 2, 2, 2), ("", 5, 1, 1, 1),
    ]  # fmt: skip
    assert steps(text, name) == [(*facts, line) for facts, line in zip(expected, lines, strict=True)]


def test_a_list_is_one_track_and_a_number_is_so_many_rounds():
    schedule = parse_schedule("- {name: stop, repeat: 3}\n- {name: stop, repeat: {times: 1}}", "s.yaml")
    assert list(schedule.tracks) == [""] and [e.title for e in schedule.entries] == [
        "1 (round 1 of 3)", "1 (round 2 of 3)", "1 (round 3 of 3)", "2",
    ]  # fmt: skip
    assert all("repeat" not in e.given for e in schedule.entries)
    assert list(parse_schedule("tracks: {a: [], b: null}", "s.yaml").tracks) == ["a", "b"]


def test_until_leaves_out_this_round_and_those_behind_it():
    until = {"metric": "val_loss", "below": 1.0}
    block = {"repeat": {"times": 3, "until": until}, "do": [{"name": "stop"}, halve()], "label": "all"}
    found = [(e.until and e.until.steps, e.until and e.until.closes, e.closes) for e in
             parse_schedule(json.dumps([block]), "s.json").entries]  # fmt: skip
    assert found == [(None, None, ""), (None, None, ""), (4, "all", ""), (None, None, ""), (2, "all", ""),
                     (None, None, "all")]  # fmt: skip
    (one, two) = parse_schedule(
        json.dumps([{"name": "stop", "repeat": {"times": 2, "until": until}}]), "s.json"
    ).entries
    assert one.metrics == frozenset() and two.metrics == {"val_loss"} and two.label == ""


@pytest.mark.parametrize(
    "text, expected",
    [
        ("- {name: stop, repeat: 0}", "s.yaml:1: entry 1: stop: repeat.times must be greater than 0, got 0"),
        ("- {name: stop, repeat: often}", "repeat must be a number of rounds, or a mapping of times and until, got 'often'"),
        ("- {name: stop, repeat: true}", "repeat must be a number of rounds, or a mapping of times and until, got True"),
        ("- {name: stop, repeat: {until: {metric: val_loss, below: 1}}}", "stop: repeat.times is missing"),
        ("- {name: stop, repeat: {times: 2, untill: 1}}", "repeat.untill is no field here; did you mean until?"),
        ("- {name: stop, repeat: {times: 2, until: {metric: los, below: 1}}}", "repeat.until.metric must be the name of a metric (did you mean loss?)"),
        ("- {name: stop, repeat: 10001}", "s.yaml: a schedule has at most 10,000 entries, every round counted"),
        ("- {name: stop, label: 3}", "label must be text, got 3"),
        ("- {name: stop, label: ''}", "label "),
        ("- {repeat: 2, do: []}", "s.yaml:1: the block of entries 1 to 0: do "),
        ("- {name: stop}\n- {repeat: 2, do: 3}", "s.yaml:2: the block of entries 2 to 1: do must be a list, got 3"),
        ("- {do: [{name: stop}]}", "s.yaml:1: the block of entries 1 to 1: repeat is missing"),
        ("- {repeat: 2, do: [{name: stop}], trigger_loss: 3}", "trigger_loss is no field here; allowed: repeat, do, label"),
        ("- repeat: 2\n  do:\n  - {name: stop}\n  - {name: stop, repeat: 2}", "s.yaml:4: entry 2: `repeat` cannot stand inside a block"),
        ("- repeat: 2\n  do:\n  - repeat: 2\n    do: [{name: stop}]", "s.yaml:3: entry 1: `do` cannot stand inside a block"),
        ("- repeat: 2\n  do:\n  - {name: stopp}", "s.yaml:3: entry 1: unknown operation 'stopp'"),
        ("- repeat: 2\n  do:\n  - {name: freeze_layer, value: attn.9}", "s.yaml:3: entry 1 (round 1 of 2): no layer is called 'attn.9'"),
        ("tracks: [1]", "s.yaml: tracks must be a mapping of names to lists of entries, got [1]"),
        ("tracks: {}", "tracks must be a mapping of names to lists of entries, got {}"),
        ("tracks: {1: []}", "s.yaml: a track's name is text of 1 to 60 characters, got 1"),
        ("tracks: {" + ", ".join(f"t{i}: []" for i in range(101)) + "}", "s.yaml: a schedule has at most 100 tracks, got 101"),
        ("tracks: {a: stop}", "s.yaml: track 'a' is a list of entries"),
        ("tracks: {a: []}\nothers: 1", "unknown key 'others' beside `operations`; known: operations, tracks"),
        ("- {name: stop, all_of: []}", "all_of "),
        ("- {name: stop, all_of: {at_iter: 3}}", "all_of must be a list, got {'at_iter': 3}"),
        ("- {name: stop, all_of: [{at_itr: 3}]}", "all_of.0 must be a trigger, and 'at_itr' is none; did you mean at_iter?, got {'at_itr': 3}"),
        ("- {name: stop, all_of: [{at_iter: 3, trigger_loss: 1}]}", "all_of.0 must be a mapping of one trigger"),
        ("- {name: stop, all_of: [{at_iter: 3}, {trigger_loss: low}]}", "all_of.1 trigger_loss must be a valid number, got {'trigger_loss': 'low'}"),
        ("- {name: stop, all_of: [{all_of: [{at_iter: 3}]}]}", "all_of.0 must be a trigger, and 'all_of' is none"),
        ("- {name: stop, all_of: [{trigger: {metric: los, below: 1}}]}", "all_of.0 trigger.metric must be the name of a metric"),
        ("- {name: stop, label: a}\n- {name: stop, label: a}", "s.yaml:2: entry 2: label 'a' is that of s.yaml:1: entry 1 already"),
        ("- {name: stop, label: first}\n- {name: stop, after: frist}", "s.yaml:2: entry 2: after 'frist': no entry and no block has this label; did you mean first?"),
        ("- {name: stop, after: a}\n- {name: stop, label: a}", "s.yaml:1: entry 1: after 'a': s.yaml:2: entry 2 waits for this entry"),
        ("- {name: stop, label: a, after: a}", "s.yaml:1: entry 1: after 'a': s.yaml:1: entry 1 waits for this entry"),
        ("- {name: stop, label: a, after: a, repeat: 2}", "s.yaml:1: entry 1: after 'a'"),
        ("- repeat: 2\n  label: a\n  do:\n  - {name: stop, after: a}", "s.yaml:4: entry 1: after 'a': s.yaml:1: the block of entries 1 to 1 waits"),
        ("tracks:\n  a:\n  - {name: stop, after: y}\n  - {name: stop, label: x}\n  b:\n  - {name: stop, after: x}\n  - {name: stop, label: y}", "s.yaml:6: entry 3: after 'x': s.yaml:4: entry 2 waits for this entry"),
    ],
)  # fmt: skip
def test_every_mistake_has_its_message(text, expected):
    found = problems(text)
    assert any(expected in problem for problem in found), found


def test_one_mistake_in_a_block_is_one_message_however_often_it_is_repeated():
    assert len(problems("- repeat: 9\n  do:\n  - {name: stopp}\n  - {name: stop}")) == 1
    assert problems("- {name: stop, all_of: [{at_iter: x}]}") == [
        "s.yaml:1: entry 1: stop: all_of.0 at_iter must be a valid integer, got {'at_iter': 'x'}"
    ]
    assert len(problems("tracks:\n  a:\n  - {name: stop, after: y}\n  b:\n  - {name: stop, after: z}")) == 2


def test_as_many_entries_as_there_may_be_with_their_rounds():
    assert len(steps("- {name: stop, repeat: 9999}\n- {name: stop}", "s.yaml")) == 10_000
    with pytest.raises(Refused, match="every round counted"):
        steps("- {name: stop, repeat: 9999}\n- {name: stop}\n- {name: stop}", "s.yaml")


# ---------------------------------------------------------------------------------------------- repetitions


def test_the_rate_is_halved_on_every_plateau():
    """One entry. The values of a plateau are counted anew in each round, and each firing says which it was."""
    run = Driven([halve(trigger_plateau={"evals": 1, "min_delta": 0.1}, repeat=3)])
    rate = run.settings.learning_rate
    for loss in (3.0, 2.95, 2.95, 2.95, 2.0, 1.95, 1.95, 1.95):
        run.boundary(val_loss=loss)
    assert told(run) == [(2, 1, 1), (4, 1, 2), (6, 1, 3)] and run.settings.learning_rate == rate / 8
    decisions = [(f["round"], f["rounds"], f.get("step")) for _, kind, f in run.events if kind == "decision"]
    assert decisions == [(1, 3, None), (2, 3, 2), (3, 3, 3)] and run.orchestrator.heads == []


def test_every_round_of_a_block_waits_anew():
    block = {"repeat": 2, "do": [clip(max_wait_iters=2), decay(max_wait_iters=1)]}
    run = Driven([block, halve(max_wait_iters=3)])
    for _ in range(12):
        run.boundary()
    assert told(run) == [(2, 1, 1), (3, 2, 1), (5, 1, 2), (6, 2, 2), (9, 3, None)]
    assert run.orchestrator.missed() == []


def test_until_ends_a_repetition_while_the_next_round_has_not_begun():
    """Round 1 is made in any case; what stands behind waits from the end of the repetition."""
    until = {"metric": "val_loss", "below": 2.0}
    run = Driven([clip(max_wait_iters=3, repeat={"times": 9, "until": until}), decay(max_wait_iters=2)])
    for loss in (1.5, None, None, None, 2.5, None, None, 1.9, None, None, None):
        run.boundary(val_loss=loss)
    assert told(run) == [(3, 1, 1), (6, 1, 2), (10, 2, None)]
    ends = [(at, f["reason"], f["round"]) for at, kind, f in run.events if kind == "decision" and "ends" in f["reason"]]
    assert ends == [(8, "the repetition ends: val loss 1.9000 <= 2", 3)] and run.orchestrator.missed() == []


def test_until_sees_the_loss_that_fired_the_round_before():
    until = {"metric": "val_loss", "below": 2.0}
    run = Driven([clip(trigger_loss=2.2, repeat={"times": 9, "until": until}), decay()])
    run.boundary(val_loss=2.1)
    assert [entry for _, entry, _ in told(run)] == [1] * 9 + [2], "nothing is below 2, and each round finds 2.1"
    run = Driven([clip(trigger_loss=2.2, repeat={"times": 9, "until": until}), decay()])
    run.boundary(val_loss=2.0)
    assert told(run) == [(1, 1, 1), (1, 2, None)]


def test_until_is_not_looked_at_inside_a_round():
    until = {"metric": "loss", "above": 3.0}
    run = Driven([{"repeat": {"times": 3, "until": until}, "do": [clip(max_wait_iters=1), decay(max_wait_iters=2)]}])
    for loss in (1.0, 9.0, 1.0, 1.0, 9.0):
        run.boundary(loss=loss)
    assert told(run) == [(1, 1, 1), (3, 2, 1), (4, 1, 2)]
    run.boundary(loss=1.0)
    run.boundary(loss=4.0)
    assert told(run)[3:] == [(6, 2, 2)] and run.orchestrator.heads == []


def test_until_on_a_plateau_counts_since_the_round_before():
    until = {"metric": "loss", "plateau": {"evals": 2, "min_delta": 0.1}}
    run = Driven([clip(max_wait_iters=4, repeat={"times": 9, "until": until})])
    for loss in (1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2):
        run.boundary(loss=loss)
    assert told(run) == [(4, 1, 1), (8, 1, 2)]
    reasons = [(at, f["reason"][:22]) for at, kind, f in run.events if kind == "decision"]
    assert reasons[-1] == (11, "the repetition ends: p") and run.orchestrator.acts(False, False) is False


def test_a_repetition_that_only_a_metric_ends_acts_when_it_is_logged():
    run = Driven([clip(max_wait_iters=1, repeat={"times": 2, "until": {"metric": "loss", "below": 1.0}})])
    run.boundary()
    run.progress.iter += 1
    run.orchestrator.position.queues[""].since = Mark(99)
    assert not run.orchestrator.acts(False, False) and run.orchestrator.asked == {"loss"}
    run.orchestrator.observe({"loss": 0.5})
    assert run.orchestrator.acts(False, False)


def test_a_guarded_round_is_taken_back_alone():
    """Round 2 hurts: it is marked as reverted, and round 3 comes. Each round has a checkpoint of its own."""
    guard = {"max_increase": 0.1, "within_iters": 2, "then": "revert"}
    run = Driven([clip(max_wait_iters=3, guard=guard, repeat=3)])
    for iteration, loss in enumerate((3.0,) * 5 + (3.0, 3.5, 3.0, 3.0, 3.0, 3.0, 3.0), 1):
        run.loss = loss
        run.boundary(val_loss=loss)
        if iteration == 7:
            assert run.progress.iter == 6, "it went back"
            (back,) = [f for _, kind, f in run.events if kind == "rollback"]
            assert (back["entry"], back["round"], back["rounds"], back["step"]) == (1, 2, 3, 2)
            assert back["checkpoint"] == "iter_000000006_before_entry_1_2"
    assert told(run) == [(3, 1, 1), (6, 1, 2), (9, 1, 3)] and run.orchestrator.position.reverted == (1,)
    assert sorted(run.saved) == [f"iter_00000000{i}_before_entry_1_{n}" for n, i in enumerate((3, 6, 9), 1)]


# ---------------------------------------------------------------------------------------------- all_of


def test_all_of_holds_at_the_iteration_where_the_last_of_it_does():
    run = Driven([clip(all_of=[{"max_wait_iters": 5}, {"trigger_loss": 2.0}, on("grad_norm", below=1.0)])])
    run.boundary(val_loss=1.9)
    run.boundary(grad_norm=3.0)
    run.boundary(grad_norm=0.5)
    run.boundary()
    assert told(run) == [] and not run.orchestrator.acts(False, False)
    assert run.boundary() == [
        (1, "waited 5 iterations (max_wait_iters 5) and val loss 1.9000 <= 2 and grad_norm 0.5 <= 1")
    ]


def test_all_of_takes_the_latest_value_of_each():
    """One that no longer holds does not count, nor one from before the entry became the head."""
    both = [{"trigger_loss": 2.0}, {"trigger": {"metric": "loss", "below": 1.0}}]
    run = Driven([decay(at_iter=1), clip(all_of=both)])
    run.boundary(val_loss=1.0, loss=0.5)
    assert told(run) == [(1, 1, None), (1, 2, None)], "values of the boundary itself are everybody's"
    run = Driven([decay(at_iter=2), clip(all_of=both)])
    run.boundary(val_loss=1.0, loss=0.5)
    run.boundary()
    run.boundary(loss=0.5)
    run.boundary(val_loss=3.0)
    run.boundary(loss=2.0)
    run.boundary(val_loss=1.5)
    assert told(run) == [(2, 1, None)]
    run.boundary(loss=float("nan"))
    assert told(run) == [(2, 1, None)]
    assert run.boundary(loss=0.9) == [(2, "val loss 1.5000 <= 2 and loss 0.9000 <= 1")]


def test_all_of_a_plateau_and_a_wait_and_any_of_beside_it():
    parts = [{"trigger_plateau": {"evals": 1, "min_delta": 0.1}}, {"max_wait_iters": 4}]
    run = Driven([clip(all_of=parts, at_iter=9)])
    for loss in (3.0, 2.95, None, None):
        run.boundary(val_loss=loss)
    assert told(run) == [(4, 1, None)], "it stays flat until a new value says otherwise"
    run = Driven([clip(all_of=parts, at_iter=9)])
    for loss in (3.0, 2.95, 1.0, None, None, None, None, None, None):
        run.boundary(val_loss=loss)
    assert told(run) == [(9, 1, None)]


def test_all_of_reads_the_clock_only_when_it_is_looked_at():
    run = Driven([clip(all_of=[{"max_wait_seconds": 2.0}, {"at_iter": 2}])])
    run.progress.seconds = 5.0
    run.boundary(iters=2)
    assert told(run) == [] and not run.orchestrator.acts(False, False) and run.boundary(clock=True) != []
    (entry,) = run.orchestrator.schedule.entries
    assert entry.triggers[0].reads_clock and str(entry.triggers[0]) == "(max_wait_seconds 2 and at_iter 2)"


# ---------------------------------------------------------------------------------------------- after


def test_waits_count_from_what_an_entry_comes_after():
    run = Driven(
        {
            "tracks": {
                "one": [clip(at_iter=4, label="clipped"), clip(0.7, max_wait_iters=9)],
                "other": [decay(after="clipped", max_wait_iters=2), halve(max_wait_iters=1, after="clipped"), halve()],
            }
        }
    )
    for _ in range(7):
        run.boundary()
    assert told(run) == [(4, 1, None), (6, 3, None), (6, 4, None), (6, 5, None)], "entry 4's wait was over long ago"
    assert [f["reason"] for _, kind, f in run.events if kind == "operation"][1:3] == [
        "waited 2 iterations (max_wait_iters 2)",
        "waited 2 iterations (max_wait_iters 1)",
    ]


def test_values_count_from_what_an_entry_comes_after():
    run = Driven(
        {
            "tracks": {
                "one": [clip(at_iter=3, label="x")],
                "other": [decay(after="x", trigger_plateau={"evals": 2, "min_delta": 0.1})],
            }
        }
    )
    for _ in range(6):
        run.boundary(val_loss=3.0)
    assert told(run) == [(3, 1, None), (6, 2, None)], "three values after iteration 3"
    both = [{"trigger_loss": 2.0}, {"max_wait_iters": 0}]
    run = Driven({"tracks": {"one": [clip(at_iter=3, label="x")], "other": [decay(after="x", all_of=both)]}})
    run.boundary(iters=2, val_loss=1.0)
    run.boundary(iters=1)
    run.boundary(iters=1)
    assert told(run) == [(3, 1, None)], "the loss of iteration 2 is of the model before x"


def test_what_all_of_remembers_is_since_the_later_of_both():
    """Of what the entry comes after, and of the step before it in its track."""
    low = {"all_of": [{"trigger": {"metric": "loss", "below": 1.0}}, {"at_iter": 1}], "after": "x"}
    run = Driven({"tracks": {"one": [clip(at_iter=3, label="x")], "other": [decay(**low)]}})
    run.boundary(iters=2, loss=0.5)
    run.boundary()
    run.boundary()
    assert told(run) == [(3, 1, None)] and run.boundary(loss=0.5) != []
    run = Driven([clip(at_iter=1, label="x"), clip(0.6, at_iter=3), decay(**low)])
    run.boundary()
    run.boundary(loss=0.5)
    run.boundary()
    run.boundary()
    assert told(run) == [(1, 1, None), (3, 2, None)] and run.boundary(loss=0.5) != []


def test_an_entry_after_one_in_a_later_track_fires_at_the_same_boundary():
    run = Driven({"tracks": {"one": [decay(after="x")], "other": [clip(at_iter=2, label="x")]}})
    run.boundary(iters=2)
    assert told(run) == [(2, 2, None), (2, 1, None)]
    assert [f["reason"] for _, kind, f in run.events if kind == "operation"][1] == "after x: at once"


def test_a_label_of_a_repetition_is_for_its_end():
    until = {"metric": "val_loss", "below": 1.0}
    block = {"repeat": {"times": 3, "until": until}, "do": [clip(max_wait_iters=2)], "label": "x"}
    whole = Driven({"tracks": {"one": [block], "other": [decay(after="x", max_wait_iters=1)]}})
    for _ in range(8):
        whole.boundary()
    assert told(whole) == [(2, 1, 1), (4, 1, 2), (6, 1, 3), (7, 2, None)]
    ended = Driven({"tracks": {"one": [block], "other": [decay(after="x", max_wait_iters=1)]}})
    for loss in (None, None, 0.9, None):
        ended.boundary(val_loss=loss)
    assert told(ended) == [(2, 1, 1), (4, 2, None)]


def test_after_a_name_of_the_same_block_counts_from_this_rounds():
    block = {"repeat": 2, "do": [clip(max_wait_iters=1, label="x"), halve(max_wait_iters=1),
                                 decay(after="x", max_wait_iters=3)]}  # fmt: skip
    run = Driven([block])
    for _ in range(9):
        run.boundary()
    assert [at for at, *_ in told(run)] == [1, 2, 4, 5, 6, 8]


def test_after_a_name_outside_counts_in_the_first_round_only():
    run = Driven([clip(at_iter=1, label="x"), decay(max_wait_iters=3), halve(after="x", max_wait_iters=5, repeat=2)])
    for _ in range(12):
        run.boundary()
    assert [at for at, *_ in told(run)] == [1, 4, 6, 11]


def test_what_comes_after_an_entry_that_never_fires_is_told():
    bad = {"name": "merge_lora_weights", "at_iter": 1, "on_error": "skip", "label": "merged"}
    run = Driven({"tracks": {"one": [bad], "other": [decay(after="merged"), clip()]}})
    for _ in range(3):
        run.boundary()
    assert told(run) == [] and [entry.number for entry in run.orchestrator.missed()] == [2, 3]
    assert run.orchestrator.kept_waiting() == ["entry 2 waits after merged, which has not fired"]
    stages = plan_stages(run.orchestrator.schedule, run.settings, 1, run.orchestrator.position)
    assert len(stages) == 1


def test_a_label_that_a_resume_gives_to_another_entry_is_reached_when_that_fires():
    run = Driven([clip(at_iter=1, label="x"), decay(at_iter=9)])
    run.boundary()
    tracks = {"operations": [clip(at_iter=1), decay(at_iter=9, label="x")], "tracks": {"b": [halve(after="x")]}}
    position = run.orchestrator.position.fitted(parse_schedule(json.dumps(tracks), "s.json"))
    assert position.marks == {} and position.fired == {"": 1, "b": 0}


def test_an_entry_that_is_taken_back_has_not_fired():
    guard = {"max_increase": 0.1, "within_iters": 2, "then": "revert"}
    run = Driven(
        {"tracks": {"one": [clip(at_iter=2, guard=guard, label="x")], "other": [decay(after="x", max_wait_iters=1)]}}
    )
    for loss in (3.0, 3.0, 3.0):
        run.boundary(val_loss=loss)
    assert told(run) == [(2, 1, None), (3, 2, None)] and "x" in run.orchestrator.position.marks
    run.boundary(val_loss=9.0)
    assert run.progress.iter == 2 and run.orchestrator.position.marks == {}
    for _ in range(4):
        run.boundary(val_loss=3.0)
    assert told(run) == [(2, 1, None), (3, 2, None)]
    assert run.orchestrator.kept_waiting() == ["entry 2 waits after x, which has not fired"]


# ---------------------------------------------------------------------------------------------- tracks


def test_a_plateau_that_never_comes_blocks_nothing_else():
    run = Driven(
        {"tracks": {"rate": [halve(trigger_loss=0.1), halve()], "growth": [clip(at_iter=2), decay(at_iter=3)]}}
    )
    for _ in range(4):
        run.boundary(val_loss=3.0)
    assert told(run) == [(2, 3, None), (3, 4, None)]
    assert [entry.number for entry in run.orchestrator.heads] == [1]
    events = [f for _, kind, f in run.events if kind == "operation"]
    assert [(f["track"], f["entry"], f["step"]) for f in events] == [("growth", 3, 1), ("growth", 4, 2)]


def test_waits_of_a_track_are_its_own():
    run = Driven({"tracks": {"one": [clip(max_wait_iters=2, repeat=9)], "other": [decay(max_wait_iters=3, repeat=9)]}})
    for _ in range(6):
        run.boundary()
    assert [(at, entry) for at, entry, _ in told(run)] == [(2, 1), (3, 2), (4, 1), (6, 1), (6, 2)]


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_entries_of_one_boundary_fire_in_the_order_of_the_file(names):
    """All that is due of the first track, then of the next. On one field the last to fire has the last word."""
    one, other = names
    run = Driven({"tracks": {one: [clip(0.1, at_iter=2), clip(0.2)], other: [clip(0.3, at_iter=2), clip(0.4)]}})
    run.boundary(iters=2)
    assert [entry for _, entry, _ in told(run)] == [1, 2, 3, 4] and run.settings.grad_clip == 0.4
    plain = Driven({"tracks": {"a": [clip(0.1, at_iter=2)]}, "operations": [clip(0.2, at_iter=2)]})
    plain.boundary(iters=2)
    assert plain.settings.grad_clip == 0.2
    plain = Driven({"operations": [clip(0.2, at_iter=2)], "tracks": {"a": [clip(0.1, at_iter=2)]}})
    plain.boundary(iters=2)
    assert plain.settings.grad_clip == 0.1


def test_what_a_ramp_of_one_track_moves_the_others_leave_alone_until_it_has_arrived():
    """Its own track takes it over; another's entry on the field waits, one on another field does not."""
    rate = {"name": "change_lr", "value": 0.5, "over": 4, "at_iter": 1}
    run = Driven(
        {
            "tracks": {
                "a": [rate],
                "b": [{"name": "set_min_lr", "value": 1e-4, "at_iter": 2}, clip()],
                "c": [decay(at_iter=2)],
            }
        }
    )
    before = run.settings.learning_rate
    for _ in range(4):
        run.boundary()
    assert told(run) == [(1, 1, None), (2, 4, None)] and run.orchestrator.ramps[0].track == "a"
    run.boundary()
    assert told(run)[2:] == [(5, 2, None), (5, 3, None)] and run.orchestrator.ramps == []
    assert (run.settings.learning_rate, run.settings.min_lr) == (before / 2, 1e-4)
    own = Driven({"tracks": {"a": [rate, {"name": "set_min_lr", "value": 1e-4, "at_iter": 2}], "b": []}})
    own.boundary()
    own.boundary()
    assert told(own) == [(1, 1, None), (2, 2, None)]


def test_a_measurement_ends_the_boundary_for_its_own_track():
    """Another's entry on the loss of the boundary is still due."""
    run = Driven(
        {"tracks": {"a": [clip(at_iter=1, reevaluate=True), clip(0.6)], "b": [decay(trigger_loss=2.0), halve()]}}
    )
    run.loss = 9.0
    run.boundary(val_loss=1.9)
    assert [entry for _, entry, _ in told(run)] == [1, 3, 4]
    run.boundary()
    assert told(run)[3:] == [(2, 2, None)]


def test_the_loss_before_an_entry_is_that_of_the_model_that_another_track_has_changed():
    """The loss of the boundary counts for the first entry alone."""
    tracks = {"a": [clip(at_iter=1, reevaluate=True)], "b": [decay(at_iter=1, reevaluate=True)]}
    run = Driven({"tracks": tracks})
    run.loss = 1.5
    run.boundary(val_loss=2.0)
    losses = [(f["val_loss_before"], f["val_loss_after"]) for _, kind, f in run.events if kind == "operation"]
    assert losses == [(2.0, 1.5), (1.5, 1.5)]


def test_a_stop_ends_the_boundary_for_all(data):
    schedule = {"tracks": {"a": [{"name": "stop", "at_iter": 1}], "b": [clip(at_iter=1)]}}
    one = orchestrator(data, schedule)
    go(one, 1)
    assert fired(one) == [1] and not one.position.round_open
    go(one, 1)
    assert fired(one) == [1, 2]


def test_a_guard_that_stops_ends_the_boundary_for_all():
    """What follows belongs to whoever goes on; the loss counts for its plateau."""
    guard = {"max_increase": 0.1, "within_iters": 2, "then": "stop"}
    plateau = decay(trigger_plateau={"evals": 1, "min_delta": 0.5})
    run = Driven({"tracks": {"a": [clip(at_iter=1, guard=guard), clip(0.7, max_wait_iters=1)], "b": [plateau]}})
    run.boundary(val_loss=3.0)
    assert run.boundary(val_loss=3.4) == [] and run.settings.stops_asked == 1
    assert not run.orchestrator.position.round_open and run.orchestrator.position.round_loss is None
    assert [entry for entry, _ in run.boundary()] == [2]
    assert [entry for entry, _ in run.boundary(val_loss=3.0)] == [3]


def test_going_back_restores_all_tracks_as_they_were():
    guard = {"max_increase": 0.1, "within_iters": 3, "then": "revert"}
    run = Driven(
        {
            "tracks": {
                "a": [clip(at_iter=3, guard=guard), clip(0.7, max_wait_iters=2)],
                "b": [decay(at_iter=1), decay(0.3, max_wait_iters=3), decay(0.2, max_wait_iters=9)],
            }
        }
    )
    for loss in (3.0, 3.0, 3.0, 3.0):
        run.boundary(val_loss=loss)
    assert told(run) == [(1, 3, None), (3, 1, None), (4, 4, None)]
    run.boundary(val_loss=9.0)
    position = run.orchestrator.position
    assert run.progress.iter == 3 and position.fired == {"a": 1, "b": 1} and run.settings.weight_decay == 0.5
    assert position.queues["b"].since.iter == 1 and position.queues["a"].since.iter == 3
    assert position.reverted == (1,) and not position.round_open
    for _ in range(3):
        run.boundary(val_loss=3.0)
    assert told(run)[3:] == [(4, 4, None), (5, 2, None)], "what fired since fires again, entry 1 does not"
    (back,) = [f for _, kind, f in run.events if kind == "rollback"]
    assert (back["track"], back["entry"], back["name"]) == ("a", 1, "set_grad_clip")


def test_a_failing_entry_says_where_it_stands(data):
    schedule = {"tracks": {"a": [{"name": "merge_lora_weights", "at_iter": 1, "repeat": 2}], "b": []}}
    one = orchestrator(data, schedule)
    with pytest.raises(OperationFailed, match=r"entry 1 \(round 1 of 2\) \(merge_lora_weights\) failed"):
        go(one, 1)
    assert one.position.fired == {"a": 0, "b": 0}


# ---------------------------------------------------------------------------------------------- its state


SOME = st.sampled_from(
    [
        clip(at_iter=3),
        clip(2.0, max_wait_iters=2, over=3),
        clip(0.6, trigger_loss=1.5, reevaluate=True),
        clip(0.8, **on("loss", below=1.5), repeat=2),
        clip(0.9, max_wait_iters=1, repeat={"times": 4, "until": {"metric": "loss", "below": 1.3}}),
        clip(1.1, all_of=[{"max_wait_iters": 2}, {"trigger_loss": 1.8}, {"trigger": {"metric": "loss", "below": 1.8}}]),
        clip(1.2, max_wait_iters=1, guard={"max_increase": 0.1, "within_iters": 2}, repeat=2),
        decay(0.3, max_wait_iters=1, over=2),
        decay(0.4, after="x", max_wait_iters=1),
        {"name": "save_checkpoint"},
        {"repeat": 2, "do": [halve(max_wait_iters=1), {"name": "save_checkpoint"}, decay(0.2, trigger_loss=1.8)]},
        {"name": "merge_lora_weights", "on_error": "skip"},
    ]
)
TRACKS = st.tuples(st.lists(SOME, max_size=4), st.lists(SOME, max_size=4), st.lists(SOME, max_size=3))
LOSSES = st.lists(
    st.tuples(st.sampled_from([None, 1.0, 1.6, 2.0]), st.sampled_from([None, 1.2, 1.4, 2.0])), min_size=1, max_size=16
)


def of_three(tracks: tuple) -> dict:
    a, b, c = tracks
    return {"tracks": {"a": a, "x": [{"name": "set_dropout", "value": 0.1, "at_iter": 2, "label": "x"}, *b]},
            "operations": c}  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(TRACKS, LOSSES)
def test_a_state_is_all_that_is_known_of_tracks_and_rounds(tracks, losses):
    """One run goes on; the other ends at each save and each boundary, and another orchestrator takes over there.

    A run that is consulted only where it acts goes the same way as one that holds every round.
    """
    whole, broken, thorough = (Driven(of_three(tracks)) for _ in range(3))
    thorough.orchestrator.acts = lambda evaluated, look_at_clock: True
    for val_loss, loss in losses:
        for run in (whole, broken, thorough):
            run.progress.iter += 1
            run.progress.tokens = 10 * run.progress.iter
            run.loss = 1.5
            if loss is not None:
                run.orchestrator.observe({"loss": loss})
        for run in (whole, broken):
            if run.orchestrator.acts(val_loss is not None, loss is not None):
                run.orchestrator.consult(val_loss, look_at_clock=loss is not None)
            if run is broken:
                state = json.loads(json.dumps(run.orchestrator.state(), allow_nan=False))
                run.orchestrator = Orchestrator(run.orchestrator.schedule, run, run)
                run.orchestrator.load_state(state)
        thorough.orchestrator.consult(val_loss, look_at_clock=loss is not None)
    assert json.dumps(whole.events) == json.dumps(broken.events) == json.dumps(thorough.events)
    assert whole.orchestrator.state() == broken.orchestrator.state() and whole.settings == broken.settings


class Killed(Exception):
    pass


@settings(max_examples=300, deadline=None)
@given(TRACKS, LOSSES, st.integers(1, 9))
def test_a_save_inside_a_round_is_where_a_resume_goes_on(tracks, losses, saves):
    """Killed right after its Nth save, a run that resumes from it fires, measures and ends as one that was not."""
    whole, killed = Driven(of_three(tracks)), Driven(of_three(tracks))
    done, real, last = [0], killed.save, {}

    def save(why, *, mark=""):
        name = real(why, mark=mark)
        done[0] += 1
        if done[0] == saves:
            last.update(state=killed.saved[name], events=len(killed.events))
            raise Killed
        return name

    def boundary(run: Driven, val_loss, loss, logged: bool = True) -> None:
        if loss is not None and logged:
            run.orchestrator.observe({"loss": loss})
        run.orchestrator.consult(val_loss, look_at_clock=False)

    for iteration, (val_loss, loss) in enumerate(losses, 1):
        for run in (whole, killed):
            run.progress.iter, run.progress.tokens, run.loss = run.progress.iter + 1, 10 * iteration, 1.5
        boundary(whole, val_loss, loss)
        killed.save = save
        try:
            boundary(killed, val_loss, loss)
        except Killed:
            killed.settings, _, state = last["state"]
            del killed.events[last["events"] :]
            killed.orchestrator = Orchestrator(killed.orchestrator.schedule, killed, killed)
            killed.orchestrator.load_state(json.loads(state))
            killed.save = real
            killed.orchestrator.consult(None, look_at_clock=False)  # of what was evaluated the state remembers
    known = ("operation", "rollback", "measure", "error")
    assert [e for e in whole.events if e[1] in known] == [e for e in killed.events if e[1] in known]
    assert whole.settings == killed.settings and whole.orchestrator.state() == killed.orchestrator.state()


def test_states_of_a_list_go_on_in_a_schedule_of_tracks():
    """What was saved with one queue is the track without a name; a track that is new waits from the start."""
    entries = [clip(at_iter=1, label="x"), clip(0.6, max_wait_iters=9)]
    saved = {"fired": 1, "since_iter": 7, "since_tokens": 70, "since_seconds": 1.5, "round_open": True, "round_iter": 7}
    run = Driven(
        {"operations": entries, "tracks": {"b": [decay(max_wait_iters=8), halve(after="x", max_wait_iters=2)]}}
    )
    run.orchestrator.load_state({"position": saved, "ramps": []})
    position = run.orchestrator.position
    assert position.queues == {"": Queue(1, Mark(7, 70, 1.5), {}, True), "b": Queue()} and position.round_open
    assert position.marks == {"x": Mark(7, 70, 1.5)}
    run.orchestrator.position.queues[""].open = False
    run.boundary(iters=8)
    assert told(run) == [(8, 3, None)]
    run.boundary()
    assert told(run)[1:] == [(9, 4, None)]


@pytest.mark.parametrize(
    "position, said",
    [
        ({"queues": {"": {"fired": 3}}}, "3 entries have fired of 2"),
        ({"queues": {"b": {"fired": 1}}}, "1 entries of track b have fired of 0"),
        ({"queues": {"": {"fired": -1}}}, "fired"),
        ({"queues": {"": {"fired": 1, "head": 1}}}, "head"),
        ({"marks": {"x": {"iteration": 3}}, "queues": {}}, "iteration"),
        ({"fired": 1, "queues": {"": {"fired": 1}}, "since_time": 1}, "since_time"),
    ],
)
def test_a_position_that_was_not_saved_is_refused(position, said):
    run = Driven([clip(), decay()])
    with pytest.raises(ValueError, match=said):
        run.orchestrator.load_state({"position": position, "ramps": []})
    watch = {"entry": 2, "name": "set_weight_decay", "before": 1.0, "limit": 2.0, "until_iter": 5, "then": "keep",
             "checkpoint": "", "step": 2}  # fmt: skip
    state = {"position": {"queues": {"": {"fired": 2}}, "watches": [watch]}, "ramps": []}
    run.orchestrator.load_state(state)
    state["position"]["queues"][""]["fired"] = 1
    with pytest.raises(ValueError, match="entry 2 is watched and has not fired"):
        run.orchestrator.load_state(state)


def test_a_ramp_of_an_older_checkpoint_is_of_the_track_without_a_name(data):
    one = orchestrator(data, [clip(2.0, over=4, at_iter=1), clip(0.5, at_iter=3)])
    go(one, 1)
    state = json.loads(json.dumps(one.state()))
    assert state["ramps"][0].pop("track") == ""
    other = Orchestrator(one.schedule, one.run, Host())
    other.load_state(state)
    go(other, 2)
    assert fired(other) == [2] and other.ramps == []


# ---------------------------------------------------------------------------------------------- stages


def order(schedule, position: Position | None = None, **keys) -> list[tuple]:
    parsed = parse_schedule(json.dumps(schedule), "s.json")
    stages = plan_stages(parsed, start(**keys), 1, position)
    return [(s.entry.number, s.entry.round) for s in stages if s.entry]


def test_stages_are_in_the_order_of_the_latest_times():
    """1024 tokens an iteration: 16 * 4 * 16. What nothing bounds comes last, in the order of the file."""
    tracks = {
        "a": [clip(trigger_loss=1.0), clip(max_wait_iters=1)],
        "b": [decay(max_wait_iters=30, trigger_loss=2.0), decay(at_iter=90, max_wait_iters=50)],
        "c": [clip(at_tokens=20 * 1024 + 1), clip(all_of=[{"at_iter": 40}, {"max_wait_iters": 10}]),
              clip(max_wait_tokens=39 * 1024), clip(all_of=[{"at_iter": 1}, {"trigger_loss": 1.0}])],
        "d": [decay(at_iter=5, repeat=2), decay(after="e", max_wait_iters=76)],
        "e": [decay(at_iter=3, label="e")],
    }  # fmt: skip
    keys = {"batch_size": 16, "gradient_accumulation_steps": 4}
    # e at 3; d twice at 5; c at 21; b at 30; c at 40; c at 79, as d after e at 79 (c comes first); b at 80
    assert [n for n, _ in order({"tracks": tracks}, **keys)] == [11, 9, 9, 5, 3, 6, 7, 10, 4, 1, 2, 8]


def test_tokens_are_counted_at_the_pace_of_the_stage():
    """From iteration 10 on an iteration has twice the tokens: 15 of the first pace are seen at 13."""
    tracks = {
        "a": [{"name": "change_grad_accum", "value": 2, "at_iter": 10}],
        "b": [clip(at_tokens=15 * 1024)],
        "c": [decay(at_iter=12), decay(at_iter=13)],
    }
    keys = {"batch_size": 16, "gradient_accumulation_steps": 4}
    assert [n for n, _ in order({"tracks": tracks}, **keys)] == [1, 3, 2, 4]


def test_stages_of_a_resume_begin_where_it_stands():
    tracks = {"a": [clip(), clip(max_wait_iters=50), clip(0.7)], "b": [decay(), decay(at_iter=120), decay(after="x")]}
    tracks["a"][0]["label"] = "x"
    assert [n for n, _ in order({"tracks": tracks})] == [1, 4, 2, 3, 5, 6]
    position = Position({"a": Queue(1, Mark(100, 0)), "b": Queue(1, Mark(10, 0))}, {"x": Mark(100)})
    assert [n for n, _ in order({"tracks": tracks}, position)] == [5, 6, 2, 3]
    position.marks.clear()
    assert [n for n, _ in order({"tracks": tracks}, position)] == [5, 2, 3]


def test_rounds_are_stages_each():
    parsed = parse_schedule(json.dumps([halve(repeat=3, max_wait_iters=5)]), "s.json")
    rates = [stage.settings.learning_rate for stage in plan_stages(parsed, start(learning_rate=0.8), 1)]
    assert rates == pytest.approx([0.8, 0.4, 0.2, 0.1])
    text = "- {name: stack_layers, value: {times: 2}, repeat: 20}"
    found = problems(text)
    assert len(found) >= 1 and found[0].startswith("s.yaml:1: entry 1 (round ")


def test_the_shipped_schedules_use_the_language():
    folder = Path(__file__).resolve().parents[1] / "schedules"
    halves = parse_schedule((folder / "halve_on_plateau.yaml").read_text(), "halve_on_plateau.yaml")
    assert len({e.number for e in halves.entries}) == 3 and halves.entries[-2].rounds > 3 and halves.entries[2].until
    tracks = parse_schedule((folder / "tracks.yaml").read_text(), "tracks.yaml")
    assert (
        len(tracks.tracks) == 3 and any(e.after for e in tracks.entries) and any(e.rounds > 1 for e in tracks.entries)
    )
    assert "all_of" in {type(t).field for e in tracks.entries for t in e.triggers}


def test_the_example_of_the_page_is_a_schedule():
    page = (Path(__file__).resolve().parents[1] / "docs" / "operations.md").read_text()
    page = page.partition("## Repetitions")[2]
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, re.S | re.M)
    assert problems(text) == [] and len(parse_schedule(text, "s.yaml").entries) == 6 + 4 + 1
