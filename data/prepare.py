"""What the prepare.py scripts share: options, a checked download, and token files made of texts.

`prepare` reads documents (corpus.py), encodes them in many processes, and writes train.bin, val.bin, meta.json and the
tokenizer's files. The same input gives the same bytes for any number of workers, and after an interruption: what was
encoded lies in shards, each whole or absent, in a folder named after the content that was read and the tokenizer.
train.bin is written last, so a folder that has it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from orchestrate.data import corpus
from orchestrate.data.keeping import kept_with_data, of_data, save
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
_ENTRY = np.dtype([("document", "<u8"), ("tokens", "<u8"), ("ends", "?")])
"""A line of a shard's index: a document, or a piece of one."""


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
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line. Raises ValueError."""
    arguments = parser.parse_args()
    if arguments.workers < 1 or arguments.limit < 0:
        raise ValueError("--workers must be at least 1, and --limit at least 0")
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


def note_if_changed(path: Path, expected_sha256: str) -> None:
    """A checksum that differs is said, not refused: a text of one's own is welcome. Raises OSError."""
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != expected_sha256:
        print(f"note: {path} is not the original text (another SHA-256); it is used as it is")


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


def write_meta(folder: Path, tokenizer: Tokenizer, **facts: Any) -> None:
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
    meta = Meta(size, dtype_of(tokenizer.vocab_size), tokenizer.kind, characters, tokenizer.fingerprint)
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


def _characters(unit: list[corpus.Part], key: str) -> str:
    return "".join(sorted(set().union(*(set(text.text) for part in unit for text in corpus.texts(part, key)))))


def _encode(numbered: tuple[int, list[corpus.Part]], key: str, folder: Path) -> None:
    """Encode a unit into a shard: its tokens, and then its index, which says that it is whole."""
    number, unit = numbered
    path, tokenizer = folder / f"{number:06d}.bin", _worker["tokenizer"]
    if path.with_suffix(".npy").exists():
        return
    tokens, entries = [np.zeros(0, np.uint32)], []
    for part in unit:
        for text in corpus.texts(part, key):
            try:
                ids = tokenizer.encode_plain(text.text)
            except ValueError as error:
                raise ValueError(f"{part.path}: {error}") from None
            if text.ends and tokenizer.end_of_text is not None:
                ids = [*ids, tokenizer.end_of_text]
            tokens.append(np.array(ids, dtype=np.uint32))
            entries.append((text.document, len(ids), text.ends))
    write_tokens(path, np.concatenate(tokens), tokenizer.vocab_size)
    temporary = path.with_suffix(f".{os.getpid()}.npy")
    np.save(temporary, np.array(entries, dtype=_ENTRY))
    os.replace(temporary, path.with_suffix(".npy"))


# ---------------------------------------------------------------------------------------------- prepare


def prepare(
    inputs: Sequence[str | Path],
    out: Path,
    tokenizer: str | Tokenizer,
    *,
    key: str = "text",
    val: float = 0.1,
    limit: int = 0,
    workers: int = 1,
) -> None:
    """Make a data set of texts. Raises ValueError with the place of what is wrong.

    A document is for validation or for training as a whole, by a hash of its content, so one that is there twice is
    never on both sides. Where all documents are one, its last part is for validation.

    Args:
        inputs: files and folders of them.
        tokenizer: as --tokenizer names it, or the tokenizer itself.
        key: of a JSON line or a parquet column that holds the text.
        val: the share of the documents that is for validation.
        limit: only the first so many documents; 0: all.
    """
    if not 0 < val < 1:
        raise ValueError(f"--val must be above 0 and below 1, got {val}")
    sources, parts = [], []
    with _mapping(workers) as mapped:
        paths = corpus.find(inputs)
        for source, found in tqdm(
            mapped(functools.partial(corpus.scan, key=key), paths), "read", len(paths), disable=None
        ):
            sources.append(source)
            parts += found
            if 0 < limit <= sum(part.documents for part in parts):
                break
    parts = list(corpus.limited(parts, limit))
    units = corpus.units(parts)
    asked = {"read": [[{**asdict(part), "path": ""} for part in unit] for unit in units], "key": key}
    folder = out / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, str):
        several = sum(part.documents for part in parts) > 1
        tokenizer = _named(tokenizer, units, key, folder / f"tokenizer-{_hash(asked)}", workers, several)
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
        done = mapped(functools.partial(_encode, key=key, folder=shards), enumerate(units))
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
        val,
        {"key": key, "limit": limit, "sources": _described(sources)},
    )
    for path in (*folder.glob("encoded-*"), *folder.glob("tokenizer-*")):
        shutil.rmtree(path)
    with contextlib.suppress(OSError):  # somebody else's files are in it
        folder.rmdir()
    print(
        f"{counts['documents']:,} document{'s' * (counts['documents'] != 1)}, vocabulary of {tokenizer.vocab_size:,}; "
        f"train.bin {counts['train']:,} tokens, val.bin {counts['val']:,} tokens, in {out}"
    )


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _described(sources: Sequence[corpus.Source]) -> Any:
    each = [source.to_json() for source in sources]
    return each if len(each) <= _MOST_SOURCES else {"files": len(each), "sha256_of_list": _hash(each)}


