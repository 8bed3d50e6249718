"""How a start begins and ends: the lock before the first read, signals before the first step, the last lines."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, arguments, events

import sample
import train_orchestrated
from orchestrate.tools import main as tools
from orchestrate.training.session import ending, launch
from orchestrate.training.session.lock import FolderLock
from orchestrate.training.session.session import Session
from orchestrate.training.settings.errors import Refused, Stopped
from orchestrate.training.store import checkpoint

SCRIPT = str(ROOT / "train_orchestrated.py")


def start(*given, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, job: subprocess.Popen, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and job.poll() is None, job.stderr and job.stderr.read()
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------- the lock


@pytest.mark.timeout(300)
def test_two_ranks_beside_a_live_job_are_refused_in_one_line(data, tmp_path):
    """The live job saves at every iteration and removes the checkpoint before: whoever reads meets what vanishes."""
    out = tmp_path / "run"
    live = start(*arguments(data, out, max_iters=10**6, eval_interval=1, eval_iters=1, keep_last=1, log_interval=10**6))
    try:
        wait_for((out / "checkpoints" / "latest").exists, live)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        ranks = [
            start("--init_from=resume", f"--out_dir={out}", RANK=str(rank), LOCAL_RANK=str(rank), **where)
            for rank in range(2)
        ]
        told = [rank.communicate(timeout=120)[1] for rank in ranks]
        assert live.poll() is None, "the live job goes on"
    finally:
        live.kill()
        live.communicate()
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert told == [f"error: out_dir {out}: another job is running in it\n", ""]
    # The lock has died with its owner.
    assert train_orchestrated.main(["--init_from=resume", f"--out_dir={out}", "--max_iters=1"]) == 0


def test_nothing_is_read_before_the_lock_is_held(tiny, resume, monkeypatch):
    _, out = tiny(max_iters=4)
    monkeypatch.setattr(launch, "prepare", lambda *_: pytest.fail("something was read"))
    other = FolderLock(out)
    assert other.take() == ""
    with pytest.raises(Refused, match="another job is running in it"):
        resume(out)
    other.release()
    with pytest.raises(pytest.fail.Exception, match="something was read"):
        resume(out)


def test_a_folder_that_another_job_has_used_meanwhile_is_refused(tiny, monkeypatch, tmp_path):
    """It was not there when the start began, so there was nothing to lock."""
    real = launch.prepare

    def prepare(*given):
        prepared = real(*given)
        if not (tmp_path / "run").exists():
            monkeypatch.setattr(launch, "prepare", real)
            assert tiny(max_iters=2)[0] == 0
        return prepared

    monkeypatch.setattr(launch, "prepare", prepare)
    with pytest.raises(Refused, match="holds the checkpoints of a run"):
        tiny(max_iters=4)
    assert [e["iter"] for e in events(tmp_path / "run", "end")] == [2], "the other run is as it was"


@pytest.mark.parametrize("where", ["load", "load_file"])
@pytest.mark.parametrize(
    "command, more",
    [(train_orchestrated.main, ["--init_from=resume", "--eval_only"]), (sample.main, ["--start=To", "--device=cpu"])],
)
def test_a_checkpoint_that_vanishes_while_it_is_read_is_told_in_one_line(tiny, monkeypatch, where, command, more):
    """With eval_only, --plan and sample.py there is no lock, and the job that holds it removes old checkpoints."""
    _, out = tiny(max_iters=4)
    other = FolderLock(out)
    other.take()
    assert command([f"--out_dir={out}", *more]) == 0
    real = getattr(checkpoint, where)

    def vanishes(*given):
        shutil.rmtree(out / "checkpoints" / "iter_000000004")
        return real(*given)

    monkeypatch.setattr(checkpoint, where, vanishes)
    with pytest.raises(Refused, match=r"iter_000000004: removed while it was read: another job is running"):
        command([f"--out_dir={out}", *more])
    other.release()


# ---------------------------------------------------------------------------------------------- signals


def end_with(job: subprocess.Popen, number: int) -> str:
    """Send a signal, and what is on standard error when the job has ended, which must be soon."""
    sent = time.monotonic()
    job.send_signal(number)
    try:
        _, told = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 128 + number
    assert time.monotonic() - sent < 15
    return told


def test_ctrl_c_in_the_first_second_is_one_line(data, tmp_path):
    job = start(*arguments(data, tmp_path / "run"))
    maps = Path(f"/proc/{job.pid}/maps")
    wait_for(lambda: "torch" in maps.read_text() if maps.exists() else time.sleep(1) is None, job)
    assert end_with(job, signal.SIGINT) == "ended by SIGINT before there was anything to save\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_start_that_hangs_inside_a_call_ends_at_once(data, tmp_path, number):
    """Rank 0 waits for a rank that never comes."""
    port = free_port()
    given = arguments(data, tmp_path / "run")
    job = start(*given, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(listens, job)
    time.sleep(0.2)
    assert end_with(job, number).endswith(f"rank 0: ended by {number.name} before there was anything to save\n")


def test_a_signal_at_the_last_moment_before_the_first_boundary_is_not_lost(tiny, monkeypatch, tmp_path):
    """After `begin` it is remembered, and acted on at the first boundary."""
    real = launch.begin

    def begin(session, watch):
        real(session, watch)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(launch, "begin", begin)
    assert tiny()[0] == 128 + signal.SIGTERM
    assert [e["signal"] for e in events(tmp_path / "run", "signal")] == [15]
    assert events(tmp_path / "run", "checkpoint")[0]["iter"] == 0


# ---------------------------------------------------------------------------------------------- the last lines


def last_lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()[-2:]


def best(out: Path) -> str:
    evals = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    loss, iteration = min((e["val_loss"], e["iter"]) for e in evals if e["kind"] == "eval")
    return f"best validation loss {loss:.4f} at iteration {iteration}"


def test_the_end_says_why_where_and_how_to_go_on(tiny, resume, capsys):
    schedule = [{"name": "set_lr", "value": 1e-3, "at_iter": n} for n in (2, 90, 91, 92)]
    _, out = tiny(schedule)
    saved, goes_on = (
        f"saved: {out}/checkpoints/iter_0000000",
        f"to go on: orchestrate train --init_from=resume --out_dir={out}",
    )
    assert last_lines(capsys) == [
        f"ended at iteration 12: max_iters 12 is reached; {best(out)}; entries 2-4 never fired",
        f"{saved}12; {goes_on} --max_iters=N (N above 12)",
    ]
    assert resume(out) == 0
    over = "the run has finished: it is at iteration 12, and max_iters is 12; --max_iters=N (N above 12) goes on"
    text = capsys.readouterr().out
    assert over in text.splitlines()[:-2] and events(out, "end")[-1]["not_fired"] == [2, 3, 4]
    assert train_orchestrated.main(["--init_from=resume", f"--out_dir={out}", "--plan"]) == 0
    assert f"note: {over}\n" in capsys.readouterr().out
    assert resume(out) == 0
    nothing = "ended at iteration 12: nothing was left to train, because max_iters {} was reached before"
    assert last_lines(capsys)[0].startswith(nothing.format(12))
    assert resume(out, max_iters=10) == 0
    assert last_lines(capsys)[0].startswith(nothing.format(10))
    assert resume(out, max_iters=14) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-2].startswith("ended at iteration 14: max_iters 14 is reached; ")
    assert "has finished" not in text and [e["reason"] for e in events(out, "end")] == ["max_iters"] * 5


def test_a_run_that_stopped_early_says_so_when_it_is_gone_on_with(tiny, resume, capsys):
    _, out = tiny(early_stopping_patience=1, early_stopping_min_delta=9.0, max_iters=30)
    assert events(out, "end")[-1]["iter"] == 4
    capsys.readouterr()
    assert resume(out) == 0
    early = (
        "the run was stopped early, after 1 values of val_loss without a gain, and will be at the next one; "
        "--early_stopping_patience=N (N above 1; 0: never stop early) goes on"
    )
    assert early in capsys.readouterr().out.splitlines() and events(out, "end")[-1]["iter"] == 8
    assert resume(out, early_stopping_patience=0, max_iters=12) == 0
    assert "stopped early" not in capsys.readouterr().out


def test_a_run_that_cannot_go_on_says_why_at_its_end(tiny, capsys):
    with pytest.raises(Stopped):
        tiny(inject="nan@6", on_sick_step="stop")
    first, second = last_lines(capsys)
    assert re.match(r"ended at iteration \d: .*; on_sick_step stop, sick_step_limit 10; best validation", first)
    assert "to go on: " in second


def test_other_ends_say_why_too(tiny, monkeypatch, capsys, tmp_path):
    _, out = tiny([{"name": "stop", "at_iter": 5}, {"name": "set_lr", "value": 1e-3}], out="stopped")
    first, second = last_lines(capsys)
    assert first == f"ended at iteration 5: stopped by the schedule; {best(out)}; entry 2 never fired"
    assert second.endswith(f"iter_000000005; to go on: orchestrate train --init_from=resume --out_dir={out}")

    keys = dict(early_stopping_patience=1, early_stopping_min_delta=9.0)
    tiny(out="early", **keys)
    first, second = last_lines(capsys)
    assert first.startswith("ended at iteration 4: early stop: no gain in 1 evaluations; ")
    assert second.endswith("--early_stopping_patience=N (0: never stop early)")

    real = Session.tick

    def tick(session):
        real(session)
        if session.run.progress.iter == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Session, "tick", tick)
    assert tiny([{"name": "stop", "at_iter": 99}], out="signalled")[0] == 143
    first, second = last_lines(capsys)
    assert first == f"ended at iteration 3: SIGTERM; {best(tmp_path / 'signalled')}; entry 1 never fired"
    assert events(tmp_path / "signalled", "end")[-1]["not_fired"] == [1]
    assert "iter_000000003; to go on: orchestrate train" in second
    monkeypatch.undo()

    with pytest.raises(RuntimeError, match="injected"):
        tiny(out="raised", inject="raise@6")
    first, second = last_lines(capsys)
    assert first.startswith("ended at iteration 6: an error (RuntimeError); ") and "iter_000000006; to go on" in second


def test_the_command_that_goes_on_is_the_one_that_was_used(tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/code/train_orchestrated.py"])
    _, out = tiny(out="a name")
    command = last_lines(capsys)[1].partition("to go on: ")[2]
    assert command.startswith(f"python /code/train_orchestrated.py --init_from=resume --out_dir='{out}' --max_iters=N")


def test_numbers_are_shortened():
    assert ending.ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"
    assert ending.ranges([4]) == "4" and ending.ranges([]) == ""


# ---------------------------------------------------------------------------------------------- what cannot go on


def test_a_full_disk_at_the_end_is_one_message(data, tmp_path, monkeypatch, capsys):
    real = checkpoint.save_file

    def full(tensors, path):
        if "12" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert train_orchestrated.run(arguments(data, tmp_path / "run")) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: checkpoint at iteration 12 could not be written: ")
    assert "No space left on device" in shown.err and "Traceback" not in shown.err
    assert f"saved: {tmp_path}/run/checkpoints/iter_000000008; to go on: " in shown.out


def test_a_full_disk_at_the_start_is_refused(data, tmp_path, monkeypatch, capsys):
    def full(self, *given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert train_orchestrated.run(arguments(data, tmp_path / "run")) == 2
    told = f"error: out_dir {tmp_path / 'run'}: cannot be written to (No space left on device)\n"
    assert capsys.readouterr().err == told


def test_wandb_without_a_key_is_refused_before_anything_is_written(data, tmp_path):
    job = start(
        *arguments(data, tmp_path / "run", wandb_log=True), HOME=str(tmp_path), NETRC=str(tmp_path / "none"),
        WANDB_API_KEY="", WANDB_MODE="online",
    )  # fmt: skip
    _, told = job.communicate(timeout=120)
    assert job.returncode == 2 and "error: wandb_log: No API key configured" in told and "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_other_systems_are_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setattr(sys, "platform", "win32")
    code = tools.run("train", [])
    monkeypatch.undo()
    assert code == 2
    assert capsys.readouterr().err == "error: win32 is not supported: Linux and macOS are (on Windows: inside WSL)\n"
