"""Text to token ids and back: characters, or GPT-2's byte-pair encoding through tiktoken."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from orchestrate.data.stream import Meta


class Tokenizer(Protocol):
    """What sampling and preparing need of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class CharTokenizer:
    """One token a character. Raises ValueError for a character that the data set does not have."""

    def __init__(self, characters: Sequence[str]) -> None:
        self.itos = tuple(characters)
        self._stoi = {character: i for i, character in enumerate(self.itos)}

    @classmethod
    def of(cls, text: str) -> CharTokenizer:
        """The tokenizer of all characters of a text, in sorted order."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        try:
            return [self._stoi[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise ValueError(
                f"the character {character!r} (position {text.index(character)}) is not among the "
                f"{len(self.itos)} characters of this data set"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.itos[i] if 0 <= i < len(self.itos) else "\ufffd" for i in ids)


class BpeTokenizer:
    """A tiktoken encoding; ids beyond its vocabulary (a padded model's) decode to U+FFFD."""

    def __init__(self, encoding: Any) -> None:
        self.encoding = encoding
        self.end_of_text: int = encoding.eot_token

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special={"<|endoftext|>"})

    def encode_plain(self, text: str) -> list[int]:
        """Without special tokens: what a document says is text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        known = self.encoding.n_vocab
        pieces, run = [], []
        for i in [*ids, -1]:
            if 0 <= i < known:
                run.append(i)
                continue
            pieces.append(self.encoding.decode(run))
            pieces.append("\ufffd")
            run = []
        return "".join(pieces[:-1])


class RemappedTokenizer:
    """A tokenizer over a shrunken vocabulary: old ids are mapped by the run's remapping array."""

    def __init__(self, inner: Tokenizer, remap: np.ndarray) -> None:
        self.inner, self.remap = inner, remap
        # Several old ids may share a new one (rare tokens); the first is the one that is shown.
        ids, first = np.unique(remap, return_index=True)
        self._back = dict(zip(ids.tolist(), first.tolist(), strict=True))

    def encode(self, text: str) -> list[int]:
        return self.remap[self.inner.encode(text)].tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode([self._back.get(int(i), -1) for i in ids])


class HuggingFaceTokenizer:
    """The tokenizer of a local Hugging Face folder. Raises ValueError where the folder has none that can be read."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            # Nothing that the folder brings along is run.
            self._inner = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # files of all kinds, by many libraries
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{folder}: no tokenizer can be read from it ({first}); --dataset names one") from None

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        known = len(self._inner)
        runs = [(inside, list(run)) for inside, run in itertools.groupby(ids, lambda i: 0 <= i < known)]
        return "".join(self._inner.decode(run) if inside else "\ufffd" * len(run) for inside, run in runs)


def tokenizer_kind(folder: str | Path) -> str:
    """The kind of tokenizer that a Hugging Face folder names ("gpt2" for GPT-2's); nothing where it names none."""
    try:
        values = json.loads((Path(folder) / "tokenizer_config.json").read_text("utf-8"))
        name = str(values["tokenizer_class"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return "gpt2" if name.startswith("GPT2") else name


def gpt2_tokenizer() -> BpeTokenizer:
    """GPT-2's encoding. Raises ValueError where its vocabulary is neither cached nor to be downloaded."""
    import tiktoken

    try:
        return BpeTokenizer(tiktoken.get_encoding("gpt2"))
    except Exception as error:  # whatever tiktoken's download raises
        raise ValueError(
            f"the GPT-2 vocabulary cannot be had ({type(error).__name__}): tiktoken downloads it once; without "
            "network, copy its cache from another machine and name it in TIKTOKEN_CACHE_DIR"
        ) from None


def tokenizer_of(meta: Meta) -> Tokenizer:
    """The tokenizer that a data folder's meta names. Raises ValueError."""
    return CharTokenizer(meta.itos) if meta.tokenizer == "char" else gpt2_tokenizer()
