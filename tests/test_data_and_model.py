"""Data and model against each other: what does not fit is refused by a plan and by a start; what is odd is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import TEXT, arguments, events, on_ranks, tensors, write_data
from test_foreign_weights import DYNAMIC, LLAMA3, gpt2, llama, nanogpt_checkpoint, qwen2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import sample
import train_orchestrated
from orchestrate.data.keeping import kept_with_data, kept_with_run, save
from orchestrate.data.prepare import prepare
from orchestrate.data.stream import read_meta
from orchestrate.data.tokenizer import CharTokenizer, HuggingFaceTokenizer
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
    both_refuse(given, "speaks LlamaTokenizerFast: a token means something else to it; --allow_other_tokenizer=True")
    notes = planned_notes([*given, "--allow_other_tokenizer=True"], capsys)
    assert "is written in tokens of char, and" in notes
    assert "speaks LlamaTokenizerFast: a token means something else to it; going on all the same" in notes
    given = [f"--dataset={data}", "--init_from=gpt2", "--device=cpu", "--block_size=16", "--allow_other_tokenizer=True"]
    notes = planned_notes(given, capsys)
    assert "gpt2 speaks gpt2" in notes and "vocabulary is 50257" in notes
    with pytest.raises(Refused, match="gpt2 speaks gpt2"):
        train_orchestrated.main([*given[:-1], "--plan"])


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


def test_the_recorded_configuration_is_that_of_the_foreign_weights(data, tmp_path, monkeypatch):
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
    with pytest.raises(Refused, match="n_hidden cannot change on resume from 48 to 0"):
        train_orchestrated.main([*resumed, "--n_hidden=0"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the first command again: 0 is what the folder has
    assert train_orchestrated.main([*given, "--max_iters=4"]) == 0 and events(out, "end")[-1]["iter"] == 4


def test_what_the_finer_options_say_of_foreign_weights(data, tmp_path, monkeypatch):
    """Their keys are recorded, contradicted aloud, and config.json is read once."""
    import transformers

    hf, out = tmp_path / "hf", tmp_path / "run"
    qwen2(rope_parameters=LLAMA3, vocab_size=SIZE).save_pretrained(hf)
    given = arguments(data, out, init_from=hf, n_head=4, n_embd=32, max_iters=2)
    have = f"but the weights of {hf} have"
    both_refuse([*given, "--attn_bias=all"], f"attn_bias: got 'all', {have} attn_bias 'qkv'$")
    both_refuse(
        [*given, "--rotary_llama3_factor=1"], f"rotary_llama3_factor: got 1.0?, {have} rotary_llama3_factor 8.0$"
    )
    both_refuse([*given, "--bias=True"], f"bias: got True, {have} bias False$")
    asked, read = [], transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *a, **k: asked.append(a) or read(*a, **k))
    assert train_orchestrated.main([*given, "--attn_bias=qkv", "--rotary_original_length=16"]) == 0
    assert len(asked) == 1
    recorded = json.loads((out / "config.json").read_text())
    shape = {"attn_bias": "qkv", "bias": False, "mlp_bias": False, "rotary_llama3_factor": 8.0,
             "rotary_low_freq_factor": 1.0, "rotary_high_freq_factor": 4.0, "rotary_original_length": 16,
             "rotary_scale": 1.0, "rotary_base": 100.0}  # fmt: skip
    assert recorded | shape == recorded
    resumed = ["--init_from=resume", f"--out_dir={out}", "--max_iters=3"]
    both_refuse([*resumed, "--rotary_low_freq_factor=2"], "from 1.0 to 2.*, and no operation changes it$")
    assert train_orchestrated.main([*resumed, "--attn_bias=qkv"]) == 0
    # Dynamic NTK, in sequences up to its factor times the length that it begins at.
    qwen2(rope_parameters=DYNAMIC, vocab_size=SIZE).save_pretrained(tmp_path / "ntk")
    given = arguments(data, tmp_path / "long", init_from=tmp_path / "ntk", n_head=4, n_embd=32, max_iters=1)
    both_refuse([*given, "--rotary_dynamic_factor=0"], "rotary_dynamic_factor: got 0.*, .* rotary_dynamic_factor 3.0$")
    both_refuse([*given, "--block_size=97"], "block_size 97 is longer than the 96 that .* was made for")
    assert train_orchestrated.main([*given, "--block_size=40"]) == 0
    recorded = json.loads((tmp_path / "long" / "config.json").read_text())
    assert (recorded["rotary_dynamic_factor"], recorded["rotary_original_length"]) == (3.0, 32)
    # Biases in all of it are said by each of the three keys.
    gpt2(vocab_size=SIZE).save_pretrained(tmp_path / "gpt2")
    given = arguments(data, tmp_path / "other", init_from=tmp_path / "gpt2", n_head=4, n_embd=32, max_iters=1)
    both_refuse([*given, "--attn_bias=none"], "attn_bias: got 'none', .* have attn_bias 'all'$")
    assert train_orchestrated.main([*given, "--attn_bias=all", "--mlp_bias=True"]) == 0


def test_a_folder_that_does_not_fit_is_refused_before_training(data, tmp_path):
    hf = tmp_path / "hf"
    keys = {"init_from": hf, "n_head": 4, "n_embd": 32}
    llama(vocab_size=SIZE - 1).save_pretrained(hf)
    both_refuse(
        arguments(data, tmp_path / "run", **keys), f"vocabulary of {SIZE}, more than the {SIZE - 1} of the model"
    )
    llama(max_position_embeddings=15, vocab_size=SIZE).save_pretrained(hf)
    both_refuse(arguments(data, tmp_path / "run", **keys), "block_size 16 is longer than the 15 that .* was made for")
    whole = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(whole[:-1])
    both_refuse(arguments(data, tmp_path / "run", **keys), "model.safetensors: damaged or cut short")
    assert not (tmp_path / "run").exists()


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
        ("./Qwen/Qwen2-0.5B", "there is no such file or folder; allowed: .*, a nanoGPT ckpt.pt$"),
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
    with pytest.raises(ValueError, match="no tokenizer can be read from it .*--dataset names a data set that has one"):
        sample.main(options)
    assert sample.main([*options, f"--dataset={data}"]) == 0


# ---------------------------------------------------------------------------------------------- tokenizers


def _texts(folder, tokenizer, text=TEXT):
    """A data set of the tests' text in these tokens."""
    folder.mkdir()
    (folder / "in.txt").write_text(text)
    prepare([folder / "in.txt"], folder / "data", tokenizer)
    return folder / "data"


