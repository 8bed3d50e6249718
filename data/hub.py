"""Data sets of the Hugging Face hub as local files of parquet, which the preparing then reads like anybody's own.

The library `datasets` downloads them (the extra `data`). What was fetched lies in files that are whole or absent, so an
interrupted call goes on; nothing that a data set brings along is run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

_ROWS = 2**16
"""Rows of a file."""


@dataclass(frozen=True)
class Hub:
    """A data set of the hub."""

    name: str
    """Or a local folder that datasets.load_dataset reads."""
    licence: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None

    def facts(self) -> dict[str, Any]:
        """What a meta.json says of where the data is from."""
        source = {name: value for name, value in asdict(self).items() if name != "licence" and value is not None}
        return {"source": source, "licence": self.licence}


def fetch(hub: Hub, folder: Path, limit: int = 0) -> list[Path]:
    """The rows of a data set, or the first `limit`, as files of parquet in a folder. Raises ValueError."""
    key = hashlib.sha256(json.dumps([hub.facts(), limit]).encode()).hexdigest()[:16]
    folder = folder / key
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "whole.json"
    if not whole.exists():
        names = []
        for number, rows in enumerate(_tables(hub, limit)):
            path = folder / f"{number:05d}.parquet"
            if not path.exists():
                temporary = path.with_suffix(f".{os.getpid()}.tmp")
                rows().to_parquet(str(temporary), batch_size=1024)
                os.replace(temporary, path)
            names.append(path.name)
        temporary = folder / "whole.tmp"
        temporary.write_text(json.dumps(names))
        os.replace(temporary, whole)
    return [folder / name for name in json.loads(whole.read_text())]


def _tables(hub: Hub, limit: int) -> Iterator[Any]:
    """Functions that give a datasets.Dataset of _ROWS rows each."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{hub.name}: the library datasets is missing: pip install 'datasets>=3' (the extra data), or give local "
            "files with --input"
        ) from None
    try:
        if limit:  # no more than needed is downloaded
            stream = datasets.load_dataset(
                hub.name, hub.subset, split=hub.split, revision=hub.revision, streaming=True
            ).take(limit)
            rows = list(tqdm(stream, hub.name, limit, disable=None))
            found = datasets.Dataset.from_list(rows, features=stream.features)
        else:
            found = datasets.load_dataset(hub.name, hub.subset, split=hub.split, revision=hub.revision)
    except Exception as error:  # hubs fail in many ways
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{hub.name} cannot be loaded ({type(error).__name__}: {first}); without a network, give local files with "
            "--input"
        ) from None
    starts = range(0, len(found), _ROWS)
    for start in tqdm(starts, "fetch", disable=None):
        yield lambda start=start: found.select(range(start, min(start + _ROWS, len(found))))
