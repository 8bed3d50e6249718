"""Our adapter for lm-eval against lm-eval's own one on the exported model, request by request."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TEXT, on_ranks
from test_export import GPT2_STYLE, LLAMA_STYLE, shaken
from test_tokenizers import EOT, byte_level, encoding, saved, unigram

from orchestrate.data.keeping import save
from orchestrate.data.tokenizer import BpeTokenizer, CharTokenizer, RemappedTokenizer, Tokenizer
from orchestrate.model import export as forms
from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.tasks.adapter import Adapter, CannotDo, Interrupted, NotFinite

pytest.importorskip("lm_eval")

KINDS = {
    "char": lambda folder: CharTokenizer.of(TEXT, several=True),
    "tiktoken": lambda folder: encoding(special={EOT: 269, "<|fim|>": 270}),  # without holes among the ids
    "byte_level": lambda folder: saved(byte_level(), folder, eos_token=EOT),
    "begins texts": lambda folder: saved(unigram(), folder, eos_token="</s>", bos_token="</s>"),
}


def request(*args):
    return SimpleNamespace(args=args, task_name="test")


def model_of(tokenizer: Tokenizer, config: ModelConfig = GPT2_STYLE) -> GPT:
    return shaken(replace(config, vocab_size=tokenizer.vocab_size))


def words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices([word for word in TEXT.split() if word.isascii()], k=rng.randint(least, most)))


def pairs(tokenizer: Tokenizer, count: int = 40) -> list:
    """Questions with several answers and one beginning, alone or in each other's way; long, empty, spaced ones."""
    rng = random.Random(5)
    start = words(rng, 2, 3)
    found = []
    for number in range(count):
        context = f"{start if number % 3 else ''} {words(rng, 1, 1 + number)}".strip()
        if number % 7 == 0:
            context += "  "
        answers = [f" {words(rng, 1, 1 + number % 4)}" for _ in range(1 + number % 3)]
        found += [request(context, answer) for answer in answers]
    found += [request(start, f" {letter}") for letter in "benot"] + [request("", words(rng, 2, 2))]
    end = tokenizer.decode([tokenizer.end_of_text])
    if tokenizer.kind != "char":
        found += [request(f"{end}{start}", " to"), request("", f"{end}to be")]
    found.append(found[0])
    rng.shuffle(found)
    return found


@pytest.fixture(scope="module", params=[(kind, style) for kind in KINDS for style in ("gpt2", "llama")], ids=str)
def both(request, tmp_path_factory):
    """(ours, theirs) of one model; theirs reads the exported folder."""
    from lm_eval.models.huggingface import HFLM

    kind, style = request.param
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = KINDS[kind](folder / "source")
    model = model_of(tokenizer, GPT2_STYLE if style == "gpt2" else LLAMA_STYLE)
    special = {"bos_token_id": tokenizer.start_of_text, "eos_token_id": tokenizer.end_of_text}
    forms.write_hugging_face(forms.form_of(model), folder, special=special)
    save(tokenizer, folder)
    return Adapter(model, tokenizer, batch_size=3), HFLM(str(folder), device="cpu", batch_size=4, dtype="float32")


def same(mine, other) -> None:
    assert len(mine) == len(other) > 20
    for (value, likeliest), (their_value, their_likeliest) in zip(mine, other, strict=True):
        assert value == pytest.approx(their_value, abs=1e-4) and likeliest is their_likeliest


def test_every_loglikelihood_is_that_of_lm_eval(both):
    ours, hf = both
    asked = pairs(ours.tokenizer)
    mine = ours.loglikelihood(asked)
    same(mine, hf.loglikelihood(asked, disable_tqdm=True))
    assert len({round(value, 3) for value, _ in mine}) > 20
    lengths = [len(ours._encode(context)) for context, _ in (r.args for r in asked)]
    assert max(lengths) > ours.max_length > min(lengths), "some lose their beginning"


def test_greedy_answers_are_told_from_others(both):
    """What the model itself says is its likeliest answer; with one token changed it is not."""
    ours, hf = both
    rng = random.Random(3)
    asked = []
    for _ in range(12):
        context = words(rng, 2, 4)
        given = ours._encode(context)
        for n in (1, 2):
            said = list(given)
            for _ in range(n):
                said.append(int(ours.model.logits(torch.tensor([said]))[0, -1].argmax()))
            text = ours.tokenizer.decode(said)
            if "<" in text or not (text.startswith(context) and text[len(context) :].strip()):
                continue
            if ours._encode(text) == said:
                asked += [request(context, text[len(context) :]), request(context, text[len(context) :] + " to")]
    if not asked:
        pytest.skip("what this model says is not what its tokenizer makes of it")
    mine, other = ours.loglikelihood(asked), hf.loglikelihood(asked, disable_tqdm=True)
    assert [best for _, best in mine] == [best for _, best in other]
    assert any(best for _, best in mine) and not all(best for _, best in mine)