def _speaking(folder, tokenizer):
    """A Llama's folder with this tokenizer."""
    llama(vocab_size=304).save_pretrained(folder)
    save(tokenizer, folder)
    return folder


FEW = {"max_iters": 2, "lr_decay_iters": 2, "warmup_iters": 0, "n_head": 4, "n_embd": 32, "block_size": 16}
SAMPLE = ["--start=to be", "--num_samples=1", "--max_new_tokens=5", "--device=cpu"]


def test_a_model_goes_on_with_data_in_its_own_tokens(tmp_path, capsys):
    """From any place and in any form: told by what the tokens are."""
    folder = _texts(tmp_path / "a", "train:300")
    kept = HuggingFaceTokenizer(kept_with_data(folder))
    hf = _speaking(tmp_path / "hf", kept)
    (hf / "tokenizer.json").write_text(json.dumps(json.loads((hf / "tokenizer.json").read_text()), indent=7))
    again = _texts(tmp_path / "b", str(hf))
    assert (again / "train.bin").read_bytes() == (folder / "train.bin").read_bytes()
    capsys.readouterr()
    for data in (folder, again):
        notes = planned_notes(arguments(data, tmp_path / "run", init_from=hf, **FEW), capsys)
        assert "tokenizer" not in notes
    characters = _texts(tmp_path / "c", "char")
    hf = _speaking(tmp_path / "chars", CharTokenizer(read_meta(characters).itos))
    assert planned_notes(arguments(characters, tmp_path / "run", init_from=hf, **FEW), capsys).count("tokenizer") == 0
    (characters / "meta.json").write_text(
        json.dumps(json.loads((characters / "meta.json").read_text()) | {"fingerprint": ""})
    )
    assert planned_notes(arguments(characters, tmp_path / "run", init_from=hf, **FEW), capsys).count("tokenizer") == 0


def test_a_model_and_data_of_another_tokenizer_are_refused(tmp_path, capsys):
    folder = _texts(tmp_path / "a", "train:300")
    hf = _speaking(tmp_path / "hf", HuggingFaceTokenizer(kept_with_data(_texts(tmp_path / "b", "train:290"))))
    given = arguments(folder, tmp_path / "run", init_from=hf, **FEW)
    ours = read_meta(folder).fingerprint[:12]
    said = rf"written in tokens of huggingface \(fingerprint {ours}\), and {hf} speaks a tokenizer of 290 tokens"
    both_refuse(given, said)
    assert not (tmp_path / "run").exists()
    both_refuse(arguments(_texts(tmp_path / "c", "char"), tmp_path / "run", init_from=hf, **FEW), "tokens of char")
    with pytest.raises(Refused, match="tokens of huggingface .*, and gpt2 speaks gpt2"):
        train_orchestrated.main(
            [f"--dataset={folder}", "--init_from=gpt2", "--device=cpu", "--block_size=16", "--plan"]
        )
    plain = with_ids(tmp_path / "plain", [0, 1, 2] * 99)  # no meta: GPT-2's, by nanoGPT's convention
    both_refuse(arguments(plain, tmp_path / "run", init_from=hf, **FEW), "tokens of gpt2, and")
    (hf / "tokenizer.json").write_text("{")
    both_refuse(given, "speaks one that cannot be read")
    capsys.readouterr()
    assert train_orchestrated.main([*given, "--allow_other_tokenizer=True"]) == 0
    assert "a token means something else to it; going on all the same" in capsys.readouterr().out


