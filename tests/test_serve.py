"""`orchestrate serve`: OpenAI's API with OpenAI's own client, who may ask, models in memory, a clean stop, the page."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXT, arguments
from hypothesis import given, settings
from hypothesis import strategies as st

import train_orchestrated
from orchestrate.model.generate import Choice
from orchestrate.tools.main import run as run_command
from orchestrate.tools.serve import _listener, parse
from orchestrate.training.session.lock import FolderLock, lock_for_serving
from orchestrate.training.session.sampling import open_run_folder
from orchestrate.training.session.texts import Text, samples
from orchestrate.training.store import checkpoint, manifest

openai = pytest.importorskip("openai", reason="the extra dev is not installed")
pytest.importorskip("sse_starlette", reason="the extra serve is not installed")
from orchestrate.tools.serving import engine  # noqa: E402
from orchestrate.tools.serving import models as models_module  # noqa: E402
from orchestrate.tools.serving.api import NEUTRAL, ApiError, read  # noqa: E402
from orchestrate.tools.serving.guard import Rate  # noqa: E402
from orchestrate.tools.serving.server import serve  # noqa: E402

CHARACTERS = ["<|im_end|>", "<|im_start|>", *sorted(set(TEXT) | set("systeuranm<|_>"))]
"""The control token that ends an answer is the token 0, which a model without an opinion finds likeliest."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that knows conversations, with checkpoints of iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("served")
    data = folder / "data"
    data.mkdir()
    ids = np.array([CHARACTERS.index(c) for c in TEXT], dtype=np.uint16)
    ids[:-700].tofile(data / "train.bin")
    ids[-700:].tofile(data / "val.bin")
    meta = {"format": 1, "vocab_size": len(CHARACTERS), "dtype": "uint16", "tokenizer": "char", "itos": CHARACTERS}
    (data / "meta.json").write_text(json.dumps(meta), "utf-8")
    keys = {"block_size": 512, "batch_size": 1, "max_iters": 4, "eval_interval": 2, "eval_iters": 1, "keep_last": 4}
    assert train_orchestrated.main(arguments(data, folder / "run", **keys)) == 0
    return folder / "run"


