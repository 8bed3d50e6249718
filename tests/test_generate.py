"""Generation: tokens as transformers chooses them, cached as uncached, in a batch as alone, and text in pieces."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_model import BOTH, GPT2, LLAMA, QK_NORM, STYLES, tokens, trained
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orchestrate.data.tokenizer import BpeTokenizer, CharTokenizer
from orchestrate.model.config import LoraSpec
from orchestrate.model.export import form_of, write_hugging_face
from orchestrate.model.generate import Choice, Continuation, draw, lay_out
from orchestrate.model.gpt import Cache
from orchestrate.training.session.texts import samples
from orchestrate.training.settings.errors import Refused

# ---------------------------------------------------------------------------------------------- one token


def logits(rows: int = 5, vocab: int = 40) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(2)) * 3


def seen_of(history: torch.Tensor, vocab: int) -> torch.Tensor:
    return torch.zeros(len(history), vocab, dtype=torch.bool).scatter_(1, history, True)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("temperature", [1.0, 0.8, 2.5])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (7, 1.0), (99, 1.0), (0, 0.9), (0, 1e-9), (7, 0.55)])
def test_logits_are_filtered_as_transformers_does(penalty, temperature, top_k, top_p):
    """In its order: penalty, temperature, top_k, top_p; to the bit."""
    scores, history = logits(), torch.randint(0, 40, (5, 12), generator=torch.Generator().manual_seed(4))
    ours = Choice(penalty, temperature, top_k, top_p).filtered(scores, seen_of(history, 40))
    theirs = scores
    if penalty != 1:
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(history, theirs)
    theirs = TemperatureLogitsWarper(temperature)(history, theirs)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(history, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(history, theirs)
    assert torch.equal(ours, theirs)


def test_filters_by_hand():
    chances = torch.tensor([[0.5, 0.05, 0.25, 0.2]])

    def kept(**choice) -> list[float]:
        return [round(p, 4) for p in Choice(**choice).filtered(chances.log(), None).softmax(-1)[0].tolist()]

    assert kept(top_p=0.6) == [0.6667, 0.0, 0.3333, 0.0], "0.5 are not enough, 0.75 are"
    assert kept(top_p=0.45) == [1.0, 0.0, 0.0, 0.0], "the likeliest is always there"
    assert kept(top_k=3) == [0.5263, 0.0, 0.2632, 0.2105]
    assert kept(temperature=0.5) == [0.7042, 0.007, 0.1761, 0.1127], "squares over 0.355"
    two = torch.tensor([[2.0, -1.0, 3.0]])
    seen = torch.tensor([[True, True, False]])
    assert Choice(repetition_penalty=2.0, temperature=0).filtered(two, seen).tolist() == [[1.0, -2.0, 3.0]]
    tied = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    assert Choice(top_k=2).filtered(tied, None).isfinite().tolist() == [[True, True, False, True]]


def test_extreme_numbers_leave_finite_logits_finite():
    """They are a person's input: what comes of them is no sign of a model that has diverged."""
    logits, seen = torch.tensor([[-9.0, 0.0, 900.0, 3.0]]), torch.ones(1, 4, dtype=torch.bool)
    for temperature in (1e-300, 5e-324, 1e-40, 1e300):
        for penalty in (1.0, 1e-300, 5e-324, 1e-30, 1e30, 1e300):
            choice = Choice(repetition_penalty=penalty, temperature=temperature)
            assert draw(choice.filtered(logits, seen), [0.5]).item() >= 0, choice
            assert Choice(repetition_penalty=penalty, temperature=0).filtered(logits, seen).isfinite().all()
    assert draw(Choice(temperature=1e-300).filtered(logits, None), [0.999]).item() == 2


def test_a_token_is_drawn_by_the_distribution_function():
    scores = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).log()
    for uniform, token in [(0.0, 0), (0.2499, 0), (0.2501, 2), (0.7499, 2), (0.7501, 3), (math.nextafter(1, 0), 3)]:
        assert draw(scores, [uniform]).tolist() == [token], uniform
    assert draw(torch.tensor([[-torch.inf, 1.0], [2.0, -torch.inf]]), [0.0, math.nextafter(1, 0)]).tolist() == [1, 0]
    assert draw(torch.tensor([[0.0, torch.nan], [0.0, 1.0], [torch.inf, 0.0]]), [0.5] * 3).tolist() == [-1, 1, -1]
    many, random = logits(1), np.random.default_rng(0)
    drawn = torch.bincount(draw(many.expand(20000, -1), random.random(20000).tolist()), minlength=40) / 20000
    assert (drawn - many.softmax(-1)[0]).abs().max() < 0.015


