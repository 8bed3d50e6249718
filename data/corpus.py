"""Documents out of files: text, JSON lines and parquet, plain or gzipped, in parts that can be read side by side.

A text file is one document; a line of JSON or a row of parquet is one. How files are cut into parts follows from their
content alone, so it is the same on any machine and for any number of workers. What is wrong with a file is told with
its place. Nothing in a file is run.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

UNIT = 16 * 2**20
"""Bytes that a worker reads at a time, about; a gzipped file is one part, and so is a row group of parquet."""
PIECE = 4 * 2**20
"""Characters that are encoded at a time: a longer document is cut behind a word."""
_SUFFIXES = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "lines", ".ndjson": "lines", ".json": "lines"}
_SUFFIXES[".parquet"] = "parquet"
_SHOWN = ".txt, .md, .jsonl, .parquet, or .gz of the first three"


@dataclass(frozen=True)
class Part:
    """A stretch of a file."""

    path: str
    kind: str
    """text | separated | lines | parquet."""
    sha256: str
    """Of the whole file as it lies."""
    start: int
    stop: int
    """Bytes; of parquet, the row group and the one after it; a stop of -1 is the end of a gzipped file."""
    first: int = 1
    """Number of the first line or row."""
    documents: int = 1
    """How many are read at most. Of a text that is one document, 1 where it ends here, else 0."""
    size: int = 0
    """Bytes, about."""
    separator: str = ""
    """What stands between the documents of a text."""

    @property
    def zipped(self) -> bool:
        return self.path.endswith(".gz")


@dataclass(frozen=True)
class Source:
    """A file that was looked through."""

    file: str
    bytes: int
    sha256: str
    documents: int
    changed: int
    """Time of its last change; nanoseconds."""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "changed"}

    def check(self) -> None:
        """Raises ValueError where the file has changed since."""
        found = Path(self.file).stat()
        if (found.st_size, found.st_mtime_ns) != (self.bytes, self.changed):
            raise ValueError(f"{self.file}: changed while it was read")


@dataclass(frozen=True)
class Text:
    """A document, or a piece of a long one."""

    text: str
    document: int
    """A number made of the content of the document, the same for each piece; 64 bits."""
    ends: bool
    """Whether the document ends here."""


def find(inputs: Sequence[str | Path]) -> list[str]:
    """Files and the files in folders, in a fixed order. Raises ValueError for what is missing or empty."""
    found: list[str] = []
    for given in map(Path, inputs):
        if given.is_dir():
            # Sorted as parts of a path, so that no system's order of names comes in.
            inside = sorted(
                path for path in given.rglob("*") if path.suffix != ".json" and _kind(path) and path.is_file()
            )
            if not inside:
                raise ValueError(f"--input {given}: there is no text in this folder ({_SHOWN})")
            found += map(str, inside)
        elif given.is_file():
            found.append(str(given))
        else:
            raise ValueError(f"--input {given}: there is no such file or folder")
    if len(set(found)) < len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise ValueError(f"--input {twice}: given twice")
    return found


def _kind(path: Path) -> str:
    """How a file is read by its name; nothing where the name does not say."""
    name = path.name.lower()
    kind = _SUFFIXES.get(Path(name.removesuffix(".gz")).suffix, "")
    return "" if name.endswith(".gz") and kind == "parquet" else kind


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """What readers raise, as a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{place}: cannot be read ({error.strerror or error})") from None
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{place}: not a whole gzip file ({error})") from None


def _open(path: str) -> BinaryIO:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def scan(path: str, key: str, separator: str = "") -> tuple[Source, list[Part]]:
    """Look through a file: its checksum, its documents, and where it is cut. Raises ValueError.

    Args:
        key: the column of a parquet file that is read; nothing where rows are read whole.
        separator: what stands between the documents of a text; nothing where a text is one.
    """
    kind = _kind(Path(path)) or "text"
    kind = "separated" if kind == "text" and separator else kind
    with _reading(path):
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
        found = Path(path).stat()
        whole = Part(path, kind, digest.hexdigest(), 0, found.st_size, size=found.st_size, separator=separator)
        if kind == "parquet":
            parts = _row_groups(whole, key)
        elif whole.zipped:
            with _open(path) as file:
                count = sum(1 for line in file if line.strip()) if kind == "lines" else 1
                count = _count(file.read(), separator) if kind == "separated" else count
            parts = [replace(whole, stop=-1, documents=count)]
        else:
            with open(path, "rb") as file:
                parts = list({"lines": _lines, "separated": _separated}.get(kind, _stretches)(file, whole))
    parts = parts if found.st_size else []
    return Source(path, found.st_size, whole.sha256, sum(p.documents for p in parts), found.st_mtime_ns), parts


