"""Text to token ids and back: characters, tiktoken's encodings, and any Hugging Face tokenizer.

`tokenizer_of(meta, folder)` gives the tokenizer that a data set's or a run's meta names, from the files that are kept
beside it (keeping.py). All have what `Tokenizer` lists. `Pieces` decodes ids as they come, one by one, and never shows
a part of a character. Nothing that a folder brings along is run, and nothing is unpickled.

A tokenizer is known by its fingerprint: a SHA-256 over the bytes that each id stands for, and over the ids of a fixed
text (PROBE). So two files that tokenize alike have the same one, whatever their form: a tokenizer.json with other
whitespace, a tiktoken encoding and the tokenizer.json made of it, characters and their tokenizer.json. It does not
cover which id ends a text, what is put before one, or a chat template.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from orchestrate.data.stream import Meta, read_file

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\ufffd"
_VOCABULARY = 128 * 2**20
_CONFIG = 4 * 2**20
"""Bytes that a file may have. The largest vocabularies there are (256k tokens) take 34 MB."""
# What of a Hugging Face folder is kept, beside tokenizer.json.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
# One of these files is there where a folder has a tokenizer.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

PROBE = (
    "The quick brown fox can't jump over 13 lazy dogs; they've said so since 1984, and we'll SHOUT IT'S TRUE!\n",
    "def f(x):\n    return {'a': x**2,\t'b': [1.5e-3, 0xFF]}  # comment\n\n\n\nif __name__ == 'main':\r\n\tf(12345)\n",
    "Ünïcödé, cafe\u0301, Straße, ŒUVRE, naïve coöperation, İstanbul, ﬁne ½ ² №\n",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया।\n",
    "你好，世界。こんにちは世界！안녕하세요 세계? ไทย\u3000全角\n",
    "👋🏽 👩‍👩‍👧 🇺🇳 \u200b\u00a0\ufeff\u2028 ™ € ∑ ≠\n",
    "   leading, trailing   \n\n \t \n",
    "antidisestablishmentarianism aaaaaaaaaaaaaaaaaaaa ======== -------- ... ?!?! 1000000 3.14159 00 1 22 333 4444",
    "<|endoftext|> <s> </s> [UNK] <0x0A> ▁ Ġ ##ing https://example.org/a?b=c&d=%20 user@example.com C:\\x\\y",
    "don't DON'T Don't I'm I'M we're y'all o'clock rock'n'roll 'tis ''quoted'' HTTPServer camelCase snake_case",
)
"""Each is encoded for itself; one that a tokenizer cannot encode counts as nothing."""


class Tokenizer(Protocol):
    """What preparing, training and sampling need of a tokenizer."""

    kind: str
    """As a meta names it: char | gpt2 | tiktoken:NAME | huggingface."""
    vocab_size: int
    """The largest id and one."""
    end_of_text: int | None
    """The id that ends a document; None where there is none."""
    start_of_text: int | None
    """The id that stands before a text where something must: what the tokenizer names so, else the one that ends."""
    unspoken: frozenset[int]
    """The ids of control tokens, which are no text."""
    fingerprint: str
    """64 hexadecimal digits (see the file's head); empty for a remapped vocabulary."""

    def encode(self, text: str) -> list[int]:
        """A prompt: control tokens in it are understood, and what the tokenizer puts before a text is there."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """A document or what a user says: text alone, which never becomes a control token. Raises ValueError."""
        ...

    def control(self, name: str) -> int | None:
        """The id of a control token, as <|im_end|>; None where there is none of this name."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """An id that there is not, and bytes that are no character, are U+FFFD."""
        ...

    def bytes_of(self, token: int) -> bytes | None:
        """What an id stands for; None where its text depends on the ids beside it."""
        ...


class Pieces:
    """Text out of ids that come one by one: all that is returned, joined, is what `decode` makes of all ids.

    A character of several tokens is held back until it is whole.
    """

    _HELD = 8
    """Tokens that are held back at most: no character has more bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        # Where the text of an id depends on its neighbours, a few of them are decoded again with each new one.
        self._ids: list[int] = []
        self._shown = 0
        """How many of `_ids` have been returned."""

    def push(self, token: int) -> str:
        """What can be shown now that this id has come."""
        known = self._tokenizer.bytes_of(token)
        if known is not None:
            return self._bytes.decode(known)
        self._ids.append(token)
        new = self._new()
        if new.endswith(UNKNOWN) and len(self._ids) - self._shown < self._HELD:
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return new

    def end(self) -> str:
        """What is left when no more ids come."""
        left = self._bytes.decode(b"", final=True) + self._new()
        self._shown = len(self._ids)
        return left

    def _new(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._shown])) :]


