"""Data and model against each other: what does not fit is refused by a plan and by a start; what is odd is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import TEXT, arguments, events, on_ranks, tensors, write_data
from test_foreign_weights import gpt2, llama, nanogpt_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import sample
import train_orchestrated
from orchestrate.training.settings.errors import Refused

SIZE = len(set(TEXT))


def with_ids(folder, ids, dtype="uint16", **meta):
    """A data set of these ids, with a meta.json of these fields or none."""
    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        np.array(ids, dtype=dtype).tofile(folder / name)
    if meta:
        (folder / "meta.json").write_text(json.dumps({"format": 1, "tokenizer": "char", "dtype": dtype, **meta}))
    return folder


def valid_where_sampled(ids: np.ndarray) -> None:
    """Put id 4 where a start looks: into 64 evenly spaced pieces of 64 KiB."""
    for i in range(64):
        ids[(len(ids) - 32768) * i // 63 :][:32768] = 4


def both_refuse(given: list[str], said: str) -> None:
    """By --plan and by a start, with exit code 2 and nothing written."""
    for options in (["--plan"], []):
        with pytest.raises(Refused, match=said):
            train_orchestrated.main([*given, *options])
        assert train_orchestrated.run([*given, *options]) == 2


def test_a_vocabulary_beyond_the_models_is_refused(tmp_path):
    """Though no id that is looked at is too large."""
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    folder = with_ids(tmp_path / "d", [0, 1, 2] * 100, vocab_size=31)
    given = arguments(folder, tmp_path / "run", init_from=tmp_path / "ckpt.pt")
    both_refuse(given, f"has a vocabulary of 31, more than the 30 of the model of {tmp_path / 'ckpt.pt'}$")


@pytest.mark.parametrize("place", ["train.bin", "val.bin"])
def test_ids_beyond_the_vocabulary_are_refused(tmp_path, place):
    folder = with_ids(tmp_path / "d", [0, 1, 2] * 100, vocab_size=3)
    np.array([0, 1, 2] * 99 + [3], dtype=np.uint16).tofile(folder / place)
    both_refuse(arguments(folder, tmp_path / "run"), rf"{place}: token id 3 is beyond the model's vocabulary of 3$")
    assert not (tmp_path / "run").exists()


def test_ids_are_looked_at_where_no_vocabulary_is_known(tmp_path):
    """Without a meta GPT-2's padded vocabulary is assumed."""
    folder = with_ids(tmp_path / "d", [50303] * 99)
    assert train_orchestrated.main([*arguments(folder, tmp_path / "run"), "--plan"]) == 0
    folder = with_ids(tmp_path / "e", [50304] * 99)
    both_refuse(arguments(folder, tmp_path / "run"), "token id 50304 is beyond the model's vocabulary of 50304")


def test_an_id_that_no_sample_showed_ends_the_run_with_a_message(tmp_path, capsys):
    folder = with_ids(tmp_path / "d", np.full(5_000_000, 9), vocab_size=5)
    whole = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r+")
    valid_where_sampled(whole)
    whole.flush()
    np.zeros(999, dtype=np.uint16).tofile(folder / "val.bin")
    assert train_orchestrated.run(arguments(folder, tmp_path / "run")) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the data does not fit the model: ") and "Traceback" not in told
    assert "train.bin: token id 9 is beyond the model's vocabulary of 5" in told
    assert "token id 9" in events(tmp_path / "run", "error")[0]["message"]


def test_an_id_of_the_validation_file_too(tmp_path, capsys):
    folder = with_ids(tmp_path / "d", [0] * 999, vocab_size=5)
    ids = np.full(5_000_000, 9, dtype=np.uint16)
    valid_where_sampled(ids)
    ids.tofile(folder / "val.bin")
    given = arguments(folder, tmp_path / "run", eval_iters=50, eval_batch_size=50)
    assert train_orchestrated.run(given) == 2
    assert "val.bin: token id 9 is beyond the model's vocabulary of 5" in capsys.readouterr().err


def _meets_a_foreign_id(rank: int, folder: str, out: str):
    """A run of two ranks in which the second alone finds an id that the model does not have."""
    import contextlib
    import io

    from orchestrate.data import stream
    from orchestrate.training.run.batches import Batches

    def within(ids, vocab_size, place):
        raise ValueError(f"{place}: token id 9 is beyond")

    def load(self, *args, original=Batches.load):
        stream.within = within
        return original(self, *args)

    if rank:
        Batches.load = load  # its first batch of training
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            code = train_orchestrated.run(arguments(folder, out, max_iters=3))
        except RuntimeError as error:  # the exchange that the other rank has left
            return type(error).__name__, told.getvalue()
    return code, told.getvalue()