def _lines(file: BinaryIO, whole: Part) -> Iterator[Part]:
    """Stretches of whole lines."""
    start, offset, first, documents = 0, 0, 1, 0
    for number, line in enumerate(file, 1):
        offset += len(line)
        documents += bool(line.strip())
        if offset - start >= UNIT or offset >= whole.stop:
            yield replace(whole, start=start, stop=offset, first=first, documents=documents, size=offset - start)
            start, first, documents = offset, number + 1, 0


def _stretches(file: BinaryIO, whole: Part) -> Iterator[Part]:
    """Stretches of a text that end behind a word, else between two characters."""
    start = 0
    while start < whole.stop:
        file.seek(start + UNIT)
        following = file.read(2**16)
        word = re.search(rb"[0-9A-Za-z](?=[ \n])", following)
        cut = word.end() if word else next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)
        stop = start + UNIT + cut if following else whole.stop
        yield replace(whole, start=start, stop=stop, documents=int(stop == whole.stop), size=stop - start)
        start = stop


def _separated(file: BinaryIO, whole: Part) -> Iterator[Part]:
    """Stretches of whole documents between separators."""
    mark, start, stretch = whole.separator.encode("utf-8"), 0, b""
    while block := file.read(UNIT):
        stretch += block
        cut = stretch.rfind(mark) + len(mark) if mark in stretch else 0
        if cut:
            yield _counted(whole, start, stretch[:cut])
            start, stretch = start + cut, stretch[cut:]
    if stretch:
        yield _counted(whole, start, stretch)


def _counted(whole: Part, start: int, stretch: bytes) -> Part:
    size, documents = len(stretch), _count(stretch, whole.separator)
    return replace(whole, start=start, stop=start + size, documents=documents, size=size)


def _count(content: bytes, separator: str) -> int:
    return sum(1 for document in content.split(separator.encode("utf-8")) if document.strip())


def _parquet(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path}: parquet files need pyarrow: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from None


def _row_groups(whole: Part, key: str) -> list[Part]:
    with _parquet(whole.path) as file:
        if key and key not in file.schema_arrow.names:
            raise ValueError(f"{whole.path}: has no column {key!r} (--key); there are {file.schema_arrow.names}")
        if key and str(file.schema_arrow.field(key).type) not in ("string", "large_string", "string_view"):
            raise ValueError(f"{whole.path}: column {key!r} holds {file.schema_arrow.field(key).type}, not text")
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    parts, first = [], 1
    for i, group in enumerate(groups):
        counts = {"start": i, "stop": i + 1, "documents": group.num_rows, "size": group.total_byte_size}
        parts.append(replace(whole, first=first, **counts))
        first += group.num_rows
    return parts


def limited(parts: Iterable[Part], documents: int) -> Iterator[Part]:
    """The parts of the first so many documents; 0: all."""
    left = documents
    for part in parts:
        if not documents:
            yield part
        elif left > 0:
            yield replace(part, documents=min(part.documents, left))
            left -= part.documents


def units(parts: Iterable[Part]) -> list[list[Part]]:
    """Parts together that one worker reads at a time, of about UNIT bytes: many small files are one unit."""
    found: list[list[Part]] = []
    size = UNIT
    for part in parts:
        if size >= UNIT:
            found.append([])
            size = 0
        found[-1].append(part)
        size += max(part.size, 1024)
    return found