def _fingerprint(tokens: Iterable[tuple[int, bytes]], encode_plain: Callable[[str], list[int]]) -> str:
    digest = hashlib.sha256()
    for i, text in sorted(tokens):
        digest.update(b"%d %d " % (i, len(text)) + text)
    for line in PROBE:
        try:
            ids = encode_plain(line)
        except ValueError:
            ids = []
        digest.update(b"\n" + b" ".join(b"%d" % i for i in ids))
    return digest.hexdigest()


class CharTokenizer:
    """One token a character. Raises ValueError for a character that the data set does not have.

    An entry `<|endoftext|>` ends a document. Entries longer than a character are control tokens: no text becomes one.
    """

    kind = "char"

    def __init__(self, characters: Sequence[str]) -> None:
        self.itos = tuple(characters)
        self.stoi = {character: i for i, character in enumerate(self.itos)}
        self.vocab_size = len(self.itos)
        self.start_of_text = self.end_of_text = self.stoi.get(END_OF_TEXT)
        self.unspoken = frozenset(i for i, text in enumerate(self.itos) if len(text) > 1)

    @classmethod
    def of(cls, text: Iterable[str], several: bool = False) -> CharTokenizer:
        """The tokenizer of all characters of a text, in sorted order; with `several` documents, and of their end."""
        return cls([*sorted(set(text)), *([END_OF_TEXT] if several else [])])

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(((i, text.encode("utf-8")) for text, i in self.stoi.items()), self.encode_plain)

    def encode_plain(self, text: str) -> list[int]:
        try:
            return [self.stoi[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise ValueError(
                f"the character {character!r} (position {text.index(character)}) is not among the "
                f"{len(self.itos)} characters of this data set"
            ) from None

    encode = encode_plain

    def control(self, name: str) -> int | None:
        return self.stoi.get(name) if len(name) > 1 else None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.itos[i] if 0 <= i < len(self.itos) else UNKNOWN for i in ids)

    def bytes_of(self, token: int) -> bytes:
        return self.decode([token]).encode("utf-8")


class _ByteTokenizer:
    """Tokens that stand for bytes each for itself. An id beyond them (a padded model's) is U+FFFD."""

    token_bytes: Mapping[int, bytes]

    def bytes_of(self, token: int) -> bytes | None:
        return self.token_bytes.get(int(token), UNKNOWN.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes.get(int(i), UNKNOWN.encode("utf-8")) for i in ids).decode("utf-8", "replace")


class BpeTokenizer(_ByteTokenizer):
    """A tiktoken encoding."""

    def __init__(self, encoding: Any) -> None:
        self.encoding = encoding
        self.kind = encoding.name if encoding.name == "gpt2" else f"tiktoken:{encoding.name}"
        self.vocab_size: int = encoding.n_vocab
        self.end_of_text: int | None = encoding._special_tokens.get(END_OF_TEXT)
        self.start_of_text = self.end_of_text
        self.unspoken = frozenset(encoding._special_tokens.values())

    @cached_property
    def token_bytes(self) -> dict[int, bytes]:
        special = {i: text.encode("utf-8") for text, i in self.encoding._special_tokens.items()}
        return {rank: token for token, rank in self.encoding._mergeable_ranks.items()} | special

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self.token_bytes.items(), self.encode_plain)

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def encode_plain(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def control(self, name: str) -> int | None:
        return self.encoding._special_tokens.get(name)


class HuggingFaceTokenizer(_ByteTokenizer):
    """The tokenizer of a local Hugging Face folder: its tokenizer.json, else what transformers makes of its files.

    Raises ValueError where the folder has none that can be read.

    Attributes:
        files: what is kept of it, name -> content: tokenizer.json, its configuration and chat template.
    """

    kind = "huggingface"

    def __init__(self, folder: str | Path) -> None:
        try:
            files = {name: read_file(path, _CONFIG) for name in _COMPANIONS if (path := Path(folder) / name).is_file()}
            path = Path(folder) / "tokenizer.json"
            files["tokenizer.json"] = read_file(path, _VOCABULARY) if path.is_file() else _converted(Path(folder))
            self._open(files)
        except (OSError, ValueError, RecursionError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{folder}: no tokenizer can be read from it ({first})") from None

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> HuggingFaceTokenizer:
        """The tokenizer that these files are. Raises ValueError."""
        made = cls.__new__(cls)
        made._open(files)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer.of, (self.files,)

    def _open(self, files: Mapping[str, bytes]) -> None:
        from tokenizers import Tokenizer as Inner

        self.files = dict(files)
        text = self.files["tokenizer.json"].decode("utf-8")
        with in_rust("tokenizer.json"):
            self._inner = Inner.from_str(text)
            self._inner.no_truncation()
            self._inner.no_padding()
        described = json.loads(text)
        self._config = _object(self.files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
        self._vocabulary: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        if not self._vocabulary:
            raise ValueError("tokenizer.json has no tokens")
        self.vocab_size = max(self._vocabulary.values()) + 1
        self._added = {i: token.content for i, token in self._inner.get_added_tokens_decoder().items()}
        special = {i for i, token in self._inner.get_added_tokens_decoder().items() if token.special}
        self.unspoken = frozenset(special)
        known = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
        guessed = next((i for text in known if (i := self._vocabulary.get(text)) in special), None)
        self.end_of_text = self._vocabulary.get(self.special.get("eos_token", ""), guessed)
        self.start_of_text = self._vocabulary.get(self.special.get("bos_token", ""), self.end_of_text)
        model = described["model"]
        unknown = {model.get("unk_id"), self._vocabulary.get(str(model.get("unk_token")))}
        # A word that is not in the vocabulary may become the unknown one, but no text the one that ends it.
        self._control = (special - unknown) | ({self.end_of_text} - {None})
        self._by_bytes = (described.get("decoder") or {}).get("type") == "ByteLevel"

    @cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """Of a byte-level vocabulary the bytes of each token, of any other its name."""
        if not self._by_bytes:
            return {i: text.encode("utf-8") for text, i in self._vocabulary.items()}
        back = _byte_level()

        def of(text: str, i: int) -> bytes:
            plain = i in self._added or not all(character in back for character in text)
            return text.encode("utf-8") if plain else bytes(back[character] for character in text)

        return {i: of(text, i) for text, i in self._vocabulary.items()}

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self.token_bytes.items(), self.encode_plain)

    @cached_property
    def _plain(self) -> Any:
        """The same tokenizer, to which control tokens are text like any other."""
        from tokenizers import Tokenizer as Inner

        plain = Inner.from_str(self.files["tokenizer.json"].decode("utf-8"))
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True
        return plain

    def encode(self, text: str) -> list[int]:
        with in_rust("the tokenizer"):
            return self._inner.encode(text).ids

    def encode_plain(self, text: str) -> list[int]:
        with in_rust("the tokenizer"):
            encoded = self._plain.encode(text, add_special_tokens=False)
        ids: list[int] = encoded.ids
        if self._control.isdisjoint(ids):
            return ids
        # The model's own vocabulary has a control token's name as a word: it is cut after its first character.
        spans = [span for i, span in zip(ids, encoded.offsets, strict=True) if i in self._control]
        if any(end - start < 2 for start, end in spans):
            first = next(text[start:end] for start, end in spans if end - start < 2)
            raise ValueError(f"this tokenizer encodes the text {first!r} as a control token")
        edges = [0, *(start + 1 for start, _ in spans), len(text)]
        return [i for start, end in itertools.pairwise(edges) for i in self.encode_plain(text[start:end])]

    def control(self, name: str) -> int | None:
        return next((i for i, text in self._added.items() if text == name and i in self._control), None)

    @property
    def control_names(self) -> list[str]:
        """Of all control tokens."""
        return [text for i, text in self._added.items() if i in self._control]

    @cached_property
    def chat_template(self) -> str:
        """Jinja; nothing where the folder has none. Raises ValueError where that cannot be read."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode("utf-8")
        kept = _object(self.files.get("chat_template.json", b"{}"), "chat_template.json").get("chat_template")
        found = kept or self._config.get("chat_template") or ""
        if isinstance(found, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default", "")
        if not isinstance(found, str):
            raise ValueError(f"tokenizer_config.json: 'chat_template' must be text, got {found!r:.80}")
        return found

    @property
    def special(self) -> dict[str, str]:
        """bos_token, eos_token and what else the configuration names so, as a chat template asks for them."""
        given = {**_object(self.files.get("special_tokens_map.json", b"{}"), "special_tokens_map.json"), **self._config}
        named = {k: v.get("content") if isinstance(v, dict) else v for k, v in given.items() if k.endswith("_token")}
        return {name: text for name, text in named.items() if isinstance(text, str)}

    def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """Texts and names of control tokens (True), joined: as `encode` has it, but no text becomes a control token.

        Nothing is put before it. Raises ValueError.
        """
        names = sorted(self.control_names, key=len, reverse=True)
        joined = "".join(text for text, _ in parts)
        # Where the names in it are those of the parts, the tokenizer may see all of it at once.
        found = [name for name in re.findall("|".join(map(re.escape, names)) or "(?!)", joined)]
        wanted = [text for text, control in parts if control]
        if found == wanted:
            with in_rust("the tokenizer"):
                ids: list[int] = self._inner.encode(joined, add_special_tokens=False).ids
            if [i for i in ids if i in self._control] == [self.control(name) for name in wanted]:
                return ids
        apart = [[self.control(text)] if control else self.encode_plain(text) for text, control in parts]
        return [i for ids in apart for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        if self._by_bytes:
            return super().decode(ids)
        runs = [(inside, list(run)) for inside, run in itertools.groupby(ids, lambda i: int(i) in self.token_bytes)]
        with in_rust("the tokenizer"):
            return "".join(
                self._inner.decode(run, skip_special_tokens=False) if inside else UNKNOWN * len(run)
                for inside, run in runs
            )

    def bytes_of(self, token: int) -> bytes | None:
        return super().bytes_of(token) if self._by_bytes else None


class RemappedTokenizer:
    """A tokenizer over a shrunken vocabulary: old ids are mapped by the run's remapping array."""

    fingerprint = ""

    def __init__(self, inner: Tokenizer, remap: np.ndarray) -> None:
        self.inner, self.remap, self.kind = inner, remap, inner.kind
        # Several old ids may share a new one (rare tokens); the first is the one that is shown.
        ids, first = np.unique(remap, return_index=True)
        self._back = dict(zip(ids.tolist(), first.tolist(), strict=True))
        self.vocab_size = int(remap.max()) + 1
        end = inner.end_of_text
        start = inner.start_of_text
        self.end_of_text = None if end is None or end >= len(remap) else int(remap[end])
        self.start_of_text = None if start is None or start >= len(remap) else int(remap[start])
        self.unspoken = frozenset(new for new, old in self._back.items() if old in inner.unspoken)

    def _mapped(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= len(self.remap):
            raise ValueError(f"token {max(ids)} is beyond the {len(self.remap)} entries of the vocabulary map")
        return self.remap[ids].tolist() if ids else []

    def encode(self, text: str) -> list[int]:
        return self._mapped(self.inner.encode(text))

    def encode_plain(self, text: str) -> list[int]:
        return self._mapped(self.inner.encode_plain(text))

    def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        return self._mapped(self.inner.encode_parts(parts))

    def control(self, name: str) -> int | None:
        token = self.inner.control(name)
        return None if token is None or token >= len(self.remap) else int(self.remap[token])

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode([self._back.get(int(i), -1) for i in ids])

    def bytes_of(self, token: int) -> bytes | None:
        return self.inner.bytes_of(self._back.get(int(token), -1))


def remapped(tokenizer: Tokenizer, vocabulary_map: Sequence[int]) -> Tokenizer:
    """A data set's tokenizer as a run speaks it, through the map in force."""
    return RemappedTokenizer(tokenizer, np.array(vocabulary_map)) if vocabulary_map else tokenizer


def byte_counts(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of UTF-8 each id adds to a text, int64; control tokens add none.

    Where the text of an id depends on its neighbours it is taken inside a text, after another token.
    """
    before = next((i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).strip().isalpha()), None)

    def count(token: int) -> int:
        if token in tokenizer.unspoken:
            return 0
        known = tokenizer.bytes_of(token)
        if known is not None or before is None:
            return len(known or b"")
        first, both = tokenizer.decode([before]), tokenizer.decode([before, token])
        # A byte that is a token of its own is no character alone.
        return 1 if both[len(first) :] == UNKNOWN else len(both[len(first) :].encode("utf-8"))

    return np.array([count(token) for token in range(tokenizer.vocab_size)], dtype=np.int64)


@contextlib.contextmanager
def in_rust(place: str) -> Iterator[None]:
    """What a library in Rust raises, a panic too, as a ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ValueError):
        raise
    except BaseException as error:
        raise ValueError(f"{place}: {error}") from None


def _object(content: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: not a JSON object")
    return value


def _converted(folder: Path) -> bytes:
    """A tokenizer.json made of a folder's older files by transformers. Raises ValueError."""
    if not has_tokenizer(folder):
        raise ValueError(f"it has none of {', '.join(_VOCABULARIES)}")
    from transformers import AutoTokenizer

    try:
        # Nothing that the folder brings along is run.
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return made.backend_tokenizer.to_str().encode("utf-8")
    except Exception as error:  # files of all kinds, by many libraries
        raise ValueError(str(error) or type(error).__name__) from None


def _byte_level() -> dict[str, int]:
    """Character -> byte, as GPT-2's byte-level vocabularies write bytes (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(shifted)}


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has the files of a Hugging Face tokenizer."""
    return any((Path(folder) / name).is_file() for name in _VOCABULARIES)


def tokenizer_kind(folder: str | Path) -> str:
    """The kind of tokenizer that a Hugging Face folder names ("gpt2" for GPT-2's); nothing where it names none."""
    try:
        values = json.loads((Path(folder) / "tokenizer_config.json").read_text("utf-8"))
        name = str(values["tokenizer_class"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return "gpt2" if name.startswith("GPT2") else name


def tells_apart(meta: Meta, other: Meta) -> bool:
    """Whether tokens of two data sets mean different things; of those without fingerprints only the kind is known."""
    one, two = fingerprint_of(meta), fingerprint_of(other)
    return one != two if one and two else meta.tokenizer != other.tokenizer


def begins_with(tokenizer: Tokenizer, meta: Meta) -> bool:
    """Whether a tokenizer is the one that a meta names with tokens added behind its last, none of them out of text."""
    table = tokenizer.token_bytes if hasattr(tokenizer, "token_bytes") else dict(enumerate(_texts_of(tokenizer)))
    known = [(i, text) for i, text in table.items() if i < meta.tokens]
    return bool(fingerprint_of(meta)) and _fingerprint(known, tokenizer.encode_plain) == fingerprint_of(meta)


def _texts_of(tokenizer: Tokenizer) -> Iterable[bytes]:
    return (tokenizer.bytes_of(i) or b"" for i in range(tokenizer.vocab_size))


def fingerprint_of(meta: Meta) -> str:
    """What the meta says, or its characters do; nothing where neither does."""
    return meta.fingerprint or (CharTokenizer(meta.itos).fingerprint if meta.tokenizer == "char" else "")


def is_gpt2(tokenizer: Tokenizer) -> bool:
    """Whether ids mean what they mean to GPT-2, told by a few of them: its vocabulary is not at hand everywhere."""
    return all(tokenizer.bytes_of(i) == text for i, text in _GPT2.items())


_GPT2 = {262: b" the", 995: b" world", 15496: b"Hello", 50256: END_OF_TEXT.encode()}


def tiktoken_tokenizer(name: str) -> BpeTokenizer:
    """One of tiktoken's encodings. Raises ValueError where there is none, or its vocabulary cannot be had."""
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name not in known:
        raise ValueError(f"tiktoken has no encoding {name!r:.80}; there are {', '.join(known)}")
    try:
        return BpeTokenizer(tiktoken.get_encoding(name))
    except Exception as error:  # whatever tiktoken's download raises
        raise ValueError(
            f"the vocabulary of {name} cannot be had ({type(error).__name__}): tiktoken downloads it once; without "
            "network, copy its cache from another machine and name it in TIKTOKEN_CACHE_DIR"
        ) from None


def tokenizer_of(meta: Meta, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer that a data set's or a run's meta names. Raises ValueError.

    Args:
        folder: where its files are kept (keeping.kept_with_data, keeping.kept_with_run); what is there comes before
            a download. Files that are not those that the meta's fingerprint names are refused.
    """
    if meta.tokenizer == "char":
        tokenizer: Tokenizer = CharTokenizer(meta.itos)
    elif folder is not None and has_tokenizer(folder):
        tokenizer = HuggingFaceTokenizer(folder)
        tokenizer.kind = meta.tokenizer  # its form is another one, it is not
    elif meta.tokenizer == "huggingface":
        where = f"{folder}: there is no tokenizer.json" if folder is not None else "its files are not kept"
        raise ValueError(f"the tokenizer of the data set cannot be had ({where})")
    else:
        folder, tokenizer = None, tiktoken_tokenizer(meta.tokenizer.removeprefix("tiktoken:"))
    if meta.fingerprint and tokenizer.fingerprint != meta.fingerprint:
        raise ValueError(
            f"{folder or meta.tokenizer}: this is not the tokenizer that the tokens were made with "
            f"(fingerprint {tokenizer.fingerprint[:12]}, and meta says {meta.fingerprint[:12]})"
        )
    return tokenizer
