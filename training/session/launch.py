"""One start of a run, from a configuration to its exit code: lock, read, check, write, train.

Everything that can be refused is, before anything is written. What is written before the first step is whole or
absent after a death, as a step's writes are; a signal until then ends the process at once (stopping.py).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from orchestrate.data.keeping import keep
from orchestrate.training.report.write import at_the_end
from orchestrate.training.run import out_of_memory
from orchestrate.training.run.casting import in_words
from orchestrate.training.run.device import DTYPES, pick_device, pick_dtype
from orchestrate.training.run.distributed import Meeting, Ranks
from orchestrate.training.run.run import Run
from orchestrate.training.schedule.orchestrator import Orchestrator
from orchestrate.training.schedule.own import OwnFile
from orchestrate.training.session import ending
from orchestrate.training.session.code import code_version
from orchestrate.training.session.lock import FolderLock
from orchestrate.training.session.opening import open_run
from orchestrate.training.session.resume import Resumed, resume
from orchestrate.training.session.session import Session
from orchestrate.training.session.start import doubts, opened, the_schedule
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.settings.config import TrainConfig, depth_told, stands_for_more
from orchestrate.training.settings.errors import Refused, Stopped, refusing
from orchestrate.training.settings.values import brief
from orchestrate.training.store.manifest import held, refuse_to_overwrite, set_aside
from orchestrate.training.store.reporting import Reporter, Silent
from orchestrate.training.store.run_folder import rewind, write_start
from orchestrate.training.store.trackers import About, Trackers, check, check_wandb, leave


def launch(
    config: TrainConfig,
    given: dict[str, str],
    watch: SignalWatch,
    train: Callable[[Session], int],
    operations: Sequence[OwnFile] = (),
    planned: Callable[[], str] = str,
) -> int:
    """Start or resume a run and train it; returns the exit code. Raises Refused on every rank.

    Args:
        given: where each key was given that was, for messages and to tell overrides from defaults.
        watch: installed already.
        train: the loop.
        planned: the run's plan as a text; asked for by trackers only.
    """
    meeting, lock = Meeting(), FolderLock(config.out_dir)
    try:
        # Before anything in the folder is read: the job that holds the lock removes old checkpoints.
        if not config.eval_only and (problem := meeting.from_first("lock", lock.take_if_used)):
            raise Refused(problem)
        with refusing():
            resumed, orchestrator, parent = prepare(config, given, operations, meeting)
        config, run = orchestrator.run.config, orchestrator.run
        reporter, wandb_id = Silent(), resumed.loaded.state.wandb_id if resumed else None
        problem, plan = "", planned() if config.trackers and run.ranks.is_first else ""
        if run.ranks.is_first:
            try:
                if not config.eval_only:
                    make_folder(config, orchestrator, lock, resumed)
                reporter = open_reporter(config, run, wandb_id, plan)
                reporter.restore = lambda: restore_folder(config, orchestrator, lock)
            except Refused as error:
                problem = str(error)
            except OSError as error:
                place = error.filename or f"out_dir {config.out_dir}"
                problem = f"{place}: cannot be written to ({error.strerror or error})"
        if problem := run.ranks.broadcast(problem):
            raise Refused(problem.splitlines())
        session = Session(config, run, orchestrator, reporter, watch, operations)
        code = 1
        try:
            announce(session, resumed, given, parent)
            begin(session, watch)
            code = train(session)
        finally:
            session.saver.finish()
            if config.report and run.ranks.is_first and not config.eval_only:
                at_the_end(config.out_dir, orchestrator.schedule, reporter.say)
            reporter.close(code)
        run.ranks.close()
        return code
    finally:
        lock.release()


def prepare(
    config: TrainConfig, given: dict[str, str], operations: Sequence[OwnFile], meeting: Meeting
) -> tuple[Resumed | None, Orchestrator, dict[str, Any] | None]:
    """Everything that can be refused without the run folder being written to; and `Foreign.parent`."""
    resumed = foreign = None
    config, given = resume_after_restart(config, given)
    if config.init_from == "resume":
        resumed = resume(config, given, operations, meeting.from_first)
        config, schedule = resumed.config, resumed.schedule
    else:
        schedule, (config, foreign) = the_schedule(config), opened(config)
        if not config.eval_only:
            refuse_to_overwrite(config.out_dir)
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where tensors are float32; a CPU stays exact
    dtype = DTYPES[pick_dtype(config.dtype, device)]
    ranks = Ranks(device.type, config.backend, config.parallel, dtype, meeting)
    if len(set(ranks.gather(tuple((file.path.name, file.sha256) for file in operations)))) > 1:
        raise Refused("--operations: the ranks have files of different names or contents")
    run = open_run(config, resumed, schedule, ranks, foreign)
    run.check_ranks_agree("the start")
    orchestrator = Orchestrator(schedule, run)
    if resumed is not None:
        try:
            orchestrator.load_state(resumed.orchestrator)
        except ValueError as error:
            raise Refused(f"checkpoint {resumed.loaded.path}: state.json: orchestrator: {error}") from None
    problem = check(config.trackers) if ranks.is_first else ""
    if not problem and ranks.is_first and "wandb" in config.trackers:
        problem = check_wandb("wandb_log" if config.wandb_log else "tracker=wandb")
    if problem := ranks.broadcast(problem):
        raise Refused(problem)
    return resumed, orchestrator, foreign.parent if foreign else None


def resume_after_restart(config: TrainConfig, given: dict[str, str]) -> tuple[TrainConfig, dict[str, str]]:
    """When torchrun or Slurm starts the same command again, it means to go on from the latest checkpoint."""
    counts = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    restarted = any(count.isdigit() and int(count) > 0 for count in counts)
    # Checkpoints that cannot be read are a reason to go on too: that is refused, where a new run would hide the loss.
    if restarted and config.init_from != "resume" and held(config.out_dir):
        # Keys of the command are those that the run was started with; the schedule may have moved them since.
        foreign = config.init_from != "scratch"  # then a number of 0 stands for what those weights have
        said = [key for key in given if not (foreign and stands_for_more(key) and not getattr(config, key))]
        kept = {key: given[key] for key in said if key != "init_from"}
        return config.model_copy(update={"init_from": "resume"}), kept
    return config, given


def make_folder(config: TrainConfig, orchestrator: Orchestrator, lock: FolderLock, resumed: Resumed | None) -> None:
    """Make the run folder, or bring it up to this start (rank 0). Raises Refused and OSError."""
    out_dir = Path(config.out_dir)
    if problem := lock.take():
        raise Refused(problem)
    if resumed is None:
        refuse_to_overwrite(config.out_dir)  # another job may have run in it before the lock was taken
    # What a start without a checkpoint has left in the logs is void for the next one.
    sizes, wandb_id = (resumed.loaded.state.log_sizes, resumed.loaded.state.wandb_id) if resumed else ({}, None)
    rewind(out_dir, sizes, before=lambda: leave(out_dir, orchestrator.run.progress.iter, wandb_id))
    out_of_memory.forget(out_dir)  # every rank has heeded it
    write_start(out_dir, config.model_dump(), orchestrator.schedule.text)
    speaks = orchestrator.run.batches.opened.speaks
    keep(speaks.meta, speaks.folder, out_dir)


def restore_folder(config: TrainConfig, orchestrator: Orchestrator, lock: FolderLock) -> str:
    """Make again what a start writes, after somebody removed the run folder; returns what is wrong, or nothing."""
    write_start(Path(config.out_dir), config.model_dump(), orchestrator.schedule.text)
    speaks = orchestrator.run.batches.opened.speaks
    keep(speaks.meta, speaks.folder, config.out_dir)
    return lock.renew()


def open_reporter(config: TrainConfig, run: Run, wandb_id: str | None, plan: str) -> Reporter:
    """Everything that writes to the logs (rank 0). Raises Refused and OSError.

    Args:
        wandb_id: of the W&B run of an earlier version's checkpoint.
    """
    if config.eval_only:
        return Reporter(None, config.max_iters, run.progress.iter, None)
    out_dir, log_file = Path(config.out_dir), None
    if config.file_logging:
        log_file = Path(config.log_dir or config.out_dir) / f"{out_dir.name}.log"
    about = About.of(config.out_dir, config.wandb_project, config.wandb_run_name, config.model_dump(), plan)
    trackers = Trackers(config.trackers, about, wandb_id)
    trackers.open()
    return Reporter(out_dir, config.max_iters, run.progress.iter, log_file, trackers)


def begin(session: Session, watch: SignalWatch) -> None:
    """From here on a signal is acted on at a boundary. Raises Stopped where another rank did not come so far."""
    ranks = session.run.ranks
    watch.begin(ranks)
    try:
        ranks.gather(None)  # whoever trains knows that all the others listen
    except RuntimeError as error:
        raise Stopped(f"another rank ended before the first step ({error})") from error


def announce(
    session: Session, resumed: Resumed | None, given: dict[str, str], parent: dict[str, Any] | None = None
) -> None:
    """Write down and say how this start begins; `parent` is the run whose weights it begins with."""
    config, run = session.config, session.run
    total, trainable = run.parameter_counts()
    facts = {
        "config": config.model_dump(),
        "settings": run.settings.to_json(),
        "world_size": run.ranks.world_size,
        "device": str(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "code": code_version() if run.ranks.is_first else None,
        "operations": [file.to_json() for file in session.operations],
        "parameters_total": total,
        "parameters_trainable": trainable,
        "tokens_per_iter": run.settings.tokens_per_iter,
        **({"cast": run.cast.to_json()} if run.cast else {}),
    }
    if resumed is None:
        session.event("start", **facts, **({"parent": parent} if parent else {}))
        if parent:
            session.reporter.say(f"weights of {parent['run']}, {parent['checkpoint']}, iteration {parent['iter']}")
        for line in depth_told(config, given):
            session.reporter.say(line)
    else:
        path = str(resumed.loaded.path)
        writes = run.ranks.is_first and not config.eval_only
        aside = [str(set_aside(path)) for path in resumed.damaged] if writes else []
        session.event("resume", checkpoint=path, problems=resumed.passed_over, set_aside=aside, **facts)
        for problem in resumed.passed_over:
            session.reporter.say(f"passed over: {problem}")
        session.reporter.say(f"resumed from {path} at iteration {run.progress.iter}")
        if over := ending.finished(config, run.progress):
            session.reporter.say(over)
        for override in resumed.overrides:
            session.event("override", **override)
            verb = "override" if override["applied"] else "not overridden"
            session.reporter.say(
                f"{verb}: {override['key']} {brief(override['before'])} -> {brief(override['after'])} "
                f"({override['reason']})"
            )
    session.reporter.say(
        f"{total:,} parameters, {trainable:,} trainable; {run.settings.tokens_per_iter:,} tokens per iteration; "
        f"{len(session.orchestrator.missed())} entries pending; {run.device}, {facts['dtype']}, "
        f"{run.ranks.world_size} process{'es' if run.ranks.world_size > 1 else ''}"
        + (", sharded (fsdp)" if run.ranks.sharded else "")
    )
    if run.cast:
        session.reporter.say(f"note: {in_words(run.cast.to_json())}")
    if run.optimizer.note:
        session.reporter.say(f"note: {run.optimizer.note}")
    trained = resumed.loaded.state.tokenizer if resumed is not None else None
    for doubt in doubts(run.batches.opened, config, run.settings, trained):
        session.reporter.say(f"warning: {doubt}")
    if config.parallel == "fsdp" and not run.ranks.sharded:
        session.reporter.say("parallel=fsdp shards nothing on one process")
