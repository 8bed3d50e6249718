"""The learning rate against the formulas, at the corners of every schedule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from orchestrate.model.config import ModelConfig
from orchestrate.training.run.learning_rate import learning_rate
from orchestrate.training.session.start import settings_from
from orchestrate.training.settings.config import TrainConfig

CONFIG = dict(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=110, wsd_decay_fraction=0.2)
SHAPE = ModelConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8)


def rate(iteration: int, **keys) -> float:
    return learning_rate(settings_from(TrainConfig(**{**CONFIG, **keys}), SHAPE), iteration)


def nanogpt(it: int) -> float:
    """nanoGPT's rule, from its description: linear warmup, cosine to min_lr, min_lr."""
    if it < 10:
        return 1e-3 * (it + 1) / 11
    if it > 110:
        return 1e-4
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * (it - 10) / 100)) * 9e-4


def test_cosine_is_nanogpts_curve():
    for iteration in range(130):
        assert rate(iteration) == pytest.approx(nanogpt(iteration), rel=1e-12)


@pytest.mark.parametrize(
    "schedule, at, expected",
    [
        ("linear", 60, 5.5e-4),
        ("linear", 110, 1e-4),
        ("constant", 10_000, 1e-3),
        ("constant", 4, 1e-3 * 5 / 11),
        ("wsd", 88, 1e-3),
        ("wsd", 99, 5.5e-4),
        ("wsd", 110, 1e-4),
        ("wsd", 500, 1e-4),
    ],
)
def test_values(schedule, at, expected):
    assert rate(at, lr_schedule=schedule) == pytest.approx(expected, rel=1e-12)


def test_without_decay_the_rate_is_flat_from_the_first_step():
    assert {rate(i, decay_lr=False) for i in (0, 5, 50, 500)} == {1e-3}


def test_no_schedule_leaves_the_band_or_jumps():
    for schedule in ("cosine", "linear", "wsd"):
        curve = [rate(i, lr_schedule=schedule) for i in range(200)]
        assert max(curve) == 1e-3 and min(curve[10:]) == 1e-4
        assert max(abs(a - b) for a, b in zip(curve, curve[1:], strict=False)) < 1e-4


def test_a_floor_above_the_peak_never_lifts_the_rate():
    assert rate(200, learning_rate=5e-5) == 5e-5
    assert rate(60, learning_rate=5e-5, lr_schedule="linear") == 5e-5


def test_a_decay_that_is_over_before_the_warmup_ends_is_the_floor():
    assert rate(20, warmup_iters=10, lr_decay_iters=5) == 1e-4
    assert rate(0, warmup_iters=0, lr_decay_iters=0) == 1e-4


def test_a_rewarming_climbs_from_above_zero_back_to_the_curve():
    settings = replace(settings_from(TrainConfig(**CONFIG, lr_schedule="constant"), SHAPE), rewarm_iters=4)
    climbs = [learning_rate(settings, 50 + i, i) for i in range(6)]
    assert climbs == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3], rel=1e-12)
    assert learning_rate(settings, 5, 1) == pytest.approx(1e-3 * 6 / 11 * 2 / 5), (
        "inside the warm-up it is a share of it"
    )
    assert learning_rate(settings, 50, None) == 1e-3 == learning_rate(replace(settings, rewarm_iters=0), 50, 0)


@pytest.mark.parametrize(
    "schedule, keys, expected",
    [
        # The last iteration of the warm-up, the peak right after it, and the ends of the fall.
        ("cosine", {}, {9: 1e-3 * 10 / 11, 10: 1e-3, 109: 1e-4 + 4.5e-4 * (1 - math.cos(math.pi / 100)), 110: 1e-4}),
        ("linear", {}, {10: 1e-3, 11: 1e-3 - 9e-6, 109: 1e-4 + 9e-6}),
        # 110 * 0.8 = 88 iterations are stable; where the warm-up is longer than that, the fall begins behind it.
        ("wsd", {}, {10: 1e-3, 89: 1e-3 - 9e-4 / 22, 109: 1e-4 + 9e-4 / 22}),
        ("wsd", {"warmup_iters": 100}, {99: 1e-3 * 100 / 101, 100: 1e-3, 105: 5.5e-4}),
        ("wsd", {"wsd_decay_fraction": 0.0001}, {109: 1e-3, 110: 1e-4}),
        # The decay ends exactly where the warm-up does, or before.
        ("linear", {"lr_decay_iters": 10}, {9: 1e-3 * 10 / 11, 10: 1e-4}),
        ("constant", {}, {0: 1e-3 / 11, 10: 1e-3, 111: 1e-3}),
    ],
)
def test_corners(schedule, keys, expected):
    found = {at: rate(at, lr_schedule=schedule, **keys) for at in expected}
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_change_of_settings_moves_the_whole_curve():
    base = settings_from(TrainConfig(**CONFIG), SHAPE)
    half = replace(base, learning_rate=5e-4, min_lr=5e-5)
    for iteration in (3, 50, 105, 200):
        assert learning_rate(half, iteration) == pytest.approx(learning_rate(base, iteration) / 2)
