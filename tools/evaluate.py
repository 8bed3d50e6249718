"""Score models by tasks of EleutherAI's lm-eval: checkpoints of runs, Hugging Face or PEFT folders, a nanoGPT ckpt.pt.

    orchestrate evaluate RUN --tasks hellaswag,arc_easy [--checkpoint best] [--limit N]
    orchestrate evaluate RUN OTHER_RUN --suite core|gauntlet --checkpoint all --plot scores.html --out scores.json
    orchestrate evaluate --suite gauntlet --list

Data sets come from the Hugging Face hub, or with --data from local files: what the hub has as ORG/NAME, configuration
C, split S is FOLDER/ORG/NAME/C/S.jsonl. What has been scored is not scored again: an interrupted command goes on where
it was. A task that fails is named, and the exit code is 1. Under torchrun all processes share the work.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from orchestrate.tools.main import called, script
from orchestrate.training.run.device import DTYPES, pick_device, pick_dtype
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.session.evaluating import NO_PLOTLY, evaluate, members_of, opened, plot, subjects, table
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.settings.errors import Refused, refusing
from orchestrate.training.tasks.adapter import Adapter
from orchestrate.training.tasks.harness import every_name, require
from orchestrate.training.tasks.suites import SUITES, Suite


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. Raises Refused."""
    parser = argparse.ArgumentParser(
        prog=called("evaluate"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, Hugging Face folders, or a ckpt.pt")
    parser.add_argument("--tasks", default="", help="names of lm-eval, with commas between them")
    parser.add_argument("--suite", default="", help=" | ".join(SUITES))
    parser.add_argument("--list", action="store_true", help="the tasks of the suite, or all of lm-eval; score nothing")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME",
                        help="latest | best | all | a folder's name or path (repeatable; default latest)")  # fmt: skip
    parser.add_argument("--few_shot", type=int, help="examples before each question (default: the task's own number)")
    parser.add_argument("--limit", type=int, help="documents of each task at most")
    parser.add_argument("--data", help="a folder of local data sets; nothing is read from the hub then")
    parser.add_argument("--out", help="write the results as JSON")
    parser.add_argument("--plot", nargs="?", const="evaluations.html", metavar="FILE.html",
                        help="a page with the scores over checkpoints and runs (default evaluations.html)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="score what is known already, too")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of block_size tokens at once (default 8)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--dataset", default="", help="take the tokenizer of this data set")
    options = parser.parse_args(arguments)
    problems = [
        f"--{name}: must be at least {least}, got {value}"
        for name, least in (("limit", 1), ("few_shot", 0), ("batch_size", 1))
        if (value := getattr(options, name)) is not None and value < least
    ]
    options.tasks = [name for name in options.tasks.split(",") if name]
    if options.suite and options.suite not in SUITES:
        problems.append(f"--suite {options.suite}: allowed are {', '.join(SUITES)}")
    if bool(options.tasks) == bool(options.suite) and not (options.list and not options.tasks):
        problems.append("give --tasks or --suite, one of them")
    if options.suite and options.few_shot is not None:
        problems.append("--few_shot: a suite says itself how many examples a task has")
    if not options.runs and not options.list:
        problems.append("RUN is missing: a run folder, a Hugging Face folder or a nanoGPT ckpt.pt")
    if options.data is not None and not Path(options.data).is_dir():
        problems.append(f"--data {options.data}: there is no such folder")
    for name in ("out", "plot"):
        given = getattr(options, name)
        if given is not None and not Path(given).absolute().parent.is_dir():
            problems.append(f"--{name} {given}: there is no folder {Path(given).parent}")
        elif given is not None and Path(given).is_dir():
            problems.append(f"--{name} {given}: is a folder")
    if problems:
        raise Refused(problems)
    return options


def _list(suite: Suite | None) -> None:
    if suite is None:
        print("\n".join(every_name()))
        return
    for m in suite.members:
        shots = "its own" if m.few_shot is None else m.few_shot
        print(f"{m.category}  {m.name}  {m.task}  {m.metric}  few-shot {shots}  guessing {100 * m.baseline:.4g} %")
    for name, why in suite.missing.items():
        print(f"missing: {name} ({why})")


def main(arguments: Sequence[str], watch: SignalWatch | None = None) -> int:
    """Score and print the table; returns the exit code. Raises Refused."""
    options = parse(arguments)
    suite = SUITES.get(options.suite)
    with refusing():
        require()
        if options.plot and importlib.util.find_spec("plotly") is None:  # before hours of work
            raise Refused(NO_PLOTLY)
        if options.list:
            _list(suite)
            return 0
        members = list(suite.members) if suite else members_of(options.tasks, options.few_shot)
        chosen = [
            one for run in options.runs for which in options.checkpoint or ["latest"] for one in subjects(run, which)
        ]
        device = pick_device(options.device, int(os.environ.get("LOCAL_RANK", 0)))
        dtype = pick_dtype(options.dtype, device)
        ranks = Ranks(device.type)
        # A run that trains meanwhile may save between one rank's look and another's.
        chosen = ranks.broadcast(chosen)

        def say(text: str) -> None:
            if ranks.is_first:
                print(text, flush=True)

        scored, unread = [], []
        for one in dict.fromkeys(chosen):
            why = ""
            try:
                model, tokenizer = opened(one, options.dataset)
            except (OSError, ValueError) as error:
                why = str(error)
            # All ranks or none: the run may remove a checkpoint that one of them has read already.
            if problem := next(filter(None, ranks.gather(why)), ""):
                unread.append(problem)
                continue
            for problem in one.passed_over if ranks.is_first else ():
                print(f"passed over: {problem}", file=sys.stderr, flush=True)
            model = model.to(device)
            model.reset_buffers(device)
            say(f"{one.name}{f' ({one.checkpoint})' if one.checkpoint else ''}")
            adapter = Adapter(
                model,
                tokenizer,
                options.batch_size,
                ranks,
                nullcontext if dtype == "float32" else lambda: torch.autocast(device.type, DTYPES[dtype]),
            )
            data = Path(options.data) if options.data else None
            scored.append(
                evaluate(
                    one,
                    members,
                    adapter,
                    dtype=dtype,
                    limit=options.limit,
                    data=data,
                    again=options.again,
                    say=lambda text: say(f"  {text}"),
                )  # fmt: skip
            )
        if not scored:
            raise Refused(unread)
        if ranks.is_first:
            print(table(scored, members, suite))
            scale = "; the last rows are rescaled: 0 % is what guessing gets, 100 % no mistake" if suite else ""
            print(f"±: one standard error{scale}")
            for name, why in (suite.missing if suite else {}).items():
                print(f"not in {options.suite}: {name} ({why})")
            if options.out:
                found = {
                    "format": 1,
                    "suite": options.suite,
                    "limit": options.limit,
                    "missing": suite.missing if suite else {},
                    "models": [one.to_json(suite) for one in scored],
                }
                try:
                    Path(options.out).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
                except OSError as error:
                    raise Refused(f"--out {options.out}: cannot be written ({error.strerror})") from None
            if options.plot:
                plot(scored, members, suite, Path(options.plot))
        ranks.close()
    failed = [
        f"{f'{one.label}: ' if len(chosen) > 1 else ''}{name}: {why}"
        for one in scored
        for name, why in one.failed.items()
    ] + unread
    for problem in failed if ranks.is_first else ():
        print(f"error: {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    script("evaluate", sys.argv[1:])
