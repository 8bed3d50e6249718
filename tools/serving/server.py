"""A server of models, wired: models, engine, routes and guard behind a socket, from the first load to a clean stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import socket
from collections.abc import Callable, Iterator
from functools import partial

import psutil
import torch
import uvicorn

from orchestrate.tools.serving import LOOPBACK
from orchestrate.tools.serving.app import Service
from orchestrate.tools.serving.engine import Engine
from orchestrate.tools.serving.guard import Guard, Rate
from orchestrate.tools.serving.models import OneModel, RunFolder, Shelf, TooLarge, Unknown
from orchestrate.training.run.device import pick_device
from orchestrate.training.session.sampling import is_run, placed
from orchestrate.training.settings.errors import Refused


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the command hears them


async def serve(
    options: argparse.Namespace,
    listener: socket.socket,
    stops: Callable[[], bool],
    ready: Callable[[str], None],
) -> bool:
    """Serve until `stops` says so. Raises ValueError.

    Args:
        options: as `orchestrate serve` has them.
        listener: a socket that is bound.
        ready: called with what to tell a person once requests are taken.

    Returns whether all has ended: a model that is being read cannot be interrupted.
    """
    memory = int(options.memory * 2**30) or _memory(pick_device(options.device, 0)) // 2
    source = (RunFolder if is_run(options.run, options.checkpoint) else OneModel)(options.run, options.dataset)
    place = partial(placed, device=options.device, dtype=options.dtype)
    shelf = Shelf(source, options.checkpoint, place, limit=memory, slots=options.slots)
    try:
        loaded = await shelf.lease()
    except (Unknown, TooLarge) as error:
        raise Refused(f"{options.run}: {error}") from None
    shelf.release(loaded)

    loop = asyncio.get_running_loop()
    engine = Engine(options.slots, lambda told: loop.call_soon_threadsafe(service.arrived, told))
    service = Service(shelf, engine, options.queue)
    hosts = {*LOOPBACK, *(name.lower() for name in options.allow_host)}
    app = Guard(
        service.app(),
        hosts if options.host in LOOPBACK or options.allow_host else (),
        options.token,
        Rate(options.rate),
    )
    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # who asks could say that somebody else does
            limit_concurrency=1000,
            timeout_graceful_shutdown=math.ceil(options.stop_seconds) + 5,
        )
    )
    engine.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    ready(f"serving {options.run} ({loaded.offer.name}): a page at {address}, OpenAI's API at {address}/v1")
    while engine.alive and not (stops() or serving.done()):
        await asyncio.sleep(0.05)
    service.stop(options.stop_seconds)
    server.should_exit = True
    await serving
    return await asyncio.to_thread(engine.join, 1.0) and shelf.idle


def _memory(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