def test_a_run_keeps_its_tokenizer(tmp_path, resume, capsys):
    """The data set may be gone, and another tokenizer's data may have come since."""
    folder, out = _texts(tmp_path / "a", "train:300"), tmp_path / "run"
    assert train_orchestrated.main(arguments(folder, out, max_iters=2, always_save_checkpoint=True)) == 0
    meta = read_meta(folder)
    recorded = json.loads((out / "checkpoints/latest/state.json").read_text())["tokenizer"]
    assert (recorded["tokenizer"], recorded["fingerprint"]) == ("huggingface", meta.fingerprint)
    (tmp_path / "a").rename(tmp_path / "gone")
    capsys.readouterr()
    assert sample.main([f"--out_dir={out}", *SAMPLE]) == 0
    assert capsys.readouterr().out.startswith("to be")
    other = _texts(tmp_path / "b", "train:290")
    for options in ([], ["--plan"]):
        given = ["--init_from=resume", f"--out_dir={out}", f"--dataset={other}", "--max_iters=4", *options]
        with pytest.raises(Refused) as refused:
            train_orchestrated.main(given)
        changed, tokens = refused.value.problems
        assert "--allow_changed_data=True" in changed and "--allow_other_tokenizer=True" in tokens
        assert "and the checkpoint was trained on those of huggingface (fingerprint" in tokens
        with pytest.raises(Refused, match="allow_other_tokenizer"):
            train_orchestrated.main([*given, "--allow_changed_data=True"])
    keys = {"allow_changed_data": True, "allow_other_tokenizer": True}
    first = sorted(path.name for path in (out / "checkpoints").iterdir() if path.name.startswith("iter"))[-1]
    assert resume(out, dataset=other, max_iters=4, **keys) == 0
    assert "warning: dataset" in (told := capsys.readouterr().out) and "going on all the same" in told
    assert sorted(path.name for path in (out / "tokenizer").iterdir()) == sorted(
        [meta.fingerprint[:16], read_meta(other).fingerprint[:16]]
    )
    for name in ("latest", first):
        assert sample.main([f"--out_dir={out}", f"--checkpoint={name}", *SAMPLE]) == 0
    kept = kept_with_run(out, meta)
    (kept / "tokenizer.json").write_bytes((kept_with_run(out, read_meta(other)) / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="not the tokenizer that the tokens were made with"):
        sample.main([f"--out_dir={out}", f"--checkpoint={first}", *SAMPLE])
    (kept / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="there is no tokenizer.json.*--dataset names"):
        sample.main([f"--out_dir={out}", f"--checkpoint={first}", *SAMPLE])
    gone = tmp_path / "gone" / "data"
    assert sample.main([f"--out_dir={out}", f"--checkpoint={first}", f"--dataset={gone}", *SAMPLE]) == 0


def test_files_that_are_not_those_of_the_data_are_refused(tmp_path, capsys):
    folder = _texts(tmp_path / "a", "train:300")
    kept, other = kept_with_data(folder), kept_with_data(_texts(tmp_path / "b", "train:290"))
    (kept / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    both_refuse(arguments(folder, tmp_path / "run"), "not the tokenizer that the tokens were made with")
    (kept / "tokenizer.json").unlink()
    assert "has not the files of its tokenizer" in planned_notes(arguments(folder, tmp_path / "run"), capsys)


def test_a_map_says_what_ids_mean(tmp_path, capsys):
    """Whoever maps the tokens of the data has said what they mean to the model."""
    folder = _texts(tmp_path / "a", "train:300")
    hf = _speaking(tmp_path / "hf", HuggingFaceTokenizer(kept_with_data(_texts(tmp_path / "b", "train:290"))))
    np.save(tmp_path / "map.npy", np.arange(300) % 300)
    keys = {"shrunken_vocab_size": 300, "vocab_remapping_file": tmp_path / "map.npy", "init_from": hf}
    assert "tokenizer" not in planned_notes(arguments(folder, tmp_path / "run", **keys, **FEW), capsys)


@pytest.mark.parametrize("place", ["shakespeare", "own"])
def test_old_data_of_gpt2_goes_with_gpt2s_folder(place, tmp_path, capsys):
    """Without a fingerprint GPT-2's tokens are told by a few of them, which others that borrow its class lack."""
    folder = with_ids(tmp_path / "d", [0, 1, 2] * 99)
    own = {"Hello": 15496, "\u0120the": 262, "\u0120world": 995, "<|endoftext|>": 50256}
    if place == "own":
        own["\u0120the"], own["\u0120world"] = 995, 262
    inner = Tokenizer(models.BPE(own, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    gpt2().save_pretrained(tmp_path / "hf")
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "hf")
    given = arguments(folder, tmp_path / "run", init_from=tmp_path / "hf", n_head=4, n_embd=32)
    if place == "own":
        both_refuse(given, "tokens of gpt2, and")
    else:
        assert "tokenizer" not in planned_notes(given, capsys)