def test_rolling_windows_are_those_of_lm_eval(both):
    ours, hf = both
    rng = random.Random(7)
    asked = [request(words(rng, 1 + 9 * n, 10 * n + 1)) for n in range(8)]
    assert max(len(ours._encode(r.args[0])) for r in asked) > 2 * ours.max_length
    mine, other = ours.loglikelihood_rolling(asked), hf.loglikelihood_rolling(asked, disable_tqdm=True)
    assert mine == pytest.approx(other, abs=1e-4 * 10) and len({round(value) for value in mine}) > 4


def test_generated_texts_are_those_of_lm_eval(both):
    ours, hf = both
    rng = random.Random(9)
    kwargs = [dict(until=["e"], max_gen_toks=6), dict(until=[" ", "qu"], max_gen_toks=12, do_sample=False),
              dict(until="that is", max_gen_toks=9, temperature=0.0)]  # fmt: skip
    asked = [request(words(rng, 1, 12), dict(kwargs[n % 3])) for n in range(20)]
    other = hf.generate_until(asked, disable_tqdm=True)
    mine = ours.generate_until([request(context, dict(wanted)) for context, wanted in (r.args for r in asked)])
    assert mine == other and len(set(mine)) > 3


def test_one_context_is_computed_once(monkeypatch):
    tokenizer = encoding()
    model = model_of(tokenizer)
    asked = [request("to be or not to be", f" {word}") for word in ("to", "be or", "no", "be")]
    fed = []

    def counted(idx, counts, *rest, real):
        fed.append(sum(counts))
        return real(idx, counts, *rest)

    for real in (model.extend, model.score):
        monkeypatch.setattr(model, real.__name__, lambda *args, real=real: counted(*args, real=real))
    ours = Adapter(model, tokenizer)
    ours.loglikelihood(asked)
    context = len(ours._encode("to be or not to be"))
    again = [len(ours._encode(r.args[0] + r.args[1])) - context for r in asked]
    assert sum(fed) == context + sum(n - 1 for n in again), "each token once, and the last of an answer never"
    fed.clear()
    start = "to be or not to be, that is the question " * 2
    ours.max_length = 400
    ours.model = shaken(replace(GPT2_STYLE, vocab_size=tokenizer.vocab_size, block_size=400))
    asked = [request(start + word, " b") for word in ("to", "be", "not", "or")]
    plain = [Adapter(ours.model, tokenizer).loglikelihood([one])[0] for one in asked]
    real = ours.model.extend
    monkeypatch.setattr(ours.model, "extend", lambda *args: counted(*args, real=real))
    ours._room = 4000
    assert ours.loglikelihood(asked) == [(pytest.approx(value, abs=1e-5), best) for value, best in plain]
    assert fed[0] > 20 and len(fed) == 2 and fed[1] < 4 * 6, "the beginning of all of them once"


def test_what_cannot_be_done_is_said():
    tokenizer = encoding()
    ours = Adapter(model_of(tokenizer), tokenizer)
    for call, message in (
        (lambda: ours.loglikelihood([request("to", " to be" * 40)]), r"continuation of \d+ tokens does not fit"),
        (lambda: ours.loglikelihood([request("to", "")]), "no token to score"),
        (lambda: ours.generate_until([request("to", {"until": ["a"]})]), "asks for 256 new tokens.*block_size 32"),
        (lambda: ours.generate_until([request("to", {"max_gen_toks": 4, "num_beams": 3})]), "asks for num_beams"),
    ):
        with pytest.raises(CannotDo, match=message):
            call()
    bare = CharTokenizer.of(TEXT)
    with pytest.raises(CannotDo, match="no token that begins one"):
        Adapter(model_of(bare), bare).loglikelihood([request("", "to")])
    wide = CharTokenizer.of(TEXT + "é")
    small = Adapter(shaken(replace(GPT2_STYLE, vocab_size=5)), wide)
    with pytest.raises(CannotDo, match="beyond the model's vocabulary of 5"):
        small.loglikelihood([request("to", " be")])
    with pytest.raises(Interrupted):
        Adapter(model_of(tokenizer), tokenizer, poll=lambda: 15).loglikelihood([request("to", " be")])