# ---------------------------------------------------------------------------------------------- many tokens

SAMPLED = Choice(repetition_penalty=1.2, temperature=0.9, top_k=20, top_p=0.9)
GREEDY = Choice(temperature=0)


def continued(model, prompts, count, choice=SAMPLED, seed=3, use_cache=True, end=lambda row, token: False):
    """The sequences after so many steps; the numbers are those of samples 0, 1, ..."""
    rows = joined(Continuation(model, len(prompts), max(map(len, prompts)) + count, use_cache), prompts, choice, seed)
    ended = {}
    for _ in range(count):
        for row, token in rows.step().items():
            if end(row, token):
                ended[row] = rows.end(row)
    return [(ended | rows.tokens)[row] for row in range(len(prompts))]


def joined(rows, prompts, choice, seed=0):
    for n, prompt in enumerate(prompts):
        assert rows.add(prompt, choice, (seed, n)) == n
    return rows


def by_hand(model, prompt, count, choice, random):
    """The same for one sequence, from whole forward passes over its last block_size tokens."""
    text = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            scores = model.logits(torch.tensor([text[-model.config.block_size :]]))[:, -1]
        scores = choice.filtered(scores, seen_of(torch.tensor([text]), model.config.vocab_size))
        text.append(int(draw(scores, [random.random()]) if choice.temperature else scores.argmax()))
    return text


def test_nothing_is_kept_of_a_sequence_that_ended():
    """A server adds and ends them for weeks."""
    rows = joined(Continuation(trained(GPT2), 2, 8), [[7], [3, 4]], SAMPLED)
    rows.step()
    kept = {name: value for name, value in vars(rows).items() if isinstance(value, dict)}
    assert rows.tokens in kept.values() and all(set(value) == {0, 1} for value in kept.values()), kept
    assert [len(rows.end(number)) for number in (0, 1)] == [2, 3] and not any(kept.values())


MIXED = [[7], list(range(5)), list(range(3, 19)), list(range(40)), [11, 2, 40], list(range(20, 35))]
NTK = replace(LLAMA, rotary_dynamic_factor=2.0, rotary_original_length=9)
ADAPTED = replace(LLAMA, lora={"attn.0": LoraSpec(4, 8.0), "mlp.1": LoraSpec(2, 8.0)})