def test_the_rank_that_meets_it_tells_it(tmp_path):
    folder = with_ids(tmp_path / "d", [0, 1, 2] * 100, vocab_size=5)
    (first, _), (code, told) = on_ranks(_meets_a_foreign_id, str(folder), str(tmp_path / "run"))
    assert first == "RuntimeError"
    assert code == 2 and told.startswith("error: the data does not fit the model: ") and "token id 9" in told


def test_a_map_that_lacks_ids_of_the_data_is_refused(tmp_path):
    folder = with_ids(tmp_path / "d", [0, 1, 7] * 100)
    np.save(tmp_path / "map.npy", np.array([0, 1, 1, 0]))
    given = arguments(folder, tmp_path / "run", shrunken_vocab_size=2, vocab_remapping_file=tmp_path / "map.npy")
    both_refuse(given, r"train.bin: token id 7 is beyond the 4 entries of the vocabulary map")


def test_what_a_vocabulary_grows_to_later_does_not_help_now(tmp_path):
    """The ids must fit the model that starts."""
    folder = with_ids(tmp_path / "d", [0, 1, 70] * 100, vocab_size=65)
    (tmp_path / "s.json").write_text('[{"name": "resize_vocabulary", "value": 80, "at_iter": 5}]')
    both_refuse(arguments(folder, tmp_path / "run", schedule=tmp_path / "s.json"), "token id 70 is beyond")


