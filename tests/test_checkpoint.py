"""Checkpoint folders: whole or absent, verified on reading, pruned, and never unpickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

import pytest
import torch
from conftest import arguments, events, lines, on_ranks, state_of
from fuzzing import seal, write_manifest

import train_orchestrated
from orchestrate.training.session.resume import latest_good
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint, manifest
from orchestrate.training.store.manifest import Damaged
from orchestrate.training.store.state import State, UserFile


def save(root, iteration: int, loss: float | None = None, keep_last: int = 2, keep_best: int = 1):
    evaluated = {} if loss is None else {"last_val_loss": loss, "last_eval_iter": iteration}
    state = state_of(iter=iteration, **evaluated)
    model = {"a": torch.full((2, 3), float(iteration)), "b.c": torch.arange(3.0)}
    optimizer = {"a": {"exp_avg": torch.ones(2, 3), "step": torch.tensor(float(iteration))}}
    return checkpoint.save(root, state, model, optimizer, keep_last=keep_last, keep_best=keep_best)


def names(root) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def test_round_trip(tmp_path):
    path = save(tmp_path, 7, 1.5)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded.model["a"], torch.full((2, 3), 7.0)) and loaded.state.progress.iter == 7
    assert loaded.optimizer["a"]["step"] == 7 and list(loaded.optimizer["a"]) == ["exp_avg", "step"]
    facts = json.loads((path / "manifest.json").read_text())
    assert facts["files"]["model.safetensors"]["bytes"] == (path / "model.safetensors").stat().st_size


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


def test_best_never_points_at_what_was_removed(tmp_path):
    save(tmp_path, 4, 1.0, keep_last=1, keep_best=0)
    save(tmp_path, 9, keep_last=1, keep_best=0)
    assert names(tmp_path) == ["iter_000000009", "latest"]


def test_the_loss_in_a_manifest_is_that_of_its_own_state(tmp_path):
    """A loss that was measured iterations ago is another model's, and `best` does not go by it."""
    save(tmp_path, 4, 2.0)
    state = state_of(iter=6, last_val_loss=1.0, last_eval_iter=4)
    path = checkpoint.save(tmp_path, state, {"a": torch.ones(1)}, {}, keep_last=2, keep_best=1)
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
                assert torch.equal(loaded.model["a"], torch.full((2, 3), float(loaded.state.progress.iter)))
    assert 4 < dies_at < 99, "there are some, and not all of them were met"


def test_a_save_after_going_back_is_kept_beside_later_ones(tmp_path):
    save(tmp_path, 8, 1.0, keep_last=1, keep_best=0)
    save(tmp_path, 5, keep_last=1, keep_best=0)
    assert names(tmp_path) == ["best", "iter_000000005", "iter_000000008", "latest"]
    assert (tmp_path / "checkpoints/latest").resolve().name == "iter_000000005"
    checkpoint.remove_after(tmp_path, 5)
    assert names(tmp_path) == ["iter_000000005", "latest"]


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


def harm(path, kind: str) -> None:
    """Damage a manifest."""
    content = path.read_bytes()
    path.unlink() if kind == "remove" else path.write_bytes({"cut": content[:100], "garbage": b"\x00{" * 40}[kind])


HARMS = ["cut", "garbage", "remove"]


@pytest.mark.parametrize("kind", HARMS)
def test_a_damaged_manifest_is_named_and_its_folder_let_be(tmp_path, kind):
    path = save(tmp_path, 1, 0.5)
    weights = (path / "model.safetensors").read_bytes()
    harm(path / "manifest.json", kind)
    assert checkpoint.find(tmp_path) == [] and [found for found, _ in manifest.survey(tmp_path)] == [path]
    with pytest.raises(Damaged, match="iter_000000001: manifest.json is (damaged|missing)"):
        checkpoint.load(path)
    for iteration in (2, 3, 4):
        save(tmp_path, iteration, 9.0)
    assert (path / "model.safetensors").read_bytes() == weights, "no save removes it"
    checkpoint.remove_after(tmp_path, 0)
    assert names(tmp_path)[1] == path.name, "nor does going back"
    save(tmp_path, 1)
    assert (path.with_name("damaged_iter_000000001") / "model.safetensors").read_bytes() == weights
    checkpoint.load(path)


