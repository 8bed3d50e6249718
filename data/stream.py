"""The token stream: a batch is a pure function of (seed, global sample index).

A .bin file is memory-mapped and cut into windows of block_size tokens; every pass visits each of its windows once, in
an order that a keyed permutation gives without storing it. Several files may be one sequence, and a mask says which
tokens the loss counts (files.py). So there is no state to save and no epoch in memory: any
sample can be asked for at any time, and the stream goes on without a gap or a repeat when batch size, accumulation
or the number of processes change. Nothing here knows torch.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import json
import pickle
import pickletools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrate.data.files import MASK, MOST_FILES, Bits, Joined, mask_of, packed
from orchestrate.data.proportions import UNITS, in_units, turns

# Far above any data set there is. More is a slip of the pen, or meant to fill the memory of who reads it.
_LARGEST_VOCABULARY = 2**24
GPT2_TOKENS = 50257
_LONGEST_META = 4 * 2**20
_LONGEST_PICKLE = 2 * 2**20
_LONGEST_MAP = 8 * 2**20
_SAMPLED = 2**16
"""Bytes."""
_FILES = {"train": ("train.bin",), "val": ("val.bin",)}
_TOKENIZERS = r"char|gpt2|huggingface|tiktoken:[\w.-]{1,80}"
_ROUNDS = 4
_EVALUATION_KEY = 0x5EED_0F_E7A1


# ---------------------------------------------------------------------------------------------- files


class TokenFile:
    """A memory-mapped file of token ids, read-only; or several, one behind the other, as one.

    Args:
        path: of the file, or of each.
        dtype: of the file, little-endian unsigned integers.
        remap: array from old token id to new one, applied to what is read.
        masked: whether a mask lies beside each file.
        row: see `Meta.row`.

    Attributes:
        mask: whether the loss counts a token, one by one; None where it counts all.

    Raises ValueError for a file that is missing, empty or no whole number of tokens, or a mask that does not fit.
    """

    def __init__(
        self,
        path: str | Path | Sequence[Path],
        dtype: str = "uint16",
        remap: np.ndarray | None = None,
        masked: bool = False,
        row: int = 1,
    ) -> None:
        self.paths = [Path(path)] if isinstance(path, (str, Path)) else list(path)
        self.path = self.paths[0]
        self.dtype = np.dtype(dtype)
        self.remap, self.row = remap, row
        maps = [self._map(path) for path in self.paths]
        self.tokens = maps[0] if len(maps) == 1 else Joined(maps)
        masks = [Bits(mask_of(path), len(part)) for path, part in zip(self.paths, maps, strict=True) if masked]
        self.mask = None if not masks else masks[0] if len(masks) == 1 else Joined(masks)
        self._fingerprint = ""

    def _map(self, path: Path) -> np.ndarray:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        if size == 0 or size % self.dtype.itemsize:
            raise ValueError(f"{path}: {size} bytes are not a whole number of {self.dtype} tokens (at least 1)")
        return np.memmap(path, dtype=self.dtype, mode="r")

    def through(self, remap: np.ndarray) -> TokenFile:
        """The same files read through a map."""
        other = copy.copy(self)
        other.remap, other._fingerprint = remap, ""
        return other

    def __len__(self) -> int:
        return len(self.tokens)

    def fingerprint(self) -> str:
        """SHA-256 over length, type and 64 evenly spaced samples of 64 KiB: cheap for a file of any size. Made once.

        The same of the mask. Where there are several files, their lengths and the beginning of each are in it too.
        """
        if self._fingerprint:
            return self._fingerprint
        digest = hashlib.sha256(f"{len(self)} {self.dtype}".encode())
        for start, stop in self._places():
            digest.update(self.tokens[start:stop].tobytes())
        if isinstance(self.tokens, Joined):
            for tokens in self.tokens.parts:
                digest.update(f"file {len(tokens)}".encode() + tokens[:_SAMPLED].tobytes())
        if self.mask is not None:
            for start, stop in self._places():
                digest.update(b"mask" + packed(self.mask[start:stop]))
            for mask in self.mask.parts if isinstance(self.mask, Joined) else ():
                digest.update(b"mask" + packed(mask[:_SAMPLED]))
        if self.remap is not None:
            digest.update(np.ascontiguousarray(self.remap).tobytes())
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def sampled(self) -> np.ndarray:
        """The ids of the evenly spaced samples, mapped. Raises ValueError for one that the map does not have."""
        return self.mapped(self.stored())

    def stored(self) -> np.ndarray:
        """The same samples as they are in the file."""
        return np.concatenate([self.tokens[start:stop] for start, stop in self._places()])

    def _places(self) -> Iterator[tuple[int, int]]:
        """64 evenly spaced pieces of 64 KiB; the whole of a short file."""
        size = _SAMPLED // self.dtype.itemsize
        last = max(0, len(self) - size)
        for start in sorted({last * i // 63 for i in range(64)}):
            yield start, start + size

    def mapped(self, ids: np.ndarray) -> np.ndarray:
        """Ids as they are in the file as the int64 ids that they are read as. Raises ValueError."""
        if self.remap is None:
            return ids.astype(np.int64)
        try:
            return self.remap[ids]
        except IndexError:
            raise ValueError(
                f"{self.path}: token id {int(ids.max())} is beyond the {len(self.remap)} entries of the vocabulary map"
            ) from None

    def require(self, block_size: int) -> None:
        """Raises ValueError when the file has not one window of block_size tokens and the token after it."""
        if len(self) < block_size + 1:
            raise ValueError(
                f"{self.path}: {len(self)} tokens are too few for block_size {block_size} (at least {block_size + 1})"
            )


@dataclass(frozen=True)
class Meta:
    """What a data folder says about its tokens. An absent meta means GPT-2 BPE, nanoGPT's convention."""

    vocab_size: int | None = None
    dtype: str = "uint16"
    tokenizer: str = "gpt2"
    """char | gpt2 | tiktoken:NAME | huggingface (then the tokenizer's files are kept, data/keeping.py)."""
    itos: tuple[str, ...] = ()
    """For tokenizer "char": the character of each id."""
    fingerprint: str = ""
    """Of the tokenizer (data/tokenizer.py); empty in folders of nanoGPT and of earlier versions."""
    files: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(_FILES), hash=False)
    """The token files of train and val, in the order in which they are read as one."""
    masks: tuple[str, ...] = ()
    """Which of train and val have a mask beside each of their files."""
    row: int = 1
    """Tokens of a row where all rows are equally long, lines or packed documents: windows of whole rows, or of whole
    parts of one, begin with one in every pass."""

    def to_json(self) -> dict[str, Any]:
        """What is as in any other folder is left out."""
        files = {} if self.files == _FILES else {"files": {name: list(names) for name, names in self.files.items()}}
        return {
            "format": 1,
            "vocab_size": self.vocab_size,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer,
            "itos": list(self.itos),
            "fingerprint": self.fingerprint,
            **files,
            **({"masks": list(self.masks)} if self.masks else {}),
            **({"row": self.row} if self.row > 1 else {}),
        }

    @property
    def tokens(self) -> int:
        """How many the tokenizer has; 0 where nothing says so.

        Data of GPT-2's tokens names no vocab_size, because models of them have it rounded up, as in nanoGPT.
        """
        return self.vocab_size or (GPT2_TOKENS if self.tokenizer == "gpt2" else 0)

    def of_tokens(self) -> Meta:
        """What the ids mean, without the files that they lie in: what a run keeps."""
        return replace(self, files=dict(_FILES), masks=(), row=1)

    @classmethod
    def from_json(cls, values: Any, place: str = "meta.json") -> Meta:
        """Raises ValueError for what is not a meta of ours."""
        if not isinstance(values, dict) or values.get("format") != 1:
            raise ValueError(f"{place}: not a meta of format 1")
        vocab_size, itos = values.get("vocab_size"), values.get("itos") or []
        if vocab_size is not None and not (type(vocab_size) is int and 1 <= vocab_size <= _LARGEST_VOCABULARY):
            raise ValueError(
                f"{place}: vocab_size must be a whole number from 1 to {_LARGEST_VOCABULARY}, got {vocab_size!r:.80}"
            )
        if values.get("dtype", "uint16") not in ("uint8", "uint16", "uint32"):
            raise ValueError(f"{place}: dtype must be uint8, uint16 or uint32, got {values.get('dtype')!r}")
        tokenizer, fingerprint = values.get("tokenizer"), values.get("fingerprint", "")
        if not isinstance(tokenizer, str) or not re.fullmatch(_TOKENIZERS, tokenizer):
            raise ValueError(
                f"{place}: tokenizer must be char, gpt2, tiktoken:NAME or huggingface, got {tokenizer!r:.80}"
            )
        if not isinstance(itos, list) or not _are_texts(itos):
            raise ValueError(f"{place}: itos must be a list of texts")
        if not isinstance(fingerprint, str) or not re.fullmatch("([0-9a-f]{64})?", fingerprint):
            raise ValueError(f"{place}: fingerprint must be 64 hexadecimal digits, got {fingerprint!r:.80}")
        files, masks = values.get("files", {}), values.get("masks", [])
        if not isinstance(files, dict) or not set(files) <= set(_FILES) or not all(map(_are_names, files.values())):
            raise ValueError(
                f"{place}: files must give under train and val the names of token files beside it, each ending in "
                f".bin, at most {MOST_FILES} and none twice, got {files!r:.80}"
            )
        if not isinstance(masks, list) or not all(isinstance(name, str) and name in _FILES for name in masks):
            raise ValueError(f"{place}: masks must be a list of train or val, got {masks!r:.80}")
        row = values.get("row", 1)
        if type(row) is not int or not 1 <= row <= 2**32:
            raise ValueError(f"{place}: row must be a whole number from 1 to {2**32}, got {row!r:.80}")
        files = {**_FILES, **{name: tuple(names) for name, names in files.items()}}
        if set(files["train"]) & set(files["val"]):
            raise ValueError(f"{place}: files: a file is named for train and for val")
        dtype = values.get("dtype", "uint16")
        return cls(vocab_size, dtype, tokenizer, tuple(itos), fingerprint, files, tuple(masks), row)


