"""Tasks of lm-eval while a model trains, set_eval_tasks, and bits per byte."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import miniature
import numpy as np
import pytest
from conftest import arguments, assert_same_tensors, events, lines, on_ranks, tensors
from test_evaluate import words
from test_tokenizers import EOT, byte_level, encoding, saved, unigram

import train_orchestrated
from orchestrate.data.files import packed
from orchestrate.data.keeping import save
from orchestrate.data.stream import eval_windows, open_data
from orchestrate.data.tokenizer import byte_counts
from orchestrate.tools.main import run as orchestrate
from orchestrate.training.run.text_bytes import TextBytes
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Settings
from orchestrate.training.store import checkpoint
from orchestrate.training.store.state import State
from orchestrate.training.tasks.adapter import NotFinite
from orchestrate.training.tasks.harness import Loaded

pytest.importorskip("lm_eval")

KEYS = dict(max_iters=6, eval_interval=2, block_size=128, n_embd=16, n_head=2, n_layer=1, batch_size=2, eval_iters=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return miniature.write(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return words(tmp_path_factory.mktemp("letters") / "letters")


@pytest.fixture
def train(letters, tmp_path):
    def launch(schedule=(), out="run", **keys):
        path = tmp_path / f"{out}.json"
        path.write_text(json.dumps(list(schedule)))
        code = train_orchestrated.main(arguments(letters, tmp_path / out, schedule=path, **{**KEYS, **keys}))
        return code, tmp_path / out

    return launch


def scores(out, name) -> dict[int, float]:
    return {m["iter"]: m[name] for m in lines(out / "metrics.jsonl") if m["kind"] == "eval" and name in m}


def test_a_task_of_lm_eval_is_a_metric(train, data, capsys):
    """Its numbers are those that `orchestrate evaluate` gives of the checkpoint; the run is the same to the bit."""
    keys = dict(eval_tasks=f"['copa:{data}', 'arc_easy:{data}']", eval_tasks_limit=8)
    code, out = train([{"name": "set_grad_clip", "value": 0.5,
                        "trigger": {"metric": "eval/copa", "above": 0.0}}], **keys)  # fmt: skip
    assert code == 0 and list(scores(out, "eval/copa")) == [0, 2, 4, 6]
    assert events(out, "operation")[0]["reason"].startswith("eval/copa ")
    last = next(m for m in lines(out / "metrics.jsonl") if m["kind"] == "eval" and m["iter"] == 6)
    assert last["eval/arc_easy"] == last["eval/arc_easy/acc"]
    target = out / "scores.json"
    asked = ["--tasks", "copa,arc_easy", "--data", str(data), "--limit", "8", "--out", str(target)]
    assert orchestrate("evaluate", [str(out), *asked]) == 0
    (model,) = json.loads(target.read_text())["models"]
    for name in ("copa", "arc_easy"):
        value, error = model["results"][name]["scores"]["acc"]
        assert (last[f"eval/{name}"], last[f"eval/{name}/stderr"]) == (value, pytest.approx(error))
    assert last["eval/arc_easy/acc_norm"] == model["results"]["arc_easy"]["scores"]["acc_norm"][0]
    _, other = train([{"name": "set_grad_clip", "value": 0.5, "at_iter": 0}], out="without")
    assert_same_tensors(tensors(out), tensors(other))


def test_a_metric_without_a_value_ends_no_run(train, data, monkeypatch):
    """As a correlation where all answers are alike; nor do logits that are not finite."""
    real, calls = Loaded.score, []

    def some(self, *args):
        calls.append(self.name)
        if len(calls) == 2:
            raise NotFinite
        found = real(self, *args)
        return replace(found, scores={name: pair for name, pair in found.scores.items() if name != "acc"})

    monkeypatch.setattr(Loaded, "score", some)
    code, out = train(eval_tasks=f"arc_easy:{data}", eval_tasks_limit=4)
    assert code == 0 and len(calls) == 4 and not scores(out, "eval/arc_easy")
    assert list(scores(out, "eval/arc_easy/acc_norm")) == [0, 4, 6] and not scores(out, "eval/arc_easy/stderr")


def test_which_tasks_are_scored_changes_in_a_run(train, data, resume):
    schedule = [
        {"name": "set_eval_tasks", "value": [f"copa:{data}"], "at_iter": 3},
        {"name": "set_eval_tasks", "value": [f"piqa:{data}"], "trigger": {"metric": "eval/copa", "above": 0.0}},
    ]
    code, out = train(schedule, max_iters=4)
    assert code == 0 and list(scores(out, "eval/copa")) == [4] and not scores(out, "eval/piqa")
    assert resume(out, max_iters=8) == 0
    assert list(scores(out, "eval/copa")) == [4] and list(scores(out, "eval/piqa")) == [6, 8]
    two = events(out, "operation")
    assert [event["settings_after"]["eval_tasks"] for event in two] == [[f"copa:{data}"], [f"piqa:{data}"]]
    assert resume(out, max_iters=10, eval_tasks=f"boolq:{data}") == 0
    assert list(scores(out, "eval/piqa")) == [6, 8] and list(scores(out, "eval/boolq")) == [10]


@pytest.mark.parametrize(
    "schedule, keys, message",
    [
        ([], dict(eval_tasks="copas"), "eval_tasks: there is no task 'copas'"),
        ([{"name": "set_eval_tasks", "value": ["adder:x", "copas"]}], {}, "entry 1: set_eval_tasks"),
        ([], dict(eval_tasks="copa:nowhere"), "eval_tasks: copa: nowhere: there is no such folder"),
        ([], dict(eval_tasks="wikitext:DATA"), "eval_tasks: "),
        ([], dict(eval_tasks="triviaqa:DATA"),
         "eval_tasks: triviaqa: it asks for 256 new tokens, and the model has block_size 128"),
        ([{"name": "set_dropout", "value": 0.1, "trigger": {"metric": "eval/piqa", "above": 0.1}}],
         dict(eval_tasks="copa:DATA"), "eval/piqa is given by no task"),
    ],
)  # fmt: skip
def test_bad_tasks_are_refused_at_the_start(train, data, tmp_path, schedule, keys, message):
    with pytest.raises(Refused) as caught:
        train(schedule, **{key: value.replace("DATA", str(data)) for key, value in keys.items()})
    assert message in "\n".join(caught.value.problems) and not (tmp_path / "run").exists()


def test_an_older_checkpoint_has_its_tasks_in_the_configuration(train, data):
    _, out = train(max_iters=2, eval_tasks=f"copa:{data}")
    state = checkpoint.load(checkpoint.folder(out) / "latest").state
    values = json.loads(state.text())
    assert values["settings"].pop("eval_tasks") == [f"copa:{data}"]
    assert State.from_json(values).settings == state.settings
    assert Settings.from_json(values["settings"]).eval_tasks == ()


def _on_ranks(rank: int, letters, data, out) -> list:
    keys = dict(eval_tasks=f"copa:{data}", gradient_accumulation_steps=2, **KEYS | {"eval_iters": 3})
    assert train_orchestrated.main(arguments(letters, out, **keys)) == 0
    return [] if rank else [list(scores(out, name).items()) for name in ("eval/copa", "val_bpb")]


def test_ranks_share_a_task(letters, data, tmp_path, train):
    """Two processes have the scores of one, and its bits per byte."""
    found, _ = on_ranks(_on_ranks, letters, data, tmp_path / "two")
    _, out = train(eval_tasks=f"copa:{data}", gradient_accumulation_steps=2, eval_iters=3)
    (copa, bits), expected = found, scores(out, "val_bpb")
    assert copa == list(scores(out, "eval/copa").items()) and len(copa) == 4
    assert dict(bits) == pytest.approx(expected, rel=1e-6) and len(set(expected.values())) == 4


# ---------------------------------------------------------------------------------------------- bits per byte


def written(folder, ids, own=None, mask=None, **meta):
    """A data set of these validation ids; the training ones are the same."""
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        np.array(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
        if mask is not None:
            (folder / f"{split}.mask.bin").write_bytes(packed(np.array(mask, dtype=bool)))
    if own is not None:
        save(own, folder / "tokenizer")
        meta |= {"tokenizer": "huggingface", "vocab_size": own.vocab_size}
    masks = ["train", "val"] if mask is not None else []
    (folder / "meta.json").write_text(json.dumps({"format": 1, "dtype": "uint16", "masks": masks, **meta}))
    return open_data(str(folder), 4)


def test_bits_per_byte_by_hand(tmp_path):
    """The text aé and an end, again and again."""
    characters = {"vocab_size": 3, "tokenizer": "char", "itos": ["a", "é", EOT]}
    ids = [0, 1, 2] * 4 + [0]
    data = written(tmp_path / "d", ids, **characters)
    # 3 windows begin at 0, 4, 8; their targets are tokens 1 to 12: four each of é (2 bytes), the end (0) and a (1).
    assert TextBytes().bits_per_byte(data, 0.5, 99, 4) == pytest.approx(0.5 / math.log(2))
    size, seen = [1, 2, 0], set()
    for count in (1, 2, 3):
        starts = eval_windows(data.val, count, 2)
        seen.add(expected := sum(size[ids[i]] for start in starts for i in (start + 1, start + 2)) / (2 * len(starts)))
        assert TextBytes().bits_per_byte(data, 0.5, count, 2) == pytest.approx(0.5 / math.log(2) / expected)
    assert len(seen) > 1
    masked = written(tmp_path / "m", ids, mask=[i % 3 == 1 for i in range(13)], **characters)
    assert TextBytes().bits_per_byte(masked, 0.5, 99, 4) == pytest.approx(0.5 / math.log(2) / 2), "only é counts"


def test_two_tokenizers_over_one_text(tmp_path):
    """A model that gives each byte 2 bits has 2 bits per byte in either; the losses per token differ."""
    text, losses = "to be or not to be 1234567 é\n" * 8, set()
    for name, tokenizer in (("pairs", encoding()), ("bpe", saved(byte_level(), tmp_path / "hf", eos_token=EOT))):
        ids = tokenizer.encode_plain(text)
        counts = byte_counts(tokenizer)
        assert counts[ids].sum() == len(text.encode()) and counts[tokenizer.end_of_text] == 0
        data = written(tmp_path / name, ids, tokenizer)
        targets = ids[1 : 1 + (len(ids) - 1) // 4 * 4]
        loss = 2 * math.log(2) * len(tokenizer.decode(targets).encode()) / len(targets)
        losses.add(loss)
        assert TextBytes().bits_per_byte(data, loss, 999, 4) == pytest.approx(2.0), name
    assert len(losses) == 2


def test_bytes_of_tokens_whose_text_depends_on_neighbours(tmp_path):
    tokenizer = saved(unigram(), tmp_path / "hf", eos_token="</s>")
    counts = byte_counts(tokenizer)
    for text in ("to be", "to be, not", "to é"):
        ids = tokenizer.encode_plain(text)
        assert counts[ids].sum() == len(text.encode()), text
    assert counts[tokenizer.end_of_text] == 0


def test_bits_per_byte_are_logged_and_a_metric(train, capsys):
    """Of a data set by characters of a byte each they are the loss in bits."""
    schedule = [{"name": "set_grad_clip", "value": 0.5, "trigger": {"metric": "val_bpb", "below": 100.0}}]
    code, out = train(schedule)
    said = capsys.readouterr().out
    assert code == 0 and events(out, "operation")[0]["reason"].startswith("val_bpb ")
    found = [m for m in lines(out / "metrics.jsonl") if m["kind"] == "eval"]
    assert len(found) == 4
    for m in found:
        assert m["val_bpb"] == pytest.approx(m["val_loss"] / math.log(2), rel=1e-9)
        assert f", {m['val_bpb']:.4f} bits per byte" in said


def test_a_data_set_without_its_tokenizer_has_no_bits_per_byte(tmp_path, capsys):
    data = tmp_path / "bare"
    written(data, [*range(50)] * 40, vocab_size=50, tokenizer="gpt2")
    keys = {**KEYS, "max_iters": 4}
    assert train_orchestrated.main(arguments(data, tmp_path / "run", **keys)) == 0
    said = capsys.readouterr().out
    assert said.count("val_bpb is not measured of") == 1 and "no tokenizer is kept with the data set" in said
    assert not any("val_bpb" in m for m in lines(tmp_path / "run" / "metrics.jsonl"))
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"name": "stop", "trigger": {"metric": "val_bpb", "below": 1.0}}]))
    with pytest.raises(Refused, match="val_bpb cannot be measured: .*no tokenizer is kept"):
        train_orchestrated.main(arguments(data, tmp_path / "other", schedule=path, **keys))


def test_several_data_sets_have_bits_per_byte_each(letters, tmp_path):
    other = tmp_path / "again"
    shutil.copytree(letters, other)
    keys = {**KEYS, "max_iters": 2, "dataset": {str(letters): 0.75, str(other): 0.25}}
    assert train_orchestrated.main(arguments(letters, tmp_path / "run", **keys)) == 0
    last = [m for m in lines(tmp_path / "run" / "metrics.jsonl") if m["kind"] == "eval"][-1]
    each = {name: value for name, value in last.items() if name.startswith("val_bpb/")}
    assert len(each) == 2 and last["val_bpb"] == pytest.approx(last["val_loss"] / math.log(2))