def test_the_checksum_of_a_manifest_by_hand(tmp_path):
    facts = json.loads((save(tmp_path, 7, 1.5) / "manifest.json").read_text())
    digests = ",".join(
        f'"{name}":{{"bytes":{file["bytes"]},"sha256":"{file["sha256"]}"}}' for name, file in facts["files"].items()
    )
    text = f'{{"files":{{{digests}}},"format":3,"iter":7,"torch":"{torch.__version__}","val_loss":1.5}}'
    assert list(facts["files"]) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert facts["sha256"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "old, new",
    [
        ('"iter": 21', '"iter": 61'),
        ('"val_loss": 2.5', '"val_loss": 1.5'),
        ('"format": 3', '"format": 2'),
        ('"format": 3', '"format": 1'),
        ('"format": 3', '"format": 0'),
        ('"torch"', '"tOrch"'),
        ('"sha256": "', '"sha256": "0'),
    ],
)
def test_a_changed_digit_of_a_manifest_is_damage(tmp_path, old, new):
    save(tmp_path, 20, 2.0, keep_last=9)
    path = save(tmp_path, 21, 2.5, keep_last=9) / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(Damaged, match="manifest.json is damaged"):
        checkpoint.load(path.parent)
    save(tmp_path, 22, 2.2, keep_last=9)
    assert (tmp_path / "checkpoints/best").resolve().name == "iter_000000020", "a damaged one has no rank"


def test_a_manifest_of_another_iteration_than_its_folder_is_damage(tmp_path):
    """As formats 1 and 2 have no checksum: it is not taken for the newest."""
    save(tmp_path, 20)
    path = save(tmp_path, 21)
    write_manifest(path, {**json.loads((path / "manifest.json").read_text()), "format": 2, "iter": 61})
    assert [found.name for found in checkpoint.find(tmp_path)] == ["iter_000000020"]
    with pytest.raises(Damaged, match="manifest.json is damaged .iter 61"):
        checkpoint.load(path)


@pytest.mark.parametrize("key, value", [("iter", 8), ("val_loss", 0.5)])
def test_a_manifest_without_a_checksum_is_compared_with_the_state(tmp_path, key, value):
    """As formats 1 and 2 have it; the folder has another name, so that its name is no help."""
    path = save(tmp_path, 7, 1.5).rename(tmp_path / "copy")
    facts = json.loads((path / "manifest.json").read_text())
    write_manifest(path, {**facts, "format": 2})
    assert checkpoint.load(path).state.progress.iter == 7
    write_manifest(path, {**facts, "format": 2, key: value})
    with pytest.raises(Damaged, match=f"{key} {value}.*state.json says otherwise"):
        checkpoint.load(path)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_a_link_in_a_checkpoint_is_refused(tmp_path, file):
    path = save(tmp_path, 1)
    (path / file).rename(tmp_path / "elsewhere")
    (path / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match=f"{file} is a link") as refused:
        checkpoint.load(path)
    assert not isinstance(refused.value, Damaged), "it is not renamed for that"


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_all_files_have_the_mode_that_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()} == dict.fromkeys(
        ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"], mode
    )