@pytest.mark.parametrize(
    "name, said",
    [
        ("nothere", "dataset nothere: no train.bin and val.bin"),
        ("broken", "meta.json: not JSON"),
        ("odd", "meta.json: vocab_size must be a whole number from 1 to 16777216, got 'many'"),
    ],
)
def test_a_plan_refuses_what_a_start_refuses(tmp_path, name, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_ids(tmp_path / "odd", [0] * 99, vocab_size="many")
    with_ids(tmp_path / "broken", [0] * 99)
    (tmp_path / "broken" / "meta.json").write_text("{")
    both_refuse(arguments(name, tmp_path / "run"), said)


def test_a_plan_refuses_a_device_that_is_not_there(data, tmp_path):
    both_refuse(arguments(data, tmp_path / "run", device="cuda:99"), "CUDA device")


# ---------------------------------------------------------------------------------------------- doubts


def planned_notes(given: list[str], capsys) -> str:
    capsys.readouterr()
    assert train_orchestrated.main([*given, "--plan"]) == 0
    return "".join(line for line in capsys.readouterr().out.splitlines(True) if line.startswith("note: "))


def test_a_smaller_vocabulary_than_the_models_is_said(data, tmp_path, capsys):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")  # 30 tokens: some more than the data has, as padding is
    keys = {"max_iters": 1, "warmup_iters": 0}
    assert planned_notes(arguments(data, tmp_path / "run", init_from=tmp_path / "ckpt.pt", **keys), capsys) == ""
    keys |= {"n_head": 4, "n_embd": 32}
    llama(vocab_size=512).save_pretrained(tmp_path / "hf")
    given = arguments(data, tmp_path / "run", init_from=tmp_path / "hf", **keys)
    said = f"dataset {data} has {SIZE} tokens, and the model's vocabulary is 512"
    assert planned_notes(given, capsys) == f"note: {said}\n"
    assert train_orchestrated.main(given) == 0
    assert f"warning: {said}\n" in capsys.readouterr().out


def test_another_tokenizer_than_the_models_is_said(data, tmp_path, capsys):
    llama(vocab_size=64).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    given = arguments(data, tmp_path / "run", init_from=tmp_path / "hf", n_head=4, n_embd=32)
    assert "is written in tokens of char, and" in (notes := planned_notes(given, capsys))
    assert "speaks LlamaTokenizerFast: a token means something else to it" in notes
    notes = planned_notes([f"--dataset={data}", "--init_from=gpt2", "--device=cpu", "--block_size=16"], capsys)
    assert "gpt2 speaks gpt2" in notes and "vocabulary is 50257" in notes


def test_a_run_within_its_warmup_is_said(data, tmp_path, capsys):
    given = arguments(data, tmp_path / "run", max_iters=500, warmup_iters=2000)
    assert "the run ends within its warm-up (max_iters 500, warmup_iters 2000)" in planned_notes(given, capsys)
    assert planned_notes([*given, "--warmup_iters=499"], capsys) == ""
    assert planned_notes([*given, "--decay_lr=False"], capsys) == ""


# ---------------------------------------------------------------------------------------------- foreign shapes


def test_a_key_that_contradicts_foreign_weights_is_refused(data, tmp_path):
    llama().save_pretrained(tmp_path / "hf")
    keys = {"n_layer": 7, "n_head": 4, "n_embd": 32, "norm": "layernorm", "tie_weights": True}
    have = f"but the weights of {tmp_path / 'hf'} have"
    with pytest.raises(Refused) as refused:
        train_orchestrated.main(arguments(data, tmp_path / "run", init_from=tmp_path / "hf", **keys))
    for said in (f"n_layer: got 7, {have} n_layer 2", f"norm: got 'layernorm', {have} norm 'rmsnorm'",
                 f"tie_weights: got True, {have} tie_weights False"):  # fmt: skip
        assert any(said in problem for problem in refused.value.problems), refused.value.problems
    assert len(refused.value.problems) == 3


def test_the_recorded_configuration_is_that_of_the_foreign_weights(data, tmp_path):
    llama(max_position_embeddings=24).save_pretrained(tmp_path / "hf")
    out = tmp_path / "run"
    given = [f"--dataset={data}", f"--out_dir={out}", f"--init_from={tmp_path / 'hf'}", "--device=cpu"]
    given += ["--max_iters=2", "--eval_iters=1", "--compile=False", "--batch_size=2", "--n_layer=2", "--n_hidden=0"]
    given += ["--gradient_accumulation_steps=1", "--dropout=0.1"]
    assert train_orchestrated.main(given) == 0
    recorded = json.loads((out / "config.json").read_text())
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_hidden": 48, "norm": "rmsnorm",
             "norm_eps": 1e-6, "activation": "swiglu", "use_rotary_embeddings": True, "tie_weights": False,
             "bias": False, "block_size": 24, "dropout": 0.1}  # fmt: skip
    assert recorded | shape == recorded
    assert json.loads((out / "checkpoints/latest/state.json").read_text())["config"] | shape == recorded
    resumed = ["--init_from=resume", f"--out_dir={out}", "--max_iters=3"]
    assert train_orchestrated.main([*resumed, "--n_layer=2"]) == 0
    with pytest.raises(Refused, match="n_layer cannot change on resume from 2 to 12"):
        train_orchestrated.main([*resumed, "--n_layer=12"])


def test_adapters_fit_the_foreign_shape(data, tmp_path):
    """Ranks are held against the weights' own sizes, not against those of a configuration that is not meant."""
    gpt2().save_pretrained(tmp_path / "hf")
    given = [f"--dataset={data}", f"--init_from={tmp_path / 'hf'}", "--device=cpu", "--plan"]
    assert train_orchestrated.main([*given, "--attn_lora_rank=32"]) == 0
    with pytest.raises(Refused, match="LoRA rank of attn.0 must be from 1 to 32 .*got 33"):
        train_orchestrated.main([*given, "--attn_lora_rank=33"])


# ---------------------------------------------------------------------------------------------- on resume


def test_the_same_data_under_another_name_goes_on(tmp_path, resume):
    for name in ("a", "b", "other"):
        write_data(tmp_path / name)
    raw = bytearray((tmp_path / "other" / "train.bin").read_bytes())
    raw[10] ^= 1
    (tmp_path / "other" / "train.bin").write_bytes(raw)
    out = tmp_path / "run"
    assert train_orchestrated.main(arguments(tmp_path / "a", out, max_iters=4)) == 0
    assert resume(out, dataset=tmp_path / "b", max_iters=6) == 0
    (override,) = [event for event in events(out, "override") if event["key"] == "dataset"]
    assert (override["before"], override["after"]) == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert override["applied"]
    said = f"dataset {tmp_path / 'other'}: the content of train.bin is not what the checkpoint was trained on"
    for options in ({}, {"plan": "table"}):
        with pytest.raises(Refused, match=said):
            resume(out, dataset=tmp_path / "other", max_iters=8, **options)
    assert resume(out, dataset=tmp_path / "other", max_iters=8, allow_changed_data=True) == 0
    assert resume(out, max_iters=9) == 0, "and the other content is what the next checkpoint was trained on"


