"""How values are shown to a person: short, and nothing cut out of the middle of a name."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrate.model.config import BLOCK_LAYERS
from orchestrate.training.settings.values import brief, changed, cut, layer_ranges, problems_of


def blocks(*numbers: int) -> list[str]:
    return [f"{kind}.{n}" for n in numbers for kind in BLOCK_LAYERS]


@pytest.mark.parametrize(
    "names, expected",
    [
        ([], []),
        (["wte", "wpe", *blocks(0, 1, 2, 3), "ln_f"], ["wte", "wpe", "block.0-3", "ln_f"]),
        (blocks(0, 2, 3, 10), ["block.0", "block.2-3", "block.10"]),
        (["attn.0", "attn.1", "mlp.1", "attn.3"], ["attn.0-1", "mlp.1", "attn.3"]),
        ([*blocks(4), "mlp.5"], ["block.4", "mlp.5"]),
        (["mlp.0", *blocks(1), "mlp.2"], ["mlp.0", "block.1", "mlp.2"]),
        (["attn.2", "attn.1"], ["attn.1-2"]),
        (["attn.*", "mlp.", "x.1"], ["attn.*", "mlp.", "x.1"]),
    ],
)
def test_layers_as_ranges(names, expected):
    assert layer_ranges(names) == expected


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = 0
    kind: int | str = 0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner = Inner()


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"A": 1}, [(("A",), "is no field here; allowed: inner")]),
        ({"int": 1}, [(("int",), "is no field here; did you mean inner? allowed: inner")]),
        ({"inner": {"Size": 1}}, [(("inner", "Size"), "is no field here; did you mean size? allowed: size, kind")]),
        ({"inner": {"kind": []}}, [(("inner", "kind"), "must be a valid integer or text, got []")]),
        (3, [((), "must be a mapping of inner, got 3")]),
    ],
)
def test_a_key_that_looks_like_a_name_of_pydantics_is_still_a_key(values, expected):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(values)
    assert problems_of(caught.value, Outer) == expected


def test_many_layers_take_no_time():
    assert layer_ranges(blocks(*range(4096))) == ["block.0-4095"]


def test_values_of_settings():
    ranks = {"attn.0": {"rank": 8, "alpha": 1.0}, "attn.1": {"rank": 8, "alpha": 1.0}, "mlp.0": {"rank": 2}}
    assert brief(ranks) == "{attn.0-1: 8; mlp.0: 2}"
    assert brief({"mlp.0": {"known": 4, "share": 0.25}}) == "{mlp.0: 0.25}"
    assert brief({}) == "{}" and brief([]) == "[]" and brief(None) == "None"
    assert brief([64, 64, 64]) == "[3 x 64]" and brief([64, 32]) == "[64, 32]"
    assert brief(0.1 + 0.2) == "0.3" and brief("x" * 200) == "x" * 200 and len(brief(list(range(99)))) == 60
    assert brief([{"name": "set_lr", "value": 1}, {"name": "stop"}]) == "2 entries (set_lr, stop)"
    assert cut("abcdef", 6) == "abcdef" and cut("abcdefg", 6) == "abc..."
    assert brief([{"name": "stop"}] * 5) == "5 entries (stop, stop, stop, stop, ...)"


@pytest.mark.parametrize(
    ("name", "before", "after", "expected"),
    [
        ("frozen", [], blocks(0, 1, 2, 3), "block.0-3 frozen"),
        ("frozen", ["wte", *blocks(0, 1), "ln_f"], ["wte", *blocks(1, 2)],
         "block.2 frozen, block.0, ln_f no longer frozen"),
        ("frozen", ["wte", "wpe"], ["wpe", "wte"], "frozen [wte, wpe] -> [wpe, wte]"),
        ("model.lora", {}, {"attn.0": {"rank": 4}, "attn.1": {"rank": 4}, "wte": {"rank": 2}},
         "model.lora attn.0-1: none -> 4; wte: none -> 2"),
        ("model.lora", {"attn.0": {"rank": 4}, "mlp.0": {"rank": 4}}, {"attn.0": {"rank": 16}, "mlp.0": {"rank": 4}},
         "model.lora attn.0: 4 -> 16"),
        ("model.lora", {"attn.0": {"rank": 4, "alpha": 8.0}}, {"attn.0": {"rank": 4, "alpha": 2.5}},
         "model.lora attn.0: alpha 8 -> 2.5"),
        ("model.lora", {"attn.0": {"rank": 4}}, {}, "model.lora attn.0: 4 -> none"),
        ("mixture", {"a": 0.25, "b": 0.75}, {"a": 0.5, "b": 0.5}, "mixture a: 0.25 -> 0.5; b: 0.75 -> 0.5"),
        ("fading", {"mlp.3": {"known": 4, "share": 0.0}}, {}, "fading mlp.3: 0 -> none"),
        ("vocabulary_map", [], [3, 1, 3], "vocabulary_map [] -> [3, 1, 3]"),
        ("learning_rate", 1e-3, 5e-4, "learning_rate 0.001 -> 0.0005"),
    ],
)  # fmt: skip
def test_a_change_says_what_is_other_than_before(name, before, after, expected):
    assert changed(name, before, after) == expected