def test_a_removal_that_dies_leaves_litter_and_no_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def dies(path, **kwargs):
        if path.exists():
            (path / "manifest.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(manifest.shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep_last=1)
    monkeypatch.undo()
    assert names(tmp_path) == [".writing_old_iter_000000001", "iter_000000002", "latest"]
    assert [path.name for path, _ in manifest.survey(tmp_path)] == ["iter_000000002"]
    save(tmp_path, 3, keep_last=1)
    assert names(tmp_path) == ["iter_000000003", "latest"]


def test_a_second_damaged_one_of_the_same_name_does_not_replace_the_first(tmp_path):
    aside = [checkpoint.set_aside(save(tmp_path, 1)).name for _ in range(3)]
    assert aside == ["damaged_iter_000000001", "damaged_iter_000000001_2", "damaged_iter_000000001_3"]


def test_a_state_comes_back_as_it_was_saved(tmp_path):
    state = state_of(iter=3, last_val_loss=float("nan"), last_eval_iter=3, best_val_loss=2.5)
    state = dataclasses.replace(state, operations=(UserFile("mine.py", "0" * 64),), log_sizes={"events.jsonl": 7})
    path = checkpoint.save(tmp_path, state, {}, {}, keep_last=1, keep_best=1)
    expected = dataclasses.replace(state, progress=dataclasses.replace(state.progress, last_val_loss=None))
    assert checkpoint.load(path).state == expected, "a loss that is no number is null"
    values = expected.to_json()
    for broken, said in [
        ({**values, "surprise": 1}, "surprise"),
        ({**values, "progress": {**values["progress"], "iter": -1}}, r"progress\.iter"),
        ({**values, "config": {"n_layr": 1}}, r"config\.n_layr"),
        ({**values, "operations": [{"file": "x.py", "sha256": "../.."}]}, r"operations\.0\.sha256"),
        ({**values, "orchestrator": {"position": {"fired": 1.0}, "ramps": []}}, r"orchestrator\.position\.fired"),
        ({**values, "tokenizer": {"format": 1, "tokenizer": "x"}}, "tokenizer must be"),
        ({name: value for name, value in values.items() if name != "data"}, "data is missing"),
        ([], "not a state"),
    ]:
        with pytest.raises(ValueError, match=said):
            State.from_json(broken)


def test_a_full_disk_is_an_error_of_the_disk(tmp_path, monkeypatch):
    def full(*_):
        raise checkpoint.SafetensorError("No space left on device")

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 2)
    assert [path.name for path in checkpoint.find(tmp_path)] == ["iter_000000001"]


def _without_moments(path):
    (path / "optimizer.safetensors").unlink()
    values = json.loads((path / "manifest.json").read_text())
    del values["files"]["optimizer.safetensors"]
    write_manifest(path, values)


def _other_numbers(path):
    tensors = {"a": torch.ones(2, 3, dtype=torch.float16)}
    checkpoint.save_file(tensors, path / "model.safetensors")


def _no_json(path):
    (path / "state.json").write_text("{")


@pytest.mark.parametrize(
    "change, said",
    [
        (_without_moments, r"not readable \(ValueError: optimizer.safetensors is missing\)"),
        (_other_numbers, r"not readable \(ValueError: model.safetensors: a is F16, "),
        (_no_json, r"state\.json: Expecting property name"),
    ],
)
def test_what_this_version_did_not_write_is_refused(tmp_path, change, said):
    path = save(tmp_path, 7, 1.5)
    change(path)
    seal(path)
    with pytest.raises(Refused, match=f"^checkpoint {path}: {said}"):
        checkpoint.load(path)


# ---------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("kind", HARMS)
@pytest.mark.parametrize("iteration", [4, 8])
def test_a_start_sets_a_damaged_manifest_aside_wherever_it_is(tiny, resume, capsys, kind, iteration):
    _, out_dir = tiny(max_iters=8)
    name = f"iter_{iteration:09d}"
    harm(out_dir / "checkpoints" / name / "manifest.json", kind)
    assert resume(out_dir, max_iters=10) == 0
    (event,) = events(out_dir, "resume")
    assert event["checkpoint"].endswith("iter_000000008" if iteration == 4 else "iter_000000004")
    assert len(event["problems"]) == 1 and f"{name}: manifest.json is" in event["problems"][0]
    assert event["set_aside"] == [str(out_dir / "checkpoints" / f"damaged_{name}")]
    assert (out_dir / "checkpoints" / f"damaged_{name}" / "model.safetensors").exists()
    assert f"passed over: checkpoint {out_dir}/checkpoints/{name}: manifest.json" in capsys.readouterr().out


