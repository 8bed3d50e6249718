"""A model taken out: from a run folder, a Hugging Face folder or a nanoGPT ckpt.pt to what other programs read.

The target is whole or as it was: everything is written beside it and renamed. What a format cannot hold is refused with
the operation of the run that made it so. How a model is brought into a format's shape is model/export.py's to say.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate.data import keeping
from orchestrate.data.tokenizer import Tokenizer, tokenizer_of
from orchestrate.model import hugging_face, peft_folder
from orchestrate.model.export import (
    SHARD_BYTES,
    Form,
    NoForm,
    form_of,
    nanogpt_form_of,
    write_hugging_face,
    write_nanogpt,
)
from orchestrate.model.families import FAMILIES, Family
from orchestrate.model.gpt import GPT
from orchestrate.training.run.device import DTYPES
from orchestrate.training.session.model_card import card, fired
from orchestrate.training.session.sampling import foreign_model, foreign_tokenizer, is_run, open_checkpoint
from orchestrate.training.settings.errors import Refused, Stopped, refusing
from orchestrate.training.store.run_folder import RunRecord, read_run
from orchestrate.training.store.state import State

_NO_BEST = 1e9
"""What nanoGPT begins with."""


@dataclass(frozen=True)
class Source:
    """What is exported; `state` and `record` of a run only."""

    name: str
    model: GPT
    state: State | None = None
    record: RunRecord | None = None
    passed_over: tuple[str, ...] = ()
    """What is wrong with newer checkpoints."""


@dataclass(frozen=True)
class Exported:
    """What was written, for a person."""

    target: Path
    what: str
    """The format, or the family of Hugging Face's."""
    notes: tuple[str, ...]
    """What was done to the form of the model, and what was left out."""
    files: tuple[str, ...]


def open_source(name: str, checkpoint: str = "latest") -> Source:
    """A run folder, a Hugging Face or PEFT folder or a nanoGPT ckpt.pt. Raises ValueError."""
    if is_run(name, checkpoint):
        model, state, passed_over = open_checkpoint(name, checkpoint)
        return Source(name, model, state, read_run(Path(name)), tuple(passed_over))
    return Source(name, foreign_model(name))


def to_hugging_face(
    source: Source, target: str, *, dtype: str = "float32", overwrite: bool = False, shard_bytes: int = SHARD_BYTES
) -> Exported:
    """A folder for transformers: configuration, weights, tokenizer, model card. Raises Refused and Stopped."""
    path = _target(source, target, overwrite, is_folder=True)
    form = _form(source, lambda model: form_of(model, _families(source)))
    notes = list(form.steps)

    def write(folder: Path) -> None:
        folder.mkdir()
        special = _write_tokenizer(source, form.model.config.vocab_size, folder, notes)
        write_hugging_face(form, folder, DTYPES[dtype], shard_bytes, special)
        _write_card(source, folder, form.model, {"architecture": form.family.title, "number type": dtype}, notes)

    _whole_or_absent(path, write)
    return Exported(path, form.family.title, tuple(notes), tuple(sorted(os.listdir(path))))


def _write_card(source: Source, folder: Path, model: GPT, about: dict[str, str], notes: list[str], **head: str) -> None:
    text = card(model.config, about, notes, source.state, source.record, **head)
    (folder / "README.md").write_text(text, "utf-8")


