"""How fast our adapter for lm-eval is beside lm-eval's own one on the exported model, in turns on the same requests.

    python bench/evaluate.py [--layers 6] [--width 256] [--documents 24] [--rounds 3]

Three kinds of requests: endings after a context (as hellaswag's), letters after a long prompt with examples that all
prompts share (as mmlu's), and answers of 32 tokens. The numbers are seconds; the answers of both are compared.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrate.data.keeping import save  # noqa: E402
from orchestrate.data.tokenizer import CharTokenizer  # noqa: E402
from orchestrate.model.config import ModelConfig  # noqa: E402
from orchestrate.model.export import form_of, write_hugging_face  # noqa: E402
from orchestrate.model.gpt import GPT, init_weights  # noqa: E402
from orchestrate.training.tasks.adapter import Adapter  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ,.?:\n"


def requests(documents: int, rng: random.Random) -> dict[str, tuple[str, list[Any]]]:
    """Kind -> (what lm-eval calls, its requests)."""

    def text(size: int) -> str:
        return "".join(rng.choices(LETTERS[:52] + " " * 9, k=size)).strip() or "a"

    def asked(*args: Any) -> SimpleNamespace:
        return SimpleNamespace(args=args, task_name="bench")

    examples = text(320)
    contexts = [text(rng.randint(60, 160)) for _ in range(documents)]
    questions = [f"{examples}\nQuestion: {text(rng.randint(40, 90))}\nAnswer:" for _ in range(documents)]
    wanted = {"until": ["never said"], "max_gen_toks": 32}
    return {
        "endings": ("loglikelihood", [asked(c, f" {text(rng.randint(30, 60))}") for c in contexts for _ in range(4)]),
        "letters": ("loglikelihood", [asked(q, f" {letter}") for q in questions for letter in "ABCD"]),
        "answers": ("generate_until", [asked(c, dict(wanted)) for c in contexts]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8, help="of both; of ours rows of block_size tokens")
    options = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    logging.disable(logging.WARNING)
    tokenizer = CharTokenizer.of(LETTERS, several=True)
    shape = ModelConfig(
        block_size=512, vocab_size=tokenizer.vocab_size, n_layer=options.layers, n_head=options.width // 32,
        n_embd=options.width,
    )  # fmt: skip
    model = GPT(shape).eval()
    init_weights(model, 1)
    with tempfile.TemporaryDirectory() as folder:
        special = {"bos_token_id": tokenizer.start_of_text, "eos_token_id": tokenizer.end_of_text}
        write_hugging_face(form_of(model), Path(folder), special=special)
        save(tokenizer, folder)
        theirs = HFLM(folder, device="cpu", batch_size=options.batch_size, dtype="float32")
    ours = Adapter(model, tokenizer, options.batch_size)
    for kind, (call, given) in requests(options.documents, random.Random(1)).items():
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(options.rounds):
            found = {}
            for name, adapter in (("theirs", theirs), ("ours", ours)):
                started = time.perf_counter()
                found[name] = getattr(adapter, call)(given, **({"disable_tqdm": True} if adapter is theirs else {}))
                seconds[name].append(time.perf_counter() - started)
        if call == "loglikelihood":
            apart = max(abs(a - b) for (a, _), (b, _) in zip(found["ours"], found["theirs"], strict=True))
            same = all(a == b for (_, a), (_, b) in zip(found["ours"], found["theirs"], strict=True))
            told = (
                f"log-likelihoods differ by {apart:.1e} at most, {'the same' if same else 'OTHER'} answers are greedy"
            )
        else:
            told = f"texts {'equal' if found['ours'] == found['theirs'] else 'DIFFER'}"
        ratios = [theirs_ / ours_ for theirs_, ours_ in zip(seconds["theirs"], seconds["ours"], strict=True)]
        one, other = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{kind}: {len(given)} requests, ours {one:.2f} s, lm-eval's {other:.2f} s")
        print(f"  {statistics.median(ratios):.2f} times as fast {spread}; {told}")


if __name__ == "__main__":
    main()
