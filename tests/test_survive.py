"""Sick numbers, memory that runs out, deaths: what was hurt, what was not, and that every rank knows."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, assert_same_tensors, events, lines, on_ranks, tensors
from test_operations import live_run

import train_orchestrated
from orchestrate.data.stream import Cursor
from orchestrate.training.run.sickness import Sick
from orchestrate.training.schedule.file import Schedule
from orchestrate.training.schedule.orchestrator import Orchestrator
from orchestrate.training.session.lock import FolderLock
from orchestrate.training.session.saving import BackgroundSave
from orchestrate.training.session.session import Session
from orchestrate.training.session.stopping import NoSignals
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.faults import parse_faults
from orchestrate.training.settings.records import Place
from orchestrate.training.store.reporting import Reporter
from orchestrate.training.store.run_folder import read_run


def train_lines(out_dir):
    return [m for m in lines(out_dir / "metrics.jsonl") if m["kind"] == "train" and not m.get("void")]


# ---------------------------------------------------------------------------------------------- sick numbers


def test_a_step_that_is_not_finite_touches_nothing(data, tmp_path):
    run = live_run(data, inject="nan@4", out_dir=str(tmp_path))
    run.step()
    weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    moments = {n: {k: v.clone() for k, v in m.items()} for n, m in run.optimizer.state_by_name().items()}
    result = run.step()
    assert result.sick == Sick("not finite", Place(4, Cursor(16, 16, 32), 512), samples=8, batch_size=4)
    assert all(torch.equal(p, weights[n]) for n, p in run.model.named_parameters())
    for n, m in run.optimizer.state_by_name().items():
        assert all(torch.equal(v, moments[n][k]) for k, v in m.items()), n
    assert run.progress.iter == 5, "the samples are passed over"
    assert not run.step().sick
    assert not torch.equal(run.model.get_parameter("transformer.wte.weight"), weights["transformer.wte.weight"])


def test_skipping_is_logged_with_the_samples(tiny):
    code, out = tiny(inject="nan@5")
    assert code == 0
    (error,) = events(out, "error")
    assert error["action"] == "skip" and error["samples"] == [40, 48] and "not finite" in error["message"]
    assert train_lines(out)[5]["loss"] is None, "null, never NaN"
    assert all(m["loss"] is not None for m in train_lines(out) if m["iter"] != 6)


def test_rolling_back_goes_past_the_offending_data(tiny):
    code, out = tiny(inject="nan@6", on_sick_step="rollback", rollback_skip_batches=2, rollback_rewarm_iters=3)
    assert code == 0
    (back,) = events(out, "rollback")
    assert back["iter"] == 4 and back["from_iter"] == 7 and back["checkpoint"] == "iter_000000004"
    assert back["next_sample"] == 7 * 8 + 2 * 8
    assert [m["iter"] for m in train_lines(out)] == list(range(1, 13))
    rates = {m["iter"]: m["step_lr"] for m in train_lines(out)}
    assert rates[5] < rates[6] < rates[7] < rates[4]


def test_rolling_back_passes_over_a_damaged_checkpoint(tiny, monkeypatch):
    real = Session.roll_back

    def damage_first(self, why):
        path = Path(self.config.out_dir) / "checkpoints" / "iter_000000008" / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
        real(self, why)

    monkeypatch.setattr(Session, "roll_back", damage_first)
    code, out = tiny(inject="nan@10", on_sick_step="rollback")
    assert code == 0
    (back,) = events(out, "rollback")
    assert back["iter"] == 4 and back["checkpoint"] == "iter_000000004"
    assert "iter_000000008: model.safetensors is damaged" in back["problems"][0]
    assert [Path(path).name for path in back["set_aside"]] == ["damaged_iter_000000008"]
    assert (out / "checkpoints" / "damaged_iter_000000008" / "model.safetensors").exists()
    assert [m["iter"] for m in train_lines(out)] == list(range(1, 13))


def test_a_run_that_stays_sick_stops(tiny, tmp_path):
    with pytest.raises(RuntimeError, match="sick_step_limit 3"):
        tiny(inject="nan@5,nan@6,nan@7,nan@8", sick_step_limit=3)
    assert [e["action"] for e in events(tmp_path / "run", "error") if "action" in e] == ["skip", "skip", "stop"]
    assert events(tmp_path / "run", "emergency")[0]["path"], "what there is is saved"


def test_a_fault_that_comes_back_after_every_rollback_stops(tiny, tmp_path):
    """Each rollback makes the count of sick steps in a row what it was; the rollbacks themselves are counted."""
    with pytest.raises(RuntimeError, match="sick_step_limit 2"):
        tiny(inject="nan@5,nan@6,nan@7", on_sick_step="rollback", sick_step_limit=2)
    told = [(r["iter"], r["action"]) for r in lines(tmp_path / "run" / "events.jsonl") if r.get("action")]
    assert told == [(6, "rollback"), (7, "rollback"), (8, "stop")]


def test_stop_saves_and_says_why(tiny, resume, tmp_path):
    with pytest.raises(RuntimeError, match="on_sick_step stop"):
        tiny(inject="nan@5", on_sick_step="stop")
    assert resume(tmp_path / "run") == 0, "and the resumed run goes on after the sick samples"


def test_spikes(tiny):
    code, out = tiny(inject="spike@27", spike_sigma=6.0, max_iters=32, eval_interval=16)
    assert code == 0
    (error,) = events(out, "error")
    assert error["message"].startswith("spike in the step after iteration 27")
    _, out = tiny(out="off", inject="spike@27", max_iters=32, eval_interval=16)
    assert not events(out, "error")


def test_the_memory_of_losses_is_part_of_the_checkpoint(tiny, resume):
    keys = dict(spike_sigma=6.0, inject="spike@27", eval_interval=8)
    _, whole = tiny(out="whole", max_iters=32, lr_decay_iters=32, **keys)
    _, halves = tiny(out="halves", max_iters=24, lr_decay_iters=32, **keys)
    assert resume(halves, max_iters=32) == 0
    assert_same_tensors(tensors(halves), tensors(whole))


# ---------------------------------------------------------------------------------------------- out of memory


def test_out_of_memory_makes_the_same_batch_in_smaller_pieces(tiny):
    _, plain = tiny(out="plain")
    code, out = tiny(inject="oom@5")
    assert code == 0
    (event,) = [e for e in events(out, "operation") if e["entry"] is None]
    assert event["settings_after"] == {"batch_size": 2, "grad_accum": 4}
    state = json.loads((out / "checkpoints" / "latest" / "state.json").read_text())
    assert state["progress"]["cursor"]["sample"] == 12 * 8, "no sample lost, none seen twice"
    for one, other in zip(train_lines(out), train_lines(plain), strict=True):
        assert one["iter"] == other["iter"] and one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_out_of_memory_with_nothing_left_to_halve_ends_clearly(tiny, tmp_path):
    with pytest.raises(RuntimeError, match="micro-batch of one sequence"):
        tiny(inject="oom@5", batch_size=1)
    assert events(tmp_path / "run", "emergency")


def _sick_on_one_rank(rank: int, data: str, out: str, fault: str):
    return train_orchestrated.main(arguments(data, out, inject=fault))


@pytest.mark.parametrize("fault", ["nan@5:rank1", "oom@5:rank1"])
def test_what_hurts_one_rank_is_known_to_all(data, tmp_path, fault):
    """An end is an agreement: operations compare the bits of all weights on both ranks."""
    assert on_ranks(_sick_on_one_rank, str(data), str(tmp_path / "run"), fault) == [0, 0]
    state = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())
    assert state["progress"]["iter"] == 12 and state["progress"]["cursor"]["sample"] == 12 * 8
    if fault.startswith("oom"):
        assert state["settings"]["batch_size"] == 2 and state["settings"]["grad_accum"] == 4
    else:
        assert events(tmp_path / "run", "error")[0]["samples"] == [40, 48]
    weights = tensors(tmp_path / "run")
    assert all(np.isfinite(w.numpy()).all() for w in weights.values())


# ---------------------------------------------------------------------------------------------- memory, lock, faults


@pytest.mark.parametrize("first, at", [([10, 10, 95, 96, 97, 50, 99], [3, 7]), ([90, 91, 89.9, 90], [1, 4])])
def test_memory_beyond_the_limit_is_saved_once_per_crossing(tiny, monkeypatch, capsys, first, at):
    """The limit itself is beyond it, and so may the first look be."""
    percents = iter(first + [10] * 20)
    monkeypatch.setattr(
        "orchestrate.training.session.session.memory_percent", lambda device: {"host": float(next(percents))}
    )
    _, out = tiny(memory_checkpoint_percent=90.0, eval_interval=12)
    saved = [e["iter"] for e in events(out, "checkpoint") if "memory" in e["reason"]]
    assert saved == at
    assert capsys.readouterr().out.count("warning: host memory") == 2


def test_faults_are_checked_like_any_key(tiny):
    assert [str(f) for f in parse_faults("nan@1, oom@20:rank3")] == ["nan@1", "oom@20:rank3"]
    with pytest.raises(Refused, match="'nan@x' is no fault"):
        tiny(inject="nan@x")


def test_a_fault_strikes_once_per_run_folder(tiny, resume, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="injected: raise@6"):
        tiny(inject="raise@6")
    assert resume(tmp_path / "run") == 0
    _, plain = tiny(out="plain")
    assert_same_tensors(tensors(tmp_path / "run"), tensors(plain))


def test_two_jobs_on_one_run_folder(tiny, monkeypatch, data, tmp_path):
    """The second is refused while the first runs, and only then."""
    seen = []
    real = Session.evaluate

    def evaluate(self):
        if not seen:
            seen.append(1)
            with pytest.raises(Refused, match="another job"):
                train_orchestrated.main(arguments(data, tmp_path / "run"))
        return real(self)

    monkeypatch.setattr(Session, "evaluate", evaluate)
    assert tiny()[0] == 0 and seen


# ---------------------------------------------------------------------------------------------- deaths


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "ends", [["--kills=4", "--signals=0", "--processes=1"], ["--kills=1", "--signals=3", "--processes=2"]]
)
def test_ended_at_random_moments(ends):
    """A short form of `make torture`: the end is that of the undisturbed run to the bit."""
    command = [sys.executable, str(ROOT / "bench" / "torture.py"), *ends]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    cells = [cell.strip() for cell in done.stdout.splitlines()[2].split("|")[1:-1]]
    kills, signals, starts, runs, differences = (int(cells[i]) for i in (1, 2, 4, 5, 6))
    wanted = {key: int(value) for key, value in (end.removeprefix("--").split("=") for end in ends)}
    assert kills >= wanted["kills"] and signals >= wanted.get("signals", 0) and starts > kills and runs >= 1
    assert differences == 0


@pytest.mark.timeout(600)
def test_torchrun_brings_a_killed_rank_back_by_itself(data, tmp_path):
    """The same command: a rank is killed, torchrun restarts the group, and it goes on from the latest checkpoint."""
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
        str(ROOT / "train_orchestrated.py"), *arguments(data, out, inject="kill@6:rank1"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert events(out, "resume")[0]["iter"] == 6 and not events(out, "override"), "rank 0 saved what it had"
    assert [m["iter"] for m in train_lines(out)] == list(range(1, 13))
    assert events(out, "end")[0]["iter"] == 12


def test_a_restart_before_the_first_checkpoint_starts_anew(tiny, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="injected"):
        tiny(inject="raise@0")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    code, out = tiny(inject="raise@0")
    assert code == 0 and [m["iter"] for m in train_lines(out)] == list(range(1, 13))


def test_a_requeued_slurm_job_goes_on(tiny, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="injected"):
        tiny(inject="raise@9")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    code, out = tiny(inject="raise@9")
    assert code == 0 and events(out, "resume")[0]["iter"] == 9 and not events(out, "override")


def test_a_run_folder_that_cannot_be_written_is_refused(tiny, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(Refused, match="cannot be written to"):
        tiny()


def test_a_read_only_run_folder_is_refused_though_its_lock_can_be_opened(tiny, monkeypatch, tmp_path):
    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(Refused, match=r"out_dir .*run: cannot be written to \(Read-only file system\)"):
        tiny()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


# ---------------------------------------------------------------------------------------------- storage


def test_a_full_disk_is_said_and_the_run_goes_on(tiny, monkeypatch, capsys):
    """A save at an evaluation that fails leaves the checkpoint before as it was; the one at the end must succeed."""
    from orchestrate.training.store import checkpoint

    real, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            raise checkpoint.SafetensorError("No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, out = tiny()
    assert code == 0
    (error,) = events(out, "error")
    assert "No space left" in error["message"] and error["action"] == "go on"
    assert "the run goes on with the checkpoint before" in capsys.readouterr().out
    assert {path.name for path in checkpoint.find(out)} == {"iter_000000004", "iter_000000012"}


def test_a_run_folder_that_vanishes_is_made_anew(tiny, resume, monkeypatch, tmp_path, capsys):
    """Somebody removes it during the run: what comes after is there, and that something is gone is said."""
    real, out, told = Session.evaluate, tmp_path / "run", []

    def evaluate(self):
        if self.run.progress.iter == 8:
            shutil.rmtree(out)
        if self.run.progress.iter == 12:
            told.append(FolderLock(out).take())
        return real(self)

    monkeypatch.setattr(Session, "evaluate", evaluate)
    assert tiny()[0] == 0
    assert "was removed: a new one is begun" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["max_iters"] == 12
    assert (out / "schedule.yaml").read_text() == "[]\n"
    assert told == [f"out_dir {out}: another job is running in it"], "the new folder is locked too"
    assert [m["iter"] for m in train_lines(out)] == [9, 10, 11, 12]
    assert "metrics.jsonl was removed" in events(out, "error")[0]["message"]
    monkeypatch.undo()
    assert resume(out, max_iters=14) == 0, "its checkpoint goes on"


def test_a_save_at_the_end_that_fails_is_an_error(tiny, monkeypatch, tmp_path):
    from orchestrate.training.store import checkpoint

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RuntimeError, match="No space left"):
        tiny()
    kinds = [e["kind"] for e in lines(tmp_path / "run" / "events.jsonl")]
    assert kinds[-2:] == ["error", "emergency"]


def test_saving_in_the_background_saves_the_same(tiny, resume, monkeypatch):
    """Each checkpoint is the state at its iteration, though the run goes on while it is written."""
    from orchestrate.training.store import checkpoint

    _, plain = tiny(out="plain", keep_last=9)
    real = checkpoint.save_file

    def slow(tensors, path):
        time.sleep(0.1)
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    code, out = tiny(out="background", keep_last=9, async_save=True)
    assert code == 0
    for name in ("iter_000000004", "iter_000000008", "iter_000000012"):
        assert_same_tensors(tensors(out, name), tensors(plain, name))
    assert [e["reason"] for e in events(out, "checkpoint")] == [e["reason"] for e in events(plain, "checkpoint")]


def test_a_background_save_that_fails_is_told(tiny, monkeypatch):
    from orchestrate.training.store import checkpoint

    real, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, out = tiny(async_save=True)
    assert code == 0 and "No space left" in events(out, "error")[0]["message"]
    assert len(checkpoint.find(out)) == 2


def test_an_exception_of_one_rank_does_not_wait_for_a_sharded_save(data, tmp_path):
    """The save needs the other ranks, and one of them may hang."""
    run = live_run(data, out_dir=str(tmp_path))
    run.ranks.sharded = True
    session = Session(run.config, run, Orchestrator(Schedule(), run), Reporter(tmp_path, 9, 0, None), NoSignals())
    hangs = threading.Event()
    session.saver._background = BackgroundSave(hangs.wait, "never ends")
    ended = threading.Thread(target=lambda: (session.saver.emergency(RuntimeError("alone")), session.saver.finish()))
    ended.start()
    ended.join(10)
    still_waits = ended.is_alive()
    hangs.set()
    ended.join()
    assert not still_waits
    assert [e["saved"] for e in events(tmp_path, "emergency")] == [False]


def test_an_evaluation_that_is_no_number_can_be_saved_and_resumed(tiny, resume):
    keys = dict(learning_rate=1e38, min_lr=1e38, warmup_iters=0, decay_lr=False, grad_clip=0.0, sick_step_limit=99)
    code, out = tiny(max_iters=4, **keys)
    assert code == 0
    (_, last) = [m for m in lines(out / "metrics.jsonl") if m["kind"] == "eval"]
    assert last["iter"] == 4 and last["val_loss"] is None
    saved = read_run(out).checkpoints[0]
    assert (saved.iter, saved.val_loss) == (4, None)
    assert resume(out, max_iters=5) == 0


def test_the_data_is_read_for_its_fingerprint_once_a_start(tiny, monkeypatch):
    made, real = [], hashlib.sha256
    monkeypatch.setattr("orchestrate.data.stream.hashlib.sha256", lambda *a: made.append(a) or real(*a))
    _, out = tiny(keep_last=9)
    assert len(read_run(out).checkpoints) == 3
    assert sum(bool(a) and a[0].endswith(b"uint16") for a in made) == 2, "train.bin and val.bin"


# ---------------------------------------------------------------------------------------------- elsewhere


def _goes_on(rank: int, out: str, batch_size: int, accumulation: int):
    split = [f"--batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}"]
    return train_orchestrated.main(["--init_from=resume", f"--out_dir={out}", "--max_iters=12", *split])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("worlds, split", [((1, 3), (2, 6)), ((4, 2), (6, 2))])
def test_on_another_number_of_processes_it_is_the_same_curve(data, tmp_path, tiny, worlds, split):
    """And in other micro-batches: the same global batches; losses to rounding, because sums are in another order."""
    keys = dict(gradient_accumulation_steps=12, batch_size=1, max_iters=12)
    _, whole = tiny(out="whole", **keys)
    out = tmp_path / "moved"
    assert set(on_ranks(_first_half, str(data), str(out), keys, world_size=worlds[0])) == {0}
    assert set(on_ranks(_goes_on, str(out), *split, world_size=worlds[1])) == {0}
    assert [m["batch_size"] for m in train_lines(out)] == [1] * 6 + [split[0]] * 6
    for one, other in zip(train_lines(out), train_lines(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_in_another_dtype_it_is_the_same_curve(tiny, resume, tmp_path):
    """Weights and moments are float32 in any case; autocast decides what is computed in fewer bits."""
    _, whole = tiny(out="whole")
    _, out = tiny(max_iters=6)
    assert resume(out, dtype="bfloat16", max_iters=12) == 0
    assert events(out, "resume")[0]["dtype"] == "bfloat16"
    assert {e["key"] for e in events(out, "override")} == {"dtype", "max_iters"}
    for one, other in zip(train_lines(out), train_lines(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.03)
    assert all(value.dtype == torch.float32 for value in tensors(out).values())


def _first_half(rank: int, data: str, out: str, keys: dict):
    return train_orchestrated.main(arguments(data, out, **{**keys, "max_iters": 6}))
