"""Generate text: from a run folder, a Hugging Face model or folder, or a nanoGPT ckpt.pt.

    python sample.py --out_dir=RUN --start="ROMEO:" [--num_samples --max_new_tokens --temperature --top_k --seed]
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt

A run folder carries its tokenizer; the other models speak GPT-2's, or that of --dataset.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from orchestrate.data.stream import Meta, find_folder, read_meta, read_remap
from orchestrate.data.tokenizer import RemappedTokenizer, Tokenizer, tokenizer_of
from orchestrate.model import hugging_face, nanogpt
from orchestrate.model.generate import generate
from orchestrate.model.gpt import GPT, compile_blocks, from_weights
from orchestrate.training.run.device import DTYPES, pick_device, pick_dtype
from orchestrate.training.session.resume import latest_good
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint


def _switch(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return text == "True"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return options


def open_model(options: argparse.Namespace) -> tuple[GPT, Tokenizer]:
    """The model and its tokenizer. Raises ValueError."""
    meta = read_meta(find_folder(options.dataset)) if options.dataset else Meta()
    if options.init_from != "resume":
        is_file = Path(options.init_from).is_file()
        model = nanogpt.load_checkpoint(options.init_from) if is_file else hugging_face.load(options.init_from)
        return model, tokenizer_of(meta)
    if options.checkpoint == "latest":
        loaded, passed_over, _ = latest_good(options.out_dir)
        for problem in passed_over:
            print(f"passed over: {problem}", file=sys.stderr)
    else:
        loaded = checkpoint.load(checkpoint.folder(options.out_dir) / options.checkpoint)
    recorded, settings = loaded.state.config, loaded.state.settings
    model = from_weights(settings.model, loaded.model)
    tokenizer = tokenizer_of(meta if options.dataset else loaded.state.tokenizer)
    if recorded.shrunken_vocab_size:
        remap = read_remap(recorded.vocab_remapping_file, None, recorded.shrunken_vocab_size)
        tokenizer = RemappedTokenizer(tokenizer, remap)
    if settings.vocabulary_map:
        tokenizer = RemappedTokenizer(tokenizer, np.array(settings.vocabulary_map))
    return model, tokenizer


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    start = options.start
    if start.startswith("FILE:"):
        try:
            start = Path(start[5:]).read_text("utf-8")
        except OSError as error:
            raise Refused(f"--start: {start[5:]} cannot be read ({error.strerror})") from None
    device = pick_device(options.device, 0)
    model, tokenizer = open_model(options)
    model = model.to(device)
    model.reset_buffers(device)
    if options.compile:
        compile_blocks(model)
    ids = tokenizer.encode(start)
    if not ids:
        raise Refused("--start: the prompt is empty")
    if max(ids) >= model.config.vocab_size:
        raise Refused(f"--start: token {max(ids)} is beyond the model's vocabulary of {model.config.vocab_size}")
    dtype = DTYPES[pick_dtype(options.dtype, device)]
    generator = torch.Generator(device).manual_seed(options.seed)
    prompt = torch.tensor([ids], device=device)
    with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
        for _ in range(options.num_samples):
            new = generate(
                model,
                prompt,
                options.max_new_tokens,
                temperature=options.temperature,
                top_k=options.top_k or None,
                generator=generator,
            )
            print(tokenizer.decode(new[0].tolist()))
            print("---------------")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        for line in error.problems if isinstance(error, Refused) else [str(error)]:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