def _are_names(names: Any) -> bool:
    """Whether these are names of token files in the folder itself."""
    return (
        isinstance(names, list)
        and 1 <= len(names) <= MOST_FILES
        and all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,200}\.bin", name) for name in names)
        and not any(name.endswith(MASK) for name in names)
        and len(set(names)) == len(names)
    )


def _are_texts(values: Iterable[Any]) -> bool:
    """Whether all can be written as UTF-8: half a surrogate pair is no text."""
    try:
        "".join(values).encode("utf-8")
    except (TypeError, UnicodeEncodeError):
        return False
    return True


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, texts and numbers; a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


# The instructions that make dictionaries, lists, tuples, texts, numbers, true, false and none.
_PLAIN = set(
    "PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE INT BININT "
    "BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE EMPTY_DICT DICT SETITEM SETITEMS "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3".split()
)


def _unpickled(content: bytes) -> Any:
    """The plain value of a pickle. Raises ValueError, or what a broken pickle raises.

    The instructions are looked at first: one of them alone can ask for memory without end.
    """
    for instruction, argument, _ in pickletools.genops(content):
        if instruction.name in ("GLOBAL", "STACK_GLOBAL"):
            break  # what it names is where reading it ends
        if instruction.name not in _PLAIN:
            raise ValueError(f"it holds more than plain values ({instruction.name})")
        if instruction.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(content):
            raise ValueError(f"it numbers a value {argument}")
    return _PlainUnpickler(io.BytesIO(content)).load()