def _diverged() -> Adapter:
    """Of a model whose logits are not finite where its prompt has a q."""
    tokenizer = CharTokenizer.of(TEXT)
    model = model_of(tokenizer, LLAMA_STYLE)
    with torch.no_grad():
        model.transformer["wte"].weight[tokenizer.stoi["q"]] = torch.nan
    return Adapter(model, tokenizer, batch_size=1)


def _told(ours: Adapter) -> list:
    """What is said of requests without a q, when those with one have been refused."""
    pairs = [request("to be", " or"), request("or be", " q to"), request("be", " be")]
    texts = [request(context, {"until": ["@"], "max_gen_toks": 4}) for context in ("q to", "to be", "be to")]
    found = []
    for ask, asked in ((ours.loglikelihood, pairs), (ours.generate_until, texts)):
        with pytest.raises(NotFinite, match="not finite"):
            ask(asked)
        found.append(ask([one for one in asked if "q" not in "".join(map(str, one.args))]))
    return found


def _told_on_ranks(rank: int) -> list:
    ours = _diverged()
    ours.ranks = Ranks("cpu")
    found = _told(ours)
    ours.ranks.close()
    return found


def test_logits_that_are_not_finite_are_no_score():
    """Also where one rank alone has met them: no other waits for it."""
    found = on_ranks(_told_on_ranks)
    assert found[0] == found[1] == _told(_diverged()) and len(found[0][0]) == len(found[0][1]) == 2


def test_a_drawn_answer_is_the_same_again_and_another_with_another_temperature():
    tokenizer = encoding()
    ours = Adapter(model_of(tokenizer), tokenizer)

    def said(**more):
        return ours.generate_until([request(TEXT[:9], {"until": [], "max_gen_toks": 20, "do_sample": True, **more})])

    assert said(temperature=1.0) == said(temperature=1.0) != said(temperature=5.0)
    assert said(temperature=5.0, top_k=1) == said(temperature=0.1, top_k=1)


def test_a_remapped_vocabulary_scores_its_own_ids():
    inner = CharTokenizer.of("abc ", several=True)
    remap = np.array([2, 1, 0, 3, 4])
    tokenizer = RemappedTokenizer(inner, remap)
    assert (tokenizer.start_of_text, tokenizer.end_of_text, tokenizer.unspoken) == (
        int(remap[inner.start_of_text]), int(remap[inner.end_of_text]), {int(remap[inner.end_of_text])}
    )  # fmt: skip
    model = model_of(tokenizer)
    given, asked = tokenizer.encode("ab"), tokenizer.encode("ca")
    logits = model.logits(torch.tensor([[*given, asked[0]]]))[0].detach().log_softmax(-1)
    expected = float(logits[1, asked[0]] + logits[2, asked[1]])
    found = Adapter(model, tokenizer).loglikelihood([request("ab", "ca")])
    assert found[0][0] == pytest.approx(expected, abs=1e-5)


def _shared_work(rank: int, parallel: str) -> tuple:
    tokenizer: BpeTokenizer = encoding()
    ranks = Ranks("cpu", parallel=parallel)
    model = ranks.place(model_of(tokenizer), torch.device("cpu"))
    ours = Adapter(model, tokenizer, batch_size=2, ranks=ranks)
    polled = []
    ours.poll = lambda: polled.append(1) or 0
    rng = random.Random(1)
    wanted = [request(words(rng, 1, 5), {"until": ["e"], "max_gen_toks": 5 + n % 2}) for n in range(7)]
    answer = (ours.loglikelihood(pairs(tokenizer)), ours.loglikelihood_rolling([request(TEXT[:200])]),
              ours.generate_until(wanted), len(polled))  # fmt: skip
    ranks.close()
    return answer


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_share_the_work_and_agree(parallel):
    one, other = on_ranks(_shared_work, parallel)
    assert one == other, "the polls too"
    tokenizer = encoding()
    alone = Adapter(model_of(tokenizer), tokenizer)
    same(one[0], alone.loglikelihood(pairs(tokenizer)))
    assert one[1] == pytest.approx(alone.loglikelihood_rolling([request(TEXT[:200])]), abs=1e-3)
    rng = random.Random(1)
    wanted = [request(words(rng, 1, 5), {"until": ["e"], "max_gen_toks": 5 + n % 2}) for n in range(7)]
    assert one[2] == alone.generate_until(wanted)
