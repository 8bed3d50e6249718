"""Train a model while a schedule changes the run: the main command.

    python train_orchestrated.py [CONFIG.py ...] [--schedule FILE] [--KEY=VALUE | --KEY VALUE ...]
    torchrun --standalone --nproc_per_node=2 train_orchestrated.py config/x.py --schedule schedules/scale.yaml
    python train_orchestrated.py CONFIG.py --schedule FILE --plan
    python train_orchestrated.py --init FOLDER                     # a configuration and a schedule to start from
    python train_orchestrated.py --init_from=resume --out_dir=RUN [--learning_rate=3e-4 ...]

`orchestrate train` is the same command. Bad input ends with a message and exit code 2, before anything is written.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from orchestrate.tools.main import called
from orchestrate.tools.plan_table import render
from orchestrate.training import plan
from orchestrate.training.loop import train
from orchestrate.training.schedule.own import OwnFile, registered
from orchestrate.training.session import starter
from orchestrate.training.session.launch import launch
from orchestrate.training.session.seeds import train_seeds
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.settings import config as configuration
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused, refusing
from orchestrate.training.settings.values import closest


def parse(
    arguments: Sequence[str], name: str = "train", description: str | None = __doc__
) -> tuple[TrainConfig, dict[str, str], argparse.Namespace]:
    """The configuration, where each key was given, and the options that are no keys. Raises Refused."""
    parser = argparse.ArgumentParser(
        prog=called(name),
        description=description,
        epilog=configuration.help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [CONFIG.py ...] [--schedule FILE] [--operations FILE.py] "
        "[--plan[=json] [--wide] [--against RUN]] [--KEY=VALUE]",
    )
    parser.add_argument("files", nargs="*", metavar="CONFIG.py", help="files of plain assignments, later ones win")
    parser.add_argument(
        "--operations",
        metavar="FILE.py",
        action="append",
        default=[],
        help="a Python file that registers operations and triggers of your own; it is executed (repeatable)",
    )
    parser.add_argument(
        "--plan",
        nargs="?",
        const="table",
        choices=("table", "json"),
        help="check everything, print the stages (as a table, or --plan=json), train nothing",
    )
    parser.add_argument(
        "--wide",
        action="store_true",
        help="with --plan: a line a stage, with every number, however long",
    )
    parser.add_argument(
        "--against",
        metavar="RUN",
        default="",
        help="with --plan: at which iteration each entry would have fired on the losses of this run folder",
    )
    parser.add_argument(
        "--init",
        metavar="FOLDER",
        help="write a commented configuration and schedule to start from, with the keys that are given, and exit",
    )
    for key in (*configuration.KEYS, *configuration.ALIASES):
        # nargs="?" lets a switch such as --compile stand for --compile=True.
        parser.add_argument(f"--{key}", nargs="?", const="True", action="append", help=argparse.SUPPRESS)
    # A bare --plan takes no argument, so that a config file may follow it.
    known, unknown = parser.parse_known_intermixed_args(["--plan=table" if a == "--plan" else a for a in arguments])
    given = [(key, text) for key in (*configuration.KEYS, *configuration.ALIASES) for text in getattr(known, key) or []]
    keys = (*configuration.KEYS, *configuration.ALIASES, *configuration.OTHER_KEYS)
    options = [name for name in vars(known) if name not in keys]
    for text in unknown:
        key, _, value = text.removeprefix("--").partition("=")
        near = closest(key, [*options, *keys], cutoff=0.7)
        if near in options:  # of a misspelt key the configuration tells
            raise Refused(f"--{key}: unknown option; did you mean --{near}?")
        given.append((key, value))
    config, places = configuration.resolve(known.files, given)
    if known.wide and known.plan != "table":
        raise Refused("--wide is a form of the table that --plan prints: give --plan too")
    if known.against and not known.plan:
        raise Refused("--against says when a plan's entries would have fired: give --plan too")
    return config, places, known


def main(arguments: Sequence[str], watch: SignalWatch | None = None) -> int:
    """Plan, train, or write what to start from; returns the exit code. Raises Refused for bad input.

    Then nothing has been written.

    Args:
        watch: installed already; without one, signals are listened to from here on.
    """
    config, given, options = parse(arguments)
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(registered(options.operations))
        if options.init is not None:
            written, how = starter.write(options.init, config, given), called("train")
            how = f"{'python ' if how.endswith('.py') else ''}{how} {shlex.quote(str(written[0]))}"
            print(f"wrote {', '.join(map(str, written))}\nto check it: {how} --plan\nto train it: {how}")
            return 0
        if not options.plan:
            watch = watch or stack.enter_context(SignalWatch().installed())
            if config.seeds:
                return train_seeds(config, given, arguments, watch, partial(print, flush=True))
            return launch(config, given, watch, train, own, partial(_planned, config, given, own))
        with refusing():
            planned = plan.make(config, given, int(os.environ.get("WORLD_SIZE", 1)), options.against, own)
        print(planned.to_json() if options.plan == "json" else render(planned, options.wide, Console().is_terminal))
        return 0


def _planned(config: TrainConfig, given: dict[str, str], own: Sequence[OwnFile]) -> str:
    """What --plan prints, for trackers; of a plan that cannot be made, why."""
    try:
        with refusing():
            return render(plan.make(config, given, int(os.environ.get("WORLD_SIZE", 1)), "", own))
    except Refused as error:
        return "\n".join(error.problems)
