"""How fast is generation? Tokens per second beside transformers' generate on the same model, exported for it.

    python bench/generate.py [--models "GPT-2 1 M,Llama 1 M"] [--batches 1,8] [--tokens 64] [--rounds 5] [--threads N]

Weights are random. Both take the likeliest token each time, from the same prompts of unequal length (transformers with
padding on the left and its own cache), and what they say is compared. Everything is measured in turns inside one
process, in rounds, because timings of this kind drift; a ratio is the median of those of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrate.model.config import ModelConfig  # noqa: E402
from orchestrate.model.export import form_of, write_hugging_face  # noqa: E402
from orchestrate.model.generate import Choice, Continuation, lay_out  # noqa: E402
from orchestrate.model.gpt import GPT, init_weights, parameter_count  # noqa: E402

SMALL = ModelConfig(block_size=512, vocab_size=256, n_layer=5, n_head=4, n_embd=128, bias=True)
LLAMA = dict(norm="rmsnorm", activation="swiglu", position="rotary", tie_weights=False, bias=False)
MODELS = {
    "GPT-2 1 M": SMALL,
    "Llama 1 M": replace(SMALL, n_kv_head=2, n_hidden=344, **LLAMA),
    "Llama 56 M": ModelConfig(1024, 32000, 8, 8, n_kv_head=2, n_embd=512, n_hidden=1408, **LLAMA),
    "GPT-2 124 M": ModelConfig(vocab_size=50257, bias=True),
}
Generate = Callable[[], list[list[int]]]


def ours(model: GPT, prompts: Sequence[Sequence[int]], count: int) -> Generate:
    """The sequences with so many more tokens each."""
    lay_out(model)

    def generate() -> list[list[int]]:
        rows = Continuation(model, len(prompts), max(map(len, prompts)) + count)
        for prompt in prompts:
            rows.add(prompt, Choice(temperature=0))
        for _ in range(count):
            rows.step()
        return list(rows.tokens.values())

    return generate


def theirs(model: GPT, prompts: Sequence[Sequence[int]], count: int) -> Generate:
    """The same, by transformers."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        write_hugging_face(form_of(model), Path(folder))
        exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    there = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def generate() -> list[list[int]]:
        said = exported.generate(
            padded, attention_mask=there, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        return [row[longest - len(prompt) :] for row, prompt in zip(said.tolist(), prompts, strict=True)]

    return generate


def prompts_of(batch: int, longest: int, vocab_size: int) -> list[list[int]]:
    """Random prompts of unequal length, from an eighth of the longest to that."""
    generator = torch.Generator().manual_seed(batch)
    lengths = [max(1, longest * (8 - n % 8) // 8) for n in range(batch)]
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="of: " + ", ".join(MODELS))
    parser.add_argument("--batches", default="1,8", help="sequences that are generated together")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a sequence")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the longest prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    import transformers

    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, CPU, {options.threads} threads, float32; "
        f"prompts of up to {options.prompt} tokens, {options.tokens} new ones"
    )
    print("| model | parameters | batch | tokens/s | transformers | ratio | of the rounds | equal |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models.split(","):
        config = MODELS[name]
        model = GPT(config).eval()
        init_weights(model, 0)
        for batch in map(int, options.batches.split(",")):
            prompts = prompts_of(batch, options.prompt, config.vocab_size)
            contenders = [make(model, prompts, options.tokens) for make in (theirs, ours)][::-1]
            said = [generate() for generate in contenders]  # and so they are warm
            equal = sum(mine == their for mine, their in zip(*said, strict=True))
            rounds = []
            for _ in range(options.rounds):
                seconds = []
                for generate in contenders:
                    start = time.perf_counter()
                    generate()
                    seconds.append(time.perf_counter() - start)
                rounds.append(seconds)
            ratios = [their / mine for mine, their in rounds]
            mine, their = (batch * options.tokens / statistics.median(column) for column in zip(*rounds, strict=True))
            print(
                f"| {name} | {parameter_count(config):,} | {batch} | {mine:,.0f} | {their:,.0f} "
                f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {equal} of {batch} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
