"""Talk to a run's checkpoints over HTTP: OpenAI's API at /v1, and a page to chat on at /.

    orchestrate serve RUN [--checkpoint latest|best|NAME] [--host 127.0.0.1] [--port 8000] [--token T | FILE:PATH]

RUN is a run folder, which may be training meanwhile, a Hugging Face or PEFT folder, or a nanoGPT ckpt.pt. Every
checkpoint of a run can be asked for. Another address than this machine's own needs a token. docs/serving.md has the
limits. Ctrl-C or SIGTERM ends it: what is being answered has --stop_seconds, and everybody else is told.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrate.tools.main import called, script
from orchestrate.tools.serving import LOOPBACK
from orchestrate.training.run.device import DTYPES
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.session.lock import lock_for_serving
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.settings.errors import Refused, refusing


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. Raises Refused."""
    parser = argparse.ArgumentParser(
        prog=called("serve"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, a Hugging Face or PEFT folder or a nanoGPT ckpt.pt")
    parser.add_argument("--checkpoint", default="latest", help="for requests that name none (default latest)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default 8000)")
    parser.add_argument("--token", default="", help="what requests must bring as API key; FILE:path of one")
    parser.add_argument(
        "--allow_host", action="append", default=[], metavar="NAME",
        help="another name that requests may have for this server, as behind a proxy (repeatable)",
    )  # fmt: skip
    parser.add_argument("--slots", type=int, default=8, help="texts that a model writes at once (default 8)")
    parser.add_argument("--queue", type=int, default=64, help="texts that may wait beyond those (default 64)")
    parser.add_argument("--rate", type=int, default=600, help="requests a minute of one address; 0: any (default 600)")
    parser.add_argument(
        "--memory", type=float, default=0.0, metavar="GIB",
        help="what models in memory may take together (default 0: half of the device's memory)",
    )  # fmt: skip
    parser.add_argument("--stop_seconds", type=float, default=10.0, help="to finish answers at the end (default 10)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--dataset", default="", help="take the tokenizer of this data set")
    options = parser.parse_args(arguments)
    problems = [
        f"--{name}: must be at least {least}, got {getattr(options, name)}"
        for name, least in (("port", 0), ("slots", 1), ("queue", 0), ("rate", 0), ("memory", 0), ("stop_seconds", 0))
        if not least <= getattr(options, name) < math.inf
    ]
    if options.port > 65535:
        problems.append(f"--port: must be at most 65535, got {options.port}")
    if options.token.startswith("FILE:"):
        try:
            options.token = Path(options.token.removeprefix("FILE:")).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"--token: the file cannot be read ({error})")
        else:
            problems += [] if options.token else ["--token: the file is empty"]
    if not (options.token.isascii() and options.token.isprintable()) or " " in options.token:
        problems.append("--token: must be of ASCII characters without blanks")
    if options.host not in LOOPBACK and not options.token and not problems:
        problems.append(f"--host {options.host}: another address than {' or '.join(LOOPBACK)} needs a --token")
    if problems:
        raise Refused(problems)
    return options


def main(arguments: Sequence[str], watch: SignalWatch | None = None) -> int:
    """Serve until a signal; returns the exit code. Raises Refused."""
    options = parse(arguments)
    try:
        from orchestrate.tools.serving.server import serve
    except ModuleNotFoundError as error:
        raise Refused(f"serve: {error.name} is missing: pip install 'training-orchestrator[serve]'") from None
    watch = watch or SignalWatch()

    def ready(what: str) -> None:
        watch.begin(Ranks("cpu"))  # from now on a signal is an end in order
        print(what, flush=True)

    with refusing(), lock_for_serving(options.run), _listener(options.host, options.port) as listener:
        over = asyncio.run(serve(options, listener, lambda: bool(watch.received), ready))
    code = 128 + watch.received if watch.received else 1
    if not over:
        sys.stdout.flush()
        os._exit(code)
    return code


def _listener(host: str, port: int) -> socket.socket:
    """A socket that is bound to this address. Raises Refused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise Refused(f"--host {host} --port {port}: cannot be listened on ({error.strerror})") from None
    return listener


if __name__ == "__main__":
    script("serve", sys.argv[1:])
