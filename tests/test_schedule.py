"""The schedule file: what is accepted, and that every mistake is told at once with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, SHIPPED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT
from orchestrate.training.schedule import file, stages
from orchestrate.training.schedule.file import entry_fields, parse_schedule, read_schedule
from orchestrate.training.schedule.ramps import Ramp
from orchestrate.training.schedule.stages import plan_stages
from orchestrate.training.schedule.triggers import TRIGGERS
from orchestrate.training.session.start import planned_model_config, settings_from
from orchestrate.training.settings.config import TrainConfig, resolve
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Elapsed, Measured

# The example of the interface, and entries as nanoGPT's orchestrating fork writes them.
INTERFACE = """
- name: set_layer_lora_rank      # the operation
  value: ["attn.2", 16]          # its argument
  trigger_loss: 5.5              # fire when val loss <= this ...
  max_wait_iters: 75000          # ... or after so many iterations
  reevaluate: true
  desc: widen attention once the loss flattens
"""
FORK = json.dumps(
    {
        "operations": [
            {"name": "change_lr", "value": 0.5, "trigger_loss": 6.0, "max_wait_iters": 50000, "reevaluate": False},
            {"name": "set_attn_lora_rank", "value": 8, "trigger_loss": None, "max_wait_iters": 100, "desc": ""},
            {"name": "reset_lr_schedule", "value": None, "trigger_loss": 5.0, "max_wait_iters": 5},
            {"name": "merge_lora_weights", "value": None, "trigger_loss": 4.5, "max_wait_iters": 25000},
        ]
    },
    indent="\t",
)


def start(**keys):
    config = TrainConfig(**{"n_layer": 4, "n_head": 4, "n_embd": 32, "block_size": 16, **keys})
    return settings_from(config, ModelConfig(block_size=16, vocab_size=64, n_layer=4, n_head=4, n_embd=32))


def problems(text: str, name: str = "s.yaml", world_size: int = 1, **keys) -> list[str]:
    try:
        plan_stages(parse_schedule(text, name), start(**keys), world_size)
    except Refused as error:
        return error.problems
    return []


def test_the_examples_are_accepted():
    (entry,) = parse_schedule(INTERFACE, "s.yaml").entries
    assert entry.operation.value == ("attn.2", 16) and entry.reevaluate and entry.line == 2
    assert [type(t).field for t in entry.triggers] == ["trigger_loss", "max_wait_iters"]
    assert problems(INTERFACE) == []
    fork = parse_schedule(FORK, "s.json")
    assert len(fork.entries) == 4 and fork.entries[2].line > fork.entries[1].line > 0
    assert problems(FORK, "s.json") == []


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("3e-4", 3e-4), ("1E5", 1e5), ("2", 2.0), (".5", 0.5)])
def test_numbers_as_people_write_them(text, value):
    (entry,) = parse_schedule(f"- {{name: set_lr, value: {text}, max_wait_tokens: 1e9}}", "s.yaml").entries
    assert entry.operation.value == value and isinstance(entry.operation.value, float | int)
    assert entry.triggers[0].value == 10**9


def test_empty_schedules():
    assert parse_schedule("", "s.yaml").entries == parse_schedule("[]", "s.json").entries == ()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("- {name: set_lr, value: 1e-3, trigger_los: 3}", "s.yaml:1: entry 1: unknown field 'trigger_los'; did you mean trigger_loss?"),
        ("- {name: set_learning_rat, value: 1}", "unknown operation 'set_learning_rat'; did you mean set_lr?"),
        ("- {name: set_learning_rate, value: 1}", "unknown operation 'set_learning_rate'; did you mean set_lr?"),
        ("- {name: change_learning_rate, value: 1}", "did you mean change_lr?"),
        ("- {name: set_eval_iter, value: 1}", "did you mean set_eval_iters?"),
        ("- {name: polish, value: 1}", "unknown operation 'polish'; known: add_heads, adjust_batch_size, "),
        ("- {name: change_eval_iters, value: 1}", "write set_eval_iters, which takes the new number itself"),
        ("- {name: change_warmup_iters, value: 1}", "write set_warmup_iters, which takes the new number itself"),
        ("- {name: decrease_attn_lora_scaling, value: 2}", "write set_attn_lora_rank, which takes the new number"),
        ("- {name: decrease_vocab_lora_scaling, value: 2}", "write set_embedding_lora_rank, which takes the new"),
        ("- {name: set_curriculum_alpha, value: 1.5}", "set_curriculum_alpha: value must be less than or equal to 1, got 1.5"),
        ("- {name: set_data_mixture, value: {a: 0, b: 0}}", "set_data_mixture: value must have a weight above 0, and a finite sum"),
        ("- {name: set_data_mixture, value: {a: -0.5, b: 1}}", "set_data_mixture: value.a must be greater than or equal to 0, got -0.5"),
        ("- {name: set_data_mixture, value: {}}", "set_data_mixture: value"),
        ("- {name: disable_vocab_remapping}", "the data is read in its own ids already"),
        ("- {name: set_embedding_freeze_mode, value: true}", "write freeze_layer: [block.*, ln_f]"),
        ("- {name: stack_layers, value: 2}", "stack_layers: value must say what the number is: {n_layer: 12} (blocks) or {times: 2} (a factor), got 2"),
        ("- {name: stack_layers, value: deep}", "value must be a list or a mapping of n_layer, times, how, where, got 'deep'"),
        ("- {name: stack_layers, value: {layers: 3}}", "value.layers is no field here; did you mean n_layer? allowed: n_layer, times, how, where"),
        ("- {name: widen_mlp, value: 1.5}", "value must be the new width; a factor is {times: 2}, and it is a whole number, got 1.5"),
        ("- {name: resize_vocabulary, value: [198, 0.01]}", "[ID, NOISE] is {size: 50304, init: {copy: ID}, noise: NOISE}"),
        ("- {name: resize_vocabulary, value: {size: 70, init: {cop: 3}}}", "value.init.cop is no field here; did you mean copy? allowed: copy"),
        ("- {name: adjust_batch_size, value: {target_vram_percent: 80}}", "target: 0.8 instead of target_vram_percent: 80"),
        ("- {name: adjust_batch_size, value: {percent: 80}}", "value.percent is no field here; allowed: target, keep_global_batch, max_batch_size"),
        ("- {name: set_lr, value: 1, guard: {max: 1}}", "guard.max is no field here; allowed: metric, max_increase, max_decrease, within_iters, then"),
        ("- {name: set_lr, value: 1, guard: 3}", "guard must be a mapping of metric, max_increase, max_decrease, within_iters, then, got 3"),
        ("- {name: merge_lora_weights}", "adapted: none (merging removes adapters; relora merges and keeps them)"),
        ("- {value: 1}", "has no `name`"),
        ("- 3", "an entry is a mapping"),
        ("name: set_lr", "needs the key `operations`"),
        ("operations: []\nother: 1", "unknown key 'other'"),
        ("- {name: set_lr, value: '1e-3'}", "value must be a valid number, got '1e-3'"),
        ("- {name: set_lr}", "value is missing"),
        ("- {name: set_lr, value: .nan}", "finite number"),
        ("- {name: set_lr, value: 1, trigger_loss: low}", "trigger_loss must be a valid number, got 'low'"),
        ("- {name: set_lr, value: 1, max_wait_iters: -1}", "max_wait_iters must be greater than or equal to 0, got -1"),
        ("- {name: set_lr, value: 1, max_wait_iters: 1.5}", "max_wait_iters must be a valid integer"),
        ("- {name: set_lr, value: 1, trigger_plateau: {eval: 3}}", "trigger_plateau.eval"),
        ("- {name: set_lr, value: 1, trigger_plateau: {evals: '3'}}", "trigger_plateau.evals must be a valid integer, got '3'"),
        ("- {name: set_lr, value: 1, trigger_plateau: {evals: 0}}", "trigger_plateau.evals must be greater than 0, got 0"),
        ("- {name: set_lr, value: 1, trigger: {metric: gradnorm, below: 1}}", "trigger.metric must be the name of a metric (did you mean grad_norm?), got 'gradnorm'"),
        ("- {name: set_lr, value: 1, trigger: {metric: zzz, below: 1}}", "trigger.metric must be the name of a metric (val_loss, val_bpb, rank/attn, "),
        ("- {name: set_lr, value: 1, trigger: {metric: val_los/wiki, below: 1}}", "(did you mean val_loss?), got 'val_los/wiki'"),
        ("- {name: set_lr, value: 1, trigger: {metric: host_memory, above: 1}}", "did you mean machine.host_memory?"),
        ("- {name: set_lr, value: 1, trigger: {below: 1}}", "trigger.metric is missing"),
        ("- {name: set_lr, value: 1, trigger: {metric: loss}}", "trigger must have one of below, above and plateau beside metric, got {'metric': 'loss'}"),
        ("- {name: set_lr, value: 1, trigger: {metric: loss, below: 1, above: 2}}", "trigger must have one of below, above and plateau"),
        ("- {name: set_lr, value: 1, trigger: {metric: loss, below: low}}", "trigger.below must be a valid number, got 'low'"),
        ("- {name: set_lr, value: 1, trigger: {metric: loss, plateau: {evals: 0}}}", "trigger.plateau.evals must be greater than 0"),
        ("- {name: set_lr, value: 1, trigger: loss}", "trigger must be a mapping of metric, below, above, plateau, got 'loss'"),
        ("- {name: set_lr, value: 1, guard: {metric: los, max_increase: 1}}", "guard.metric must be the name of a metric (did you mean loss?)"),
        ("- {name: set_lr, value: 1, guard: {metric: grad_norm}}", "guard must give max_increase: its default 0.05 is in nats, grad_norm is not, got"),
        ("- {name: set_lr, value: 1, trigger_plateau: {evals: '3'}}", "trigger_plateau.evals must be a valid integer, got '3'"),
        ("- {name: set_lr, value: 1, trigger_plateau: {evals: 0}}", "trigger_plateau.evals must be greater than 0, got 0"),
        ("- {name: set_lr, value: 1, reevaluate: 1}", "reevaluate must be a valid boolean, got 1"),
        ("- {name: set_lr, value: 1, over: 0}", "over must be greater than 0"),
        ("- {name: set_lr, value: 1, over: 5, style: cubic}", "style must be 'constant', 'linear', 'cosine' or 'power'"),
        ("- {name: set_lr, value: 1, style: cosine}", "there is no `over`"),
        ("- {name: stop, over: 5}", "`over` moves a number or fades new weights in; stop does neither"),
        ("- {name: set_lr, value: 1, on_error: hope}", "on_error must be 'stop' or 'skip'"),
        ("- {name: set_lr, name: stop}", "name is given twice"),
        ("- {name: [}", "line 1: not YAML"),
        ("- {name: !!python/object:os.system x}", "not YAML"),
        ("- {name: set_lr, value: 2024-01-01}", "value must be a valid number"),
        ("- {name: freeze_layer, value: attn.9}", "no layer is called 'attn.9'"),
        ("- {name: set_layer_lora_rank, value: [wpe, 2]}", "wpe cannot carry a LoRA adapter"),
        ("- {name: set_attn_lora_rank, value: 33}", "must be from 1 to 32"),
        ("- {name: set_grad_accum, value: 3}", "grad_accum 3 (micro-steps over all ranks) must be a multiple of the 2 processes"),
    ],
)  # fmt: skip
def test_every_mistake_has_its_message(text, expected):
    found = problems(text, world_size=2)
    assert any(expected in problem for problem in found), found


def test_all_errors_at_once_with_their_lines():
    text = "- {name: set_lr, value: fast}\n- {name: stopp}\n\n- {name: set_lr, value: 1, over: x, foo: 2}\n"
    found = problems(text)
    assert [problem.split(": entry")[0] for problem in found] == ["s.yaml:1", "s.yaml:2", "s.yaml:4", "s.yaml:4"]
    text = "- {name: freeze_layer, value: attn.9}\n- {name: change_grad_accum, value: 0.33}\n"
    assert [problem[:9] for problem in problems(text)] == ["s.yaml:1:", "s.yaml:2:"]


def test_one_mistake_is_one_message():
    assert problems('- {name: set_layer_lora_rank, value: [16, "attn.2"]}') == [
        's.yaml:1: entry 1: set_layer_lora_rank: value must be [names, rank] in this order, e.g. ["attn.2", 16], '
        "got [16, 'attn.2']"
    ]
    assert problems("- {name: freeze_layer, value: 3}") == [
        "s.yaml:1: entry 1: freeze_layer: value must be text or a list, got 3"
    ]


def test_what_another_orchestrator_has_marked_as_done_is_told_once():
    text = "- {name: set_lr, value: 1, completed: true}\n- {name: stop}\n- {name: stop, completed: false, x: 1}\n"
    assert problems(text) == [
        "s.yaml: entries 1, 3: remove the field `completed`: what has fired is kept in the run folder, and a resume "
        "goes on from there",
        "s.yaml:3: entry 3: unknown field 'x'",
    ]


def test_of_many_mistakes_the_first_are_told():
    found = problems("- {name: stopp}\n" * 900)
    assert (
        found[50].startswith("s.yaml:51: ") and found[-1] == "s.yaml:52: entry 52 and those after it were not looked at"
    )
    found = problems("- {name: freeze_layer, value: attn.9}\n" * 900)
    assert len(found) == 52 and found[-1] == "s.yaml: entry 52 and those after it were not looked at"


def test_a_thousand_entries_are_planned_soon(monkeypatch):
    """Each freezes or unfreezes another layer: the model is built once for all of them, not 35 s long."""
    built = []
    monkeypatch.setattr(stages, "GPT", lambda config: built.append(config) or GPT(config))
    stages._model.cache_clear()
    stages._trainable.cache_clear()
    kinds = ("attn", "mlp", "ln_1", "ln_2")
    made = [
        {"name": ("freeze_layer", "unfreeze_layer")[i // 16 % 2], "value": f"{kinds[i % 4]}.{i // 4 % 4}"}
        for i in range(1000)
    ]
    assert problems(json.dumps(made), "s.json") == [] and len(built) == 1


def test_an_entry_is_named_as_it_was_written():
    entries = parse_schedule(
        json.dumps([{"name": "change_lr", "value": 0.5}, {"name": "merge_lora_weights"}]), "s.json"
    )
    assert [str(entry) for entry in entries.entries] == ["change_lr 0.5", "merge_lora_weights"]


def test_what_a_guard_is_when_nothing_is_said():
    guard = parse_schedule("- {name: change_lr, value: 0.5, guard: {}}", "s.yaml").entries[0].guard
    assert (guard.metric, guard.max_increase, guard.within_iters, guard.then) == ("val_loss", 0.05, 200, "revert")
    assert guard.max_decrease == 0.0


def test_a_merged_key_may_be_overridden_and_one_of_the_same_mapping_may_not():
    text = "- &first {name: change_lr, value: 0.5, max_wait_iters: 3}\n- <<: *first\n  value: 0.25\n"
    assert parse_schedule(text, "s.yaml").entries[1].given == {"name": "change_lr", "value": 0.25, "max_wait_iters": 3}
    assert problems(text + "  max_wait_iters: 1\n  value: 0.1\n") == ["s.yaml: line 5: not YAML (value is given twice)"]


@pytest.mark.parametrize(
    "text, name, place",
    [
        ("desc: [1, 2]\noperations:\n- {name: nothing}", "s.yaml", "s.yaml:3: entry 1: "),
        ("base: &b {operations: [{name: nothing}]}\n<<: *b", "s.yaml", "s.yaml:1: entry 1: "),
        ('{"desc": [1,\n 2], "operations":\n [{"name":\n "nothing"}]}', "s.json", "s.json:3: entry 1: "),
        ('{"desc":1,"operations":[{"name":"nothing"}]}', "s.json", "s.json:1: entry 1: "),
    ],
)
def test_the_place_of_an_entry_of_a_mapping(text, name, place):
    unknown_key, unknown_operation = problems(text, name)
    assert "beside `operations`" in unknown_key
    assert unknown_operation.startswith(f"{place}unknown operation 'nothing'")


def test_an_entry_tells_all_that_is_wrong_with_it_and_cuts_a_long_name():
    found = problems(json.dumps([{"name": "n" * 100, "value": 1, "colour": 2, "over": -1}]), "s.json")
    assert len(found) == 3 and "colour" in found[0] and "unknown operation" in found[1]
    assert found[2].startswith(f"s.json:1: entry 1: {'n' * 60}: over ")


@pytest.mark.parametrize("text", ["words", "42"])
def test_what_is_no_list_is_no_schedule(text):
    assert problems(text) == [
        f"s.yaml: a schedule is a list of entries (or {{operations: [...]}}), got {text if text == '42' else repr(text)}"
    ]


def test_the_bounds_are_where_they_are_said_to_be(monkeypatch):
    """256 characters of a number, 40 levels, and so many values; one more is refused."""
    number = "1" * 256
    with pytest.raises(Refused, match="a number of 257 characters"):
        parse_schedule(f'[{{"name": "set_lr", "value": {number}1}}]', "s.json")
    for name in ("s.yaml", "s.json"):
        with pytest.raises(Refused, match="set_lr"):  # it was read: a learning rate of that size is refused
            parse_schedule(f'[{{"name": "set_lr", "value": [{number}]}}]', name)
    monkeypatch.setattr(file, "MOST_VALUES", 6)  # the list, the mapping, two keys and two values
    for name in ("s.yaml", "s.json"):
        assert len(parse_schedule('[{"name": "change_lr", "value": 1}]', name).entries) == 1
        with pytest.raises(Refused, match="more than 6 values"):
            parse_schedule('[{"name": "set_lr", "value": [1]}]', name)


def test_json_errors_have_lines():
    assert "line 2: not JSON" in problems('{"operations": [\n{"name": }]}', "s.json")[0]
    assert "given twice" in problems('[{"name": "stop", "name": "stop"}]', "s.json")[0]


def test_unreadable_files(tmp_path):
    with pytest.raises(Refused, match="cannot be read"):
        read_schedule(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="not UTF-8"):
        read_schedule(tmp_path / "binary.yaml")
    deep = "[" * 5000
    assert problems(deep) and problems(deep, "s.json")


CONFIGS = sorted((ROOT / "config").glob("*.py"))


def test_there_are_shipped_files():
    assert len(CONFIGS) >= 6 and len(SHIPPED) >= 4


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_schedule_plans_against_every_shipped_config(path):
    schedule = read_schedule(path)
    for config_file in CONFIGS:
        if config_file.name == "adder.py" and path.name != "curriculum_digits.yaml":
            continue  # two blocks and lines of 26 tokens: for its own schedule
        config, _ = resolve([config_file], [])
        if config.n_layer < 4:  # config/adder.py: recipes name four layers, and lengths that divide 64
            config, _ = resolve([config_file], [("n_layer", "4"), ("block_size", "64")])
        model, _ = planned_model_config(config)
        stages = plan_stages(schedule, settings_from(config, model), world_size=1)
        assert len(stages) == len(schedule.entries) + 1


SEEDS = [INTERFACE, FORK, *(path.read_text("utf-8") for path in SHIPPED)]
JUNK = st.sampled_from(
    ["", "{", "}", "[", "]", ":", "-", "\t", "\n", "'", '"', "&a", "*a", "!!x", "null", "nan", "1e999", "-1", "true",
     "attn.*", "name", "value", "over", "9" * 400, "\x00", "é", "<<: *a", "%", "? ", "|"]
)  # fmt: skip


@st.composite
def mutated(draw) -> tuple[str, str]:
    text = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 12))
        text = text[:at] + draw(JUNK) + text[at + cut :]
    return text, draw(st.sampled_from(["s.yaml", "s.json"]))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_fuzz_mutated_schedules_are_accepted_or_refused(case):
    text, name = case
    assert all(isinstance(problem, str) and problem for problem in problems(text, name))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["attn.0", "mlp.*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.sampled_from(entry_fields()), VALUES, max_size=5), max_size=3))
def test_fuzz_any_values_in_any_fields(document):
    assert all(isinstance(problem, str) for problem in problems(json.dumps(document), "s.json"))


# ---------------------------------------------------------------------------------------------- triggers and ramps


def fires(field: str, value, elapsed=None, now=None, history=()) -> str | None:
    base = dict(iter=100, tokens=1000, iters_waited=10, tokens_waited=100, seconds_waited=None)
    metric = value["metric"] if field == "trigger" else "val_loss"
    measured = Measured({} if now is None else {metric: now}, {metric: tuple(history)})
    return TRIGGERS[field](value=value).fires(Elapsed(**{**base, **(elapsed or {})}), measured)


def test_a_metric_that_is_exactly_at_its_limit_fires():
    for side, beyond in (("below", 2.001), ("above", 1.999)):
        on = {"metric": "loss", side: 2.0}
        assert fires("trigger", on, now=2.0) and not fires("trigger", on, now=beyond) and not fires("trigger", on)


@pytest.mark.parametrize(
    "field, at, below",
    [("max_wait_iters", 10, 11), ("max_wait_tokens", 100, 101), ("at_iter", 100, 101), ("at_tokens", 1000, 1001)],
)
def test_exact_triggers(field, at, below):
    assert fires(field, at) and not fires(field, below)


def test_loss_and_clock_triggers():
    assert fires("trigger_loss", 2.0, now=2.0) and not fires("trigger_loss", 2.0, now=2.0001)
    assert not fires("trigger_loss", 2.0)
    assert fires("max_wait_seconds", 1.5, {"seconds_waited": 1.5}) and not fires("max_wait_seconds", 1.5)


@pytest.mark.parametrize(
    "history, expected",
    [
        ((3.0, 2.9, 2.8), False),
        ((3.0, 2.995, 2.994), True),
        ((3.0, 2.995), False),
        ((3.0, 3.5, 2.0), False),
        ((2.0, 2.5, 2.45, 2.44), True),  # better than the last before, not than the best before
        ((3.0, 2.5, 2.99), False),  # one of the two gained
        ((1.0, 0.99, 0.99), False),  # a gain of min_delta is one (0.99 is 1.0 - 0.01 in floating point)
    ],
)
def test_plateau(history, expected):
    plateau = {"evals": 2, "min_delta": 0.01}
    assert bool(fires("trigger_plateau", plateau, now=history[-1], history=history)) is expected
    for metric in ("val_loss", "loss"):
        named = {"metric": metric, "plateau": plateau}
        assert bool(fires("trigger", named, now=history[-1], history=history)) is expected
        assert not fires("trigger", named, history=history), "no value of now"


def test_triggers_on_metrics_give_their_reasons():
    """Those on val_loss in the words of the triggers that they are the long form of."""
    plateau = {"evals": 2, "min_delta": 0.01}
    for short, long in [
        (("trigger_loss", 2.5), {"metric": "val_loss", "below": 2.5}),
        (("trigger_plateau", plateau), {"metric": "val_loss", "plateau": plateau}),
    ]:
        values = {"now": 2.44444, "history": (2.4, 2.44444, 2.44444)}
        assert fires(*short, **values) == fires("trigger", long, **values) is not None
    assert fires("trigger", {"metric": "grad_norm", "below": 0.1}, now=0.1) == "grad_norm 0.1 <= 0.1"
    assert fires("trigger", {"metric": "lr", "above": 3e-4}, now=3.14159265e-4) == "lr 0.000314159 >= 0.0003"
    assert not fires("trigger", {"metric": "lr", "above": 3e-4}, now=2.99e-4)
    assert not fires("trigger", {"metric": "grad_norm", "below": 0.1}, now=0.1001)
    assert (
        fires("trigger", {"metric": "loss", "plateau": plateau}, now=2.0, history=(2.0, 2.1, 2.0))
        == "plateau of loss: 2.0000 in 2 values, 2.0000 before (min_delta 0.01)"
    )


@pytest.mark.parametrize("condition", [{"below": 1.0}, {"above": 1.0}, {"plateau": {"evals": 1}}])
def test_what_is_no_number_fires_nothing(condition):
    assert not fires("trigger", {"metric": "grad_norm", **condition}, now=float("nan"), history=(1.0,))


def test_a_plateau_is_five_evaluations_without_a_gain_of_a_hundredth():
    assert fires("trigger_plateau", {}, now=2.0, history=(2.0, 1.995, 2.0, 2.0, 2.0, 2.0))
    assert not fires("trigger_plateau", {}, now=2.0, history=(2.0, 2.0, 2.0, 2.0, 2.0))
    assert not fires("trigger_plateau", {}, now=2.0, history=(2.0, 1.985, 2.0, 2.0, 2.0, 2.0))


def test_ramps_start_where_they_are_and_end_exactly():
    (entry,) = parse_schedule("- {name: set_lr, value: 0.3, over: 7, style: cosine}", "s.yaml").entries
    before = start()
    ramp = Ramp.between(entry, before, entry.operation.plan(before), start_iter=100)
    assert ramp.at(100) == {"learning_rate": before.learning_rate} and ramp.at(107) == {"learning_rate": 0.3}
    values = [ramp.at(i)["learning_rate"] for i in range(100, 108)]
    assert values == sorted(values) and ramp.done(107) and not ramp.done(106)
    assert Ramp.from_json(json.loads(json.dumps(ramp.to_json()))) == ramp


@pytest.mark.parametrize(
    "name, value, over, expected",
    [
        # A half goes to the even neighbour, as Python rounds.
        ("set_batch_size", 17, 10, [12, 12, 13, 14, 14, 14, 15, 16, 16, 16, 17]),
        ("set_batch_size", 9, 4, [12, 11, 10, 10, 9]),
        # Accumulation moves in steps of the largest number that divides both ends: here 8 (from 40), then 1.
        ("set_grad_accum", 16, 8, [40, 40, 32, 32, 32, 24, 24, 16, 16]),
        ("set_grad_accum", 43, 4, [40, 41, 42, 42, 43]),
    ],
)
def test_ramps_of_whole_numbers_round(name, value, over, expected):
    (entry,) = parse_schedule(json.dumps([{"name": name, "value": value, "over": over}]), "s.json").entries
    before = start(batch_size=12, gradient_accumulation_steps=40)
    ramp = Ramp.between(entry, before, entry.operation.plan(before), start_iter=7)
    (values,) = zip(*[ramp.at(7 + i).values() for i in range(over + 1)], strict=True)
    assert list(values) == expected and {type(v) for v in values} == {int}


def test_a_cosine_ramp_is_slow_at_its_ends():
    (entry,) = parse_schedule("- {name: set_lr, value: 0.5, over: 4, style: cosine}", "s.yaml").entries
    before = start(learning_rate=0.1)
    ramp = Ramp.between(entry, before, entry.operation.plan(before), start_iter=0)
    values = [ramp.at(i)["learning_rate"] for i in range(5)]
    assert values == pytest.approx([0.1, 0.1 + 0.2 * (1 - 0.5**0.5), 0.3, 0.1 + 0.2 * (1 + 0.5**0.5), 0.5])


@pytest.mark.parametrize(
    "style, exponent, middle",
    [
        ("constant", None, [0.1, 0.1, 0.1]),
        ("linear", None, [0.2, 0.3, 0.4]),
        ("power", 2.0, [0.125, 0.2, 0.325]),
        ("power", 0.5, [0.3, 0.1 + 0.4 * 0.5**0.5, 0.1 + 0.4 * 0.75**0.5]),
    ],
)
@pytest.mark.parametrize("name, key", [("set_lr", "learning_rate"), ("set_weight_decay", "weight_decay")])
def test_every_style_of_a_ramp_by_hand(style, exponent, middle, name, key):
    given = {"name": name, "value": 0.5, "over": 4, "style": style, **({"exponent": exponent} if exponent else {})}
    (entry,) = parse_schedule(json.dumps([given]), "s.json").entries
    before = start(**{key: 0.1})
    ramp = Ramp.between(entry, before, entry.operation.plan(before), start_iter=3)
    ramp = Ramp.from_json(json.loads(json.dumps(ramp.to_json())))
    values = [ramp.at(3 + i)[key] for i in range(5)]
    assert values == pytest.approx([0.1, *middle, 0.5]) and (values[0], values[4]) == (0.1, 0.5)


def test_an_accumulation_ramp_reaches_its_end_where_the_power_of_others_does_not():
    """From 1 to 20 in 1000: 18 is the last that 0.1 ** share gives; here the end is the end, and once more after it."""
    (entry,) = parse_schedule(
        "- {name: set_grad_accum, value: 20, over: 1000, style: power, exponent: 2}", "s.yaml"
    ).entries
    before = start(gradient_accumulation_steps=1)
    ramp = Ramp.between(entry, before, entry.operation.plan(before), start_iter=0)
    values = [ramp.at(i)["grad_accum"] for i in (0, 100, 500, 900, 999, 1000, 1001)]
    assert values == [1, 1, 6, 16, 20, 20, 20]


@pytest.mark.parametrize(
    "text, message",
    [
        ("style: power", "style power and `exponent` go together: got power and None"),
        ("style: cosine, exponent: 2", "style power and `exponent` go together: got cosine and 2.0"),
        ("style: power, exponent: 0", "exponent must be .* 0"),
        ("exponent: 2", "got linear and 2.0"),
    ],
)
def test_power_has_an_exponent_and_no_other_style_has_one(text, message):
    (told,) = problems("- {name: set_lr, value: 0.3, over: 7, " + text + "}")
    assert re.search(message, told), told


def test_a_ramp_of_an_older_checkpoint_has_no_exponent():
    saved = {
        "entry": 1,
        "name": "set_lr",
        "start_iter": 0,
        "over": 2,
        "style": "linear",
        "fields": {"min_lr": [0.0, 1.0]},
    }
    assert Ramp.from_json(saved).at(1) == {"min_lr": 0.5}


def test_nothing_left_to_train_is_refused_whatever_causes_it():
    """Block 3 is the last that trains, and it is dropped."""
    text = "- {name: freeze_layer, value: [block.0, block.1, block.2, wte, wpe, ln_f]}\n"
    assert problems(text) == [] == problems(text + "- {name: drop_layers, value: [2]}")
    assert problems(text + "- {name: drop_layers, value: [3]}") == [
        "s.yaml:2: entry 2: nothing would be left to train: every parameter is frozen"
    ]


def test_accumulation_ramps_in_steps_that_both_ends_share():
    (entry,) = parse_schedule("- {name: set_grad_accum, value: 16, over: 10}", "s.yaml").entries
    before = start(gradient_accumulation_steps=4)
    ramp = Ramp.between(entry, before, entry.operation.plan(before), start_iter=0)
    values = [ramp.at(i)["grad_accum"] for i in range(11)]
    assert values[0] == 4 and values[-1] == 16 and all(value % 4 == 0 for value in values) and len(set(values)) == 4


def test_schedule_file_is_never_written(tmp_path):
    path = Path(tmp_path / "s.yaml")
    path.write_text(INTERFACE)
    before = path.stat()
    read_schedule(path)
    assert path.read_text() == INTERFACE and path.stat().st_mtime_ns == before.st_mtime_ns
