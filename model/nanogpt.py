"""Weights from a nanoGPT ckpt.pt, read without running anything that is in it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.gpt import GPT, from_weights

_ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
_COMPILED = "_orig_mod."  # torch.compile's prefix on every name


def _read(path: str | Path) -> dict[str, Any]:
    """The checkpoint's dictionary, memory-mapped. Raises ValueError for anything else."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file (a nanoGPT ckpt.pt is expected)")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:
        raise ValueError(f"{path}: not a checkpoint of plain tensors ({str(error).splitlines()[0]})") from None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("model"), dict) or "model_args" not in loaded:
        raise ValueError(f"{path}: not a nanoGPT checkpoint (it needs `model` and `model_args`)")
    missing = [name for name in _ARGUMENTS if name not in loaded["model_args"]]
    if missing:
        raise ValueError(f"{path}: model_args lacks {', '.join(missing)}")
    return loaded


def config_from_checkpoint(path: str | Path) -> ModelConfig:
    """The configuration of the model in a ckpt.pt. Raises ValueError."""
    arguments = _read(path)["model_args"]
    return ModelConfig(**{name: arguments[name] for name in _ARGUMENTS}, dropout=float(arguments.get("dropout") or 0.0))


def load_checkpoint(path: str | Path) -> GPT:
    """The model in a ckpt.pt. Raises ValueError."""
    loaded = _read(path)
    weights = {name.removeprefix(_COMPILED): value for name, value in loaded["model"].items()}
    # The head is tied to the embedding and stored twice; old checkpoints also hold the causal mask.
    weights = {
        name: value for name, value in weights.items() if name != "lm_head.weight" and not name.endswith(".attn.bias")
    }
    return from_weights(config_from_checkpoint(path), weights)