def test_the_run_is_that_of_the_name_it_started_with(tmp_path, tiny, resume):
    """Another path of the same bytes changes no bit."""
    from conftest import assert_same_tensors

    copy = write_data(tmp_path / "copy")
    _, whole = tiny(out="whole", max_iters=8)
    _, part = tiny(out="part", max_iters=4)
    assert resume(part, dataset=copy, max_iters=8) == 0
    assert_same_tensors(tensors(part), tensors(whole))


def test_an_empty_schedule_on_resume_means_no_more_entries(tiny, resume):
    first = {"name": "set_lr", "value": 5e-3, "at_iter": 2, "desc": "é \U0001f600"}
    _, out = tiny([first, {"name": "set_grad_clip", "value": 0.5, "at_iter": 5}], max_iters=4)
    assert resume(out, schedule="", max_iters=8) == 0
    assert [entry["name"] for entry in events(out, "operation")] == ["set_lr"]
    (override,) = events(out, "override")[-1:]
    assert override["key"] == "schedule" and len(override["before"]) == 1 and override["after"] == []
    assert json.loads((out / "schedule.yaml").read_text("utf-8")) == [first]
    assert events(out, "end")[-1]["not_fired"] == []
    # A further resume goes on from it, and one more entry can be added to what has fired.
    assert resume(out, max_iters=9) == 0
    more = out.parent / "more.json"
    more.write_text(json.dumps([first, {"name": "set_dropout", "value": 0.1, "at_iter": 9}]))
    assert resume(out, schedule=more, max_iters=11) == 0
    assert [entry["name"] for entry in events(out, "operation")] == ["set_lr", "set_dropout"]


# ---------------------------------------------------------------------------------------------- messages, samples


@pytest.mark.parametrize(
    "name, said",
    [
        ("Qwen/Qwen2-0.5B", "no such file or folder; allowed: scratch, resume, gpt2, .* of the hub's models only"),
        ("gpt3", "no such file or folder; allowed: scratch, resume, gpt2, gpt2-medium"),
    ],
)
def test_init_from_says_what_is_allowed(data, tmp_path, name, said):
    both_refuse(arguments(data, tmp_path / "run", init_from=name), said)
    with pytest.raises(ValueError, match=said):
        sample.main([f"--init_from={name}", "--device=cpu"])


def test_loading_shows_no_bars(data, tmp_path, capfd):
    gpt2().save_pretrained(tmp_path / "hf")
    capfd.readouterr()
    keys = {"n_head": 4, "n_embd": 32, "max_iters": 1}
    assert train_orchestrated.main(arguments(data, tmp_path / "run", init_from=tmp_path / "hf", **keys)) == 0
    assert capfd.readouterr().err == ""


def _with_tokenizer(folder):
    """A Llama with a tokenizer of its own: words, numbered by how often they come."""
    inner = Tokenizer(models.WordLevel(unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=["?"], vocab_size=30))
    llama(vocab_size=64).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?").save_pretrained(folder)
    return inner


def test_a_folder_is_sampled_with_its_own_tokenizer(tmp_path, capsys, data):
    inner = _with_tokenizer(tmp_path / "hf")
    options = ["--start=to be", "--num_samples=1", "--max_new_tokens=6", "--device=cpu"]
    assert sample.main([f"--init_from={tmp_path / 'hf'}", *options]) == 0
    words = capsys.readouterr().out.split("\n---")[0]
    assert words.startswith("to be") and set(words.replace("\ufffd", " ").split()) <= set(inner.get_vocab())
    assert sample.main([f"--init_from={tmp_path / 'hf'}", f"--dataset={data}", *options]) == 0
    assert capsys.readouterr().out.startswith("to be")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, data, capsys):
    llama(vocab_size=64).save_pretrained(tmp_path / "hf")
    options = [f"--init_from={tmp_path / 'hf'}", "--device=cpu", "--num_samples=1", "--max_new_tokens=2"]
    with pytest.raises(ValueError, match="no tokenizer can be read from it .*--dataset names one"):
        sample.main(options)
    assert sample.main([*options, f"--dataset={data}"]) == 0