@pytest.mark.parametrize("choice", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize(
    "config", [GPT2, LLAMA, QK_NORM, ADAPTED, NTK], ids=["gpt2", "llama", "qk_norm", "lora", "ntk"]
)
def test_a_row_of_a_batch_says_what_it_says_alone(config, choice):
    """Prompts of 1 to 40 tokens in a window of 16, for 20 tokens: each begins to slide at a step of its own.

    So it does to have frequencies of its own under dynamic NTK, from 10 tokens on.
    """
    model = trained(config)
    together = continued(model, MIXED, 20, choice)
    assert together == continued(model, MIXED, 20, choice, use_cache=False)
    for n, prompt in enumerate(MIXED):
        assert together[n] == by_hand(model, prompt, 20, choice, np.random.default_rng([3, n])), n
    assert len({tuple(row[-10:]) for row in together}) > 3, "they do not all say the same"


@BOTH
def test_rows_that_end_leave_the_others_as_they_are(config):
    model = trained(config)
    whole = continued(model, MIXED, 20)
    ends = {0: 3, 2: 1, 5: 9, 3: 2}
    steps = dict.fromkeys(range(len(MIXED)), 0)

    def end(row, token):
        steps[row] += 1
        return steps[row] == ends.get(row)

    cut = continued(model, MIXED, 20, end=end)
    assert cut == [
        row[: len(prompt) + ends.get(n, 20)] for n, (row, prompt) in enumerate(zip(whole, MIXED, strict=True))
    ]


@pytest.mark.parametrize("capacity", [None, 9, 0], ids=["whole", "short", "none"])
@BOTH
def test_rows_that_join_and_leave_say_what_they_say_alone(config, capacity):
    """Three slots for six sequences, each with a rule, a seed and an end of its own, that begin at steps 0 to 20."""
    model = trained(config)
    rules = [SAMPLED, GREEDY, Choice(1.5, 0), Choice(temperature=1.4), Choice(top_p=0.7), SAMPLED]
    lengths, waiting = [12, 5, 9, 14, 4, 8], list(range(6))
    rows, said, together = Continuation(model, 3, capacity), {}, []
    while waiting or rows.live:
        while waiting and rows.free:
            n = waiting.pop(0)
            assert rows.add(MIXED[n], rules[n], (3, n)) == n
        together.append(rows.live)
        assert set(rows.step()) == set(rows.live)
        for n in rows.live:
            if len(rows.tokens[n]) == len(MIXED[n]) + lengths[n]:
                said[n] = rows.end(n)
    assert together[0] == [0, 1, 2] and [0, 3, 4] in together and [3, 4, 5] in together and len(together) == 20
    for n, prompt in enumerate(MIXED):
        assert said[n] == by_hand(model, prompt, lengths[n], rules[n], np.random.default_rng([3, n])), n


@BOTH
def test_a_row_that_broke_does_not_spoil_the_next_one_in_its_place(config):
    """One token's embedding is infinite: what it left in the cache is weighed by 0 from then on, and 0 times that."""
    model = trained(replace(config, tie_weights=False))
    with torch.no_grad():
        model.transformer["wte"].weight[13] = torch.inf
        model.lm_head.weight[13] = 0.0  # never the likeliest
    rows = joined(Continuation(model, 3), [[1, 2, 3, 4, 5, 6], [1, 2, 3, 13, 4, 5, 6, 7], [3, 4]], GREEDY)
    assert [token < 0 for token in rows.step().values()] == [False, True, False]
    rows.end(1)
    assert rows.add([5, 6], GREEDY) == 3
    assert min(rows.step().values()) >= 0 and len(rows.tokens[0]) == 8
    rows.end(0)
    assert min(rows.step().values()) >= 0 and list(rows.tokens) == [2, 3]


@BOTH
def test_equal_prompts_differ_by_their_number_and_the_seed(config):
    model = trained(config)
    one, other = continued(model, [[5, 6]] * 2, 10)
    assert one != other and [one] == continued(model, [[5, 6]], 10)
    assert one != continued(model, [[5, 6]], 10, seed=4)[0]


@BOTH
def test_logits_of_the_cache_are_those_of_whole_passes(config):
    """Several tokens at a time, a different number in each row, with rubbish where a row has none."""
    model, x, cache = trained(config), tokens(3, 16), Cache(config, 3, 14)
    have = [0, 0, 0]
    for counts in ([3, 1, 2], [1, 1, 1], [4, 2, 1], [1, 5, 3]):
        new = torch.full((3, max(counts)), 49)
        for row, count in enumerate(counts):
            new[row, :count] = x[row, have[row] : have[row] + count]
        have = [h + c for h, c in zip(have, counts, strict=True)]
        with torch.no_grad():
            step = model.extend(new, counts, cache)
            for row in range(3):
                whole = model.logits(x[row : row + 1, : have[row]])[0, -1]
                torch.testing.assert_close(step[row], whole, atol=1e-5, rtol=1e-4)
    assert cache.lengths == have == [9, 9, 7]
    cache.fill(1, cache, 2, 7)
    with torch.no_grad():
        step = model.extend(x[2:, 7:9], [2], cache, 1)
        torch.testing.assert_close(step, model.logits(x[2:, :9])[:, -1], atol=1e-5, rtol=1e-4)
    assert cache.lengths == [9, 9, 7]
    with pytest.raises(AssertionError, match="15 tokens in a cache of 14"):
        model.extend(x[2:, :6], [6], cache, 1)


def test_the_cache_is_made_once():
    model = trained(GPT2)
    rows = joined(Continuation(model, 2, 11), [[1, 2], [3]], GREEDY)
    places = set()
    for _ in range(9):
        rows.step()
        places.add(tuple(part.data_ptr() for pair in rows._cache._layers for part in pair))
        assert {part.shape for pair in rows._cache._layers for part in pair} == {(2, 11, 4, 8)}
    assert len(places) == 1


def test_numbers_that_are_none_are_told():
    model = trained(GPT2)
    with torch.no_grad():
        model.transformer["ln_f"].weight[0] = torch.nan
    for choice in (SAMPLED, GREEDY):
        assert joined(Continuation(model, 2), [[1], [2, 3]], choice).step() == {0: -1, 1: -1}
    with pytest.raises(Refused, match="not finite"):
        list(samples(model, CharTokenizer(LETTERS), ["ab"], 1, 4, choice=SAMPLED, seed=0))


# ---------------------------------------------------------------------------------------------- text

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX"  # 50, as many as the models have


class Scripted(Continuation):
    """Says what it is told, whatever the model."""

    script: tuple[list[int], ...] = ()

    def step(self):
        found = {row: self.script[row][len(self.tokens[row]) - 1] for row in self.live}
        for row, token in found.items():
            self.tokens[row].append(token)
        return found


class Words:
    """Tokens of several characters, and one that ends a text."""

    end_of_text = 9
    words = ("", "ab", "cd", "\n\n", "x", "Us", "er", ":", "bc", "<end>")

    def encode(self, text):
        return [4] * len(text)

    def bytes_of(self, token):
        return None

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def pieces(monkeypatch, script, tokenizer=None, stop=(), **keys):
    """What is told of scripted texts that begin with x, a list of pieces each."""
    monkeypatch.setattr("orchestrate.training.session.texts.Continuation", Scripted)
    monkeypatch.setattr(Scripted, "script", script)
    told = [[] for _ in script]
    count = max(len(row) for row in script)
    model = trained(replace(GPT2, vocab_size=300))
    for piece in samples(model, tokenizer or Words(), ["x"], len(script), count, choice=GREEDY, seed=0,
                         stop=stop, **keys):  # fmt: skip
        told[piece.sample].append(piece.text)
        assert piece.prompt == 0
    return told


@pytest.mark.parametrize(
    "script, stop, text",
    [
        ([1, 2, 1], [], "xabcdab"),
        ([1, 2, 1], ["cd"], "xab"),
        ([1, 2, 1], ["bc"], "xa"),  # over a border
        ([1, 2, 1], ["zz", "dab", "bcda"], "xa"),  # the one that is whole first
        ([1, 2, 1], ["cdb"], "xabcdab"),  # begins and does not go on
        ([1, 2, 1], ["xa"], "xabcdab"),  # not in the prompt
        ([2, 5, 6, 7, 1], ["User:"], "xcd"),  # three tokens
        ([2, 5, 5, 6, 7, 1], ["User:"], "xcdUs"),
        ([1, 1, 2], ["ababab", "cd"], "xabab"),
        ([1, 9, 2], [], "xab"),  # the end of text is not shown
        ([1, 9, 2], ["<end>"], "xab"),
        ([5, 9, 2], ["User:"], "xUs"),  # what was held back comes
        ([2, 5, 6], ["User:"], "xcdUser"),
        ([8, 8, 8], ["bcc"], "xbcbcbc"),
    ],
)
@pytest.mark.parametrize("in_step", [False, True])
def test_where_a_text_ends(monkeypatch, script, stop, text, in_step):
    assert "".join(pieces(monkeypatch, (script,), stop=stop, in_step=in_step)[0]) == text


def test_in_step_every_pass_is_made_whatever_becomes_of_the_texts(monkeypatch):
    script, steps = ([1, 2, 1, 4, 4], [2, 9, 1, 1, 1], [1, 2, 2, 2, 2]), []
    monkeypatch.setattr(Scripted, "step", lambda self, step=Scripted.step: steps.append(len(self.live)) or step(self))
    ended = [["xab", "cdab", "x", "x"], ["xcd"], ["xab"]]
    assert pieces(monkeypatch, script, stop=["cdcd"]) == ended and steps == [3, 3, 2, 1, 1]
    steps.clear()
    assert pieces(monkeypatch, script, stop=["cdcd"], in_step=True) == ended and steps == [3] * 5
    steps.clear()
    assert pieces(monkeypatch, ([9, 1, 1],), in_step=True) == [["x"]] and steps == [1] * 3


def test_pieces_come_as_soon_as_they_are_certain(monkeypatch):
    assert pieces(monkeypatch, ([1, 2, 5, 1, 3],), stop=["User:"]) == [["xab", "cd", "Usab", "\n\n"]]
    first, second = pieces(monkeypatch, ([1, 2, 1, 4], [2, 9, 1, 1]))
    assert first == ["xab", "cd", "ab", "x"] and second == ["xcd"], "the texts follow each other"


def test_a_character_of_several_tokens_comes_whole(monkeypatch):
    import tiktoken

    one_byte = tiktoken.Encoding(
        "bytes", pat_str=r"(?s).", mergeable_ranks={bytes([n]): n for n in range(256)}, special_tokens={"<|eot|>": 256}
    )
    script = list("é€a😀b".encode())
    (told,) = pieces(monkeypatch, ([*script, 0xE2, 0x82],), BpeTokenizer(one_byte))
    assert told == ["x", "é", "€", "a", "😀", "b", "\ufffd"]
    assert "".join(pieces(monkeypatch, (script,), BpeTokenizer(one_byte), stop=["€"])[0]) == "xé"


@BOTH
def test_texts_are_the_same_in_any_batch(config):
    model, tokenizer = trained(config), CharTokenizer(LETTERS)
    prompts = ["a", "bcdefgh", "The", LETTERS]

    def texts(some, **keys):
        found = {}
        last = (-1, -1)
        for piece in samples(model, tokenizer, some, 3, 14, choice=SAMPLED, seed=5, **keys):
            where = (some[piece.prompt], piece.sample)
            found[where] = found.get(where, "") + piece.text
            assert (piece.prompt, piece.sample) >= last
            last = (piece.prompt, piece.sample)
        return found

    whole = texts(prompts, batch_size=99)
    assert len(set(whole.values())) == 12 and all(len(text) == len(p) + 14 for (p, _), text in whole.items())
    for keys in ({"batch_size": 1}, {"batch_size": 5}, {"in_step": True}):
        assert texts(prompts, **keys) == whole
    assert {key: text for prompt in prompts for key, text in texts([prompt]).items()} == whole


def test_generating_leaves_the_model_as_it_was():
    model = trained(GPT2).train()
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.random.get_rng_state()
    list(samples(model, CharTokenizer(LETTERS), ["ab"], 2, 20, choice=SAMPLED, seed=0))
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_greedy_tokens_are_those_that_transformers_says_after_an_export(name, tmp_path):
    """Prompts of unequal length within the window, in a batch as one by one."""
    from transformers import AutoModelForCausalLM

    model = trained(replace(STYLES[name], block_size=64))
    write_hugging_face(form_of(model), tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for prompt, ours in zip(MIXED, continued(model, MIXED, 20, GREEDY), strict=True):
        theirs = exported.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ours == theirs[0].tolist()


@BOTH
def test_rows_that_begin_from_one_prefix_of_another_cache(config):
    """As whole passes in float64 say it, logits after every token; what stood in a row before is gone."""
    model, prefix, x = trained(config).double(), tokens(1, 6), tokens(3, 9)
    x[:, :6] = prefix
    shared, cache, counts = Cache(config, 1, 6), Cache(config, 4, 12), [3, 1, 2]
    with torch.no_grad():
        model.extend(prefix, [6], shared)
        model.extend(tokens(4, 11) + 1, [11] * 4, cache)
        for row in (1, 2, 3):
            cache.fill(row, shared, 0, 6)
        assert cache.lengths == [11, 6, 6, 6]
        found = model.extend(x[:, 6:], counts, cache, 1, every=True)
        whole = model.logits(x)[:, 6:]
        for row, count in enumerate(counts):
            torch.testing.assert_close(found[row, :count], whole[row, :count], atol=1e-9, rtol=1e-9)
        assert cache.lengths == [11, 9, 7, 8]
        with pytest.raises(AssertionError, match="7 tokens of a row of 6"):
            cache.fill(0, shared, 0, 7)


@pytest.mark.parametrize("config", [GPT2, LLAMA, ADAPTED], ids=["gpt2", "llama", "lora"])
def test_laid_out_for_generating_it_is_the_same_model(config):
    model, whole = trained(config), trained(config)
    lay_out(model)
    strides = {name: p.stride() for name, p in model.named_parameters() if p.dim() == 2}
    assert strides["transformer.h.0.mlp.c_fc.weight"] == (1, config.n_hidden[0]) and strides[
        "transformer.wte.weight"
    ] == (32, 1)
    assert all(torch.equal(p, other) for p, other in zip(model.parameters(), whole.parameters(), strict=True))
    assert continued(model, MIXED, 20) == continued(whole, MIXED, 20)
    narrow = trained(config).bfloat16()
    lay_out(narrow)
    assert all(p.is_contiguous() for p in narrow.parameters())


def test_a_slot_is_there_once_and_a_prompt_has_a_token():
    rows = joined(Continuation(trained(GPT2), 2), [[1], [2]], GREEDY)
    assert rows.free == 0 and rows.live == [0, 1]
    with pytest.raises(AssertionError, match="all 2 slots are taken"):
        rows.add([1], GREEDY)
    assert rows.end(0) == [1] and rows.free == 1, "also before its first step"
    with pytest.raises(AssertionError, match="an empty prompt"):
        rows.add([], GREEDY)
    assert rows.add([3], GREEDY) == 2 and set(rows.step()) == {1, 2} == set(rows.live)
