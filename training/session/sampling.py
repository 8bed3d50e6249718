"""Text from weights: those of a run folder, of a Hugging Face model or folder, or of a nanoGPT ckpt.pt.

A run folder carries its tokenizer, and so does a Hugging Face folder; the others speak GPT-2's, or a data set's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from orchestrate.data.keeping import kept_with_run, of_data
from orchestrate.data.stream import Meta, read_remap
from orchestrate.data.tokenizer import HuggingFaceTokenizer, RemappedTokenizer, Tokenizer, tokenizer_of
from orchestrate.model import hugging_face, nanogpt
from orchestrate.model.generate import generate
from orchestrate.model.gpt import GPT, from_weights
from orchestrate.training.session.resume import latest_good, named, reading
from orchestrate.training.settings.errors import Refused


def open_run_folder(out_dir: str, name: str = "latest", dataset: str = "") -> tuple[GPT, Tokenizer, list[str]]:
    """A run's model and tokenizer, and what is wrong with newer checkpoints. Raises ValueError.

    Args:
        name: latest, best, or the name of a checkpoint's folder.
        dataset: the data set whose tokenizer is taken instead of the run's own.
    """
    passed_over: list[str] = []
    if name == "latest":
        loaded, passed_over, _ = latest_good(out_dir)
    else:
        loaded = named(out_dir, name)
    recorded, settings = loaded.state.config, loaded.state.settings
    with reading(loaded.path):
        model = from_weights(settings.model, loaded.model)
    meta = loaded.state.tokenizer
    tokenizer = of_data(dataset) if dataset else tokenizer_of(meta, kept_with_run(out_dir, meta))
    if recorded.shrunken_vocab_size:
        remap = read_remap(recorded.vocab_remapping_file, None, recorded.shrunken_vocab_size)
        tokenizer = RemappedTokenizer(tokenizer, remap)
    if settings.vocabulary_map:
        tokenizer = RemappedTokenizer(tokenizer, np.array(settings.vocabulary_map))
    return model, tokenizer, passed_over


def open_foreign(source: str, dataset: str = "") -> tuple[GPT, Tokenizer]:
    """The model of a Hugging Face name or folder or of a nanoGPT ckpt.pt, and its tokenizer. Raises ValueError."""
    model = nanogpt.load_checkpoint(source) if Path(source).is_file() else hugging_face.load(source)
    own = Path(source).is_dir() and source not in hugging_face.GPT2_MODELS and not dataset
    return model, HuggingFaceTokenizer(source) if own else of_data(dataset) if dataset else tokenizer_of(Meta())


def samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    count: int,
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[str]:
    """So many texts that begin with the prompt, one after the other. Raises ValueError for a prompt it cannot read."""
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt)
    if not ids:
        raise Refused("the prompt is empty")
    if max(ids) >= model.config.vocab_size:
        raise Refused(f"token {max(ids)} of the prompt is beyond the model's vocabulary of {model.config.vocab_size}")
    generator = torch.Generator(device).manual_seed(seed)
    given = torch.tensor([ids], device=device)
    with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
        for _ in range(count):
            new = generate(model, given, max_new_tokens, temperature=temperature, top_k=top_k, generator=generator)
            yield tokenizer.decode(new[0].tolist())
