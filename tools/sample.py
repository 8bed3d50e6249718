"""Generate text: from a run folder, a Hugging Face model or folder, a PEFT folder, or a nanoGPT ckpt.pt.

    python sample.py --out_dir=RUN --start="ROMEO:" [--num_samples --max_new_tokens --temperature --top_k --seed]
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --top_p=0.9 --stop="\\n\\n" --stream
    python sample.py --out_dir=RUN --prompts=FILE --num_samples=1

`orchestrate sample` is the same command. A run folder carries its tokenizer, and so does a Hugging Face folder; a PEFT
folder has its own or its base's; the others speak GPT-2's, or that of --dataset. A text follows from the model, its
prompt, --seed and its number among the texts of that prompt: it is the same alone and beside others, but for the
rounding of larger matrix products.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrate.model.generate import Choice
from orchestrate.model.gpt import compile_blocks
from orchestrate.tools.main import called
from orchestrate.training.run.device import DTYPES
from orchestrate.training.session.sampling import open_foreign, open_run_folder, placed
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.session.texts import samples
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
    parser.add_argument("--start", help='the prompt, FILE:path of one, or - for standard input (default "\\n")')
    parser.add_argument("--prompts", help="a file with a prompt on each line that is not empty; -: standard input")
    parser.add_argument("--num_samples", type=int, default=10, help="texts of each prompt (default 10)")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="of each text (default 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    parser.add_argument("--top_k", type=int, default=200, help="draw among the k likeliest; 0: among all (default 200)")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw among the fewest likeliest that have this probability together"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0,
        help="above 1: what is there already, the prompt included, becomes less likely (CTRL's; default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end a text before this, which is not printed (repeatable); \\n and \\t stand for a newline and a tab",
    )  # fmt: skip
    parser.add_argument("--stream", action="store_true", help="print each piece of a text as it comes")
    parser.add_argument("--batch_size", type=int, default=16, help="texts that are generated together (default 16)")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--compile", type=_switch, nargs="?", const=True, default=False)
    parser.add_argument("--dataset", default="", help="take the tokenizer of this data set")
    options = parser.parse_args(arguments)
    problems = number_problems(options, num_samples=1, max_new_tokens=1, temperature=0, top_k=0, seed=0, batch_size=1)
    if not 0 < options.repetition_penalty < math.inf:
        problems.append(f"--repetition_penalty: must be positive and finite, got {options.repetition_penalty}")
    options.stop = [text.replace("\\n", "\n").replace("\\t", "\t") for text in options.stop]
    if "" in options.stop:
        problems.append("--stop: the text is empty")
    if options.checkpoint != "latest" and options.init_from != "resume":
        problems.append(f"--checkpoint {options.checkpoint}: {options.init_from} is no run folder and has none")
    if options.start is not None and options.prompts is not None:
        problems.append("--start and --prompts: give one of them")
    if problems:
        raise Refused(problems)
    if options.prompts is not None:
        options.prompts = [line for line in _text("--prompts", options.prompts).split("\n") if line]
        if not options.prompts:
            raise Refused("--prompts: there is no line that is not empty")
    elif options.start == "-":
        options.prompts = [_text("--start", "-")]
    elif options.start is not None and options.start.startswith("FILE:"):
        options.prompts = [_text("--start", options.start.removeprefix("FILE:"))]
    else:
        options.prompts = ["\n" if options.start is None else options.start]
    return options


def _text(option: str, path: str) -> str:
    """What a file says, or standard input. Raises Refused."""
    where = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise Refused(f"{option}: {where} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{option}: {where} is not UTF-8 (byte {error.start})") from None


def number_problems(options: argparse.Namespace, **least: float) -> list[str]:
    """What is wrong with top_p, and with options that must be finite and at least so much."""
    problems = [
        f"--{name}: must be at least {number}, got {getattr(options, name)}"
        for name, number in least.items()
        if not number <= getattr(options, name) < math.inf
    ]
    if not 0 < options.top_p <= 1:
        problems.append(f"--top_p: must be above 0 and at most 1, got {options.top_p}")
    return problems


def main(arguments: Sequence[str], watch: SignalWatch | None = None) -> int:
    """Print the samples; returns the exit code. Raises Refused."""
    options = parse(arguments)
    with refusing():
        if options.init_from == "resume":
            model, tokenizer, passed_over = open_run_folder(options.out_dir, options.checkpoint, options.dataset)
            for problem in passed_over:
                print(f"passed over: {problem}", file=sys.stderr)
        else:
            model, tokenizer = open_foreign(options.init_from, options.dataset)
        model, autocast = placed(model, options.device, options.dtype)
        if options.compile:
            compile_blocks(model)
        pieces = samples(
            model,
            tokenizer,
            options.prompts,
            options.num_samples,
            options.max_new_tokens,
            choice=Choice(options.repetition_penalty, options.temperature, options.top_k, options.top_p),
            seed=options.seed,
            stop=options.stop,
            batch_size=options.batch_size,
            autocast=autocast,
        )
        for piece in pieces:
            print(piece.text, end="\n---------------\n" if piece.last else "", flush=options.stream)
    return 0