@pytest.mark.parametrize("kind", HARMS)
@pytest.mark.parametrize("restarted", ["", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_no_start_takes_over_checkpoints_that_it_cannot_read(tiny, data, monkeypatch, capsys, kind, restarted):
    _, out_dir = tiny(max_iters=8)
    for path in checkpoint.find(out_dir):
        harm(path / "manifest.json", kind)
    before = {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}
    if restarted:
        monkeypatch.setenv(restarted, "1")
    assert train_orchestrated.run(arguments(data, out_dir, max_iters=8)) == 2
    told = capsys.readouterr().err
    assert "iter_000000004" in told and "iter_000000008" in told and "Traceback" not in told
    assert not restarted or "no complete checkpoint to resume from" in told, "what is wrong with each is said"
    assert train_orchestrated.run(["--init_from=resume", f"--out_dir={out_dir}"]) == 2
    assert {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()} == before


def test_a_folder_with_only_what_was_set_aside_is_not_taken_over(tmp_path, tiny):
    checkpoint.set_aside(save(tmp_path / "run", 1))
    with pytest.raises(Refused, match="cannot be read.*: damaged_iter_000000001;"):
        tiny()


def test_a_newer_format_is_refused_though_there_are_older_ones(tiny, resume):
    _, out_dir = tiny(max_iters=8)
    path = out_dir / "checkpoints" / "iter_000000008"
    write_manifest(path, {**json.loads((path / "manifest.json").read_text()), "format": 4})
    before = names(out_dir)
    with pytest.raises(Refused, match="iter_000000008: format 4, this version reads 1, 2 and 3"):
        resume(out_dir, max_iters=10)
    assert names(out_dir) == before, "and not renamed"


def test_only_the_first_rank_reads_whole_files(tmp_path, monkeypatch):
    """The others take its word, a damaged newest checkpoint included."""
    whole, damaged = save(tmp_path, 1), save(tmp_path, 2)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    told, read = [], []
    real = manifest._digest
    monkeypatch.setattr(manifest, "_digest", lambda path: read.append(path.name) or real(path))

    def first(question, answer):
        told.append(answer())
        return told[-1]

    loaded, problems, aside = latest_good(str(tmp_path), first)
    assert loaded.path == whole and aside == [damaged] and "model.safetensors is damaged" in problems[0]
    assert read.count("model.safetensors") == 2
    read.clear()
    other, problems, aside = latest_good(str(tmp_path), lambda question, answer: told[-1])
    assert other.path == whole and aside == [damaged] and problems and set(read) == {"state.json"}


def test_a_damaged_latest_is_passed_over_and_said(tiny, resume, capsys):
    _, out_dir = tiny(max_iters=8)
    latest = out_dir / "checkpoints/latest/model.safetensors"
    latest.write_bytes(latest.read_bytes()[:100])
    assert resume(out_dir, max_iters=10) == 0
    (event,) = events(out_dir, "resume")
    assert event["checkpoint"].endswith("iter_000000004") and "model.safetensors is damaged" in event["problems"][0]
    assert event["set_aside"][0].endswith("damaged_iter_000000008"), "and out of the way"
    assert "passed over" in capsys.readouterr().out


def _reads(rank: int, out_dir: str):
    """Which tensor files a rank has computed checksums of in a resume."""
    read, real = [], manifest._digest
    manifest._digest = lambda path: read.append(path.name) or real(path)
    code = train_orchestrated.main(["--init_from=resume", f"--out_dir={out_dir}", "--max_iters=8"])
    return code, read.count("model.safetensors") > 0


def test_on_two_ranks_a_damaged_newest_checkpoint_is_passed_over_on_the_word_of_the_first(tiny):
    _, out_dir = tiny(max_iters=8)
    path = out_dir / "checkpoints" / "iter_000000008" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert on_ranks(_reads, str(out_dir)) == [(0, True), (0, False)]
    (event,) = events(out_dir, "resume")
    assert event["checkpoint"].endswith("iter_000000004") and "optimizer.safetensors is damaged" in event["problems"][0]
    assert [e["iter"] for e in events(out_dir, "end")] == [8, 8]
