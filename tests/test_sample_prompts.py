"""sample_prompts: texts at evaluations in the log, the events and W&B, and a run that they do not disturb."""

from __future__ import annotations

import os

import numpy as np
import pytest
from conftest import arguments, assert_same_tensors, events, lines, on_ranks, tensors, write_data

import sample
import train_orchestrated
from orchestrate.training.settings.config import TrainConfig, resolve
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint

PROMPTS = ["To be", "q", "that is the question: whether"]
SCHEDULE = [
    {"name": "set_attn_lora_rank", "value": 2, "at_iter": 3},
    {"name": "stack_layers", "value": {"times": 2}, "at_iter": 5, "reevaluate": True},
]


def measured(out) -> list[tuple]:
    return [(m["kind"], m["iter"], m.get("loss", m.get("val_loss"))) for m in lines(out / "metrics.jsonl")]


def test_texts_are_logged_and_the_run_is_the_same_to_the_bit(tiny, capsys):
    keys = {"dropout": 0.2, "sample_tokens": 20}
    code, out = tiny(SCHEDULE, sample_prompts=PROMPTS, **keys)
    shown = capsys.readouterr().out
    other_code, other = tiny(SCHEDULE, out="without", **keys)
    assert code == other_code == 0
    assert_same_tensors(tensors(out), tensors(other))
    assert measured(out) == measured(other)
    told = events(out, "samples")
    assert [event["iter"] for event in told] == [0, 4, 8, 12] and not events(other, "samples")
    for event in told:
        assert [text["prompt"] for text in event["texts"]] == PROMPTS
        for text in event["texts"]:
            assert text["text"].startswith(text["prompt"]) and len(text["text"]) == len(text["prompt"]) + 20
            assert f"step {event['iter']}: a text from {text['prompt']!r}:\n{text['text']}\n" in shown
    assert told[0] != told[3]
    # The last ones are what sample.py says of the run's end.
    capsys.readouterr()
    given = ["--num_samples=1", "--max_new_tokens=20", "--device=cpu", "--start=To be"]
    assert sample.main([f"--out_dir={out}", *given]) == 0
    assert capsys.readouterr().out == told[3]["texts"][0]["text"] + "\n---------------\n"


def test_a_resumed_run_tells_each_text_once(tiny, resume):
    code, out = tiny(sample_prompts="To be", sample_tokens=5, max_iters=6)
    assert code == 0 and resume(out, max_iters=12) == 0
    whole = tiny(sample_prompts="To be", sample_tokens=5, out="whole", max_iters=12)[1]
    ours, theirs = ([(e["iter"], e["texts"]) for e in events(folder, "samples")] for folder in (out, whole))
    assert [text for text in ours if text[0] != 6] == theirs and [iteration for iteration, _ in ours] == [
        0,
        4,
        6,
        8,
        12,
    ]


def test_going_back_makes_texts_void(tiny):
    schedule = [{"name": "set_lr", "value": 50.0, "at_iter": 5,
                 "guard": {"max_increase": 0.0, "within_iters": 3, "then": "revert"}}]  # fmt: skip
    _, out = tiny(schedule, sample_prompts="T", sample_tokens=3)
    (back,) = events(out, "rollback")
    void = [e["iter"] for e in lines(out / "events.jsonl") if e["kind"] == "samples" and e.get("void")]
    assert void == [8] and back["iter"] == 5
    assert [e["iter"] for e in events(out, "samples")] == [0, 4, 8, 12]


def test_a_shrunken_vocabulary_speaks_through_its_map(data, tmp_path):
    np.save(tmp_path / "r.npy", np.minimum(np.arange(26), 9))
    keys = dict(shrunken_vocab_size=10, vocab_remapping_file=tmp_path / "r.npy", max_iters=1, sample_prompts=["To be"])
    assert train_orchestrated.main(arguments(data, tmp_path / "run", **keys)) == 0
    (text,) = events(tmp_path / "run", "samples")[-1]["texts"]
    assert len(text["text"]) == 5 + 64 and not text["text"].startswith("To be"), "rare characters share one id"


