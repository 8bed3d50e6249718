"""What nanoGPT's models are, and weights from its ckpt.pt, read without running anything that is in it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orchestrate.model.config import ModelConfig
from orchestrate.model.families.gpt2 import GPT2
from orchestrate.model.gpt import GPT, from_weights

_ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
_COMPILED = "_orig_mod."  # torch.compile's prefix on every name

NANOGPT = replace(
    GPT2,
    name="nanogpt",
    title="nanoGPT",
    preset={},
    keys={name: name for name in _ARGUMENTS},
    turned=(),
    values={},
    allowed={},
    by_weights=(),
    write_more=lambda config: {"dropout": 0.0},
)
"""It fixes what is no argument of its model: the exact GELU, MLPs of 4 * n_embd, a tied head."""


def _read(path: str | Path) -> dict[str, Any]:
    """The checkpoint's dictionary, memory-mapped. Raises ValueError for anything else."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a checkpoint: torch.save writes a zip archive, and this is none")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken file can raise nearly anything
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, pickle.UnpicklingError):  # torch's own advice is to run what is in the file
            cause = "it is damaged, or it holds other objects, which are never built"
        raise ValueError(f"{path}: not a checkpoint of plain tensors ({cause})") from None
    parts = [loaded.get(name) for name in ("model", "model_args")] if isinstance(loaded, dict) else [None]
    if not all(isinstance(part, dict) and all(isinstance(name, str) for name in part) for part in parts):
        raise ValueError(f"{path}: not a nanoGPT checkpoint (it needs `model` and `model_args`)")
    missing = [name for name in _ARGUMENTS if name not in loaded["model_args"]]
    if missing:
        raise ValueError(f"{path}: model_args lacks {', '.join(missing)}")
    return loaded


def open_model(path: str | Path) -> tuple[ModelConfig, Callable[[], GPT]]:
    """The configuration of the model in a ckpt.pt, and what loads its weights in float32.

    Raises ValueError; so does loading.
    """
    read = _read(path)
    config = ModelConfig(**{name: read["model_args"][name] for name in _ARGUMENTS})

    def load() -> GPT:
        weights = {name.removeprefix(_COMPILED): value for name, value in read["model"].items()}
        # The head is tied to the embedding and stored twice; old checkpoints also hold the causal mask.
        kept = {n: v for n, v in weights.items() if n != "lm_head.weight" and not n.endswith(".attn.bias")}
        model = from_weights(config, kept)
        return model.float()  # what is float32 stays mapped

    return config, load


def load_checkpoint(path: str | Path) -> GPT:
    """The model in a ckpt.pt. Raises ValueError."""
    return open_model(path)[1]()
