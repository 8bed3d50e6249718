"""`seeds`: several runs in one command, and what they have in common; `depth`: numbers that follow from one number."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, arguments, events, lines

import train_orchestrated
from orchestrate.training.session.seeds import results, spread
from orchestrate.training.settings.config import resolve
from orchestrate.training.settings.depth import RULES
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store.manifest import find


def test_spread_by_hand():
    """2, 4, 9: the mean is 5, the squares 9 + 1 + 16 = 26 over n - 1 = 2."""
    assert spread([2.0, 4.0, 9.0]) == {"n": 3, "mean": 5.0, "std": 13**0.5, "stderr": pytest.approx((13 / 3) ** 0.5)}
    assert spread([2.0]) == {"n": 1, "mean": 2.0, "std": None, "stderr": None}


def test_results_are_the_last_of_each_measure_and_none_of_those_around_an_operation():
    measured = [
        {"kind": "eval", "val_loss": 3.0, "best_val_loss": 3.0, "val_loss/a": 2.0, "eval/score": 0.5, "lr": 1.0},
        {"kind": "train", "val_loss": 9.0},
        {"kind": "eval", "val_loss": 3.5, "best_val_loss": 3.0, "val_loss/a": None},
        {"kind": "eval", "val_loss": 7.0, "best_val_loss": 3.0, "why": "after an operation"},
    ]
    record = SimpleNamespace(valid=SimpleNamespace(metrics=measured))
    assert results(record) == {"val_loss": 3.5, "best_val_loss": 3.0, "val_loss/a": 2.0, "eval/score": 0.5}


def test_an_early_stop_is_an_end_until_the_patience_is_another(data, tmp_path, capfd):
    keys = {"seeds": "1", "early_stopping_min_delta": 9.0, "max_iters": 50}
    for patience, at, said in ((1, 4, False), (1, 4, True), (2, 8, False)):
        assert train_orchestrated.main(arguments(data, tmp_path, early_stopping_patience=patience, **keys)) == 0
        assert events(tmp_path / "seed-1", "end")[-1]["iter"] == at
        assert ("seed 1: finished before" in capfd.readouterr().out) == said
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"]["val_loss"]["std"] is None


def test_two_seeds_one_command(data, tmp_path, capfd):
    out = tmp_path / "out"
    given = arguments(data, out, max_iters=4, seeds="3,14")
    assert train_orchestrated.main(given) == 0
    last = {n: [m for m in lines(out / f"seed-{n}" / "metrics.jsonl") if m["kind"] == "eval"][-1] for n in (3, 14)}
    assert events(out / "seed-14", "start")[0]["config"]["seed"] == 14
    a, b = (last[n]["val_loss"] for n in (3, 14))
    assert a != b
    facts = json.loads((out / "summary.json").read_text())
    assert facts["seeds"]["14"] == {"val_loss": b, "best_val_loss": last[14]["best_val_loss"]}
    got = facts["metrics"]["val_loss"]
    assert got["mean"] == pytest.approx((a + b) / 2) and got["std"] == pytest.approx(abs(a - b) / 2**0.5)
    assert got["stderr"] == pytest.approx(abs(a - b) / 2)
    table = capfd.readouterr().out.splitlines()[-7:]
    assert [line.split()[0] for line in table] == ["seed", "3", "14", "mean", "std", "stderr", "written"]
    assert table[2].split()[1] == f"{b:.6g}" and table[3].split()[1] == f"{(a + b) / 2:.6g}"

    # The same command again trains nothing; a higher limit goes on with both; another rate is another experiment.
    assert train_orchestrated.main(given) == 0
    said = capfd.readouterr().out
    assert "seed 3: finished before\nseed 14: finished before\n" in said and "iter " not in said
    with pytest.raises(Refused, match=r"seed-3 holds a run with learning_rate 0.01, and --learning_rate says 0.5"):
        train_orchestrated.main(arguments(data, out, max_iters=4, seeds="3,14", learning_rate=0.5))
    assert train_orchestrated.main(arguments(data, out, max_iters=5, seeds="3,14")) == 0
    assert [e["iter"] for e in events(out / "seed-14", "end")] == [4, 5]


def test_a_signal_saves_the_run_and_ends_the_command_and_the_next_goes_on(data, tmp_path):
    out = tmp_path / "out"
    given = arguments(data, out, max_iters=100000, seeds="1,2", eval_interval=100000)
    command = [sys.executable, str(ROOT / "train_orchestrated.py"), *given]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for line in process.stdout:
            if line.startswith("iter 3:"):
                process.send_signal(signal.SIGTERM)  # to the command alone, not to its run
                break
        assert process.wait(120) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.stdout.close()
    assert events(out / "seed-1", "end")[-1]["reason"] == "signal 15" and find(out / "seed-1")
    assert not (out / "seed-2").exists() and not (out / "summary.json").exists()
    reached = events(out / "seed-1", "end")[-1]["iter"]
    assert train_orchestrated.main(arguments(data, out, max_iters=reached + 1, seeds="1,2", eval_interval=100000)) == 0
    assert [e["iter"] for e in events(out / "seed-1", "resume")] == [reached]
    assert [e["iter"] for e in events(out / "seed-2", "end")] == [reached + 1]
    assert (out / "summary.json").exists()


def test_a_run_that_fails_ends_the_command(data, tmp_path):
    code = train_orchestrated.main(arguments(data, tmp_path / "out", seeds="1,2", inject="kill@2", max_iters=4))
    assert code == 128 + signal.SIGKILL and not (tmp_path / "out" / "seed-2").exists()


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"seeds": "1,1"}, "seeds 1,1: each seed is one run"),
        ({"seeds": "1,x"}, "--seeds: seeds"),
        ({"seeds": "-1"}, "--seeds: seeds"),
        ({"seeds": "1,2", "eval_only": True}, "seeds and eval_only"),
        ({"seeds": "1,2", "seed": 5}, "--seed and --seeds are given"),
    ],
)
def test_seeds_that_make_no_sense(data, tmp_path, keys, message):
    with pytest.raises(Refused, match=message):
        train_orchestrated.main(arguments(data, tmp_path / "out", **keys))


def test_seeds_inside_torchrun_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        Refused, match="seeds 1,2: .* start it once for each seed, with --seed=N --out_dir=OUT_DIR/seed"
    ):
        train_orchestrated.main(arguments(data, tmp_path / "out", seeds="1,2"))


@pytest.mark.parametrize("text", ["seeds = [1, 2, 3]", "seeds = 1, 2, 3", "seeds = '1,2,3'"])
def test_a_config_file_says_seeds_in_its_own_way(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    assert resolve([tmp_path / "c.py"], [])[0].seeds == (1, 2, 3) == resolve([], [("seeds", "1,2,3")])[0].seeds
    assert resolve([tmp_path / "c.py"], [("seeds", "")])[0].seeds == () and resolve([], [("seeds", "7")])[0].seeds == (
        7,
    )


# ---------------------------------------------------------------------------------------------- depth


def of(depth: int, **keys) -> dict:
    given = [("depth", str(depth)), *((key, str(value)) for key, value in keys.items())]
    return resolve([], given)[0].model_dump()


def test_twelve_blocks_are_gpt2_as_nanogpt_trains_it():
    v = of(12)
    assert (v["n_layer"], v["n_embd"], v["n_head"], v["batch_size"]) == (12, 768, 12, 16)
    assert v["gradient_accumulation_steps"] * 16 * 1024 == 2**19
    assert (v["learning_rate"], v["min_lr"], v["weight_decay"]) == (6e-4, 6e-5, 0.1)


def test_twice_the_depth_by_hand():
    """Eight times the weights: 8 ** 0.383 = 2.22, so 2^20 tokens; half the rate for the width, times sqrt(2)."""
    v = of(24)
    assert (v["n_layer"], v["n_embd"], v["n_head"]) == (24, 1536, 24)
    assert v["gradient_accumulation_steps"] * v["batch_size"] * 1024 == 2**20
    assert v["learning_rate"] == pytest.approx(3e-4 * 2**0.5, rel=2e-3)
    assert v["weight_decay"] == pytest.approx(0.1 * 2 * 2**0.5 / 8, rel=5e-3)  # 2 batches, rate 1 / sqrt(2), weights 8


def test_a_swiglu_and_shared_keys_count_as_they_are():
    """3 * 768 * 2048 and 768 * (768 + 2 * 192 + 768) a block; a third of the depth is a 27th of the weights less."""
    v, w = of(12, activation="swiglu", n_kv_head=3), 3 * 768 * 2048 + 768 * (2 * 768 + 2 * 192)
    assert v["weight_decay"] == pytest.approx(0.1 * 12 * 768**2 / w, rel=5e-3)


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"n_layer": 6}, {"n_layer": 6, "n_embd": 384, "n_head": 6}),
        ({"n_head": 10}, {"n_head": 10, "n_embd": 770}),  # the next multiple of 10 above 768
        ({"n_embd": 1000}, {"n_head": 10, "n_embd": 1000}),  # 15 heads of 64 would need 960; 10 of 100 divide 1000
        ({"n_embd": 32}, {"n_head": 1}),
        ({"batch_size": 4}, {"gradient_accumulation_steps": 128, "learning_rate": 6e-4}),
        ({"gradient_accumulation_steps": 64}, {"batch_size": 8, "learning_rate": 6e-4}),
        ({"batch_size": 4, "gradient_accumulation_steps": 32}, {"learning_rate": 3e-4, "weight_decay": 0.05}),
        ({"block_size": 100}, {"batch_size": 128, "gradient_accumulation_steps": 41}),
        ({"learning_rate": 1.2e-3}, {"learning_rate": 1.2e-3, "min_lr": 1.2e-4, "weight_decay": 0.05}),
        ({"learning_rate": 0}, {"min_lr": 0.0, "weight_decay": 0.1}),
        ({"min_lr": 1e-6}, {"min_lr": 1e-6, "learning_rate": 6e-4}),
        ({"weight_decay": 0.3}, {"weight_decay": 0.3}),
    ],
)
def test_every_key_can_be_given_and_the_rest_follows(keys, expected):
    v = of(12, **keys)
    assert {key: v[key] for key in expected} == expected


@pytest.mark.parametrize(
    "depth, keys, message",
    [
        (5000, {}, "depth 5000: n_layer must be a whole number from 1 to 4096"),
        (4, {"init_from": "gpt2"}, "depth 4 describes a model from scratch, and init_from gpt2 has its own"),
        (4, {"n_embd": 2**61 - 1}, "depth 4: n_embd must be a whole"),
        (4, {"batch_size": 10**300, "gradient_accumulation_steps": 10**300}, "depth 4: "),
    ],
)
def test_an_impossible_depth_is_refused_at_once(depth, keys, message):
    started = time.monotonic()
    with pytest.raises(Refused, match=message):
        of(depth, **keys)
    assert time.monotonic() - started < 5


def test_the_page_has_the_rules():
    page = " ".join((ROOT / "docs" / "migrating.md").read_text("utf-8").split())
    assert all(f"- `{key}`: {rule}" in page for key, (_, rule) in RULES.items())


def test_a_run_says_what_followed_and_a_resume_repeats_the_depth(data, tmp_path, capfd, resume):
    keys = {"depth": 1, "batch_size": 4, "gradient_accumulation_steps": 2, "block_size": 16, "max_iters": 2}
    more = {"device": "cpu", "compile": False, "eval_iters": 1, "dataset": data, "out_dir": tmp_path / "run"}
    given = [f"--{key}={value}" for key, value in {**keys, **more}.items()]
    assert train_orchestrated.main([*given, "--plan"]) == 0
    assert "note: depth 1: n_embd = 64       64 for each block" in capfd.readouterr().out
    assert train_orchestrated.main(given) == 0
    said = capfd.readouterr().out
    rate = float(f"{6e-4 * 12 * math.sqrt(128 / 2**19):.3g}")
    assert "depth 1: n_layer = 1" in said and f"depth 1: learning_rate = {rate}" in said and "768 / n_embd" in said
    assert "depth 1: batch_size = 4        --batch_size" in said and "128 tokens an iteration; 10 tokens" in said
    assert json.loads((tmp_path / "run/config.json").read_text())["n_embd"] == 64
    assert resume(tmp_path / "run", depth=1, max_iters=3) == 0
    assert "depth 1:" not in capfd.readouterr().out
    with pytest.raises(Refused, match="depth cannot change on resume from 1 to 2"):
        resume(tmp_path / "run", depth=2)
