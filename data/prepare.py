"""What the prepare.py scripts share: options, a checked download, and token files made of texts.

`prepare` reads documents (corpus.py), encodes them in many processes, and writes train.bin, val.bin, meta.json and the
tokenizer's files. The same input gives the same bytes for any number of workers, and after an interruption: what was
encoded lies in shards, each whole or absent, in a folder named after the content that was read and the tokenizer.
train.bin, or the first of its files, is written last, so a folder that has it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from orchestrate.data import corpus
from orchestrate.data.conversations import END, START, Document, Span, encode
from orchestrate.data.files import MOST_FILES, mask_of, packed
from orchestrate.data.hub import Hub, fetch
from orchestrate.data.keeping import for_conversations, kept_with_data, of_data, save
from orchestrate.data.packing import Packer
from orchestrate.data.stream import Meta, find_folder
from orchestrate.data.tokenizer import (
    END_OF_TEXT,
    CharTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    has_tokenizer,
    tiktoken_tokenizer,
)

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_MOST_SOURCES = 10_000
"""Files that a meta.json names one by one."""
_ENTRY = np.dtype([("document", "<u8"), ("tokens", "<u8"), ("ends", "?"), ("source", "u1")])
"""A line of a shard's index: a document, or a piece of one."""


@dataclass(frozen=True)
class Reading:
    """How documents are had from files."""

    key: str = "text"
    """Of a JSON line or a parquet column that holds a text."""
    separator: str = ""
    """What stands between the documents of a text file; nothing where a file is one."""
    render: Callable[[dict[str, Any]], Document] | None = None
    """Makes a document of a whole record; then it is a conversation, and its mask is kept."""
    sources: tuple[str, ...] = ("",)
    """Names of what `render` tells apart."""

    def scan(self, path: str) -> tuple[corpus.Source, list[corpus.Part]]:
        return corpus.scan(path, "" if self.render else self.key, self.separator)

    def documents(self, part: corpus.Part) -> Iterator[tuple[list[Span], int, bool, int]]:
        """(spans, number made of the content, whether the document ends here, its source). Raises ValueError."""
        if self.render is None:
            for text in corpus.texts(part, self.key):
                yield [Span(text.text)], text.document, text.ends, 0
            return
        for place, record, number in corpus.records(part):
            try:
                found, source = self.render(record)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            yield found, number, True, self.sources.index(source)

    def texts(self, part: corpus.Part) -> Iterator[str]:
        for found, *_ in self.documents(part):
            yield "".join(span.text for span in found if not span.control)

    def facts(self) -> dict[str, Any]:
        return {"key": self.key} if self.render is None else {"template": "conversations"}


TEXTS = Reading()


def options(description: str, default_out: Path, tokenizer: str = "char") -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", type=Path, nargs="+", default=[], help="texts of your own: files, or folders of them"
    )
    parser.add_argument("--out", type=Path, default=default_out, help="folder for train.bin, val.bin, meta.json")
    parser.add_argument(
        "--tokenizer",
        default=tokenizer,
        help="char | gpt2 or another tiktoken encoding | train:SIZE | a Hugging Face folder | a data set, for its "
        f"tokenizer (default {tokenizer})",
    )
    parser.add_argument("--limit", type=int, default=0, help="only the first so many documents; 0: all")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes")
    parser.add_argument(
        "--shard_tokens",
        type=int,
        default=0,
        help="tokens of each file: train_00000.bin and so on, which are read as one; 0: train.bin and val.bin",
    )
    return parser


def packing_options(parser: argparse.ArgumentParser) -> None:
    """Options of sets of many documents."""
    parser.add_argument(
        "--pack", choices=("none", "best-fit"), default="none", help="best-fit: whole documents in rows, with a mask"
    )
    parser.add_argument("--pack_length", type=int, default=1024, help="tokens of a row: the block_size (default 1024)")