def _write_tokenizer(source: Source, size: int, folder: Path, notes: list[str]) -> dict[str, int | None]:
    """The tokenizer as AutoTokenizer reads it; its special ids. Where it cannot be had, that is noted."""
    from transformers import AutoTokenizer

    try:
        tokenizer = _tokenizer(source)
        if tokenizer.vocab_size > size:
            raise ValueError(f"it has {tokenizer.vocab_size} tokens and the model {size}")
        keeping.save(tokenizer, folder)
    except ValueError as error:
        notes.append(f"there is no tokenizer in it: {error}")
        return {}
    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its own configuration may say anything
        first = next(iter(str(error).splitlines()), "")
        notes.append(f"transformers cannot open the tokenizer in it ({type(error).__name__}: {first})")
        return {}
    return {name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _tokenizer(source: Source) -> Tokenizer:
    """Raises ValueError where there is none, or none that can be written."""
    if source.state is None:
        if Path(source.name).is_file():
            raise ValueError("a nanoGPT checkpoint does not say which it is")
        return foreign_tokenizer(source.name)
    meta = source.state.tokenizer
    if source.state.present.vocabulary_map:
        raise ValueError("the run's vocabulary is a remapped one, which tokenizer.json cannot say")
    return tokenizer_of(meta, keeping.kept_with_run(source.name, meta))


def to_peft(
    source: Source, target: str, *, dtype: str = "float32", overwrite: bool = False, base: str = ""
) -> Exported:
    """A folder for peft: the adapters, on the model that the run began with. Raises Refused and Stopped.

    Args:
        base: where that model is now, a Hugging Face folder or a name on the hub; empty: where it was.
    """
    path = _target(source, target, overwrite, is_folder=True)
    if dtype != "float32":
        raise Refused(f"--dtype {dtype}: adapters are written in float32")
    if base and hugging_face.is_path(base) and not Path(base).is_dir():
        raise Refused(
            f"--base {base}: there is no such folder; allowed are a Hugging Face folder, and on the hub NAME or "
            "ORGANISATION/NAME"
        )
    base, notes = base or _base(source), []
    dropout = 0.0 if source.state is None else source.state.settings.lora_dropout

    def write(folder: Path) -> None:
        notes.extend(peft_folder.write(source.model, folder, base, lora_dropout=dropout))
        _write_tokenizer(source, source.model.config.vocab_size, folder, notes)
        head = {"library_name": "peft", "base_model": Path(base).name if Path(base).is_dir() else base}
        _write_card(source, folder, source.model, {"architecture": f"LoRA adapters on {base}"}, notes, **head)

    try:
        _whole_or_absent(path, write)
    except Refused:
        raise
    except ValueError as error:
        raise Refused(f"{source.name}: {error}") from None
    return Exported(path, f"adapters of {base}", tuple(notes), tuple(sorted(os.listdir(path))))


def _base(source: Source) -> str:
    """What a run's adapters are on: the model that it began with. Raises Refused where peft cannot load that."""
    begun, named = source.name, ""
    if source.record is not None:
        first = source.record.began_with
        begun, named = first.get("init_from", "scratch"), first.get("base_model", "")
    with refusing():
        base = peft_folder.describe(begun, named).base if peft_folder.is_peft(begun) else begun
    if base in hugging_face.GPT2_MODELS:
        return f"openai-community/{base}"
    if not (Path(base) / "config.json").is_file():
        raise Refused(
            f"{source.name}: began with {begun}, which is no Hugging Face folder here: adapters are on one (--base "
            "FOLDER says where it is), or --to hf exports the whole model"
        )
    return base


def to_nanogpt(source: Source, target: str, *, dtype: str = "float32", overwrite: bool = False) -> Exported:
    """A ckpt.pt for nanoGPT's sample.py, without the optimizer's state. Raises Refused and Stopped."""
    path = _target(source, target, overwrite, is_folder=False)
    form = _form(source, nanogpt_form_of)
    notes, state = list(form.steps), source.state
    facts = {"iter_num": 0, "best_val_loss": _NO_BEST, "config": {}}
    if state is not None:
        plain = {k: v for k, v in state.config.model_dump().items() if isinstance(v, str | int | float | bool)}
        if "dataset" in plain:
            plain["dataset"] = Path(plain["dataset"]).name
            if state.tokenizer.tokenizer == "char":
                notes.append(f"sample.py reads the characters from data/{plain['dataset']}/meta.pkl beside it")
        best = state.progress.best_val_loss
        facts = {
            "iter_num": state.progress.iter,
            "best_val_loss": _NO_BEST if best is None else best,
            "config": plain,
        }
    _whole_or_absent(path, lambda file: write_nanogpt(form, file, DTYPES[dtype], **facts))
    return Exported(path, form.family.title, tuple(notes), (path.name,))


FORMATS: dict[str, Callable[..., Exported]] = {"hf": to_hugging_face, "peft": to_peft, "nanogpt": to_nanogpt}


def export(source: Source, to: str, target: str, **options: Any) -> Exported:
    """By the name of a format. Raises Refused and Stopped."""
    return FORMATS[to](source, target, **options)


# ---------------------------------------------------------------------------------------------- what cannot be held


def _families(source: Source) -> list[Family]:
    """All of them, first the one that the weights came from, where that can still be seen."""
    begun = source.name
    if source.record is not None:
        begun = source.record.began_with.get("init_from", "")
    kind = ""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        kind = json.loads((Path(begun) / "config.json").read_text("utf-8"))["model_type"]
    return sorted(FAMILIES.values(), key=lambda family: family.name != kind)


def _form(source: Source, make: Callable[[GPT], Form]) -> Form:
    """Raises Refused with the operations that stand in the way, and what would help."""
    try:
        return make(source.model)
    except NoForm as error:
        problems = [f"{source.name}: {error}"]
        problems += [f"{source.name}: {line}" for line in _causes(source, error.options)]
        if make is nanogpt_form_of:
            with contextlib.suppress(NoForm):
                problems.append(f"--to hf holds this model, as {form_of(source.model).family.title}")
        raise Refused(problems) from None


def _causes(source: Source, options: frozenset[str]) -> list[str]:
    """The last operation that set each of these options of the model."""
    if source.state is None or source.record is None:
        return []
    told = {}
    for event in fired(source.state, source.record):
        for option in options & {name.removeprefix("model.") for name in event["settings_after"]}:
            entry = "" if event["entry"] is None else f"entry {event['entry']}, "
            told[option] = (
                f"{option} is what {event['name']} ({entry}iteration {event['iter']}) made it: "
                "a checkpoint from before it has another (--checkpoint NAME)"
            )
    return list(told.values())


# ---------------------------------------------------------------------------------------------- whole or absent


def _target(source: Source, target: str, overwrite: bool, *, is_folder: bool) -> Path:
    """Where to write. Raises Refused where something is that must not be replaced."""
    if not target:
        raise Refused("where to write is empty: give a folder, or for nanogpt a file")
    path = Path(os.path.realpath(target))
    if not os.path.lexists(path) or (is_folder and path.is_dir() and not os.listdir(path)):
        return path
    if path.is_dir() != is_folder:
        wanted, given = ("a folder", "a file") if is_folder else ("a file", "a folder")
        raise Refused(f"{target}: there is {given} of that name, and {wanted} is written")
    if not overwrite:
        raise Refused(f"{target}: is there already; --overwrite replaces it")
    if Path(os.path.realpath(source.name)).is_relative_to(path):
        raise Refused(f"{target}: is, or holds, what is exported: give another place")
    if is_folder and ((path / "checkpoints").exists() or not any((path / name).is_file() for name in _EXPORTS)):
        raise Refused(f"{target}: holds no exported model, and --overwrite replaces nothing else")
    return path


def _whole_or_absent(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside the target and rename. Raises Stopped where it cannot be written."""
    aside, old = path.with_name(f".{path.name}.writing"), path.with_name(f".{path.name}.replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{path}: its folder cannot be made ({error.strerror})") from None
    try:
        _remove(aside)
        try:
            write(aside)
            if path.is_dir() and not os.listdir(path):  # somebody may stand in it
                for file in sorted(os.listdir(aside)):
                    os.replace(aside / file, path / file)
            else:
                _remove(old)
                if path.is_dir():
                    os.replace(path, old)
                os.replace(aside, path)
                _remove(old)
        finally:
            _remove(aside)
    except OSError as error:
        raise Stopped(f"{path}: cannot be written ({error.strerror or error}); nothing new is left there") from None


_EXPORTS = ("config.json", "adapter_config.json")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