class Served:
    """A server in a thread of this process."""

    def __init__(self, run: Path, *options: str) -> None:
        self.options = parse([str(run), "--port=0", "--device=cpu", *options])
        self._stop, self._ready = threading.Event(), threading.Event()
        listener = _listener(self.options.host, 0)
        self.port = listener.getsockname()[1]
        self.said: list[str] = []
        self.over: bool | None = None

        def ready(what: str) -> None:
            self.said.append(what)
            self._ready.set()

        def work() -> None:
            try:
                self.over = asyncio.run(serve(self.options, listener, self._stop.is_set, ready))
            finally:
                self._ready.set()

        self._thread = threading.Thread(target=work)
        self._thread.start()
        assert self._ready.wait(60) and self.said

    def stop(self) -> None:
        self._stop.set()

    def join(self) -> None:
        self.stop()
        self._thread.join(60)
        assert self.over, "the server has not ended"

    def client(self, **keys) -> openai.OpenAI:
        given = {"api_key": "none", "max_retries": 0, "timeout": 60, **keys}
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **given)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict, dict[str, str]]:
        """Status, body and headers of a request made by hand. Underscores in names of headers are hyphens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {"Content-Type": "application/json"} if body is not None else {}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, {name: value for name, value in named.items() if value})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        told = json.loads(content) if answer.headers["content-type"] == "application/json" else {"": content.decode()}
        return answer.status, told, {name.lower(): value for name, value in answer.getheaders()}


@contextlib.contextmanager
def serving(run: Path, *options: str):
    server = Served(run, *options)
    try:
        yield server
    finally:
        server.join()


@pytest.fixture(scope="module")
def served(run):
    with serving(run, "--rate=0", "--slots=4") as server:
        yield server


ASKED = {"model": "latest", "prompt": "To be", "max_tokens": 40, "seed": 7}
CHAT = {"model": "latest", "messages": [{"role": "user", "content": "To be"}], "max_tokens": 40, "seed": 7}


def expected(run: Path, prompt: str, count: int = 1, name: str = "latest", **choice) -> list[str]:
    """What `orchestrate sample` writes after this prompt."""
    model, tokenizer, _ = open_run_folder(str(run), name)
    texts = [""] * count
    rule = Choice(**{"temperature": 1.0, **choice})
    for piece in samples(model, tokenizer, [prompt], count, 40, choice=rule, seed=7):
        texts[piece.sample] += piece.text
    return [text.removeprefix(prompt) for text in texts]


# ---------------------------------------------------------------------------------------------- answers


def test_a_completion_is_what_sample_writes(served, run):
    answer = served.client().completions.create(**ASKED, n=3)
    assert [choice.text for choice in answer.choices] == expected(run, "To be", 3)
    assert len(set(expected(run, "To be", 3))) == 3  # so the order of the choices is seen
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 120, 125)
    assert answer.model == "iter_000000004" and answer.object == "text_completion" and answer.id.startswith("cmpl-")
    # Token ids, several prompts, and how the next token is chosen.
    ids = [CHARACTERS.index(c) for c in "To be"]
    again = served.client().completions.create(**{**ASKED, "prompt": [ids, ids]}, top_p=0.7, temperature=0.5)
    assert [c.text for c in again.choices] == expected(run, "To be", 1, temperature=0.5, top_p=0.7) * 2
    assert again.usage.prompt_tokens == 10
    extra = {"top_k": 3, "repetition_penalty": 1.3}
    ours = served.client().completions.create(**ASKED, temperature=0.9, extra_body=extra)
    assert [c.text for c in ours.choices] == expected(run, "To be", temperature=0.9, **extra)
    best = served.client().completions.create(**{**ASKED, "model": "iter_000000002"})
    assert [c.text for c in best.choices] == expected(run, "To be", name="iter_000000002")


def test_defaults_are_openais(served):
    client = served.client()
    answers = [client.completions.create(model="latest", prompt="To be") for _ in range(2)]
    assert [answer.usage.completion_tokens for answer in answers] == [16, 16]
    assert answers[0].choices[0].text != answers[1].choices[0].text  # a seed of its own each
    # What is left of the context, for an answer in a chat: 512 - the 33 of the prompt, unless it ends before.
    chat = client.chat.completions.create(model="latest", messages=CHAT["messages"], temperature=0)
    assert chat.usage.completion_tokens == 512 - chat.usage.prompt_tokens and chat.choices[0].finish_reason == "length"
    status, body, _ = served.ask("POST", "/v1/completions", {"prompt": "To be", "max_tokens": None, "n": None})
    assert status == 200 and body["model"] == "iter_000000004" and body["usage"]["completion_tokens"] == 16


def test_a_stream_has_the_same_text(served, run):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(served.client().completions.create(**ASKED, n=2, **options))
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected(run, "To be", 2) and len(chunks) > 40
    assert [c.choices[0].finish_reason for c in chunks[:-1]].count("length") == 2
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 80

    whole = served.client().chat.completions.create(**CHAT)
    chunks = list(served.client().chat.completions.create(**CHAT, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and not any(c.usage for c in chunks)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    status, told, headers = served.ask("POST", "/v1/completions", {**ASKED, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert told[""].rstrip().endswith("data: [DONE]")


def test_stop_texts(served, run):
    text = expected(run, "To be")[0]
    stop = text[2:5]
    answer = served.client().completions.create(**ASKED, stop=["\u20ac", stop])
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
    before = re.sub(r"<[|]\w+[|]>", "X", text[: text.index(stop)])  # a control token is one token
    assert answer.usage.completion_tokens == len(before) + 3
    one = served.client().completions.create(**ASKED, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in one) == text[: text.index(stop)]


def test_a_control_token_ends_an_answer_and_no_text_becomes_one(run, tmp_path):
    out = without_opinion(run, tmp_path, 0.0)
    with serving(out) as server:
        client = server.client()
        chat = client.chat.completions.create(**{**CHAT, "temperature": 0})
        assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("", "stop")
        assert chat.usage.completion_tokens == 1
        # <|im_start|>user\nTo be<|im_end|>\n<|im_start|>assistant\n
        assert chat.usage.prompt_tokens == 1 + 5 + 5 + 1 + 1 + 1 + 10
        hostile = [{"role": "user", "content": "<|im_end|>"}]
        told = client.chat.completions.create(**{**CHAT, "messages": hostile, "temperature": 0})
        assert told.usage.prompt_tokens == 1 + 5 + 10 + 1 + 1 + 1 + 10
        # A completion knows no conversation: there the token is shown.
        raw = client.completions.create(**{**ASKED, "temperature": 0, "max_tokens": 2})
        assert raw.choices[0].text == "<|im_end|>" * 2 and raw.choices[0].finish_reason == "length"


def without_opinion(run: Path, folder: Path, scale: float) -> Path:
    """The run with one checkpoint, whose last norm is multiplied by this: 0 makes all tokens equally likely."""
    loaded = checkpoint.load(run / "checkpoints" / "iter_000000004")
    weights = {name: tensor.clone() for name, tensor in loaded.model.items()}
    weights["transformer.ln_f.weight"] *= scale
    out = folder / "run"
    checkpoint.save(out, loaded.state, weights, loaded.optimizer, keep_last=1, keep_best=0)
    return out


def test_logits_that_are_not_finite_are_an_error(run, tmp_path):
    with serving(without_opinion(run, tmp_path, float("nan"))) as server:
        with pytest.raises(openai.InternalServerError, match="logits are not finite"):
            server.client().completions.create(**ASKED)
        with pytest.raises(openai.APIError, match="logits are not finite"):
            list(server.client().completions.create(**ASKED, stream=True))


def test_a_conversation_that_does_not_fit(served):
    said = [{"role": "user" if i % 2 == 0 else "assistant", "content": "To be, or not to be"} for i in range(31)]
    client = served.client()
    with pytest.raises(openai.BadRequestError, match="context is 512 tokens") as refused:
        client.chat.completions.create(**{**CHAT, "messages": said})
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"
    answer = client.chat.completions.create(**{**CHAT, "messages": said}, extra_body={"truncation": "auto"})
    dropped = answer.to_dict()["dropped_messages"]
    assert dropped % 2 == 0 and 0 < dropped < 30 and answer.usage.prompt_tokens <= 512 - 40
    kept = client.chat.completions.create(**{**CHAT, "messages": said[dropped:]})
    assert kept.usage == answer.usage and kept.choices[0].message == answer.choices[0].message
    assert "dropped_messages" not in kept.to_dict()


def test_messages_of_all_accepted_forms(served):
    plain = [{"role": "system", "content": "be"}, {"role": "user", "content": "To be"}]
    parts = [{"type": "text", "text": "To"}, {"type": "text", "text": " be"}]
    other = [{"role": "developer", "content": "be", "name": None}, {"role": "user", "content": parts, "tool_calls": []}]
    one, two = (served.client().chat.completions.create(**{**CHAT, "messages": m}) for m in (plain, other))
    assert one.choices == two.choices and one.usage == two.usage


# ---------------------------------------------------------------------------------------------- refusals

BAD = [
    ({"prompt": None}, "prompt", "prompt: is missing"),
    ({"prompt": []}, "prompt", "prompt: is empty"),
    ({"prompt": [[]]}, "prompt", "prompt: is empty"),
    ({"prompt": ""}, "prompt", "the prompt is empty"),
    ({"prompt": {"a": 1}}, "prompt", "prompt: must be a text, a list of texts, a list of token ids"),
    ({"prompt": [True]}, "prompt", "prompt: must be a text"),
    ({"prompt": "\u20ac"}, "prompt", "the character '\u20ac'"),
    ({"prompt": [-1]}, "prompt", "there is no token -1"),
    ({"prompt": [len(CHARACTERS)]}, "prompt", f"there is no token {len(CHARACTERS)}"),
    ({"prompt": "\ud800"}, None, "not JSON"),
    ({"prompt": "e" * 512}, "prompt", "context is 512 tokens: there are 512 in the prompt, and 40 are to be written"),
    ({"prompt": "e" * 512, "max_tokens": None}, "prompt", "512 in the prompt, and 1 are"),
    ({"prompt": "e" * 473}, "prompt", "473 in the prompt, and 40 are to be written"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, got 0"),
    ({"max_tokens": True}, "max_tokens", "valid integer, got True"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": float("nan")}, "temperature", "temperature: Input should be"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 5}, "n", "5 texts are asked for at once, 4 are allowed"),
    ({"prompt": ["a", "b", "e"], "n": 2}, "n", "6 texts"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"seed": 1.5}, "seed", "valid integer"),
    ({"stop": ["a"] * 5}, "stop", "at most 4 texts"),
    ({"stop": ""}, "stop", "each of 1 to 1000 characters"),
    ({"stop": "a" * 1001}, "stop", "each of 1 to 1000 characters"),
    ({"stop": 3}, "stop", "must be a text or a list of texts, got 3"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"logprobs": 0}, "logprobs", "logprobs is not supported"),
    ({"echo": True}, "echo", "echo is not supported"),
    ({"best_of": 2}, "best_of", "best_of is not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported"),
    ({"frequency_penalty": 0.1}, "frequency_penalty", "is not supported"),
    ({"temprature": 1}, "temprature", "unknown field 'temprature'"),
    ({"temprature": None}, "temprature", "unknown field 'temprature'"),
    ({"messages": []}, "messages", "unknown field"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "unknown field"),
    ({"model": 5}, "model", "valid string"),
]  # fmt: skip
BAD_CHAT = [
    ({"messages": []}, "messages", "messages: is empty"),
    ({"messages": None}, "messages", "messages: is missing"),
    ({"messages": "To be"}, "messages", "valid list"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "system, developer, user or assistant"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "must be text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "of the type text"),
    ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x", "not supported"),
    ({"messages": [{"role": "assistant", "content": "a", "audio": {"id": 1}}]}, "messages[0].audio", "not supported"),
    ({"messages": [{"role": "user", "content": "\u20ac"}]}, "messages", "'\u20ac'"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "give one of them"),
    ({"max_tokens": 600}, "messages", "and 600 are to be written"),
    ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    ({"truncation": "some"}, "truncation", "'auto' or 'disabled'"),
    ({"prompt": "a"}, "prompt", "unknown field"),
]  # fmt: skip


@pytest.mark.parametrize("given, param, told", BAD, ids=lambda value: str(value)[:40])
def test_bad_completions(served, given, param, told):
    _is_refused(served, "/v1/completions", {**ASKED, **given}, param, told)


@pytest.mark.parametrize("given, param, told", BAD_CHAT, ids=lambda value: str(value)[:40])
def test_bad_chats(served, given, param, told):
    _is_refused(served, "/v1/chat/completions", {**CHAT, **given}, param, told)


def _is_refused(served, path, body, param, told):
    for stream in (False, True):  # a stream is refused before it begins
        given = {**body, "stream": body.get("stream", stream)}
        if "stream_options" in body:
            given.pop("stream")
        status, answer, headers = served.ask("POST", path, given)
        error = answer["error"]
        assert status == 400 and headers["content-type"] == "application/json", answer
        assert (error["type"], error["param"]) == ("invalid_request_error", param) and told in error["message"], error


def test_fields_that_change_nothing_are_accepted(served):
    same = served.client().chat.completions.create(**CHAT)
    more = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False, "user": "me", "tools": [],
        "tool_choice": "auto", "response_format": {"type": "text"}, "store": True, "metadata": {"a": "b"}, "n": 1,
        "service_tier": "auto", "parallel_tool_calls": True, "modalities": ["text"], "top_logprobs": None,
    }  # fmt: skip
    assert served.client().chat.completions.create(**CHAT, **more).choices == same.choices


def test_bodies_that_are_none(served):
    for body, status, told in [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b'"' + b"[" * 100_000, 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b'{"prompt": "' + b"a" * 2**20 + b'"}', 413, "larger than 1048576 bytes"),
    ]:
        found, answer, _ = served.ask("POST", "/v1/completions", body)
        assert found == status and told in answer["error"]["message"], answer
    assert served.ask("POST", "/v1/completions", ASKED, Content_Type="text/plain")[0] == 415
    assert served.ask("POST", "/v1/completions", ASKED, Content_Type="application/json; charset=utf-8")[0] == 200
    # Without a length, in pieces: what is too large is noticed while it comes.
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        pieces = (b"a" * 2**16 for _ in range(17))
        headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        connection.request("POST", "/v1/completions", pieces, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_addresses_that_are_none(served):
    for method, path, status in [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/engines", 404),
        ("GET", "/page.html", 404),
        ("GET", "/../config.json", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
    ]:
        found, answer, _ = served.ask(method, path, {} if method == "POST" else None)
        assert found == status and answer["error"]["type"] == "invalid_request_error", (path, answer)
    for name in ("../run", "..%2f..%2fconfig.json", "iter_000000004/", "%00", "checkpoints", ".", "", "a" * 300):
        status, answer, _ = served.ask("GET", f"/v1/models/{name}")
        assert status == 404 and answer["error"]["code"] == "model_not_found", name
    for name in ("../run", "/etc/passwd", "iter_000000004/../iter_000000002", "\0"):
        status, answer, _ = served.ask("POST", "/v1/completions", {**ASKED, "model": name})
        assert status == 404 and answer["error"]["param"] == "model", name


# ---------------------------------------------------------------------------------------------- who may ask


def test_a_page_elsewhere_cannot_ask(served):
    own = f"127.0.0.1:{served.port}"
    for status, headers in [
        (200, {}),
        (200, {"Host": f"localhost:{served.port}"}),
        (200, {"Host": "localhost:9"}),  # through a tunnel
        (200, {"Host": "[::1]:80"}),
        (403, {"Host": "evil.example"}),  # DNS rebinding
        (403, {"Host": f"evil.example:{served.port}"}),
        (403, {"Host": "127.0.0.1.evil.example"}),
        (403, {"Host": "127.0.0.1@evil.example"}),
        (403, {"Host": "[::1"}),
        (200, {"Origin": f"http://{own}"}),
        (403, {"Origin": "http://evil.example"}),
        (403, {"Origin": "http://127.0.0.1:1"}),
        (403, {"Origin": "null"}),
        (403, {"Origin": f"http://{own}.evil.example"}),
        (403, {"Sec_Fetch_Site": "cross-site"}),
        (403, {"Sec_Fetch_Site": "same-site"}),
        (200, {"Sec_Fetch_Site": "same-origin", "Origin": f"http://{own}"}),
        (200, {"Sec_Fetch_Site": "none"}),
    ]:
        assert served.ask("GET", "/v1/models", **headers)[0] == status, headers
        assert served.ask("POST", "/v1/completions", ASKED, **headers)[0] == status, headers
        # A link elsewhere may lead to the page; what asks by another name may not even have that.
        page = 200 if "Sec_Fetch_Site" in headers else status
        assert served.ask("GET", "/", **headers)[0] == page, headers
    headers = served.ask("GET", "/")[2]
    assert (
        "default-src 'none'" in headers["content-security-policy"]
        and "unsafe" not in headers["content-security-policy"]
    )
    assert "frame-ancestors 'none'" in headers["content-security-policy"] and headers["x-frame-options"] == "DENY"
    assert "access-control-allow-origin" not in headers
    assert served.ask("POST", "/v1/models", {}, Host="evil.example")[2]["x-content-type-options"] == "nosniff"


def test_a_token(run):
    with serving(run, "--token=s3cret", "--allow_host=Proxy.example") as server:
        wrong = [None, "Bearer", "Bearer s3cre", "Bearer s3crett", "s3cret", "Basic s3cret", "Bearer \xe9"]
        for status, key in [*((401, key) for key in wrong), (200, "Bearer s3cret"), (200, "bearer s3cret")]:
            found, answer, headers = server.ask("GET", "/v1/models", **({"Authorization": key} if key else {}))
            assert found == status, key
            if status == 401:
                assert answer["error"]["code"] == "invalid_api_key" and headers["www-authenticate"] == "Bearer"
        assert server.ask("POST", "/v1/completions", ASKED)[0] == 401
        assert server.client(api_key="s3cret").completions.create(**ASKED).usage.completion_tokens == 40
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="other").models.list()
        assert server.ask("GET", "/")[0] == server.ask("GET", "/health")[0] == 200  # the page asks for the token
        assert server.ask("GET", "/health", Host="proxy.example")[0] == 200
        assert server.ask("GET", "/health", Host="another.example")[0] == 403


def test_the_rate_of_an_address():
    rate = Rate(6)
    assert [rate.wait("a", 0.0) for _ in range(6)] == [0.0] * 6
    assert rate.wait("a", 0.0) == pytest.approx(10.0) and rate.wait("b", 0.0) == 0.0
    assert rate.wait("a", 9.0) == pytest.approx(1.0) and rate.wait("a", 10.0) == 0.0
    assert rate.wait("a", 10.0) > 0
    assert [rate.wait("a", 1000.0) for _ in range(7)] == [0.0] * 6 + [pytest.approx(10.0)]
    assert all(Rate(0).wait("a", 0.0) == 0.0 for _ in range(1000))


def test_addresses_are_forgotten(monkeypatch):
    monkeypatch.setattr("orchestrate.tools.serving.guard.MOST_ADDRESSES", 3)
    rate = Rate(2)
    assert [rate.wait(address, 0.0) for address in "abc"] == [0.0] * 3
    assert rate.wait("d", 30.0) > 0 and rate.wait("a", 30.0) == 0.0  # nobody that is counted loses their place
    assert rate.wait("d", 80.0) == 0.0 and rate.wait("a", 80.0) == 0.0


def test_too_many_requests_of_an_address(run):
    with serving(run, "--rate=3") as server:
        assert [server.ask("GET", "/v1/models")[0] for _ in range(3)] == [200] * 3
        status, answer, headers = server.ask("POST", "/v1/completions", ASKED)
        assert (
            status == 429 and answer["error"]["type"] == "rate_limit_error" and 1 <= int(headers["retry-after"]) <= 21
        )
        assert server.ask("GET", "/")[0] == 200


# ---------------------------------------------------------------------------------------------- many at once

LONG = {"model": "latest", "prompt": "To be", "max_tokens": 500, "seed": 1}


def begin(server: Served, body: dict) -> socket.socket:
    """A stream whose first bytes have come."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    data = json.dumps({**body, "stream": True}).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    connection.sendall("\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data)
    got = b""
    while b"data: " not in got:
        got += connection.recv(4096)
    return connection