@pytest.mark.parametrize("plan", [[], ["--plan"]])
@pytest.mark.parametrize(
    "prompts, message",
    [
        ("§", "sample_prompts: the character '§'"),
        (["To", "§"], "sample_prompts: prompt 2: the character '§'"),
        ([""], "sample_prompts: the prompt is empty"),
        ([3], "--sample_prompts: sample_prompts must be text, got 3"),
        (["a", ["b"]], r"sample_prompts must be text, got \['b'\]"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_before_anything_is_written(data, tmp_path, prompts, message, plan):
    with pytest.raises(Refused, match=message):
        train_orchestrated.main([*arguments(data, tmp_path / "run", sample_prompts=prompts), *plan])
    assert not (tmp_path / "run").exists()


def test_the_key_is_a_text_or_a_list_of_texts(tmp_path):
    file = tmp_path / "c.py"

    def given(*text: str, source: str = "") -> tuple:
        file.write_text(source)
        return resolve([file], [("sample_prompts", one) for one in text])[0].sample_prompts

    assert given() == given("") == given("()") == given("[]") == ()
    assert given("42") == ("42",) and given("ROMEO:") == ("ROMEO:",) and given("['a', \"b\"]") == ("a", "b")
    assert given(source="_a = 'x'\nsample_prompts = [_a + 'y', 'z']") == ("xy", "z")
    assert given(source="sample_prompts = ('a',)") == ("a",) == given(source="sample_prompts = 'a'")
    again = TrainConfig(**TrainConfig(sample_prompts=["a"]).model_dump(mode="json"))
    assert again.sample_prompts == ("a",)
    for source, message in [
        ("_a = ['x']\n_b = [_a, _a]", "no lists among them"),
        ("_a = ['x']\nsample_prompts = _a + _a", None),
        (f"sample_prompts = [{', '.join(['1'] * 101)}]", "at most 100 values"),
        ("_a = ['x']\n" + "_a = _a + _a\n" * 30, "at most 100 values"),
    ]:
        if message is None:
            assert given(source=source) == ("x", "x")
        else:
            with pytest.raises(Refused, match=message):
                given(source=source)


def test_numbers_that_are_none_are_told_and_the_run_goes_on(tiny, capsys, monkeypatch):
    def broken(*_, **__):
        raise Refused("the model's logits are not finite: its weights have diverged")
        yield

    monkeypatch.setattr("orchestrate.training.session.texts.samples", broken)
    code, out = tiny(sample_prompts="T", max_iters=1)
    assert code == 0 and not events(out, "samples")
    assert "warning: sample_prompts: the model's logits are not finite" in capsys.readouterr().out


def _runs(rank: int, commands: list[list[str]]) -> list[int]:
    codes = []
    for number, command in enumerate(commands):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + number)
        codes.append(train_orchestrated.main(command))
    return codes


@pytest.mark.parametrize("style", [{}, {"use_rotary_embeddings": True, "n_kv_head": 1, "tie_weights": False}])
def test_two_ranks_and_shards_are_not_disturbed(tmp_path, style):
    """The texts are those of one process; with and without them weights and losses are equal to the bit."""
    data = write_data(tmp_path / "data")
    some = {"sample_prompts": PROMPTS, "sample_tokens": 25}
    commands = {
        f"{parallel}{'_with' if extra else ''}": arguments(data, tmp_path / f"{parallel}{'_with' if extra else ''}",
                                                           parallel=parallel, max_iters=8, **extra, **style)
        for parallel in ("ddp", "fsdp") for extra in ({}, some)
    }  # fmt: skip
    assert on_ranks(_runs, list(commands.values()), seconds=300) == [[0] * 4] * 2
    for parallel in ("ddp", "fsdp"):
        one, other = tmp_path / parallel, tmp_path / f"{parallel}_with"
        assert measured(one) == measured(other) and len(measured(one)) > 8
        assert [event["iter"] for event in events(other, "samples")] == [0, 4, 8] and not events(one, "samples")
    for parallel in ("ddp", "fsdp"):
        loaded = [
            checkpoint.load(tmp_path / name / "checkpoints" / "latest") for name in (parallel, f"{parallel}_with")
        ]
        assert_same_tensors(dict(loaded[0].model), dict(loaded[1].model))
    texts = [[e["texts"] for e in events(tmp_path / f"{p}_with", "samples")] for p in ("ddp", "fsdp")]
    assert texts[0] == texts[1] and len(texts[0][0]) == 3
