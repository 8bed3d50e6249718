"""OpenWebText, GPT-2 byte-pair encoding, through Hugging Face datasets: many processes, sharded, resumable.

    python data/openwebtext/prepare.py --workers 8             # 54 GB of cache, 17 GB of tokens (9 billion)
    python data/openwebtext/prepare.py --input corpus.jsonl    # local files, as data/text/prepare.py takes them

Each shard of documents becomes a token file of its own under shards/; a run that was interrupted goes on with the
shards that are missing. At the end they are joined into train.bin and val.bin and removed. Every document ends with
<|endoftext|>; 0.05 % of the documents are for validation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
from collections.abc import Callable  # noqa: E402

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from orchestrate.data.prepare import (  # noqa: E402
    dtype_of,
    existing_tokenizer,
    options,
    parsed,
    run,
    write_meta,
    write_tokens,
)
from orchestrate.data.prepare import prepare as prepare_files  # noqa: E402
from orchestrate.data.tokenizer import Tokenizer  # noqa: E402

VAL_SHARE, SPLIT_SEED = 0.0005, 2357


def load(name: str, workers: int):
    """The documents as a datasets.Dataset with a column "text"."""
    import datasets

    try:
        documents = datasets.load_dataset(name, split="train", num_proc=workers)
    except Exception as error:  # hubs fail in many ways
        raise ValueError(f"the data set {name} cannot be loaded ({type(error).__name__}: {error})") from None
    if "text" not in documents.column_names:
        raise ValueError(f"the documents have the columns {documents.column_names}, and a column text is needed")
    return documents


def encode_shard(
    index: int, documents, shards: int, folder: Path, stem: str, make_tokenizer: Callable[[], Tokenizer]
) -> str:
    """Encode one shard of the documents to a file that is whole or absent; returns its name."""
    path = folder / f"{stem}_{index:05d}.bin"
    if not path.exists():
        tokenizer = make_tokenizer()
        shard = documents.shard(num_shards=shards, index=index, contiguous=True)
        ids: list[int] = []
        for text in shard["text"]:
            ids += tokenizer.encode_plain(text)
            ids += [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        write_tokens(path, ids, tokenizer.vocab_size)
    return path.name


def join(paths: list[Path], out: Path) -> int:
    """Concatenate token files; returns the bytes."""
    temporary = out.with_name(out.name + ".tmp")
    with open(temporary, "wb") as whole:
        for path in paths:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, whole)
    os.replace(temporary, out)
    return out.stat().st_size


def prepare(documents, out: Path, workers: int, shards: int, make_tokenizer: Callable[[], Tokenizer]) -> None:
    """Encode, join, describe. Shards that an earlier, interrupted call of the same documents left are kept."""
    folder = out / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    asked = {"documents": documents._fingerprint, "rows": len(documents), "shards": shards}
    asked["tokenizer"] = tokenizer.fingerprint
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    stale = [path for path in folder.iterdir() if f"_{key}_" not in path.name]
    if stale:
        print(f"note: {len(stale)} shards of other documents are removed from {folder}")
        for path in stale:
            path.unlink()
    n_val = max(1, int(len(documents) * VAL_SHARE))
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} documents are too few to split")
    split = documents.train_test_split(test_size=n_val, seed=SPLIT_SEED, shuffle=True)
    for name, part in (("train", split["train"]), ("val", split["test"])):
        count = min(shards, len(part))
        work = functools.partial(
            encode_shard,
            documents=part,
            shards=count,
            folder=folder,
            stem=f"{name}_{key}",
            make_tokenizer=make_tokenizer,
        )
        # spawn, not fork: the tokenizer and datasets both hold threads.
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            names = list(tqdm(pool.imap(work, range(count)), total=count, desc=name))
        size = join([folder / n for n in names], out / f"{name}.bin")
        print(f"{name}.bin: {size // np.dtype(dtype_of(tokenizer.vocab_size)).itemsize:,} tokens")
    write_meta(out, tokenizer, documents=len(documents))
    shutil.rmtree(folder)


def main() -> None:
    parser = options(__doc__, Path(__file__).parent, tokenizer="gpt2")
    parser.add_argument("--dataset", default="Skylion007/openwebtext", help="name or local folder for load_dataset")
    parser.add_argument("--num_proc", type=int, dest="workers", default=argparse.SUPPRESS, help="same as --workers")
    parser.add_argument("--shards", type=int, default=1024, help="pieces that are encoded, and resumed, one by one")
    given = parsed(parser)
    if given.shards < 1:
        raise ValueError("--shards must be at least 1")
    if given.input:
        prepare_files(given.input, given.out, given.tokenizer, val=VAL_SHARE, limit=given.limit, workers=given.workers)
        return
    make_tokenizer = functools.partial(existing_tokenizer, given.tokenizer)
    documents = load(given.dataset, given.workers)
    documents = documents.select(range(min(given.limit or len(documents), len(documents))))
    prepare(documents, given.out, given.workers, given.shards, make_tokenizer)


if __name__ == "__main__":
    run(main)
