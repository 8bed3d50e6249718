"""The learning rate: a pure function of the settings and of how far the run has come."""

from __future__ import annotations

import math

from orchestrate.training.settings.records import Settings


def learning_rate(settings: Settings, iters_since_start: int, iters_since_rewarm: int | None = None) -> float:
    """The rate of the next optimizer step.

    Args:
        iters_since_start: optimizer steps done since the learning-rate schedule (re)started; 0 for its first step.
        iters_since_rewarm: since the latest rewarming, which climbs linearly back to the curve; None without one.

    Linear warmup to `learning_rate` over warmup_iters, then by lr_schedule to `min_lr` at lr_decay_iters, then
    min_lr: cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts), linear, constant, or wsd (warmup,
    stable, decay; Hu et al. 2024, arXiv:2404.06395), which stays at the peak and falls linearly over the last
    wsd_decay_fraction. Without decay_lr the rate is `learning_rate` throughout. min_lr above the peak counts as the
    peak: a floor never lifts the rate.
    """
    rate = _curve(settings, iters_since_start)
    if iters_since_rewarm is not None and iters_since_rewarm < settings.rewarm_iters:
        rate *= (iters_since_rewarm + 1) / (settings.rewarm_iters + 1)
    return rate


def _curve(s: Settings, it: int) -> float:
    peak = s.learning_rate
    if not s.decay_lr:
        return peak
    if it < s.warmup_iters:
        return peak * (it + 1) / (s.warmup_iters + 1)
    if s.lr_schedule == "constant":
        return peak
    floor = min(s.min_lr, peak)
    decay_start = s.warmup_iters
    if s.lr_schedule == "wsd":
        decay_start = max(s.warmup_iters, round(s.lr_decay_iters * (1.0 - s.wsd_decay_fraction)))
    if it <= decay_start:
        return peak if s.lr_decay_iters > decay_start or it < s.lr_decay_iters else floor
    if it >= s.lr_decay_iters:
        return floor
    share = (it - decay_start) / (s.lr_decay_iters - decay_start)
    fall = 0.5 * (1.0 + math.cos(math.pi * share)) if s.lr_schedule == "cosine" else 1.0 - share
    return floor + fall * (peak - floor)