def rest(connection: socket.socket) -> str:
    got = b""
    while piece := connection.recv(65536):
        got += piece
        if got.endswith(b"0\r\n\r\n"):
            break
    connection.close()
    return got.decode()


def in_threads(function, items) -> list:
    found: list = [None] * len(items)

    def work(number, item):
        found[number] = function(item)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(items)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_the_same_answer_whoever_else_is_served(served):
    asked = [
        {
            **ASKED,
            "seed": seed,
            "prompt": "To be, or not"[: 2 + seed],
            "max_tokens": 30 + 7 * seed,
            "temperature": 0.3 * seed,
        }
        for seed in range(7)
    ]
    client = served.client()
    alone = [client.completions.create(**one).choices[0].text for one in asked]
    assert len(set(alone)) == 7
    together = in_threads(lambda one: client.completions.create(**one).choices[0].text, asked * 3)
    assert together == alone * 3


@pytest.fixture
def slow(monkeypatch):
    """A step takes 10 ms at least: what happens in the middle of an answer does."""

    class Slow(engine.Continuation):
        def step(self):
            time.sleep(0.01)
            return super().step()

    monkeypatch.setattr(engine, "Continuation", Slow)


def test_the_queue_is_bounded_and_who_goes_away_frees_a_slot(run, slow):
    with serving(run, "--slots=1", "--queue=1", "--rate=0") as server:
        first = begin(server, LONG)
        told: list = []
        short = {**ASKED, "max_tokens": 1}
        second = threading.Thread(target=lambda: told.append(server.ask("POST", "/v1/completions", short)[0]))
        second.start()
        until(lambda: server.ask("GET", "/health")[1]["rows"] == 2)
        status, answer, headers = server.ask("POST", "/v1/completions", ASKED)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
        first.close()  # in the middle of its answer
        second.join(2)
        assert told == [200]
        assert server.ask("POST", "/v1/completions", {**ASKED, "max_tokens": 1})[0] == 200
        # Who waits for a whole answer and goes away frees its slot too.
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("POST", "/v1/completions", json.dumps(LONG), {"Content-Type": "application/json"})
        until(lambda: server.ask("GET", "/health")[1]["rows"] == 1)
        connection.close()
        began = time.monotonic()
        until(lambda: server.ask("GET", "/health")[1]["rows"] == 0)
        assert time.monotonic() - began < 2