def prepared(given: argparse.Namespace, inputs: Sequence[str | Path], *, fetched: bool = False, **how: Any) -> None:
    """`prepare` as the command line says it, and `how`; inputs that were fetched go. Raises ValueError."""
    asked = {name: getattr(given, name) for name in ("limit", "workers", "shard_tokens")}
    asked["pack_length"] = given.pack_length if getattr(given, "pack", "none") == "best-fit" else 0
    prepare(inputs, given.out, given.tokenizer, **(asked | how))
    if fetched:
        shutil.rmtree(given.out / DOWNLOAD, ignore_errors=True)


def prepare_own(parser: argparse.ArgumentParser, what: str, reading: Callable[[argparse.Namespace], Reading]) -> None:
    """The main of a script for files of one's own, with the options it has besides. Raises ValueError."""
    packing_options(parser)
    parser.add_argument("--val", type=float, default=0.1, help=f"share of the {what} for validation (default 0.1)")
    given = parsed(parser)
    if not given.input:
        raise ValueError(f"--input: files or folders of {what} are needed")
    prepared(given, given.input, reading=reading(given), val=given.val)


def prepare_texts(description: str, folder: Path, hub: Hub, *, val: float, separator: str = "") -> None:
    """The main of a script for texts of the hub, or local files of the same form. Raises ValueError."""
    parser = options(description, folder, tokenizer="gpt2")
    packing_options(parser)
    hub_options(parser, hub)
    given = parsed(parser)
    hub = replace(hub, name=given.dataset, subset=given.subset, revision=given.revision)
    inputs = given.input or fetch(hub, given.out / DOWNLOAD, given.limit)
    reading = Reading(separator=separator)
    prepared(given, inputs, fetched=not given.input, reading=reading, val=val, facts=hub.facts())


def prepare_shakespeare(description: str, folder: Path, tokenizer: str) -> None:
    """The main of the scripts for Tiny Shakespeare. Raises ValueError."""
    given = parsed(options(description, folder, tokenizer))
    inputs = given.input or [download(SHAKESPEARE_URL, SHAKESPEARE_SHA256, given.out / "input.txt")]
    original = all([is_original(path, SHAKESPEARE_SHA256) for path in inputs])
    facts = {"source": SHAKESPEARE_URL, "licence": "public domain"} if original else {}
    prepared(given, inputs, facts=facts)


def weights_of(given: Sequence[str], sources: Sequence[str]) -> list[float]:
    """Weights as --weights names them, 1 for what is not named. Raises ValueError."""
    found = dict.fromkeys(sources, 1.0)
    for text in given:
        name, _, value = text.partition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if name not in found or not 0 <= weight <= 100:
            raise ValueError(
                f"--weights {text}: SOURCE=WEIGHT with one of {', '.join(sources)} and a number from 0 to 100"
            )
        found[name] = weight
    if not any(found.values()):
        raise ValueError("--weights: at least one must be above 0")
    return list(found.values())


DOWNLOAD = "download"
"""Where what was fetched lies until the data set is whole."""


def hub_options(parser: argparse.ArgumentParser, hub: Hub) -> None:
    """Options of a script that reads from the hub where no --input is given."""
    parser.add_argument("--dataset", default=hub.name, help=f"name or folder for load_dataset (default {hub.name})")
    parser.add_argument("--subset", default=hub.subset, help=f"of the data set (default {hub.subset})")
    parser.add_argument("--revision", default=hub.revision, help="commit or branch of the data set on the hub")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line. Raises ValueError."""
    arguments = parser.parse_args()
    if arguments.workers < 1 or arguments.limit < 0 or arguments.shard_tokens < 0:
        raise ValueError("--workers must be at least 1, --limit and --shard_tokens at least 0")
    return arguments


def run(main: Callable[[], None]) -> None:
    """Run a script's main; bad input is one message on standard error and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def is_original(path: Path, sha256: str) -> bool:
    """Whether a file is the text of this checksum. If not, that is said: a text of one's own is welcome. OSError."""
    if not path.is_file():  # a folder, or what is told later
        return False
    if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return True
    print(f"note: {path} is not the original text (another SHA-256); it is used as it is")
    return False