def read_file(path: Path, limit: int) -> bytes:
    """Raises ValueError for a file of more than `limit` bytes."""
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path}: longer than {limit:,} bytes")
    return content


def read_meta(folder: Path) -> Meta:
    """meta.json, else nanoGPT's meta.pkl (read without running anything in it), else GPT-2 BPE. Raises ValueError."""
    path = folder / "meta.json"
    if path.exists():
        content = read_file(path, _LONGEST_META)
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        return Meta.from_json(values, str(path))
    path = folder / "meta.pkl"
    if not path.exists():
        return Meta()
    content = read_file(path, _LONGEST_PICKLE)
    try:
        values = _unpickled(content)
    except Exception as error:  # a broken pickle can raise nearly anything
        raise ValueError(f"{path}: not a plain nanoGPT meta.pkl ({error})") from None
    size = values.get("vocab_size") if isinstance(values, dict) else None
    if type(size) is not int or not 1 <= size <= _LARGEST_VOCABULARY:
        raise ValueError(f"{path}: needs a vocab_size from 1 to {_LARGEST_VOCABULARY}")
    itos = values.get("itos")
    if not isinstance(itos, dict):
        return Meta(size)
    if not _are_texts(itos.values()):
        raise ValueError(f"{path}: itos must hold texts")
    return Meta(size, tokenizer="char", itos=tuple(itos.get(i, "\ufffd") for i in range(size)))