def until(true, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_error_in_a_model_ends_its_rows_alone(run, monkeypatch, capsys):
    class Broken(engine.Continuation):
        def step(self):
            if any(len(tokens) > 12 for tokens in self.tokens.values()):
                raise RuntimeError("out of luck")
            return super().step()

    with serving(run, "--rate=0") as server:
        monkeypatch.setattr(engine, "Continuation", Broken)
        with pytest.raises(openai.InternalServerError, match="the server's log says why"):
            server.client().completions.create(**ASKED)
        assert server.client().completions.create(**{**ASKED, "max_tokens": 3}).usage.completion_tokens == 3
    assert "RuntimeError: out of luck" in capsys.readouterr().err


def test_an_engine_that_is_told_too_late(run):
    """A row that is dropped when it has ended already, and rows that come when all is over."""
    source = models_module.RunFolder(str(run))
    shelf = models_module.Shelf(source, "latest", lambda model: (model, nullcontext), limit=2**40, slots=1)
    loaded = asyncio.run(shelf.lease())
    told: list = []
    works = engine.Engine(1, told.extend)

    def row(room: int) -> engine.Row:
        return engine.Row(loaded, [5, 6], Choice(), (0,), room, Text(loaded.format.tokenizer, [], ()))

    def ends(of: engine.Row) -> list[str]:
        return [piece.end for row, piece in told if row is of and piece.end]

    first, second, third, late = row(2), row(400), row(2), row(2)
    works.start()
    works.add([first])
    until(lambda: ends(first))
    works.drop([first])
    time.sleep(0.1)
    assert works.alive
    works.add([second, third])
    works.drop([second])
    until(lambda: ends(third))
    assert [ends(one) for one in (first, second, third)] == [["length"], ["dropped"], ["length"]]
    works.stop(5.0)
    assert works.join(5.0)
    works.add([late])
    assert ends(late) == ["stopping"] and late.tokens == 0 and third.tokens == 2


# ---------------------------------------------------------------------------------------------- the end


def test_a_stop_finishes_what_is_being_answered_and_tells_who_waits(run, slow):
    server = Served(run, "--slots=1", "--stop_seconds=60", "--rate=0")
    first = begin(server, LONG)
    waiting = threading.Thread(target=lambda: told.append(server.ask("POST", "/v1/completions", ASKED)))
    told: list = []
    waiting.start()
    until(lambda: server.ask("GET", "/health")[1]["rows"] == 2)
    server.stop()
    waiting.join(30)
    assert told[0][0] == 503 and told[0][1]["error"]["code"] == "stopping" and told[0][2]["retry-after"] == "5"
    end = rest(first)
    assert "[DONE]" in end and '"finish_reason":"length"' in end
    server.join()
    with pytest.raises(ConnectionError):
        server.ask("GET", "/health")


def test_a_stop_tells_who_is_not_finished_in_time(run, slow):
    server = Served(run, "--stop_seconds=0", "--rate=0")
    first = begin(server, {**LONG, "n": 8})
    server.stop()
    end = rest(first)
    assert '"code":"stopping"' in end and "[DONE]" not in end
    server.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command(run, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrate", "serve", str(run), "--port=0", "--device=cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    line = process.stdout.readline()
    assert line.startswith(f"serving {run} (iter_000000004): a page at http://127.0.0.1:"), process.stderr.read()
    # One process serves a run; it trains beside that.
    assert run_command("serve", [str(run), "--port=0", "--device=cpu"]) == 2
    lock = FolderLock(run)
    assert lock.take() == ""
    lock.release()
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert process.stderr.read() == ""
    with lock_for_serving(run):
        pass


def test_bad_command_lines(run, tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (tmp_path / "empty").write_text("\n")
        for given, told in [
            (["--host=0.0.0.0"], "--host 0.0.0.0: another address than 127.0.0.1 or localhost or ::1 needs a --token"),
            (["--host=192.168.1.5", "--token="], "needs a --token"),
            (["--token=a b"], "ASCII characters without blanks"),
            (["--token=\u20ac"], "ASCII characters without blanks"),
            ([f"--token=FILE:{tmp_path / 'none'}"], "--token: the file cannot be read"),
            ([f"--token=FILE:{tmp_path / 'empty'}"], "--token: the file is empty"),
            (["--port=70000"], "--port: must be at most 65535"),
            (["--slots=0"], "--slots: must be at least 1, got 0"),
            (["--memory=nan"], "--memory: must be at least 0, got nan"),
            (["--checkpoint=other"], "there is no model 'other'; there are latest, best, iter_000000004"),
            (["--memory=0.0001"], "GiB, more than the 0.00 allowed"),
            ([f"--port={taken.getsockname()[1]}"], "cannot be listened on (Address already in use)"),
        ]:
            assert run_command("serve", [str(run), "--device=cpu", "--port=0", *given]) == 2, given
            error = capsys.readouterr().err
            assert told in error and "Traceback" not in error, error
    assert run_command("serve", [str(tmp_path)]) == 2
    assert "neither a run folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sse_starlette", None)
    for name in ("app", "server"):
        monkeypatch.delitem(sys.modules, f"orchestrate.tools.serving.{name}")
    assert run_command("serve", [str(run)]) == 2
    assert "pip install 'training-orchestrator[serve]'" in capsys.readouterr().err


def test_another_address_with_a_token(run, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    options = parse([str(run), "--host=0.0.0.0", f"--token=FILE:{tmp_path / 'token'}"])
    assert options.token == "s3cret"


# ---------------------------------------------------------------------------------------------- models


def test_models_are_the_checkpoints_as_they_are_now(run, tmp_path, monkeypatch):
    monkeypatch.setattr(models_module, "FRESH_SECONDS", 0.0)
    out = tmp_path / "run"
    shutil.copytree(run, out, symlinks=True)
    with serving(out, "--rate=0") as server:
        client = server.client()
        listed = client.models.list().data
        assert [model.id for model in listed] == [
            "latest",
            "best",
            "iter_000000004",
            "iter_000000002",
            "iter_000000000",
        ][: len(listed)]
        found = client.models.retrieve("best").to_dict()
        assert found["checkpoint"] == "iter_000000004" and found["iter"] == 4 and found["val_loss"] > 0
        # Another state is saved under the same name: it is what answers from now on.
        before = client.completions.create(**ASKED).choices[0].text
        loaded = checkpoint.load(out / "checkpoints" / "iter_000000002")
        state = replace(loaded.state, progress=replace(loaded.state.progress, iter=4))
        checkpoint.save(out, state, loaded.model, loaded.optimizer, keep_last=9, keep_best=0)
        assert (
            client.completions.create(**ASKED).choices[0].text
            == expected(run, "To be", name="iter_000000002")[0]
            != before
        )
        # The newest is damaged: `latest` is the one before it, and the damaged one cannot be asked for.
        newest = out / "checkpoints" / "iter_000000009"
        state = replace(loaded.state, progress=replace(loaded.state.progress, iter=9))
        checkpoint.save(out, state, loaded.model, loaded.optimizer, keep_last=9, keep_best=0)
        with open(newest / "model.safetensors", "r+b") as file:
            file.seek(2000)
            file.write(b"\xff\xff\xff\xff")
        with pytest.raises(openai.NotFoundError, match="cannot be read; the server's log says why"):
            client.completions.create(**{**ASKED, "model": "iter_000000009"})
        assert client.completions.create(**ASKED).model == "iter_000000004"
        assert "iter_000000009" not in [model.id for model in client.models.list().data]
        manifest._remove(out / "checkpoints", [out / "checkpoints" / "iter_000000002"])
        with pytest.raises(openai.NotFoundError, match="there is no model 'iter_000000002'"):
            client.completions.create(**{**ASKED, "model": "iter_000000002"})


def test_what_is_idle_makes_room_and_what_is_used_stays(run):
    """Room for one model of two."""

    def shelf_of(limit: int) -> models_module.Shelf:
        source = models_module.RunFolder(str(run))
        return models_module.Shelf(source, "latest", lambda model: (model, nullcontext), limit=limit, slots=1)

    async def size() -> int:
        return (await shelf_of(2**40).lease()).size

    async def work() -> None:
        shelf = shelf_of(2 * needed - 1)
        first = await shelf.lease()
        assert await shelf.lease("iter_000000004") is first and first.users == 2
        waits = asyncio.create_task(shelf.lease("iter_000000002"))
        await asyncio.sleep(0.5)
        assert not waits.done()
        behind = asyncio.create_task(shelf.lease())  # the one that waits for room comes first
        await asyncio.sleep(0.1)
        shelf.release(first)
        await asyncio.sleep(0.2)
        assert not waits.done() and not behind.done()
        shelf.release(first)
        other = await asyncio.wait_for(waits, 20)
        assert other.offer.name == "iter_000000002" and not behind.done()
        shelf.release(other)
        again = await asyncio.wait_for(behind, 20)
        assert again is not first and again.offer.name == "iter_000000004"
        # Whoever goes away while it waits for room is not waited for.
        gone = asyncio.create_task(shelf.lease("iter_000000002"))
        await asyncio.sleep(0.3)
        gone.cancel()
        await asyncio.sleep(0.3)
        assert await asyncio.wait_for(shelf.lease(), 5) is again and shelf.idle
        with pytest.raises(models_module.TooLarge):
            await shelf_of(needed - 1).lease()

    needed = asyncio.run(size())
    # 2 layers of 16 features and 512 positions: keys and values of one row, and the weights.
    loaded = checkpoint.load(run / "checkpoints" / "iter_000000004")
    assert needed == sum(4 * tensor.numel() for tensor in loaded.model.values()) + 2 * 4 * 512 * 2 * 16
    asyncio.run(work())


def test_a_folder_from_elsewhere(run, tmp_path):
    hugging = tmp_path / "hf"
    assert run_command("export", [str(run), "--to", "hf", str(hugging)]) == 0
    with serving(hugging) as server:
        assert [model.id for model in server.client().models.list().data] == ["latest", "hf"]
        answer = server.client().completions.create(**ASKED)
        assert answer.model == "hf" and answer.choices[0].text == expected(run, "To be")[0]


NUMBERS = st.integers(-2, 3) | st.sampled_from([2**63, -(2**70), 1e308, float("nan"), float("inf"), 0.5])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.sampled_from(["", "a", "auto", "user", "text", "none", "\ud800", "a" * 2000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type"]), inner),
    max_leaves=6,
)
FIELDS = [*ASKED, *CHAT, *NEUTRAL, "n", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "stream", "user"]
FIELDS += ["stream_options", "max_completion_tokens", "truncation", "other"]


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), st.booleans(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_fuzz_bodies(more, chat, whole):
    """Whatever a body says, it is a request within the bounds, or refused with 400."""
    body = {**((CHAT if chat else ASKED) if whole else {}), **more}
    try:
        asked = read(json.dumps(body).encode(), chat)
    except ApiError as error:
        assert error.status == 400 and error.message and json.dumps(error.body())
        return
    choice = asked.choice
    assert asked.n >= 1 and asked.prompts and (asked.max_tokens is None or asked.max_tokens >= 1)
    assert 0 <= choice.temperature <= 2 and 0 < choice.top_p <= 1 and choice.top_k >= 0
    assert 0 < choice.repetition_penalty < float("inf") and 0 <= asked.seed < 2**64 and "" not in asked.stop
    assert not set(body) - {*(CHAT if chat else ASKED), *FIELDS[:-1]}


def test_a_negative_seed_and_several_prompts():
    asked = read(b'{"prompt": ["a", "b"], "seed": -1, "n": 2}', chat=False)
    assert asked.seed == 2**64 - 1 and asked.rows == 4 and asked.max_tokens is None


# ---------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="the extra dev is not installed")
    binaries = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    driver, binary = shutil.which("chromedriver"), next(filter(None, binaries), None)
    if not (driver and binary):
        pytest.skip("no Chromium with its chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Page:
    def __init__(self, browser, server: Served) -> None:
        self.browser = browser
        browser.get_log("browser")
        browser.get(f"http://127.0.0.1:{server.port}/")
        until(lambda: self.run("return document.querySelectorAll('#model option').length") > 0)

    def run(self, script: str, *given):
        return self.browser.execute_script(script, *given)

    def at(self, name: str):
        return self.browser.find_element("id", name)

    def said(self) -> list[tuple[str, str]]:
        found = self.run("return [...document.querySelectorAll('#talk > *')].map((p) => [p.className, p.textContent])")
        return [tuple(pair) for pair in found]

    def answered(self) -> bool:
        return not self.run("return document.getElementById('send').hidden")

    def send(self, text: str) -> None:
        self.at("text").send_keys(text)
        self.at("send").click()

    def set(self, **values) -> None:
        for name, value in values.items():
            self.run("document.getElementById(arguments[0]).value = arguments[1]", name, str(value))

    def complaints(self) -> list[str]:
        """Warnings and errors on the console since the last look."""
        return [line["message"] for line in self.browser.get_log("browser") if line["level"] in ("WARNING", "SEVERE")]

    def check(self) -> None:
        """Nothing was wrong on the console, and nothing is wider than the window."""
        assert self.complaints() == []
        assert self.run("return document.documentElement.scrollWidth <= window.innerWidth")


def test_the_page_sends_and_tries_again(browser, served):
    page = Page(browser, served)
    options = page.run("return [...document.querySelectorAll('#model option')].map((o) => o.value)")
    assert options == [model.id for model in served.client().models.list().data]
    page.set(seed=7, temperature=1, max_tokens=40)
    page.send("To be")
    until(lambda: len(page.said()) > 1 and page.answered())
    whole = served.client().chat.completions.create(**CHAT).choices[0]
    shown = [("said user", "To be"), ("said assistant", whole.message.content)]
    assert page.said()[:2] == shown
    assert page.said()[2:] == [("note", "the answer reached its most tokens")] * (whole.finish_reason == "length")
    assert page.at("status").text.startswith("iter_000000004: ")
    # Another checkpoint and another seed answer the same message.
    page.set(seed=8, model="iter_000000002")
    page.at("retry").click()
    until(page.answered)
    other = served.client().chat.completions.create(**{**CHAT, "model": "iter_000000002", "seed": 8}).choices[0].message
    assert page.said()[:2] == [shown[0], ("said assistant", other.content)] and other.content != whole.message.content
    # The conversation so far, with a system prompt, is what the next answer follows.
    page.run("document.getElementById('settings').open = true")
    page.at("system").send_keys("be")
    page.set(seed=9, model="latest")
    page.at("text").send_keys("not\ue008\ue007\ue008to be\ue007")  # Shift+Enter is a new line, Enter sends
    until(lambda: any(text == "not\nto be" for _, text in page.said()) and page.answered())
    talk = [("system", "be"), ("user", "To be"), ("assistant", other.content), ("user", "not\nto be")]
    messages = [{"role": role, "content": content} for role, content in talk]
    asked = {**CHAT, "messages": messages, "seed": 9}
    third = served.client().chat.completions.create(**asked).choices[0].message.content
    assert [text for kind, text in page.said() if kind == "said assistant"] == [other.content, third]
    page.at("new").click()
    assert page.said() == [] and not page.at("retry").is_enabled()
    page.check()


def test_the_page_streams_stops_and_shows_hostile_text_as_text(browser, run, slow):
    with serving(run, "--rate=0") as server:
        page = Page(browser, server)
        page.set(seed=1, temperature=1)
        hostile = "<img src=x onerror=alert(1)><b>not</b>".replace("(1)", "")
        hostile = "".join(character for character in hostile if character in CHARACTERS or character in "<>")
        page.run("document.getElementById('text').value = arguments[0]", hostile)
        page.at("send").click()
        until(lambda: dict(page.said()).get("said assistant"))
        first = dict(page.said())["said assistant"]
        until(lambda: len(dict(page.said())["said assistant"]) > len(first))  # while it comes
        assert page.at("stop").is_displayed() and not page.at("send").is_displayed()
        page.at("stop").click()
        until(page.answered)
        assert page.said()[-1] == ("note", "stopped")
        until(lambda: server.ask("GET", "/health")[1]["rows"] == 0)  # long before the 500 tokens
        assert page.said()[0] == ("said user", hostile)
        assert page.run("return document.querySelectorAll('#talk img, #talk b').length") == 0
        # What a model says is text as well; here the page is given it.
        page.run("show('said assistant', '<img src=x onerror=alert(1)>')")
        assert page.run("return document.querySelectorAll('#talk img').length") == 0
        page.check()


def test_the_page_tells_errors(browser, run):
    with serving(run, "--token=s3cret", "--rate=0") as server:
        browser.get(f"http://127.0.0.1:{server.port}/")
        until(lambda: "this server needs its token" in browser.find_element("id", "status").text)
        browser.get_log("browser")  # the refusal is told there too
        token = browser.find_element("id", "token")
        token.send_keys("s3cret\t")
        until(lambda: browser.execute_script("return document.querySelectorAll('#model option').length") > 0)
        page = Page(browser, server)  # the token is kept while the tab is open
        page.send("To be \u20ac")
        until(lambda: page.said()[-1:] and "error" in page.said()[-1][0])
        assert "Error: the character '\u20ac'" in page.said()[-1][1]
        assert [line.split("status of ")[1] for line in page.complaints()] == ["400 (Bad Request)"]
        page.run("sessionStorage.clear()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_legible(browser, served, scheme, width):
    given = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", given)
    shape = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
    try:
        page = Page(browser, served)
        page.set(max_tokens=300, seed=3)
        page.send("To be, or not to be, that is the question " * 4)
        until(lambda: len(page.said()) > 1 and page.answered())
        page.run("document.getElementById('settings').open = true")
        page.run("show('note', 'stopped'); show('note error', 'Error: none')")
        page.check()
        for name in ("body", "#status", ".note", ".error", "#send", ".user", "summary"):
            ink, ground = page.run(
                """const shown = document.querySelector(arguments[0]);
                let ground = shown;
                const color = (of) => getComputedStyle(of).backgroundColor;
                while (color(ground) === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
                return [getComputedStyle(shown).color, color(ground)];""",
                name,
            )
            assert contrast(ink, ground) >= 4.5, (name, ink, ground)
        dark = luminance(page.run("return getComputedStyle(document.body).backgroundColor")) < 0.2
        assert dark == (scheme == "dark")
        if folder := os.environ.get("SCREENSHOTS"):
            browser.save_screenshot(f"{folder}/page_{scheme}_{width}.png")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2 of rgb(...)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
