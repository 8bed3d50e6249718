"""Take a model out, for programs that read Hugging Face folders, for peft, or for nanoGPT.

    orchestrate export RUN --to hf DIR [--checkpoint latest|best|NAME] [--dtype float32|bfloat16|float16]
    orchestrate export RUN --to peft DIR [--base FOLDER]
    orchestrate export RUN --to nanogpt FILE

RUN is a run folder, a Hugging Face or PEFT folder or a nanoGPT ckpt.pt. The model computes what it computed; but for
peft its adapters are merged. What a format cannot hold is refused with the operation that made it so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from orchestrate.tools.main import called, script
from orchestrate.training.run.device import DTYPES
from orchestrate.training.session.exporting import FORMATS, export, open_source
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.settings.errors import Refused, refusing


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. Raises Refused."""
    parser = argparse.ArgumentParser(
        prog=called("export"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, a Hugging Face folder or a nanoGPT ckpt.pt")
    parser.add_argument("--to", nargs=2, required=True, metavar=("FORMAT", "TARGET"), help=" | ".join(FORMATS))
    parser.add_argument("--checkpoint", default="latest", help="latest | best | a folder's name (default latest)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the weights (default float32)")
    parser.add_argument("--base", default="", help="for peft: where the model that the run began with is now")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = parser.parse_args(arguments)
    options.to, options.target = options.to
    if options.to not in FORMATS:
        raise Refused(f"--to {options.to}: allowed are {', '.join(FORMATS)}, each with its target")
    if options.base and options.to != "peft":
        raise Refused(f"--base {options.base}: --to {options.to} has no base; it is for --to peft")
    return options


def main(arguments: Sequence[str], watch: SignalWatch | None = None) -> int:
    """Export and say what was written; returns the exit code. Raises Refused."""
    options = parse(arguments)
    with refusing():
        source = open_source(options.run, options.checkpoint)
        for problem in source.passed_over:
            print(f"passed over: {problem}", file=sys.stderr)
        more = {"base": options.base} if options.to == "peft" else {}
        done = export(source, options.to, options.target, dtype=options.dtype, overwrite=options.overwrite, **more)
    print(f"{done.target}: {done.what}, {options.dtype}: {', '.join(done.files)}")
    for line in done.notes:
        print(f"- {line}")
    return 0


if __name__ == "__main__":
    script("export", sys.argv[1:])