def download(url: str, sha256: str, path: Path) -> Path:
    """A text from the network, kept at `path` once its checksum is right. Raises ValueError."""
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            raw = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"{url}: cannot be downloaded ({error}); give a local copy with --input FILE") from None
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise ValueError(f"{url}: SHA-256 is {found}, expected {sha256}; nothing was written")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, raw)
    return path


# ---------------------------------------------------------------------------------------------- files


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def dtype_of(vocab_size: int) -> str:
    """The type of a token file: uint16 where the vocabulary fits."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_tokens(path: Path, ids: Sequence[int] | np.ndarray, vocab_size: int) -> None:
    """Write token ids, whole or not at all."""
    write_whole(path, np.asarray(ids).astype(dtype_of(vocab_size)).tobytes())


def write_meta(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    files: Mapping[str, Sequence[str]] | None = None,
    masks: Sequence[str] = (),
    row: int = 1,
    **facts: Any,
) -> None:
    """meta.json, and the tokenizer's files beside it; what cannot be kept is said. `facts` say how it was made."""
    kept = kept_with_data(folder)
    shutil.rmtree(kept, ignore_errors=True)
    characters = tokenizer.itos if isinstance(tokenizer, CharTokenizer) else ()
    if not characters:
        try:
            save(tokenizer, kept)
        except ValueError as error:
            print(f"note: {error}; the tokenizer is known by its name alone, and not kept with the data")
    # No vocabulary size of GPT-2's: models for its tokens have it rounded up, as in nanoGPT.
    size = None if tokenizer.kind == "gpt2" else tokenizer.vocab_size
    dtype, kind = dtype_of(tokenizer.vocab_size), tokenizer.kind
    meta = Meta(size, dtype, kind, characters, tokenizer.fingerprint, masks=tuple(masks), row=row)
    meta = replace(meta, files={name: tuple(names) for name, names in files.items()}) if files else meta
    write_whole(folder / "meta.json", json.dumps(meta.to_json() | facts, ensure_ascii=False).encode("utf-8"))


# ---------------------------------------------------------------------------------------------- processes


_worker: dict[str, Any] = {}


def _begin(tokenizer: Tokenizer | None) -> None:
    """What a worker does first. One whose parent was killed ends too; Ctrl-C is the parent's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker["tokenizer"] = tokenizer


@contextlib.contextmanager
def _mapping(workers: int, tokenizer: Tokenizer | None = None) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over so many processes that have the tokenizer, its results in order."""
    if workers == 1:
        _worker["tokenizer"] = tokenizer
        yield map
        return
    # spawn, not fork: tokenizers hold threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(tokenizer,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _characters(unit: list[corpus.Part], reading: Reading) -> str:
    return "".join(sorted(set().union(*(set(text) for part in unit for text in reading.texts(part)))))


def _encode(numbered: tuple[int, list[corpus.Part]], reading: Reading, folder: Path) -> None:
    """Encode a unit into a shard: its tokens and their mask, and then its index, which says that it is whole."""
    number, unit = numbered
    path, tokenizer = folder / f"{number:06d}.bin", _worker["tokenizer"]
    if path.with_suffix(".npy").exists():
        return
    tokens, masks, entries = [np.zeros(0, np.uint32)], [np.zeros(0, bool)], []
    for part in unit:
        for spans, document, ends, source in reading.documents(part):
            try:
                ids, counts = encode(tokenizer, spans)
            except ValueError as error:
                raise ValueError(f"{part.path}: {error}") from None
            if ends and tokenizer.end_of_text is not None:
                # Nobody waits for the end of a conversation: what the assistant says has an end of its own.
                ids, counts = [*ids, tokenizer.end_of_text], [*counts, reading.render is None]
            tokens.append(np.array(ids, dtype=np.uint32))
            masks.append(np.array(counts, dtype=bool))
            entries.append((document, len(ids), ends, source))
    write_tokens(path, np.concatenate(tokens), tokenizer.vocab_size)
    if reading.render:
        write_whole(path.with_suffix(".mask"), np.concatenate(masks).tobytes())
    temporary = path.with_suffix(f".{os.getpid()}.npy")
    np.save(temporary, np.array(entries, dtype=_ENTRY))
    os.replace(temporary, path.with_suffix(".npy"))


