"""A served run under load: how much faster requests are together than one after the other, and what survives a storm.

    python bench/serve.py RUN [--clients 8] [--requests 16] [--tokens 64] [--rounds 3] [--least 3]
    python bench/serve.py RUN --stress SECONDS [--clients 8] [--kill_every 3]

The server is `orchestrate serve RUN` in a process of its own, the clients are OpenAI's, each in a process of its own.
Throughput is measured in turns, in rounds, and the ratio is that of the medians. With --stress the clients ask at
random for answers that are known, because each was asked for alone before, and one client after another is killed in
the middle and replaced. Every answer is compared, and every request must have one unless its client was killed.
Exits with 1 where something is missing, differs, or is slower than --least.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["Hello", "To be, or not to be", "The cat", "1 2 3", "Once upon a time there was", "a", "What is it?", "No."]


@contextlib.contextmanager
def server(run: str, clients: int) -> Iterator[tuple[str, subprocess.Popen]]:
    """Address and process. Ends it with SIGTERM and checks how it ended."""
    command = [sys.executable, "-m", "orchestrate", "serve", run, "--port=0", f"--slots={clients}", "--rate=0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if not line:
        sys.exit(process.wait())
    print(line, end="")
    try:
        yield line.rsplit(" ", 1)[1].strip(), process
    finally:
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = process.wait(60)
        print(f"stopped within {time.monotonic() - began:.1f} s, exit code {code}")
        assert code == 128 + signal.SIGTERM


def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", timeout=120, max_retries=0)


def answer(asked: dict[str, Any], ask: openai.OpenAI) -> list[str]:
    """The texts that answer a request, in a stream or at once."""
    chat = "messages" in asked
    create = ask.chat.completions.create if chat else ask.completions.create
    if not asked.get("stream"):
        choices = create(**asked).choices
        return [(choice.message.content if chat else choice.text) or "" for choice in choices]
    texts, ended = [""] * asked.get("n", 1), 0
    for chunk in create(**asked):
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta.content if chat else choice.text) or ""
            ended += choice.finish_reason is not None
    assert ended == len(texts), "a stream ended early"
    return texts


# ---------------------------------------------------------------------------------------------- throughput


def throughput(address: str, options: argparse.Namespace) -> bool:
    asked = [
        {"model": "latest", "prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": options.tokens, "seed": i}
        for i in range(options.requests)
    ]
    clients = [client(address) for _ in range(options.clients)]

    def rate(at_once: int) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            got = pool.map(lambda job: clients[job[0] % at_once].completions.create(**job[1]), enumerate(asked))
            tokens = sum(one.usage.completion_tokens for one in got)
        return tokens / (time.perf_counter() - began)

    rate(options.clients)  # warm up
    found = [(rate(1), rate(options.clients)) for _ in range(options.rounds)]
    alone, together = (sorted(rates) for rates in zip(*found, strict=True))
    for name, rates in (("one after the other", alone), (f"{options.clients} clients", together)):
        print(f"{name}: {statistics.median(rates):.0f} tokens/s ({rates[0]:.0f} to {rates[-1]:.0f})")
    ratio = statistics.median(together) / statistics.median(alone)
    print(f"together {ratio:.2f} times as fast (least {options.least})")
    return ratio >= options.least


# ---------------------------------------------------------------------------------------------- stress


def storm(address: str, process: subprocess.Popen, options: argparse.Namespace) -> bool:
    """Known answers, clients that are killed, and what came of it."""
    names = [model.id for model in client(address).models.list().data]
    rng = random.Random(options.seed)
    asked = []
    for i in range(48):
        body: dict[str, Any] = {"model": rng.choice(names[:4]), "seed": i, "max_tokens": rng.choice([1, 8, 24, 48])}
        body |= {"temperature": rng.choice([0, 0.7, 1.0]), "top_p": rng.choice([1, 0.9]), "n": rng.choice([1, 1, 2])}
        prompt = rng.choice(PROMPTS)
        body |= {"prompt": prompt} if i % 2 else {"messages": [{"role": "user", "content": prompt}]}
        asked.append(body)
    known = [answer(body, client(address)) for body in asked]
    print(f"{len(asked)} requests answered alone, {len({json.dumps(texts) for texts in known})} different answers")

    fork = multiprocessing.get_context("fork")  # openai is imported already
    counts: Counter[str] = Counter()
    workers: dict[multiprocessing.connection.Connection, Any] = {}
    flying: dict[Any, int] = {}

    def start(number: int) -> None:
        ours, theirs = fork.Pipe(duplex=False)
        worker = fork.Process(target=_client, args=(address, asked, number, theirs), daemon=True)
        worker.start()
        theirs.close()
        workers[ours] = worker

    for number in range(options.clients):
        start(number)
    memory = psutil.Process(process.pid).memory_info
    end, kill_at, first = time.monotonic() + options.stress, time.monotonic() + options.kill_every, memory().rss
    started = options.clients
    while time.monotonic() < end:
        for pipe in multiprocessing.connection.wait(list(workers), timeout=0.1):
            kind, index, told = pipe.recv()
            if kind == "asks":
                flying[pipe] = index
                continue
            del flying[pipe]
            counts["answered"] += 1
            counts["tokens"] += sum(map(len, told)) if kind == "answer" else 0
            if kind == "error" or told != known[index]:
                counts["wrong"] += 1
                print(f"request {index} {asked[index]}: {kind} {told!r}, alone {known[index]!r}")
        if time.monotonic() >= kill_at:
            kill_at += options.kill_every
            pipe = rng.choice(list(workers))
            workers.pop(pipe).kill()
            counts["killed"] += 1
            counts["killed in the middle"] += flying.pop(pipe, None) is not None
            pipe.close()
            started += 1
            start(started)
    # Every request that was made has an answer, but those of clients that were killed.
    for pipe, worker in workers.items():
        if pipe in flying and not (pipe.poll(60) and pipe.recv()[0] == "answer"):
            counts["lost"] += 1
        worker.kill()
    time.sleep(1.0)
    left = json.load(urllib.request.urlopen(address.removesuffix("/v1") + "/health"))["rows"]
    again = sum(answer(body, client(address)) != texts for body, texts in zip(asked, known, strict=True))
    grown = (memory().rss - first) / 2**20
    print(
        f"{options.stress} s, {options.clients} clients: {counts['answered']} answers, {counts['wrong']} wrong, "
        f"{counts['lost']} lost; {counts['killed']} clients killed, {counts['killed in the middle']} in the middle of "
        f"an answer; {left} rows left behind, {again} answers differ afterwards; the server grew by {grown:.0f} MiB"
    )
    return not (counts["wrong"] or counts["lost"] or left or again) and counts["answered"] > 0


def _client(address: str, asked: list[dict[str, Any]], number: int, pipe: Any) -> None:
    """Ask for one at random, and tell what came, for ever."""
    rng, ask = random.Random(number), client(address)
    while True:
        index = rng.randrange(len(asked))
        pipe.send(("asks", index, None))
        try:
            pipe.send(("answer", index, answer({**asked[index], "stream": rng.random() < 0.5}, ask)))
        except Exception as error:
            pipe.send(("error", index, f"{type(error).__name__}: {error}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least", type=float, default=3.0)
    parser.add_argument("--stress", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--kill_every", type=float, default=3.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with server(options.run, options.clients) as (address, process):
        good = storm(address, process, options) if options.stress else throughput(address, options)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
