"""Generate text: from a run folder, a Hugging Face model or folder, or a nanoGPT ckpt.pt.

    python sample.py --out_dir=RUN --start="ROMEO:" [--num_samples --max_new_tokens --temperature --top_k --seed]
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt

`orchestrate sample` is the same command. A run folder carries its tokenizer, and so does a Hugging Face folder; the
others speak GPT-2's, or that of --dataset.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrate.model.gpt import compile_blocks
from orchestrate.tools.main import called
from orchestrate.training.run.device import DTYPES, pick_device, pick_dtype
from orchestrate.training.session.sampling import open_foreign, open_run_folder, samples
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.settings.errors import Refused, refusing


def _switch(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return text == "True"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; the prompt is read where it is a file. Raises Refused."""
    parser = argparse.ArgumentParser(
        prog=called("sample"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init_from", default="resume", help="resume (a run folder) | gpt2* | folder | ckpt.pt")
    parser.add_argument("--out_dir", default="out", help="the run folder (default out)")
    parser.add_argument("--checkpoint", default="latest", help="latest | best | a folder's name (default latest)")
    parser.add_argument("--start", default="\n", help="the prompt, or FILE:path of one")
    parser.add_argument("--num_samples", type=int, default=10)
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=200, help="draw among the k likeliest; 0: among all")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--compile", type=_switch, nargs="?", const=True, default=False)
    parser.add_argument("--dataset", default="", help="take the tokenizer of this data set")
    options = parser.parse_args(arguments)
    problems = [
        f"--{name}: must be at least {least}, got {getattr(options, name)}"
        for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0))
        if not getattr(options, name) >= least
    ]
    if problems:
        raise Refused(problems)
    if options.start.startswith("FILE:"):
        try:
            options.start = Path(options.start[5:]).read_text("utf-8")
        except OSError as error:
            raise Refused(f"--start: {options.start[5:]} cannot be read ({error.strerror})") from None
    return options


def main(arguments: Sequence[str], watch: SignalWatch | None = None) -> int:
    """Print the samples; returns the exit code. Raises Refused."""
    options = parse(arguments)
    with refusing():
        device = pick_device(options.device, 0)
        if options.init_from == "resume":
            model, tokenizer, passed_over = open_run_folder(options.out_dir, options.checkpoint, options.dataset)
            for problem in passed_over:
                print(f"passed over: {problem}", file=sys.stderr)
        else:
            model, tokenizer = open_foreign(options.init_from, options.dataset)
        model = model.to(device)
        model.reset_buffers(device)
        if options.compile:
            compile_blocks(model)
        texts = samples(
            model,
            tokenizer,
            options.start,
            options.num_samples,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k or None,
            seed=options.seed,
            dtype=DTYPES[pick_dtype(options.dtype, device)],
        )
        for text in texts:
            print(text)
            print("---------------")
    return 0
