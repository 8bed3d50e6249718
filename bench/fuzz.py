"""Feeds made-up schedules, configurations, checkpoints, logs and data files to the project, thousands of them.

    python bench/fuzz.py [--cases 20000] [--seed 0] [--target NAME ...]

Every case must be accepted or refused with a message: no traceback, no hang, nothing accepted that must not be, nothing
in a file executed. What to try is in tests/fuzzing.py; hypothesis makes the cases and cuts a failure down to its
smallest form, which is printed. The tests run the same targets with few cases.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzzing import TARGETS, Workspace, fuzz  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    options = parser.parse_args()
    # A case that wants all the memory there is fails instead of taking the machine with it.
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = 16 * 2**30 if hard == resource.RLIM_INFINITY else min(16 * 2**30, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    print("| target | cases | accepted | refused | failures | seconds |\n|---|---|---|---|---|---|", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        for name in options.target:
            answers, told, started = Counter(), "", time.monotonic()
            try:
                answers = fuzz(name, workspace, -(-options.cases // len(options.target)), options.seed)
            except BaseException:
                failed, told = True, traceback.format_exc()
            facts = [name, answers.total(), answers["accepted"], answers["refused"], int(bool(told))]
            print("|", " | ".join(map(str, [*facts, f"{time.monotonic() - started:.0f}"])), "|", flush=True)
            if told:
                print(told[-6000:], file=sys.stderr, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