@dataclass(frozen=True)
class DataSet:
    """A data folder: train.bin, val.bin and what they mean."""

    train: TokenFile
    val: TokenFile
    meta: Meta
    name: str = ""

    @property
    def folder(self) -> Path:
        return self.train.path.parent

    def fingerprint(self) -> dict[str, str]:
        return {"train": self.train.fingerprint(), "val": self.val.fingerprint()}

    def remapped(self, new_ids: np.ndarray | None) -> DataSet:
        """The same files read through another map, from the ids that they are read as now to new ones."""
        if new_ids is None:
            return self

        def through(file: TokenFile) -> TokenFile:
            if file.remap is not None and file.remap.max() >= len(new_ids):
                last = f"{len(new_ids)} entries of the vocabulary map"
                raise ValueError(f"{file.path}: token id {file.remap.max()} is beyond the {last}")
            remap = new_ids if file.remap is None else new_ids[file.remap]
            return file.through(remap)

        return replace(self, train=through(self.train), val=through(self.val))


def find_folder(name: str) -> Path:
    """The folder of a data set: data/NAME of the project, else NAME as a path, else data/NAME where one works."""
    return next((place for place in _places(name) if place.is_dir()), Path(name))


def _places(name: str) -> list[Path]:
    """Where a data set may be, in the order in which they are looked at."""
    return [Path(__file__).parent / name, Path(name), Path("data") / name]


def open_data(name: str, block_size: int, remap: np.ndarray | None = None) -> DataSet:
    """Open a data set by its name under data/ or by its path. Raises ValueError with what is missing."""
    folder = find_folder(name)
    meta = read_meta(folder)
    missing = [file for files in meta.files.values() for file in files if not (folder / file).exists()]
    if missing:
        script = folder / "prepare.py"
        how = f"make them with: python data/{name}/prepare.py" if script.exists() else "a data set has both"
        where = folder if folder.is_dir() else " or ".join(str(place) for place in dict.fromkeys(_places(name)))
        what = "train.bin and val.bin" if meta.files == _FILES else f"{missing[0]} (meta.json names it)"
        raise ValueError(f"dataset {name}: no {what} in {where}; {how}")

    def opened(split: str) -> TokenFile:
        paths = [folder / file for file in meta.files[split]]
        stray = [mask_of(path) for path in paths if split not in meta.masks and mask_of(path).exists()]
        if stray:
            raise ValueError(f"{stray[0]}: a mask that meta.json does not name (masks)")
        return TokenFile(paths, meta.dtype, remap, split in meta.masks, meta.row)

    data = DataSet(opened("train"), opened("val"), meta, name)
    data.train.require(block_size)
    data.val.require(block_size)
    return data


def read_remap(path: str | Path, old_size: int | None, new_size: int) -> np.ndarray:
    """A vocabulary remapping: .npy or .json array of new ids by old id, all in [0, new_size). Raises ValueError."""
    try:
        if str(path).endswith(".json"):
            array = np.array(json.loads(read_file(Path(path), _LONGEST_MAP)))
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a broken .npy can raise nearly anything
        raise ValueError(f"vocab_remapping_file {path}: not a readable .npy or .json array ({error})") from None
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
        raise ValueError(f"vocab_remapping_file {path}: must be one list of whole numbers")
    if len(array) > _LARGEST_VOCABULARY:
        raise ValueError(f"vocab_remapping_file {path}: at most {_LARGEST_VOCABULARY} entries, got {len(array)}")
    if array.min() < 0 or array.max() >= new_size:
        raise ValueError(
            f"vocab_remapping_file {path}: new ids go from {array.min()} to {array.max()}, "
            f"allowed 0 to {new_size - 1} (shrunken_vocab_size {new_size})"
        )
    if old_size is not None and len(array) < old_size:
        raise ValueError(f"vocab_remapping_file {path}: {len(array)} entries for a vocabulary of {old_size}")
    return array.astype(np.int64)


