"""Train a model while a schedule changes the run: the main command.

    python train_orchestrated.py [CONFIG.py ...] [--schedule FILE] [--KEY=VALUE | --KEY VALUE ...]
    torchrun --standalone --nproc_per_node=2 train_orchestrated.py config/x.py --schedule schedules/scale.yaml
    python train_orchestrated.py CONFIG.py --schedule FILE --plan
    python train_orchestrated.py --init_from=resume --out_dir=RUN [--learning_rate=3e-4 ...]

The only place that wires everything. Bad input ends with a message and exit code 2, before anything is written.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from orchestrate.training import plan
from orchestrate.training.loop import train
from orchestrate.training.run import out_of_memory
from orchestrate.training.run.device import DTYPES, pick_device, pick_dtype
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.run import Run
from orchestrate.training.schedule.file import Schedule
from orchestrate.training.session.opening import open_run
from orchestrate.training.session.resume import Resumed, resume, resume_after_restart
from orchestrate.training.session.session import Session
from orchestrate.training.session.start import the_schedule
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.settings import config as configuration
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint
from orchestrate.training.store.manifest import refuse_to_overwrite
from orchestrate.training.store.reporting import Reporter, Silent, start_wandb
from orchestrate.training.store.run_folder import rewind, write_start


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, dict[str, str], argparse.Namespace]:
    """The configuration, where each key was given, and the options that are no keys. Raises Refused."""
    parser = argparse.ArgumentParser(
        prog="train_orchestrated.py",
        description=__doc__,
        epilog=configuration.help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="train_orchestrated.py [CONFIG.py ...] [--schedule FILE] [--plan[=json] [--against RUN]] [--KEY=VALUE]",
    )
    parser.add_argument("files", nargs="*", metavar="CONFIG.py", help="files of plain assignments, later ones win")
    parser.add_argument(
        "--plan",
        nargs="?",
        const="table",
        choices=("table", "json"),
        help="check everything, print the stages (as a table, or --plan=json), train nothing",
    )
    parser.add_argument(
        "--against",
        metavar="RUN",
        default="",
        help="with --plan: at which iteration each entry would have fired on the losses of this run folder",
    )
    for key in (*configuration.KEYS, *configuration.ALIASES):
        # nargs="?" lets a switch such as --compile stand for --compile=True.
        parser.add_argument(f"--{key}", nargs="?", const="True", action="append", help=argparse.SUPPRESS)
    # A bare --plan takes no argument, so that a config file may follow it.
    known, unknown = parser.parse_known_intermixed_args(["--plan=table" if a == "--plan" else a for a in arguments])
    given = [(key, text) for key in (*configuration.KEYS, *configuration.ALIASES) for text in getattr(known, key) or []]
    for text in unknown:
        key, _, value = text.removeprefix("--").partition("=")
        given.append((key, value))
    config, places = configuration.resolve(known.files, given)
    if known.against and not known.plan:
        raise Refused("--against says when a plan's entries would have fired: give --plan too")
    return config, places, known


def main(arguments: Sequence[str]) -> int:
    """Plan or train; returns the exit code. Raises Refused for bad input, before anything is written."""
    config, given, options = parse(arguments)
    if options.plan:
        with refusing():
            planned = plan.make(config, given, int(os.environ.get("WORLD_SIZE", 1)), options.against)
        print(planned.to_json() if options.plan == "json" else planned.table())
        return 0
    watch = SignalWatch()
    with watch.installed():
        with refusing():
            resumed, schedule, run = prepare(config, given)
        watch.ranks = run.ranks
        with contextlib.nullcontext() if config.eval_only else lock(Path(run.config.out_dir), run.ranks):
            return launch(resumed, schedule, run, watch)


def launch(resumed: Resumed | None, schedule: Schedule, run: Run, watch: SignalWatch) -> int:
    """Train a run that is ready to; returns the exit code."""
    config, ranks = run.config, run.ranks
    session = Session(config, run, schedule, Silent(), watch, resumed.loaded.state.wandb_id if resumed else None)
    if resumed is not None:  # the last that can be refused: nothing is written before
        try:
            session.orchestrator.load_state(resumed.loaded.state.orchestrator)
        except ValueError as error:
            raise Refused(f"checkpoint {resumed.loaded.path}: state.json: orchestrator: {error}") from None
    if ranks.is_first:
        session.reporter, session.wandb_id = open_reporter(config, run, resumed, session.wandb_id)
    announce(session, resumed)
    code = 1
    try:
        code = train(session)
    finally:
        session.saver.finish()
        session.reporter.close(code)
    ranks.close()
    return code


def prepare(config: TrainConfig, given: dict[str, str]) -> tuple[Resumed | None, Schedule, Run]:
    """Everything that can be refused, before anything is written."""
    resumed = None
    config, given = resume_after_restart(config, given)
    if config.init_from == "resume":
        resumed = resume(config, given)
        config, schedule = resumed.config, resumed.schedule
    else:
        schedule = the_schedule(config)
        if not config.eval_only:
            refuse_to_overwrite(config.out_dir)
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where tensors are float32; a CPU stays exact
    ranks = Ranks(device.type, config.backend, config.parallel, DTYPES[pick_dtype(config.dtype, device)])
    run = open_run(config, resumed, schedule, ranks)
    run.check_ranks_agree("the start")
    return resumed, schedule, run


@contextlib.contextmanager
def lock(out_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Be the only job that writes to a run folder; the lock dies with its owner. Raises Refused on every rank."""
    handle, problem = -1, None
    if ranks.is_first:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            handle = os.open(out_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            with tempfile.TemporaryFile(dir=out_dir):
                pass  # an old lock may be writable in a folder that is not
        except OSError as error:
            problem = f"out_dir {out_dir}: cannot be written to ({error.strerror})"
        else:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = f"out_dir {out_dir}: another job is running in it"
            except OSError:
                pass  # a file system without locks: as it was before there was one
    try:
        if problem := ranks.broadcast(problem):
            raise Refused(problem)
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def open_reporter(
    config: TrainConfig, run: Run, resumed: Resumed | None, wandb_id: str | None
) -> tuple[Reporter, str | None]:
    """Make the run folder and everything that writes to it (rank 0)."""
    out_dir = Path(config.out_dir)
    if config.eval_only:
        return Reporter(None, config.max_iters, run.progress.iter, None), None
    out_dir.mkdir(parents=True, exist_ok=True)
    # What a start without a checkpoint has left in the logs is void for the next one.
    rewind(out_dir, resumed.loaded.state.log_sizes if resumed is not None else {})
    wandb_run = None
    if config.wandb_log:
        wandb_run = start_wandb(config.wandb_project, config.wandb_run_name, wandb_id, config.model_dump(), out_dir)
        wandb_id = wandb_run.id
    log_file = None
    if config.file_logging:
        log_file = Path(config.log_dir or config.out_dir) / f"{out_dir.name}.log"
    return Reporter(out_dir, config.max_iters, run.progress.iter, log_file, wandb_run), wandb_id


def announce(session: Session, resumed: Resumed | None) -> None:
    """Write down and say how this start begins."""
    config, run = session.config, session.run
    total, trainable = run.parameter_counts()
    schedule = session.orchestrator.schedule
    if run.ranks.is_first and not config.eval_only:
        out_dir = Path(config.out_dir)
        out_of_memory.forget(out_dir)  # every rank has heeded it
        session.reporter.restore = partial(write_start, out_dir, config.model_dump(), schedule.text)
        session.reporter.restore()
    facts = {
        "config": config.model_dump(),
        "settings": run.settings.to_json(),
        "world_size": run.ranks.world_size,
        "device": str(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "parameters_total": total,
        "parameters_trainable": trainable,
        "tokens_per_iter": run.settings.tokens_per_iter,
    }
    if resumed is None:
        session.event("start", **facts)
    else:
        path = str(resumed.loaded.path)
        aside = [str(checkpoint.set_aside(path)) for path in resumed.damaged] if run.ranks.is_first else []
        session.event("resume", checkpoint=path, problems=resumed.passed_over, set_aside=aside, **facts)
        for problem in resumed.passed_over:
            session.reporter.say(f"passed over: {problem}")
        session.reporter.say(f"resumed from {path} at iteration {run.progress.iter}")
        for override in resumed.overrides:
            session.event("override", **override)
            verb = "override" if override["applied"] else "not overridden"
            session.reporter.say(
                f"{verb}: {override['key']} {override['before']} -> {override['after']} ({override['reason']})"
            )
    session.reporter.say(
        f"{total:,} parameters, {trainable:,} trainable; {run.settings.tokens_per_iter:,} tokens per iteration; "
        f"{len(session.orchestrator.missed())} entries pending; {run.device}, {facts['dtype']}, "
        f"{run.ranks.world_size} process{'es' if run.ranks.world_size > 1 else ''}"
        + (", sharded (fsdp)" if run.ranks.sharded else "")
    )
    if config.parallel == "fsdp" and not run.ranks.sharded:
        session.reporter.say("parallel=fsdp shards nothing on one process")


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Tell a person of input that data/ or model/ did not accept (ValueError) as of any other refusal."""
    try:
        yield
    except Refused:
        raise
    except ValueError as error:
        raise Refused(str(error)) from error


def run(arguments: Sequence[str]) -> int:
    """main, with refusals as messages on standard error and exit code 2."""
    try:
        return main(arguments)
    except Refused as error:
        if int(os.environ.get("RANK", 0)) == 0:
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