def _join(shards: list[Path], out: Path, tokenizer: Tokenizer, val: float, facts: dict[str, Any]) -> dict[str, int]:
    """Write the data set from its shards. Raises ValueError where there is no token."""
    indices = [np.load(path.with_suffix(".npy"), allow_pickle=False) for path in shards]
    entries = np.concatenate([np.zeros(0, _ENTRY), *indices])
    total = int(entries["tokens"].sum())
    if total < 2:
        raise ValueError("--input: there is no text in it")
    hashes = np.unique(entries["document"])
    chosen = hashes[hashes < np.uint64(min(int(val * 2**64), 2**64 - 1))]
    if not len(chosen):
        chosen = hashes[:1]
    elif len(chosen) == len(hashes):
        chosen = hashes[:-1]
    edge = max(1, min(total - 1, int(total * (1 - val))))
    dtype = dtype_of(tokenizer.vocab_size)
    (out / "train.bin").unlink(missing_ok=True)
    counts = {"train": 0, "val": 0}
    with contextlib.ExitStack() as opened:
        files = {name: opened.enter_context(open(out / f"{name}.bin.tmp", "wb")) for name in counts}
        places = accumulate((int(index["tokens"].sum()) for index in indices), initial=0)
        for path, index, place in zip(shards, indices, places, strict=False):
            ids = np.fromfile(path, dtype=dtype)
            if len(hashes) == 1:
                held = np.arange(place, place + len(ids)) >= edge
            else:
                held = np.repeat(np.isin(index["document"], chosen), index["tokens"].astype(np.int64))
            for name, some in (("train", ids[~held]), ("val", ids[held])):
                files[name].write(some.tobytes())
                counts[name] += len(some)
    documents = int(entries["ends"].sum())
    write_meta(out, tokenizer, documents=documents, tokens=counts, val=val, **facts)
    for name in ("val", "train"):
        os.replace(out / f"{name}.bin.tmp", out / f"{name}.bin")
    return {**counts, "documents": documents}


# ---------------------------------------------------------------------------------------------- tokenizers


def _named(
    name: str, units: list[list[corpus.Part]], key: str, trained: Path, workers: int, several: bool
) -> Tokenizer:
    """The tokenizer that --tokenizer names. Raises ValueError.

    Args:
        trained: where one that is trained is kept until the data set is whole.
        several: whether there is more than one document.
    """
    if name == "char":
        with _mapping(workers) as mapped:
            found = mapped(functools.partial(_characters, key=key), units)
            return CharTokenizer.of("".join(found), several)
    if name.startswith("train:"):
        size = name.removeprefix("train:")
        if not size.isdecimal() or not 257 <= int(size) <= 2**20:
            raise ValueError(f"--tokenizer {name}: the size must be a whole number from 257 to {2**20}")
        trained = trained.with_name(f"{trained.name}-{size}")
        if not has_tokenizer(trained):
            made = trained_tokenizer(
                int(size), (text.text for unit in units for part in unit for text in corpus.texts(part, key))
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


def trained_tokenizer(size: int, texts: Iterable[str]) -> HuggingFaceTokenizer:
    """Byte pairs of these texts (Sennrich et al. 2016), over all 256 bytes, as GPT-2's are."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        ),
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    files = {"tokenizer.json": inner.to_str(), "tokenizer_config.json": json.dumps(config, indent=1)}
    return HuggingFaceTokenizer.of({file: text.encode("utf-8") for file, text in files.items()})