# ---------------------------------------------------------------------------------------------- the order of windows


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit reaches every output bit. uint64, wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _keys(seed: int, number: int) -> np.ndarray:
    """Round keys of the permutation of one pass, and one more word for its phase; (_ROUNDS + 1,) uint64."""
    counter = np.arange(1, _ROUNDS + 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    start = _mix(np.array([seed & (2**64 - 1)], dtype=np.uint64) + np.uint64(0x632BE59BD9B4E019))
    return _mix(_mix(start ^ np.uint64(number)) + counter)


def unit_float(seed: int, number: int) -> float:
    """A number in [0, 1) that follows from the two."""
    return float(_keys(seed, number)[-1] >> np.uint64(11)) * 2.0**-53


def permute(index: np.ndarray, n: int, seed: int, number: int) -> np.ndarray:
    """A bijection of range(n), keyed by (seed, number): the images of `index`, int64.

    A balanced Feistel network on the smallest even number of bits that holds n; an image outside range(n) is sent
    through again (cycle walking, Black and Rogaway 2002), fewer than four times on average.
    """
    if n == 1:
        return np.zeros_like(index)
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = _keys(seed, number)
    size = np.uint64(n)
    values = _feistel(index.astype(np.uint64), half, mask, keys)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], half, mask, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, mask: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = values >> half, values & mask
    for key in keys[:_ROUNDS]:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def windows_per_pass(n_tokens: int, block_size: int) -> int:
    """How many windows one pass has: as many as fit behind any phase, at least one."""
    return max(1, (n_tokens - block_size) // block_size)


def window_starts(seed: int, first: int, count: int, n_tokens: int, block_size: int, row: int = 1) -> np.ndarray:
    """First tokens of samples first .. first + count - 1, (count,) int64; each window and the token after it fit.

    Pass p shifts its grid of windows by a phase in [0, block_size), 0 in the first, so that a data set seen many times
    is cut differently each time; the phase is of whole rows of so many tokens. At most block_size tokens at the two
    ends are left out of a pass.
    """
    n = windows_per_pass(n_tokens, block_size)
    samples = np.arange(first, first + count, dtype=np.int64)
    passes = samples // n
    row = 1 if block_size % row and row % block_size else row
    starts = np.empty(count, dtype=np.int64)
    for number in range(first // n, (first + count - 1) // n + 1):
        here = passes == number
        phases = -(-min(block_size, n_tokens - n * block_size) // row)
        phase = row * int(_keys(seed, number)[-1] % np.uint64(phases)) if number else 0
        starts[here] = phase + block_size * permute(samples[here] - number * n, n, seed, number)
    return starts


def eval_windows(tokens: TokenFile, count: int, block_size: int) -> np.ndarray:
    """First tokens of the windows of an evaluation: fixed, never one twice; a larger count extends a smaller one's."""
    n = max(1, (len(tokens) - 1) // block_size)
    return block_size * permute(np.arange(min(count, n), dtype=np.int64), n, _EVALUATION_KEY, 0)


def within(ids: np.ndarray, vocab_size: int, place: str | Path) -> None:
    """Raises ValueError where an id is not below vocab_size."""
    if len(ids) and (largest := int(ids.max())) >= vocab_size:
        raise ValueError(f"{place}: token id {largest} is beyond the model's vocabulary of {vocab_size}")


def gather(
    tokens: TokenFile, starts: np.ndarray, block_size: int, vocab_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(x, y), each (len(starts), block_size) int64: the windows and, one further, what follows each token.

    A target that the file's mask leaves out is -1.
    Raises ValueError for an id that the file's map or a model with vocab_size ids does not have.
    """
    places = starts[:, None] + np.arange(block_size + 1)
    windows = tokens.mapped(tokens.tokens[places])
    if vocab_size is not None:
        within(windows, vocab_size, tokens.path)
    x, y = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
    return x, y if tokens.mask is None else np.where(tokens.mask[places[:, 1:]], y, -1)


@dataclass(frozen=True)
class Source:
    """A data set's part in a mixture: its weight, and how far its own samples have been drawn."""

    name: str
    units: int
    """Of UNITS samples from here on so many are of it (data/proportions.py)."""
    sample: int = 0
    """Index of its next sample, in its own order, counted as `Cursor.sample` is."""
    debt: int = 0
    """By how much it is behind its share, in units; negative where it is ahead."""


@dataclass(frozen=True)
class Cursor:
    """A place in the training stream: which sample comes next, among windows that are cut into pieces.

    It means the same wherever it goes, because it holds the units that it counts in, and of a mixture the weights in
    force and the place in each source. It moves by `skip`, `cut` and `mixed` only.
    """

    block_size: int
    """Tokens in a window."""
    length: int
    """Tokens in a sample; it divides block_size."""
    sample: int = 0
    """Index of the next sample, counted in pieces of `length` tokens over all passes."""
    sources: tuple[Source, ...] = ()
    """Of a mixture; () where all samples so far were, and the next are, of one data set."""

    @property
    def pieces(self) -> int:
        """Samples in a window."""
        return self.block_size // self.length

    def turns(self, count: int) -> np.ndarray:
        """Which of `sources` each of the next `count` samples is of, (count,) int64."""
        return turns(
            tuple(source.units for source in self.sources), tuple(source.debt for source in self.sources), count
        )

    def skip(self, samples: int) -> Cursor:
        """So many samples further on."""
        further = replace(self, sample=self.sample + samples)
        if not self.sources:
            return further
        drawn = np.bincount(self.turns(samples), minlength=len(self.sources)).tolist()
        moved = (
            replace(source, sample=source.sample + n, debt=source.debt + samples * source.units - n * UNITS)
            for source, n in zip(self.sources, drawn, strict=True)
        )
        return replace(further, sources=tuple(moved))

    def cut(self, block_size: int, length: int) -> Cursor:
        """The same place in other units: nothing seen comes again, of any source.

        A window that is cut into pieces is finished first, so less than one window is left out. Another block_size
        has another order of windows: the stream goes on at the same share of the data.
        """
        if (block_size, length) == (self.block_size, self.length):
            return self

        def moved(sample: int) -> int:
            windows = -(-sample // self.pieces)
            if block_size != self.block_size:
                windows = -(-windows * self.block_size // block_size)
            return windows * (block_size // length)

        sources = tuple(replace(source, sample=moved(source.sample)) for source in self.sources)
        return Cursor(block_size, length, moved(self.sample), sources)

    def mixed(self, weights: Mapping[str, float], only: str) -> Cursor:
        """The same place, from which on the samples are of these sources in these shares: each goes on where it was.

        What a source is behind or ahead is made up under the new weights, unless a source comes or goes: then all
        begin anew. So weights may move at every step without anybody losing by the rounding.

        Args:
            only: the data set that all samples were of, where there was no mixture yet.
        """
        if not self.sources and weights.keys() == {only}:
            return self
        before = {source.name: source for source in self.sources or (Source(only, UNITS, self.sample),)}
        names = list(dict.fromkeys([*before, *weights]))
        units = in_units([weights.get(name, 0.0) for name in names])
        there = [before.get(name, Source(name, 0)) for name in names]
        stays = all(bool(source.units) == bool(unit) for source, unit in zip(there, units, strict=True))
        sources = tuple(
            Source(source.name, unit, source.sample, source.debt if stays else 0)
            for source, unit in zip(there, units, strict=True)
        )
        return replace(self, sources=sources)


@dataclass(frozen=True)
class Stream:
    """The training samples of a file in the order of a seed. Holds no position: ask for any sample at any time."""

    tokens: TokenFile
    seed: int

    @property
    def masks(self) -> bool:
        """Whether targets may be -1, which do not count. Where none ever is, nobody looks for them."""
        return self.tokens.mask is not None

    def batch(self, cursor: Cursor, count: int, vocab_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` samples from a place on, as (x, y), each (count, cursor.length) int64; as `gather` does it.

        The order is one of windows of block_size tokens; shorter samples are their pieces in turn, so the tokens of
        the stream come in the same order whatever the length.
        """
        first, block_size, pieces = cursor.sample, cursor.block_size, cursor.pieces
        if pieces == 1:
            starts = self._starts(first, count, block_size)
        else:
            samples = np.arange(first, first + count, dtype=np.int64)
            window, piece = samples // pieces, samples % pieces
            low = int(window[0])
            starts = self._starts(low, int(window[-1]) - low + 1, block_size)
            starts = starts[window - low] + piece * cursor.length
        return gather(self.tokens, starts, cursor.length, vocab_size)

    def _starts(self, first: int, count: int, block_size: int) -> np.ndarray:
        """First tokens of the windows first .. first + count - 1 of the order, (count,) int64."""
        return window_starts(self.seed, first, count, len(self.tokens), block_size, self.tokens.row)

    def passes(self, cursor: Cursor) -> float:
        """How often the data set has been seen up to a place."""
        return cursor.sample / cursor.pieces / windows_per_pass(len(self.tokens), cursor.block_size)

    def coverage(self, cursor: Cursor) -> float:
        """The share of the data set's windows seen at least once."""
        return min(1.0, self.passes(cursor))
