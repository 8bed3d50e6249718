"""The models that are served: what a request may name, and which of them are in memory.

A run's models are its checkpoints, read from its folder as it is now, and the names `latest` and `best`. What a request
names is looked up among those: it never becomes a path. A model is loaded when it is first asked for. Where memory runs
out the one that was idle longest goes, and never one in use. A request that needs room waits for it, and later ones
wait behind it, so it gets its turn. Everything but the reading of files happens on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from orchestrate.model.config import ModelConfig
from orchestrate.model.generate import Continuation
from orchestrate.model.gpt import GPT
from orchestrate.training.session.sampling import checkpoint_model, run_tokenizer
from orchestrate.training.session.start import named_checkpoint
from orchestrate.training.session.talking import ChatFormat, chat_format, open_talker
from orchestrate.training.store import manifest

FRESH_SECONDS = 1.0
"""For so long what was read of the run folder is taken as it was."""


Placed: TypeAlias = tuple[GPT, Callable[[], AbstractContextManager]]


class Unknown(LookupError):
    """There is no such model, or none that can be read."""


class TooLarge(RuntimeError):
    """The model alone needs more memory than there may be."""


@dataclass(frozen=True)
class Offer:
    """A model that can be asked for."""

    name: str
    created: int
    """Seconds since 1970."""
    version: tuple[int, ...] = ()
    """Changes when something else is saved under this name."""
    iter: int | None = None
    val_loss: float | None = None
    aliases: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        return self.name, self.version


class Opened(NamedTuple):
    """A model whose weights are not in memory yet."""

    config: ModelConfig
    weights: int
    """Bytes."""
    build: Callable[[], tuple[GPT, ChatFormat]]


class Source(Protocol):
    """Where models are from."""

    def offers(self) -> list[Offer]:
        """Newest first."""
        ...

    def open(self, name: str) -> Opened:
        """One of those, verified. Raises ValueError or OSError."""
        ...


class RunFolder:
    """The checkpoints of a run, which may be training beside this reader."""

    def __init__(self, out_dir: str, dataset: str = "") -> None:
        self.out_dir, self.dataset = out_dir, dataset

    def offers(self) -> list[Offer]:
        root, found = manifest.folder(self.out_dir), []
        best = ""
        with contextlib.suppress(OSError):
            best = (root / "best").readlink().name
        for path, saved in manifest.survey(self.out_dir):
            with contextlib.suppress(OSError):  # the run removes what it needs no more
                if isinstance(saved, manifest.Manifest):
                    stat = (path / manifest.MANIFEST).stat()
                    aliases = ("latest",) * (not found) + ("best",) * (path.name == best)
                    version = (stat.st_mtime_ns, stat.st_ino)
                    offer = Offer(path.name, int(stat.st_mtime), version, saved.iter, saved.val_loss, aliases)
                    found.append(offer)
        return found

    def open(self, name: str) -> Opened:
        loaded = named_checkpoint(self.out_dir, name)
        weights = sum(
            math.prod(shape) * loaded.dtypes[key].itemsize for key, shape in loaded.shapes.items() if "|" not in key
        )
        config = loaded.state.settings.model

        def build() -> tuple[GPT, ChatFormat]:
            talk = chat_format(
                run_tokenizer(self.out_dir, loaded.state, self.dataset), config.block_size, config.vocab_size
            )
            return checkpoint_model(loaded), talk

        return Opened(config, weights, build)


class OneModel:
    """A model from elsewhere: a Hugging Face or PEFT folder, or a nanoGPT ckpt.pt."""

    def __init__(self, source: str, dataset: str = "") -> None:
        self.source, self.dataset = source, dataset
        self._offer = Offer(Path(source).resolve().name, int(time.time()), aliases=("latest",))

    def offers(self) -> list[Offer]:
        return [self._offer]

    def open(self, name: str) -> Opened:
        model, talk, _ = open_talker(self.source, dataset=self.dataset)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        return Opened(model.config, weights, lambda: (model, talk))


class Loaded:
    """A model in memory.

    Attributes:
        autocast: the number type that it computes in.
        size: bytes, of its weights and of the keys and values of its rows.
        users: how many requests and rows hold it; with none it may go.
        continuation: its rows; made by the engine, which alone touches it.
    """

    def __init__(self, offer: Offer, placed: Placed, talk: ChatFormat, size: int) -> None:
        self.offer, (self.model, self.autocast), self.format, self.size = offer, placed, talk, size
        self.users = 0
        self.used_at = time.monotonic()
        self.continuation: Continuation | None = None


def keys_and_values(config: ModelConfig, rows: int) -> int:
    """Bytes of a cache with room for as many tokens as the model sees, at most 4 bytes a number."""
    return 2 * 4 * rows * config.block_size * config.n_layer * config.n_kv_head * config.head_size


class _Load:
    """A model on its way into memory, and how many wait for it."""

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.waiters = 0


class Shelf:
    """The models in memory.

    Args:
        default: the name that a request without one means.
        place: puts a model on its device.
        limit: bytes that all of them may take together.
        slots: rows that each of them writes at once.
    """

    def __init__(self, source: Source, default: str, place: Callable[[GPT], Placed], *, limit: int, slots: int) -> None:
        self.source, self.default, self._place, self.limit, self.slots = source, default, place, limit, slots
        self._loaded: dict[tuple[str, tuple[int, ...]], Loaded] = {}
        self._loads: dict[tuple[str, tuple[int, ...]], _Load] = {}
        self._unreadable: set[tuple[str, tuple[int, ...]]] = set()
        self._turn = asyncio.Lock()
        self._wants_room = False
        self._changed = asyncio.Event()
        self._offers: list[Offer] = []
        self._read_at = -math.inf

    async def offers(self) -> list[Offer]:
        """What there is now, newest first. What could not be read is left out, and `latest` is the newest that can."""
        if time.monotonic() - self._read_at > FRESH_SECONDS:
            found = await asyncio.to_thread(self.source.offers)
            self._unreadable &= {offer.key for offer in found}
            self._offers = [offer for offer in found if offer.key not in self._unreadable]
            if self._offers and "latest" not in self._offers[0].aliases:
                self._offers[0] = replace(self._offers[0], aliases=("latest", *self._offers[0].aliases))
            self._read_at = time.monotonic()
        return self._offers

    async def find(self, name: str) -> Offer:
        """Raises Unknown."""
        offers = await self.offers()
        for offer in offers:
            if name == offer.name or name in offer.aliases:
                return offer
        there = [*(alias for offer in offers for alias in offer.aliases), *(offer.name for offer in offers)]
        raise Unknown(f"there is no model {name!r:.100}; there are {', '.join(there) or 'none'}")

    async def lease(self, name: str | None = None) -> Loaded:
        """A model in memory, which stays there until `release`. Raises Unknown and TooLarge."""
        name = name or self.default
        while True:
            offer = await self.find(name)
            loaded = self._loaded.get(offer.key)
            if loaded is not None and not self._wants_room:
                loaded.users += 1
                return loaded
            if loaded is not None:  # one that waits for room comes first
                async with self._turn:
                    continue
            load = self._loads.get(offer.key)
            if load is None:
                load = self._loads[offer.key] = _Load()
                load.task = asyncio.create_task(self._load(offer, load))
                load.task.add_done_callback(asyncio.Task.exception)  # it was told to whoever waits still
            load.waiters += 1
            try:
                await asyncio.shield(load.task)
            except Unknown:
                if name == offer.name:
                    raise
            finally:
                load.waiters -= 1
                self._changed.set()

    @property
    def idle(self) -> bool:
        """Whether no model is being loaded."""
        return not self._loads

    def release(self, loaded: Loaded) -> None:
        """Somebody has done with it."""
        loaded.users -= 1
        loaded.used_at = time.monotonic()
        self._changed.set()

    async def _load(self, offer: Offer, load: _Load) -> None:
        """Bring it into memory, unless nobody waits for it any more. Raises Unknown and TooLarge."""
        try:
            async with self._turn:
                if not load.waiters:
                    return
                opened = await asyncio.to_thread(self.source.open, offer.name)
                size = opened.weights + keys_and_values(opened.config, self.slots)
                if await self._made_room(offer, size, load):
                    placed, talk = await asyncio.to_thread(self._built, opened)
                    self._loaded[offer.key] = Loaded(offer, placed, talk, size)
        except (ValueError, OSError) as error:
            print(f"passed over: {error}", file=sys.stderr, flush=True)
            self._unreadable.add(offer.key)
            self._read_at = -math.inf
            raise Unknown(f"{offer.name} cannot be read; the server's log says why") from None
        finally:
            del self._loads[offer.key]

    def _built(self, opened: Opened) -> tuple[Placed, ChatFormat]:
        model, talk = opened.build()
        return self._place(model.eval()), talk

    async def _made_room(self, offer: Offer, size: int, load: _Load) -> bool:
        """Unload what is idle until there is so much room; False where nobody waits any more. Raises TooLarge."""
        if size > self.limit:
            raise TooLarge(f"{offer.name} takes {size / 2**30:.2f} GiB, more than the {self.limit / 2**30:.2f} allowed")
        self._wants_room = True
        try:
            while sum(loaded.size for loaded in self._loaded.values()) + size > self.limit:
                if not load.waiters:
                    return False
                idle = [(loaded.used_at, key) for key, loaded in self._loaded.items() if not loaded.users]
                if idle:
                    del self._loaded[min(idle)[1]]
                else:
                    self._changed.clear()
                    await self._changed.wait()
        finally:
            self._wants_room = False
        return True
