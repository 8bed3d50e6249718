"""Checkpoint folders: whole or absent, verified on reading, pruned, and never unpickled."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import events, lines

from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint


def save(root, iteration: int, loss: float | None = None, keep_last: int = 2, keep_best: int = 1):
    progress = {"iter": iteration, "last_val_loss": loss, "last_eval_iter": -1 if loss is None else iteration}
    model = {"a": torch.full((2, 3), float(iteration)), "b.c": torch.arange(3.0)}
    optimizer = {"a": {"exp_avg": torch.ones(2, 3), "step": torch.tensor(float(iteration))}}
    return checkpoint.save(root, {"progress": progress}, model, optimizer, keep_last=keep_last, keep_best=keep_best)


def names(root) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def test_round_trip(tmp_path):
    path = save(tmp_path, 7, 1.5)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded.model["a"], torch.full((2, 3), 7.0)) and loaded.state["progress"]["iter"] == 7
    assert loaded.optimizer["a"]["step"] == 7 and list(loaded.optimizer["a"]) == ["exp_avg", "step"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["bytes"] == (path / "model.safetensors").stat().st_size


def test_latest_and_best_are_kept_and_linked(tmp_path):
    for iteration, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)]:
        save(tmp_path, iteration, loss)
    assert names(tmp_path) == ["best", "iter_000000002", "iter_000000004", "iter_000000005", "latest"]
    root = tmp_path / "checkpoints"
    assert (root / "latest").resolve().name == "iter_000000005"
    assert (root / "best").resolve().name == "iter_000000002"
    assert [path.name for path in checkpoint.find(tmp_path)][0] == "iter_000000005"


def test_the_best_ones_are_kept_whatever_their_age(tmp_path):
    """Of equal losses the newer one; one that was not evaluated has none; a pinned one stays in any case."""
    for iteration, loss in [(1, 3.0), (2, 1.0), (3, 1.5), (4, 1.0), (5, None), (6, 2.5), (7, 2.0)]:
        save(tmp_path, iteration, loss, keep_last=1, keep_best=2)
    assert names(tmp_path) == ["best", "iter_000000002", "iter_000000004", "iter_000000007", "latest"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "iter_000000004"
    save(tmp_path, 8, 1.25, keep_last=2, keep_best=1)
    assert names(tmp_path) == ["best", "iter_000000004", "iter_000000007", "iter_000000008", "latest"]


@pytest.mark.xfail(strict=True, reason="`best` is linked before what need not be kept is removed")
def test_best_never_points_at_what_was_removed(tmp_path):
    save(tmp_path, 4, 1.0, keep_last=1, keep_best=0)
    save(tmp_path, 9, keep_last=1, keep_best=0)
    assert names(tmp_path) == ["iter_000000009", "latest"]


def test_the_loss_in_a_manifest_is_that_of_its_own_state(tmp_path):
    """A loss that was measured iterations ago is another model's, and `best` does not go by it."""
    save(tmp_path, 4, 2.0)
    progress = {"iter": 6, "last_val_loss": 1.0, "last_eval_iter": 4}
    path = checkpoint.save(tmp_path, {"progress": progress}, {"a": torch.ones(1)}, {}, keep_last=2, keep_best=1)
    assert json.loads((path / "manifest.json").read_text())["val_loss"] is None
    assert (tmp_path / "checkpoints" / "best").resolve().name == "iter_000000004"


def test_each_checkpoint_of_a_run_holds_its_own_evaluation(tiny):
    saves = [{"name": "save_checkpoint", "at_iter": 6}, {"name": "set_lr", "value": 1.0, "at_iter": 7}]
    _, out = tiny(saves, keep_last=9)
    measured = {m["iter"]: m["val_loss"] for m in lines(out / "metrics.jsonl") if m["kind"] == "eval"}
    found = {}
    for path in checkpoint.find(out):
        manifest = json.loads((path / "manifest.json").read_text())
        found[manifest["iter"]] = manifest["val_loss"]
    assert found == {4: measured[4], 6: None, 8: measured[8], 12: measured[12]}
    assert measured[4] < min(measured[8], measured[12])
    assert (out / "checkpoints" / "best").resolve().name == "iter_000000004"


def test_latest_resolves_at_every_moment_of_a_save(tmp_path, monkeypatch):
    """The process dies right before each change of the folder in turn; what is there is the state before or after."""
    changes = ("replace", "rename", "symlink", "unlink", "rmdir", "link")
    real = {name: getattr(os, name) for name in changes}
    left = [-1]

    def dying(name):
        def change(*args, **keys):
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
            return real[name](*args, **keys)

        return change

    for name in changes:
        monkeypatch.setattr(os, name, dying(name))
    for dies_at in range(100):
        root = tmp_path / str(dies_at)
        left[0] = -1
        save(root, 1, 2.0, keep_last=1)
        left[0] = dies_at
        try:
            save(root, 2, 1.0, keep_last=1)
            break
        except KeyboardInterrupt:
            for name in ("latest", "best"):
                loaded = checkpoint.load((root / "checkpoints" / name).resolve())
                assert torch.equal(loaded.model["a"], torch.full((2, 3), float(loaded.state["progress"]["iter"])))
    assert 4 < dies_at < 99, "there are some, and not all of them were met"


def test_saving_the_same_iteration_again_replaces_it(tmp_path):
    save(tmp_path, 1, 3.0)
    save(tmp_path, 1, 2.0)
    assert names(tmp_path) == ["best", "iter_000000001", "latest"]
    assert json.loads((tmp_path / "checkpoints/latest/manifest.json").read_text())["val_loss"] == 2.0


def test_a_save_that_dies_leaves_the_previous_one_and_no_litter(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2)
    assert [path.name for path in checkpoint.find(tmp_path)] == ["iter_000000001"]
    checkpoint.load(tmp_path / "checkpoints" / "latest")
    monkeypatch.setattr(checkpoint, "save_file", real)
    save(tmp_path, 3)
    assert names(tmp_path) == ["iter_000000001", "iter_000000003", "latest"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove"])
def test_damage_is_named(tmp_path, file, harm):
    path = save(tmp_path, 1) / file
    raw = bytearray(path.read_bytes())
    if harm == "flip":
        raw[len(raw) // 2] ^= 1
    path.unlink() if harm == "remove" else path.write_bytes(
        raw if harm == "flip" else raw[:5] if harm == "cut" else b""
    )
    with pytest.raises(Refused, match=f"{file} is (damaged|missing)"):
        checkpoint.load(path.parent)


def test_without_a_manifest_it_is_no_checkpoint(tmp_path):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text("{")
    assert checkpoint.find(tmp_path) == []
    with pytest.raises(Refused, match="never completed"):
        checkpoint.load(path)
    manifest = {"format": 99, "iter": 1, "files": {}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Refused, match="format 99"):
        checkpoint.load(path)


def test_a_damaged_latest_is_passed_over_and_said(tiny, resume, capsys):
    _, out_dir = tiny(max_iters=8)
    latest = out_dir / "checkpoints/latest/model.safetensors"
    latest.write_bytes(latest.read_bytes()[:100])
    assert resume(out_dir, max_iters=10) == 0
    (event,) = events(out_dir, "resume")
    assert event["checkpoint"].endswith("iter_000000004") and "model.safetensors is damaged" in event["problems"][0]
    assert event["set_aside"][0].endswith("damaged_iter_000000008"), "and out of the way"
    assert "passed over" in capsys.readouterr().out