def texts(part: Part, key: str) -> Iterator[Text]:
    """The documents of a part, long ones in pieces; an empty one is left out. Raises ValueError with the place.

    Args:
        key: of a line's object, or the column of a parquet file, whose value is the text.
    """
    with _reading(part.path):
        if part.kind == "text":
            yield from _pieces(_text(part), int(part.sha256[:16], 16), bool(part.documents))
            return
        for text in _between(part) if part.kind == "separated" else _values(part, key):
            yield from _pieces(text, _number(text), True)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def _between(part: Part) -> Iterator[str]:
    found = (text.strip() for text in _text(part).split(part.separator))
    return itertools.islice(filter(None, found), part.documents)


def records(part: Part) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Lines or rows whole: their place, what they hold, and a number made of it. Raises ValueError with the place."""
    with _reading(part.path):
        if part.kind not in ("lines", "parquet"):
            raise ValueError(f"{part.path}: records are read from .jsonl (or .jsonl.gz) and .parquet")
        rows = _table(part) if part.kind == "parquet" else _dictionaries(part)
        for place, record in itertools.islice(rows, part.documents):
            written = json.dumps(record, sort_keys=True, ensure_ascii=False, default=repr)
            try:
                number = _number(written)
            except UnicodeEncodeError:
                raise ValueError(f"{place}: holds half a character (a lone surrogate)") from None
            yield place, record, number


def _text(part: Part) -> str:
    with _open(part.path) as file:
        file.seek(part.start)
        raw = file.read() if part.stop < 0 else file.read(part.stop - part.start)
    try:
        return raw.decode("utf-8").removeprefix("\ufeff" if part.start == 0 else "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{part.path}: not UTF-8 text (byte {part.start + error.start})") from None


def _values(part: Part, key: str) -> Iterator[str]:
    rows = _rows(part, key) if part.kind == "parquet" else _objects(part, key)
    for number, value in itertools.islice(rows, part.documents):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{part.path}:{number}: {key!r} holds half a character (a lone surrogate)") from None
        yield value


def _objects(part: Part, key: str) -> Iterator[tuple[int, str]]:
    for number, line in _numbered(part):
        yield number, _value(line, key, f"{part.path}:{number}")


def _dictionaries(part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _numbered(part):
        place = f"{part.path}:{number}"
        found = _json(line, place)
        if not isinstance(found, dict):
            raise ValueError(f"{place}: not a JSON object")
        yield place, found


def _numbered(part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines of a part that are not empty."""
    with _open(part.path) as file:
        file.seek(part.start)
        for number, line in enumerate(file, part.first):  # whoever reads ends with the part's last document
            if line.strip():
                yield number, line.removeprefix(b"\xef\xbb\xbf")


def _json(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text (byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from None


def _value(line: bytes, key: str, place: str) -> str:
    found = _json(line, place)
    if not isinstance(found, dict):
        raise ValueError(f"{place}: not a JSON object, which has the text under {key!r} (--key)")
    if key not in found:
        raise ValueError(f"{place}: has no {key!r} (--key); there are {', '.join(map(repr, found)) or 'no keys'}")
    if not isinstance(found[key], str):
        raise ValueError(f"{place}: {key!r} must be text, got {found[key]!r:.80}")
    return found[key]


def _rows(part: Part, key: str) -> Iterator[tuple[int, str]]:
    return ((number, row[key] or "") for number, row in _row_objects(part, [key]))


def _table(part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"{part.path}: row {number}", row) for number, row in _row_objects(part, None))


def _row_objects(part: Part, columns: list[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow

    number = part.first
    with _parquet(part.path) as file:
        try:
            for batch in file.iter_batches(1024, row_groups=[part.start], columns=columns):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{part.path}: row {number}: cannot be read ({str(error).splitlines()[0]})") from None


def _pieces(text: str, document: int, ends: bool) -> Iterator[Text]:
    start = 0
    while len(text) - start > PIECE:
        word = re.compile(r"\w(?=\s)").search(text, start + PIECE, start + 2 * PIECE)
        stop = word.end() if word else start + PIECE
        yield Text(text[start:stop], document, False)
        start = stop
    if start < len(text):
        yield Text(text[start:], document, ends)