# ---------------------------------------------------------------------------------------------- prepare


def prepare(
    inputs: Sequence[str | Path],
    out: Path,
    tokenizer: str | Tokenizer,
    *,
    reading: Reading = TEXTS,
    val: float = 0.1,
    limit: int = 0,
    limit_each: int = 0,
    workers: int = 1,
    pack_length: int = 0,
    shard_tokens: int = 0,
    weights: Sequence[float] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Make a data set of texts. Raises ValueError with the place of what is wrong.

    A document is for validation or for training as a whole, by a hash of its content, so one that is there twice is
    never on both sides. Where all documents are one, its last part is for validation.

    Args:
        inputs: files and folders of them.
        tokenizer: as --tokenizer names it, or the tokenizer itself.
        val: the share of the documents that is for validation.
        limit: only the first so many documents; 0: all.
        limit_each: the same of each file.
        pack_length: tokens of the rows that documents are packed into (packing.py); 0: they follow each other.
        shard_tokens: tokens of each file, the last of train and of val excepted; 0: one file of each.
        weights: how often a document of each of the reading's sources is for training, 1 where none are given; of a
            fraction so many of the documents, chosen by a hash of their content. For validation each is there once,
            unless its weight is 0.
        facts: what meta.json says besides.
    """
    if not 0 < val < 1:
        raise ValueError(f"--val must be above 0 and below 1, got {val}")
    if pack_length < 0 or pack_length == 1:
        raise ValueError(f"--pack_length must be at least 2, got {pack_length}")
    sources, parts = [], []
    with _mapping(workers) as mapped:
        paths = corpus.find(inputs)
        for source, found in tqdm(mapped(reading.scan, paths), "read", len(paths), disable=None):
            sources.append(source)
            parts += corpus.limited(found, limit_each)
            if 0 < limit <= sum(part.documents for part in parts):
                break
    parts = list(corpus.limited(parts, limit))
    units = corpus.units(parts)
    asked = {"read": [[{**asdict(part), "path": ""} for part in unit] for unit in units]}
    asked |= {"render": getattr(reading.render, "__name__", ""), **reading.facts()}
    folder = out / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, str):
        several = sum(part.documents for part in parts) > 1
        tokenizer = _named(tokenizer, units, reading, folder / f"tokenizer-{_hash(asked)}", workers, several)
    tokenizer = for_conversations(tokenizer) if reading.render else tokenizer
    if pack_length and tokenizer.end_of_text is None:
        raise ValueError("--pack: the tokenizer has no token that ends a text, which fills the rows")
    asked |= {"tokenizer": tokenizer.fingerprint, "end": tokenizer.end_of_text}
    shards = folder / f"encoded-{_hash(asked)}"
    for path in folder.iterdir():
        if path.name.startswith("encoded-") and path != shards:
            print(f"note: {path} is removed: it is of another input or tokenizer")
            shutil.rmtree(path)
    shards.mkdir(exist_ok=True)
    sizes = [sum(part.size for part in unit) for unit in units]
    with (
        _mapping(workers, tokenizer) as mapped,
        tqdm(None, "encode", sum(sizes), unit="B", unit_scale=True, disable=None) as bar,
    ):
        done = mapped(partial(_encode, reading=reading, folder=shards), enumerate(units))
        for size, _ in zip(sizes, done, strict=True):
            bar.update(size)
    for source in sources:
        source.check()
    if tokenizer.end_of_text is None and sum(part.documents for part in parts) > 1:
        print("note: the tokenizer has no token that ends a text: documents follow each other without a mark")
    counts = _join(
        [shards / f"{number:06d}.bin" for number in range(len(units))],
        out,
        tokenizer,
        _Split(val, reading, tuple(weights) or (1.0,) * len(reading.sources), pack_length, shard_tokens),
        {
            **(reading.facts() if reading.render is None else {}),
            "limit": limit or limit_each,
            "sources": _described(sources),
            **(facts or {}),
        },
    )
    for path in (*folder.glob("encoded-*"), *folder.glob("tokenizer-*")):
        shutil.rmtree(path)
    with contextlib.suppress(OSError):  # somebody else's files are in it
        folder.rmdir()
    end = "" if shard_tokens else ".bin"
    print(
        f"{counts['documents']:,} document{'s' * (counts['documents'] != 1)}, vocabulary of {tokenizer.vocab_size:,}; "
        f"train{end} {counts['train']:,} tokens, val{end} {counts['val']:,} tokens, in {out}"
    )


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _described(sources: Sequence[corpus.Source]) -> Any:
    each = [source.to_json() for source in sources]
    return each if len(each) <= _MOST_SOURCES else {"files": len(each), "sha256_of_list": _hash(each)}


@dataclass(frozen=True)
class _Split:
    """How documents become the files of training and of validation."""

    val: float
    reading: Reading
    weights: tuple[float, ...]
    pack_length: int
    shard_tokens: int

    def held(self, hashes: np.ndarray) -> np.ndarray:
        """Which of these different documents are for validation; of several at least one is not, and one is."""
        chosen = hashes[hashes < np.uint64(min(int(self.val * 2**64), 2**64 - 1))]
        if not len(chosen):
            return hashes[:1]
        return hashes[:-1] if len(chosen) == len(hashes) else chosen

    def copies(self, index: np.ndarray) -> np.ndarray:
        """How often each entry is for training."""
        weights = np.array(self.weights)[index["source"]]
        # Other bits than those that hold a document back for validation.
        chance = (index["document"] & np.uint64(2**32 - 1)) / 2**32
        return np.floor(weights).astype(np.int64) + (chance < weights % 1)


class _Side:
    """One of train and val while it is written: token ids, and a mask where there is one, in files of a name for now.

    Raises ValueError for more files than a data set may have.
    """

    def __init__(self, out: Path, name: str, dtype: str, masked: bool, packer: Packer | None, most: int) -> None:
        self.out, self.name, self.dtype, self.masked, self.packer = out, name, dtype, masked, packer
        self.most = most
        """Tokens of a file; 0: any number."""
        self.names: list[str] = []
        self.tokens = self.targets = 0
        self._opened = contextlib.ExitStack()
        self._begin()

    def _begin(self) -> None:
        """Open the next file, and its mask."""
        if len(self.names) == MOST_FILES:
            raise ValueError(f"--shard_tokens {self.most}: a data set has at most {MOST_FILES} files of {self.name}")
        self.names.append(f"{self.name}_{len(self.names):05d}.bin" if self.most else f"{self.name}.bin")
        path = self.out / self.names[-1]
        self._files: list[BinaryIO] = [
            self._opened.enter_context(open(temporary_of(file), "wb"))  # noqa: SIM115 - closed with the others
            for file in (path, mask_of(path))[: 1 + self.masked]
        ]
        self._left, self._bits = self.most, np.zeros(0, bool)

    def add(self, ids: np.ndarray, counts: np.ndarray, sizes: np.ndarray, ends: np.ndarray) -> None:
        """Documents one behind the other, of these sizes; a piece of one where it does not end."""
        if self.packer is None:
            self._write(ids, counts)
            return
        stops = np.cumsum(sizes).tolist()
        for start, stop, end in zip([0, *stops], stops, ends.tolist(), strict=False):
            for row in self.packer.push(ids[start:stop], counts[start:stop], end):
                self._write(*row)

    def finish(self) -> None:
        """Write what waits, and close the files."""
        if self.packer is not None:
            for row in self.packer.flush():
                self._write(*row)
            # The token behind the last row, which a window of the whole row looks at.
            self._write(np.array([self.packer.padding], dtype=self.dtype), np.zeros(1, bool))
        self._end()

    def close(self) -> None:
        """Close the files as they are."""
        self._opened.close()

    def _end(self) -> None:
        if self.masked:
            self._files[1].write(packed(self._bits))
        self.close()

    def _write(self, ids: np.ndarray, counts: np.ndarray) -> None:
        while self.most and len(ids) > self._left:
            self._append(ids[: self._left], counts[: self._left])
            ids, counts = ids[self._left :], counts[self._left :]
            self._end()
            self._begin()
        self._append(ids, counts)
        self._left -= len(ids)

    def _append(self, ids: np.ndarray, counts: np.ndarray) -> None:
        self._files[0].write(ids.astype(self.dtype, copy=False).tobytes())
        self.tokens += len(ids)
        self.targets += int(counts.sum())
        if self.masked:
            bits = np.concatenate([self._bits, counts])
            whole = len(bits) - len(bits) % 8
            self._files[1].write(packed(bits[:whole]))
            self._bits = bits[whole:]


def temporary_of(path: Path) -> Path:
    """The name of a file until all are there."""
    return path.with_name(f"{path.name}.tmp")


def _join(shards: list[Path], out: Path, tokenizer: Tokenizer, split: _Split, facts: dict[str, Any]) -> dict[str, int]:
    """Write the data set from its shards. Raises ValueError where there is no token."""
    indices = [np.load(path.with_suffix(".npy"), allow_pickle=False) for path in shards]
    entries = np.concatenate([np.zeros(0, _ENTRY), *indices])
    total = int(entries["tokens"].sum())
    if total < 2:
        raise ValueError("--input: there is no text in it")
    of_weight = np.array(split.weights) > 0
    hashes = np.unique(entries["document"][of_weight[entries["source"]]])
    chosen = split.held(hashes)
    edge = max(1, min(total - 1, int(total * (1 - split.val))))
    dtype, length, render = dtype_of(tokenizer.vocab_size), split.pack_length, split.reading.render
    masked = bool(render or length)
    for path in out.iterdir():  # of an earlier call, in one file or in several
        if re.fullmatch(r"(train|val)(_\d{5})?(\.mask)?\.bin(\.tmp)?", path.name):
            path.unlink()
    of_source = np.zeros((len(split.weights), 2), np.int64)
    places = accumulate((int(index["tokens"].sum()) for index in indices), initial=0)
    sides: dict[str, _Side] = {}
    with contextlib.ExitStack() as opened:
        for name in ("train", "val"):
            packer = Packer(length, tokenizer.end_of_text or 0) if length else None
            sides[name] = _Side(out, name, dtype, masked, packer, split.shard_tokens)
            opened.callback(sides[name].close)
        for path, index, place in zip(shards, indices, places, strict=False):
            ids = np.fromfile(path, dtype=dtype)
            counts = np.fromfile(path.with_suffix(".mask"), dtype=bool) if render else np.ones(len(ids), bool)
            sizes = index["tokens"].astype(np.int64)
            if len(hashes) == 1:
                kept = max(0, min(edge - place, len(ids)))
                for name, part, end in (("train", slice(0, kept), edge), ("val", slice(kept, None), total)):
                    ends = place + (kept if name == "train" else len(ids)) == end
                    sides[name].add(ids[part], counts[part], np.array([len(ids[part])]), np.array([ends]))
                continue
            held = np.isin(index["document"], chosen)
            copies = np.where(held, 0, split.copies(index))
            taken = [("val", held), *(("train", copies > number) for number in range(int(copies.max(initial=0))))]
            for name, which in taken:
                tokens = np.repeat(which, sizes)
                sides[name].add(ids[tokens], counts[tokens], sizes[which], index["ends"][which])
                if name == "train":
                    np.add.at(of_source, index["source"][which], np.stack([index["ends"][which], sizes[which]], 1))
        for side in sides.values():
            side.finish()
    told: dict[str, Any] = {"documents": int(entries["ends"].sum())}
    told["tokens"] = {name: side.tokens for name, side in sides.items()}
    if masked:
        told["targets"] = {name: side.targets for name, side in sides.items()}
        for name, count in told["targets"].items():
            if not count:
                raise ValueError(f"--val {split.val}: of {name}.bin the loss counts no token; there is too little text")
    if len(split.weights) > 1:
        told["parts"] = {
            name: {"weight": weight, "documents": int(documents), "tokens": int(tokens)}
            for name, weight, (documents, tokens) in zip(split.reading.sources, split.weights, of_source, strict=True)
        }
    if length:
        padding = {
            name: side.packer.padded / max(1, side.packer.rows * length) for name, side in sides.items() if side.packer
        }
        told["packing"] = {"how": "best-fit", "length": length, "padding": padding}
    masks = ("train", "val") if masked else ()
    files = {name: side.names for name, side in sides.items()} if split.shard_tokens else None
    write_meta(out, tokenizer, files=files, masks=masks, row=length or 1, **told, val=split.val, **facts)
    written = [out / name for side in sides.values() for name in side.names]
    for path in reversed(written):
        for file in (mask_of(path), path)[not masked :]:
            os.replace(temporary_of(file), file)
    return {**told["tokens"], "documents": told["documents"]}


# ---------------------------------------------------------------------------------------------- tokenizers


def _named(
    name: str, units: list[list[corpus.Part]], reading: Reading, trained: Path, workers: int, several: bool
) -> Tokenizer:
    """The tokenizer that --tokenizer names. Raises ValueError.

    Args:
        trained: where one that is trained is kept until the data set is whole.
        several: whether there is more than one document.
    """
    if name == "char":
        with _mapping(workers) as mapped:
            found = mapped(partial(_characters, reading=reading), units)
            return CharTokenizer.of("".join(found), several)
    if name.startswith("train:"):
        size = name.removeprefix("train:")
        if not size.isdecimal() or not 257 <= int(size) <= 2**20:
            raise ValueError(f"--tokenizer {name}: the size must be a whole number from 257 to {2**20}")
        trained = trained.with_name(f"{trained.name}-{size}")
        if not has_tokenizer(trained):
            made = trained_tokenizer(
                int(size),
                (text for unit in units for part in unit for text in reading.texts(part)),
                (START, END) if reading.render else (),
            )
            save(made, trained)
        tokenizer = HuggingFaceTokenizer(trained)
        if tokenizer.vocab_size < int(size):
            print(f"note: the text gives {tokenizer.vocab_size} tokens, fewer than the {size} that were asked for")
        return tokenizer
    return existing_tokenizer(name)


def existing_tokenizer(name: str) -> Tokenizer:
    """A tiktoken encoding, or the tokenizer of a Hugging Face folder or of a data set. Raises ValueError."""
    folder = find_folder(name)
    if (folder / "meta.json").is_file() or (folder / "meta.pkl").is_file() or (folder / "train.bin").is_file():
        return of_data(name)
    if Path(name).is_dir():
        return HuggingFaceTokenizer(name)
    try:
        return tiktoken_tokenizer(name.removeprefix("tiktoken:"))
    except ValueError as error:
        raise ValueError(f"--tokenizer {name}: no such folder and no data set; {error}") from None


def trained_tokenizer(size: int, texts: Iterable[str], control: Sequence[str] = ()) -> HuggingFaceTokenizer:
    """Byte pairs of these texts (Sennrich et al. 2016), over all 256 bytes, as GPT-2's are; with control tokens."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END_OF_TEXT, *control], initial_alphabet=alphabet, show_progress=False
        ),
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    files = {"tokenizer.json": inner.to_str(), "tokenizer_config.json": json.dumps(config, indent=1)}
    return HuggingFaceTokenizer.of({file: text.encode("utf-8") for file, text in files.items()})
