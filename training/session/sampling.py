"""What text is made from, and what is exported: weights and tokenizer of a run folder or of a model from elsewhere.

Those are a Hugging Face model or folder, a PEFT folder, a nanoGPT ckpt.pt. A run folder carries its tokenizer, and so
does a Hugging Face folder; a PEFT folder has its own or its base's; the others speak GPT-2's, or a data set's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from orchestrate.data.keeping import kept_with_run, of_data
from orchestrate.data.stream import Meta
from orchestrate.data.tokenizer import HuggingFaceTokenizer, Tokenizer, remapped, tokenizer_of
from orchestrate.model import hugging_face, nanogpt, peft_folder
from orchestrate.model.generate import lay_out
from orchestrate.model.gpt import GPT, from_weights
from orchestrate.training.run.device import DTYPES, pick_device, pick_dtype
from orchestrate.training.session.resume import latest_good, reading
from orchestrate.training.session.start import is_run_folder, named_checkpoint, speaker
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.values import shown
from orchestrate.training.store.checkpoint import Checkpoint
from orchestrate.training.store.state import State


def open_checkpoint(out_dir: str, name: str = "latest") -> tuple[GPT, State, list[str]]:
    """A run's model, as far as it has faded in, the state beside it, and what is wrong with newer checkpoints.

    Args:
        name: latest, best, or the name of a checkpoint's folder.

    Raises ValueError.
    """
    loaded, passed_over = latest_good(out_dir)[:2] if name == "latest" else (named_checkpoint(out_dir, name), [])
    return checkpoint_model(loaded), loaded.state, passed_over


def checkpoint_model(loaded: Checkpoint) -> GPT:
    """The model of a checkpoint, as far as it has faded in. Raises ValueError."""
    settings = loaded.state.settings
    with reading(loaded.path):
        model = from_weights(settings.model, loaded.model)
    model.set_fading(settings.fading)
    return model


def run_tokenizer(out_dir: str, state: State, dataset: str = "") -> Tokenizer:
    """What a run speaks at a checkpoint with this state, or a data set instead. Raises ValueError."""
    tokenizer = _spoken(dataset, lambda: tokenizer_of(state.tokenizer, kept_with_run(out_dir, state.tokenizer)))
    return remapped(tokenizer, state.present.vocabulary_map)


def open_run_folder(out_dir: str, name: str = "latest", dataset: str = "") -> tuple[GPT, Tokenizer, list[str]]:
    """A run's model and tokenizer, and what is wrong with newer checkpoints. Raises ValueError.

    Args:
        name: as `open_checkpoint` has it.
        dataset: the data set whose tokenizer is taken instead of the run's own.
    """
    model, state, passed_over = open_checkpoint(out_dir, name)
    return model, run_tokenizer(out_dir, state, dataset), passed_over


def placed(model: GPT, device: str, dtype: str) -> tuple[GPT, Callable[[], AbstractContextManager]]:
    """A model on its device, laid out to generate, and the number type that it computes in. Raises ValueError."""
    where = pick_device(device, 0)
    model = model.to(where)
    model.reset_buffers(where)
    lay_out(model)
    kind = DTYPES[pick_dtype(dtype, where)]
    return model, nullcontext if kind == torch.float32 else lambda: torch.autocast(where.type, kind)


def is_run(source: str, checkpoint: str = "latest") -> bool:
    """Whether it is a run folder; otherwise it may be weights from elsewhere. Raises Refused where it is neither."""
    path = Path(source)
    if is_run_folder(source):
        return True
    if path.is_dir() and not (peft_folder.is_peft(source) or (path / "config.json").is_file()):
        raise Refused(f"{source}: neither a run folder (no checkpoints/) nor a Hugging Face folder (no config.json)")
    if not path.exists() and source not in hugging_face.GPT2_MODELS:
        raise Refused(f"{source}: there is no such run folder, Hugging Face or PEFT folder, or nanoGPT ckpt.pt")
    if checkpoint != "latest":
        raise Refused(f"--checkpoint {shown(checkpoint)}: {source} is no run folder and has no checkpoints")
    return False


def foreign_model(source: str, base: str = "") -> GPT:
    """The model of a Hugging Face name or folder, of a PEFT folder or of a nanoGPT ckpt.pt. Raises ValueError.

    Args:
        base: where a PEFT folder's base model is, where that is not where the folder says.
    """
    if peft_folder.is_peft(source):
        return peft_folder.load(source, base)
    if base:
        raise Refused(f"--base {base}: {source} is no PEFT folder and has no base")
    return nanogpt.load_checkpoint(source) if Path(source).is_file() else hugging_face.load(source)


def foreign_tokenizer(source: str, base: str = "") -> Tokenizer:
    """What such a model speaks: its folder's or its base's tokenizer, else GPT-2's. Raises ValueError."""
    source = speaker(source, base)
    own = Path(source).is_dir() and source not in hugging_face.GPT2_MODELS
    return HuggingFaceTokenizer(source) if own else tokenizer_of(Meta())


def open_foreign(source: str, dataset: str = "", base: str = "") -> tuple[GPT, Tokenizer]:
    """A model from elsewhere and its tokenizer, or a data set's. Raises ValueError."""
    return foreign_model(source, base), _spoken(dataset, lambda: foreign_tokenizer(source, base))


def _spoken(dataset: str, own: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer of a data set, if one is named, else the model's own. Raises ValueError."""
    try:
        return of_data(dataset) if dataset else own()
    except ValueError as error:
        raise ValueError(str(error) if dataset else f"{error}; --dataset names a data set that has one") from None
