"""What text is made from: weights of a run folder, of a Hugging Face model or folder, or of a nanoGPT ckpt.pt.

A run folder carries its tokenizer, and so does a Hugging Face folder; the others speak GPT-2's, or a data set's.
"""

from __future__ import annotations

from pathlib import Path

from orchestrate.data.keeping import kept_with_run, of_data
from orchestrate.data.stream import Meta
from orchestrate.data.tokenizer import HuggingFaceTokenizer, Tokenizer, tokenizer_of
from orchestrate.model import hugging_face, nanogpt
from orchestrate.model.gpt import GPT, from_weights
from orchestrate.training.session.resume import latest_good, reading
from orchestrate.training.session.start import named_checkpoint
from orchestrate.training.session.texts import remapped


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
        loaded = named_checkpoint(out_dir, name)
    settings = loaded.state.present
    with reading(loaded.path):
        model = from_weights(settings.model, loaded.model)
    meta = loaded.state.tokenizer
    tokenizer = of_data(dataset) if dataset else tokenizer_of(meta, kept_with_run(out_dir, meta))
    return model, remapped(tokenizer, settings.vocabulary_map), passed_over


def open_foreign(source: str, dataset: str = "") -> tuple[GPT, Tokenizer]:
    """The model of a Hugging Face name or folder or of a nanoGPT ckpt.pt, and its tokenizer. Raises ValueError."""
    model = nanogpt.load_checkpoint(source) if Path(source).is_file() else hugging_face.load(source)
    own = Path(source).is_dir() and source not in hugging_face.GPT2_MODELS and not dataset
    return model, HuggingFaceTokenizer(source) if own else of_data(dataset) if dataset else tokenizer_of(Meta())
