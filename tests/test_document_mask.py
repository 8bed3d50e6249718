"""The mask between documents: a row of several is what each of them is alone, in training, validation and the plan."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXT, arguments, events, lines, on_ranks, sources, write_data
from test_distributed import make_run
from test_operations import CONFIG, SHAPE, apply, live_run
from test_prepare import small_encoding
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import train_orchestrated
from orchestrate.data import prepare
from orchestrate.data.keeping import end_of_text_of
from orchestrate.data.mixture import Sources
from orchestrate.data.packing import Packer
from orchestrate.data.stream import Meta, eval_windows, gather, open_data
from orchestrate.data.tokenizer import END_OF_TEXT, CharTokenizer
from orchestrate.model import gpt
from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT, compile_blocks, document_mask, init_weights, set_dropout
from orchestrate.training import plan
from orchestrate.training.plan import activation_bytes
from orchestrate.training.session.start import doubts, settings_from
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import OperationFailed

END = 3
_LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "tie_weights": False, "bias": False}
SHAPES = {
    "learned": {},
    "rotary": {"position": "rotary"},
    "grouped": {**_LLAMA, "n_head": 4, "n_kv_head": 2, "qk_norm": True, "head_size": 6},
    "scaled": {**_LLAMA, "rotary_scale": 2.0, "rotary_llama3_factor": 8.0, "rotary_original_length": 8},
}
ROWS = torch.tensor(
    [
        [7, 9, 5, 8, 3, 3, 6, 4, 7, 8, 9, 5, 3, 4, 4, 6],  # one that is empty, and one that goes on behind the row
        [3, 5, 6, 7, 8, 9, 4, 5, 6, 7, 8, 9, 4, 5, 6, 3],  # an end first and last
        [4, 5, 6, 7, 8, 9, 4, 5, 6, 7, 8, 9, 4, 5, 6, 7],  # in the middle of a document
        [9, 3, 4, 3, 5, 3, 6, 3, 7, 3, 8, 3, 9, 3, 3, 3],
    ]
)
SPANS = [
    [(0, 5), (5, 6), (6, 13), (13, 16)],
    [(0, 1), (1, 16)],
    [(0, 16)],
    [*((i, i + 2) for i in range(0, 14, 2)), (14, 15), (15, 16)],
]
"""The documents of each row, by hand."""


def made(shape: str, **more) -> GPT:
    """Weights far from those of a start: positions and heads make a difference."""
    model = GPT(ModelConfig(**{"block_size": 16, "vocab_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16,
                               **SHAPES[shape], **more}))  # fmt: skip
    init_weights(model, 5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def alone(model: GPT, row: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Logits of a document by itself, where it stands in its row, by a model that knows of no mask."""
    if model.config.position == "learned":
        model, shifted = copy.deepcopy(model), model.transformer["wpe"].weight[start:stop]
        with torch.no_grad():
            model.transformer["wpe"].weight[: stop - start] = shifted
    return model.logits(row[None, start:stop])[0]


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def test_who_sees_whom():
    mask = document_mask(torch.tensor([[5, 3, 3, 5, 5], [3, 5, 5, 5, 3]]), 3, torch.bfloat16)
    assert mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bfloat16
    assert set(mask.flatten().tolist()) == {0.0, -torch.inf}
    assert [["".join("x" if v == 0 else "." for v in row) for row in one[0].tolist()] for one in mask] == [
        ["x....", "xx...", "..x..", "...x.", "...xx"],
        ["x....", ".x...", ".xx..", ".xxx.", ".xxxx"],
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_document_of_a_row_is_as_alone(shape):
    model = made(shape)
    wanted = [torch.cat([alone(model, row, *span) for span in spans]) for row, spans in zip(ROWS, SPANS, strict=True)]
    plain = model.logits(ROWS)
    model.document_end = END
    logits = model.logits(ROWS)
    for row in range(len(ROWS)):
        torch.testing.assert_close(logits[row], wanted[row], atol=1e-5, rtol=0)
        assert (SPANS[row] == [(0, 16)]) == ((plain[row] - wanted[row]).abs().max() < 1e-2), "it makes a difference"
    torch.testing.assert_close(logits[2], plain[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "learned"])
def test_so_are_gradients(shape):
    model, targets = made(shape), ROWS.roll(-1, 1)
    sum(
        cross_entropy(alone(model, row, a, b), following[a:b], reduction="sum")
        for row, following, spans in zip(ROWS, targets, SPANS, strict=True)
        for a, b in spans
    ).backward()
    wanted = gradients(model)
    model.document_end = END
    model(ROWS, targets).sum.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, wanted[name], atol=2e-4, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_packed_rows(tmp_path):
    """Whole documents of unequal length, and the rest of a row, which is filled with ends."""
    packer, documents = Packer(16, END), [[4, 5, 6, 3], [7, 3], [8, 9, 4, 5, 6, 7, 8, 3], [9, 8, 7, 6, 5, 4, 9, 8, 3]]
    rows = []
    for ids in documents:
        rows += packer.push(np.array(ids), np.ones(len(ids), dtype=bool), ends=True)
    rows += packer.flush()
    assert len(rows) == 2
    model = made("rotary")
    x = torch.from_numpy(np.stack([ids for ids, _ in rows]))
    plain = {tuple(ids): model.logits(torch.tensor([ids]))[0] for ids in documents}
    model.document_end = END
    found = 0
    for row, logits in zip(x.tolist(), model.logits(x), strict=True):
        for ids, wanted in plain.items():
            for at in range(17 - len(ids)):
                if tuple(row[at : at + len(ids)]) == ids and (at == 0 or row[at - 1] == END):
                    torch.testing.assert_close(logits[at : at + len(ids)], wanted, atol=1e-5, rtol=0)
                    found += 1
    assert found == len(documents)


def watched(monkeypatch) -> list[tuple]:
    """What attention is called with: (arguments behind queries, keys and values; arguments by name)."""
    calls = []

    def attention(q, k, v, *args, **named):
        calls.append((args, named))
        return scaled_dot_product_attention(q, k, v, *args, **named)

    monkeypatch.setattr(gpt.F, "scaled_dot_product_attention", attention)
    return calls


@pytest.mark.parametrize("shape", ["learned", "grouped"])
def test_without_the_key_nothing_differs(shape, monkeypatch):
    """The kernel is asked for causal attention as ever, and the bits are those of a model that never had a mask."""
    never, model = made(shape), made(shape)
    model.document_end = END
    model(ROWS, ROWS)
    model.document_end = None
    monkeypatch.setattr(gpt, "document_mask", None)
    calls = watched(monkeypatch)
    for one in (never, model):
        one(ROWS, ROWS).sum.backward()
    assert calls == [((None,), {"is_causal": True, "enable_gqa": shape == "grouped"})] * 4
    for (name, gradient), other in zip(gradients(never).items(), gradients(model).values(), strict=True):
        assert torch.equal(gradient, other), name


@pytest.mark.parametrize("kind", ["plain", "autocast", "float64"])
def test_one_mask_for_all_blocks_in_the_type_of_the_queries(kind, monkeypatch):
    model = made("grouped")
    model.document_end = END
    if kind == "float64":
        model.double()
    calls = watched(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        model(ROWS, ROWS)
    wanted = {"plain": torch.float32, "autocast": torch.bfloat16, "float64": torch.float64}[kind]
    (mask,), named = calls[0]
    assert mask.dtype == wanted and mask.shape == (4, 1, 16, 16)
    assert named == {"is_causal": False, "enable_gqa": False}, "keys for each head: no kernel of CUDA does both"
    assert len(calls) == 2 and calls[1][0][0] is mask


@pytest.mark.parametrize("shape", ["learned", "grouped"])
def test_with_dropout_and_checkpointing_and_compiled(shape):
    model, targets = made(shape).train(), ROWS.roll(-1, 1)
    model.document_end = END
    wanted = model(ROWS, targets).sum
    wanted.backward()
    first = gradients(model)
    model.checkpointing = True
    again = model(ROWS, targets).sum
    again.backward()
    assert torch.equal(again, wanted)
    assert all(torch.equal(g, first[name]) for name, g in gradients(model).items()), "the same to the bit"
    model.checkpointing = False
    set_dropout(model, 1e-12)  # its own way to the kernel, and nothing is dropped
    torch.testing.assert_close(model(ROWS, targets).sum, wanted)
    set_dropout(model, 0.0)
    compile_blocks(model, backend="aot_eager")
    torch.testing.assert_close(model(ROWS, targets).sum, wanted)
    model.document_end = None
    torch.testing.assert_close(model(ROWS, targets).sum, made(shape)(ROWS, targets).sum)
    torch._dynamo.reset()


def test_generating_goes_on_with_one_document():
    """A prompt may hold an end: what follows it sees what stands before it, with the cache and without."""
    model, prompt = made("rotary").eval(), [7, 9, 3, 5, 8]
    with torch.no_grad():
        wanted = model.logits(torch.tensor([prompt]))[0, -1]
        model.document_end = END
        torch.testing.assert_close(model.extend(torch.tensor([prompt]), [5])[0], wanted, atol=1e-6, rtol=0)
        cache = gpt.Cache(model.config, 1, 16)
        model.extend(torch.tensor([prompt[:4]]), [4], cache)
        torch.testing.assert_close(model.extend(torch.tensor([prompt[4:]]), [1], cache)[0], wanted, atol=1e-5, rtol=0)
        assert (model.logits(torch.tensor([prompt]))[0, -1] - wanted).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------- runs


def by_hand(model: GPT, x: np.ndarray, y: np.ndarray, end: int) -> float:
    """The mean loss of windows, a document at a time."""
    losses, plain = [], copy.deepcopy(model).eval()
    plain.document_end = None
    with torch.no_grad():
        for row, following in zip(torch.from_numpy(x), torch.from_numpy(y), strict=True):
            edges = [0, *(i + 1 for i in range(len(row) - 1) if row[i] == end), len(row)]
            for a, b in zip(edges, edges[1:], strict=False):
                losses.append(cross_entropy(alone(plain, row, a, b).double(), following[a:b], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("length", [0, 8])
@pytest.mark.parametrize("shape", ["learned", "grouped"])
def test_training_and_validation_use_it(data, shape, length):
    """Its end is the first character here, the end of a line. Of pieces of windows each is a row of its own."""
    run = live_run(data, model=SHAPES[shape], batch_size=16)
    if length:
        apply(run, "set_sequence_length", length)
    plain = run.evaluate(lambda: 0)
    run.progress.changed_since_eval = False
    settings = apply(run, "set_document_mask", True)
    assert settings.document_mask and run.progress.changed_since_eval and run.model.document_end == 0
    val = run.data.val
    wanted = by_hand(run.model, *gather(val, eval_windows(val, settings.eval_iters * 16, 16), 16), 0)
    assert run.evaluate(lambda: 0) == pytest.approx(wanted, abs=1e-5)
    assert abs(plain - wanted) > 1e-3
    x, y = run.stream.batch(run.progress.cursor, settings.samples_per_iter)
    assert x.shape == (32, length or 16) and (x[:, :-1] == 0).any()
    wanted = by_hand(run.model, x, y, 0)
    assert run.step().loss.item() == pytest.approx(wanted, abs=1e-5)
    apply(run, "set_document_mask", False)
    assert run.model.document_end is None
    run.step()


def test_it_survives_a_change_of_shape(data):
    run = live_run(data, document_mask=True)
    assert run.model.document_end == 0
    was = run.evaluate(lambda: 0)
    apply(run, "stack_layers", {"n_layer": 3, "how": "identity"})
    assert run.model.document_end == 0 and run.evaluate(lambda: 0) == pytest.approx(was, abs=1e-6)


def test_the_end_follows_a_map_and_where_it_cannot_the_run_stays(data):
    run = live_run(data, document_mask=True)
    before = run.fingerprint()
    with pytest.raises(OperationFailed, match="no id of its own"):
        apply(run, "resize_vocabulary", {"size": 20, "map": [i % 20 for i in range(30)]})
    assert run.model.document_end == 0 and run.fingerprint() == before
    apply(run, "resize_vocabulary", {"size": 20, "map": [19, *(i % 19 for i in range(29))]})
    assert run.model.document_end == 19
    run.step()


def test_what_a_change_of_it_means(data):
    config = TrainConfig(**CONFIG, dataset="first")
    settings = settings_from(config, ModelConfig(**SHAPE))
    assert not settings.document_mask and not settings.evaluates_as(replace(settings, document_mask=True))
    masked = settings_from(config.model_copy(update={"document_mask": True}), settings.model)
    assert masked.document_mask and len(plan._graphs(masked) - plan._graphs(settings)) == 1, "another graph of blocks"


def _steps(rank: int, data: str, parallel: str) -> list[float]:
    run = make_run(data, document_mask=True, parallel=parallel)
    losses = [run.evaluate(lambda: 0)]
    for _ in range(3):
        losses.append(float(run.ranks.sum(np.array([run.step().loss.item()]))[0]) / run.ranks.world_size)
    losses.append(run.evaluate(lambda: 0))
    run.check_ranks_agree("training")
    run.ranks.close()
    return losses


def test_two_processes_do_what_one_does(tmp_path):
    data = write_data(tmp_path / "data", documents=True)
    alone = _steps(0, str(data), "ddp")
    assert alone[0] != make_run(str(data)).evaluate(lambda: 0)
    for parallel in ("ddp", "fsdp"):
        one, other = on_ranks(_steps, str(data), parallel)
        assert one == other == pytest.approx(alone, abs=1e-5)


def test_a_whole_run_with_it_and_its_resume(tmp_path, resume, capsys):
    data, path = write_data(tmp_path / "data", documents=True), tmp_path / "s.json"
    path.write_text(json.dumps([{"name": "set_document_mask", "value": True, "at_iter": 4, "reevaluate": True}]))
    given = arguments(data, tmp_path / "run", schedule=path, max_iters=8)
    assert train_orchestrated.main([*given, "--plan"]) == 0
    assert "document_mask False -> True" in (told := capsys.readouterr().out) and "CHANGES" in told
    assert train_orchestrated.main(given) == 0
    (event,) = events(tmp_path / "run", "operation")
    assert event["settings_after"] == {"document_mask": True} and event["val_loss_before"] != event["val_loss_after"]
    losses = [line["val_loss"] for line in lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    assert resume(tmp_path / "run", max_iters=8, eval_only=True) == 0, "what was recorded comes out again"
    assert losses[-1] != losses[0] and resume(tmp_path / "run", max_iters=10) == 0


def test_a_resume_overrides_it(data, tmp_path, resume, capsys):
    with_ends = write_data(tmp_path / "data", documents=True)
    for source, out, first, then in ((with_ends, "on", True, False), (data, "off", False, True)):
        given = arguments(source, tmp_path / out, max_iters=2, document_mask=first)
        assert train_orchestrated.run(given) == 0
        go_on = ["--init_from=resume", f"--out_dir={tmp_path / out}", "--max_iters=4", f"--document_mask={then}"]
        assert train_orchestrated.run(go_on) == (2 if then else 0)
        told = [(event["key"], event["before"], event["after"]) for event in events(tmp_path / out, "override")]
        assert told == ([] if then else [("document_mask", True, False), ("max_iters", 2, 4)])
        assert ("document_mask: dataset" in capsys.readouterr().err) == then


def test_what_it_costs_is_in_the_plan(data):
    for shape, more in (({}, 0), ({"n_kv_head": 1}, 2 * 2 * 8)):
        settings = settings_from(TrainConfig(**CONFIG, dataset="first"), ModelConfig(**{**SHAPE, **shape}))
        for width in (2, 4):
            masked = activation_bytes(replace(settings, document_mask=True), width)
            # 4 sequences of 16 tokens: a number for each pair of tokens, and keys and values of one head more a block
            assert masked - activation_bytes(settings, width) == width * (4 * 16 * 16 + 64 * more)


@pytest.mark.parametrize("row, told", [(1, False), (8, True), (16, False)])
def test_windows_of_several_rows_are_doubted(data, row, told):
    """A piece of a document that was cut has no end behind it."""
    found, config = sources(data), TrainConfig(**CONFIG, dataset="first", document_mask=True)
    for name, one in found.items():
        found[name] = replace(one, meta=replace(one.meta, row=row))
    for keys in ({}, {"document_mask": False}):
        settings = settings_from(config.model_copy(update=keys), ModelConfig(**SHAPE))
        said = [doubt for doubt in doubts(found, config, settings) if "a cut document" in doubt]
        wanted = "rows of 8 tokens, and block_size 16 holds several: what is behind a piece of a cut document sees it"
        assert said == [f"dataset first has {wanted}"] * (told and not keys)


# ---------------------------------------------------------------------------------------------- which token it is


def test_the_token_that_ends_a_document(tmp_path):
    assert end_of_text_of(Meta(), tmp_path) == 50256, "nanoGPT's folders say nothing, and mean GPT-2"
    assert end_of_text_of(Meta(50257), tmp_path) == 50256 and end_of_text_of(Meta(50256), tmp_path) is None
    assert end_of_text_of(Meta(65), tmp_path) is None, "characters without names"
    assert end_of_text_of(Meta(3, tokenizer="char", itos=("a", END_OF_TEXT, "b")), tmp_path) == 1
    assert end_of_text_of(Meta(2, tokenizer="char", itos=("a", "b")), tmp_path) is None


def test_through_a_map(data):
    found = sources(data)
    count = found.meta.vocab_size
    assert found.document_end() == 0
    assert found.document_end([5, *[4] * (count - 1)]) == 5
    for shared in ([4] * count, [4, *[5] * (count - 2), 4]):
        with pytest.raises(ValueError, match="vocabulary map gives the end-of-text token 0 no id of its own"):
            found.document_end(shared)


def test_data_sets_that_end_documents_differently(data, monkeypatch):
    found = sources(data)
    other = CharTokenizer(["a", END_OF_TEXT])
    meta = replace(found["second"].meta, itos=other.itos)
    found["second"] = replace(found["second"], meta=meta)
    with pytest.raises(ValueError, match="end their documents differently: first with token 0, second with token 1"):
        found.document_end()
    found["second"] = open_data(str(data), 16)
    with pytest.raises(ValueError, match=r"dataset second has no end-of-text token \(char"):
        found.document_end()


@pytest.mark.parametrize("planned", [False, True])
def test_a_data_set_without_an_end_is_refused(data, tmp_path, capsys, planned):
    path, more = tmp_path / "s.json", ["--plan"] if planned else []
    path.write_text(json.dumps([{"name": "set_document_mask", "value": True, "at_iter": 4}]))
    for keys, place in (({"document_mask": True}, ""), ({"schedule": path}, "entry 1: set_document_mask true: ")):
        assert train_orchestrated.run([*arguments(data, tmp_path / "run", **keys), *more]) == 2
        told = capsys.readouterr().err
        assert f"{place}document_mask: dataset {data} has no end-of-text token" in told and "Traceback" not in told
        assert not (tmp_path / "run").exists()


def test_a_map_that_hides_the_end_is_refused(tmp_path, capsys):
    data = write_data(tmp_path / "data", documents=True)
    count = open_data(str(data), 16).meta.vocab_size
    for shared, code in ((4, 2), (19, 0)):
        np.save(tmp_path / "map.npy", np.array([shared, *(4 + i % 15 for i in range(count - 1))]))
        keys = dict(document_mask=True, shrunken_vocab_size=20, vocab_remapping_file=tmp_path / "map.npy", max_iters=1)
        assert train_orchestrated.run([*arguments(data, tmp_path / "run", **keys), "--plan"]) == code
        assert ("document_mask: the vocabulary map gives" in capsys.readouterr().err) == (code == 2)


def test_a_packed_set_as_it_is_prepared(tmp_path, monkeypatch):
    """The border is the token that the set's own tokenizer ends documents with, read from the files beside it."""
    texts = [TEXT[start : start + 7 + 13 * start % 40] for start in range(0, 1500, 20)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = small_encoding()
    prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer, val=0.3, pack_length=16)
    sources = Sources({"out": open_data(str(tmp_path / "out"), 16)})
    end = sources.document_end()
    assert end == tokenizer.end_of_text and (np.asarray(sources.first.train.tokens[:]) == end).sum() > 40
    seen = []
    monkeypatch.setattr(gpt, "document_mask", lambda *args: [seen.append(args), document_mask(*args)][1])
    assert train_orchestrated.run(arguments(tmp_path / "out", tmp_path / "run", max_iters=1, document_mask=True)) == 0
    assert len(seen) > 3 and {args[1] for args in seen} == {end}
