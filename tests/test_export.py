"""Models taken out: transformers and nanoGPT compute from the files what the run computed, or the export is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, arguments, state_of

import train_orchestrated
from orchestrate.model import export as forms
from orchestrate.model.config import Fade, LoraSpec, ModelConfig
from orchestrate.model.gpt import GPT, from_weights, init_weights
from orchestrate.model.nanogpt import load_checkpoint
from orchestrate.tools import export
from orchestrate.training.session import exporting
from orchestrate.training.session.model_card import card, fired
from orchestrate.training.session.sampling import open_run_folder
from orchestrate.training.settings.errors import Refused, Stopped
from orchestrate.training.store.run_folder import RunRecord

GPT2_STYLE = ModelConfig(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32)
ROTARY = replace(GPT2_STYLE, position="rotary")
LLAMA_STYLE = replace(ROTARY, norm="rmsnorm", activation="swiglu", n_kv_head=2, n_hidden=48, tie_weights=False)


def shaken(config: ModelConfig, fading: dict[str, Fade] | None = None) -> GPT:
    """A model none of whose parameters is 0 or 1."""
    model = GPT(config)
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.set_fading(fading or {})
    return model.eval()


def theirs(folder: Path, **keys):
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **keys)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


@torch.no_grad()
def difference(one, other) -> float:
    x = torch.randint(0, 61, (3, 32), generator=torch.Generator().manual_seed(3))
    logits = [model.logits(x) if isinstance(model, GPT) else model(x).logits for model in (one, other)]
    assert logits[0].std() > 0.1
    return (logits[0] - logits[1]).abs().max().item()


EXACT = {
    "no biases": (GPT2_STYLE, "gpt2", 0),
    "all biases, untied": (replace(GPT2_STYLE, bias=True, tie_weights=False, norm_eps=1e-3), "gpt2", 0),
    "some biases": (replace(GPT2_STYLE, attn_bias="qkv", mlp_bias=True), "gpt2", 0),
    "gelu_tanh": (replace(GPT2_STYLE, activation="gelu_tanh", n_hidden=40), "gpt2", 0),
    "relu2": (replace(GPT2_STYLE, activation="relu2"), "gpt2", 0),
    "unequal widths": (replace(GPT2_STYLE, bias=True, n_hidden=(24, 40)), "gpt2", 1),
    "shared keys": (replace(GPT2_STYLE, bias=True, n_kv_head=2), "gpt2", 1),
    "more heads": (replace(GPT2_STYLE, n_head=6, n_kv_head=6, head_size=8), "gpt2", 1),
    "more heads, shared keys": (replace(GPT2_STYLE, n_head=6, n_kv_head=3, head_size=8), "gpt2", 2),
    "adapters": (
        replace(GPT2_STYLE, lora={"attn.0": LoraSpec(2, 3.0), "mlp.1": LoraSpec(4, 4.0), "wte": LoraSpec(3, 7.0)}),
        "gpt2",
        1,
    ),
    "llama": (LLAMA_STYLE, "llama", 0),
    "tied": (replace(LLAMA_STYLE, tie_weights=True, head_size=10, norm_eps=1e-3), "llama", 0),
    "interpolated": (replace(LLAMA_STYLE, rotary_scale=2.0, rotary_base=5e4), "llama", 0),
    "llama, unequal widths": (replace(LLAMA_STYLE, n_hidden=(16, 40)), "llama", 1),
    "llama, biases": (replace(LLAMA_STYLE, bias=True), "llama", 0),
    "llama, more heads": (replace(LLAMA_STYLE, n_head=6, n_kv_head=3, head_size=8), "mistral", 0),
    "llama, biases, more heads": (replace(LLAMA_STYLE, n_head=6, n_kv_head=3, head_size=8, bias=True), "llama", 1),
    "llama 3.1": (
        replace(LLAMA_STYLE, rotary_llama3_factor=8.0, rotary_original_length=8, attn_bias="all"),
        "llama",
        0,
    ),
    "dynamic NTK": (replace(LLAMA_STYLE, rotary_dynamic_factor=4.0, rotary_original_length=8), "llama", 0),
    "qwen2": (replace(LLAMA_STYLE, attn_bias="qkv"), "qwen2", 0),
    "qwen3, biases": (replace(LLAMA_STYLE, qk_norm=True, attn_bias="all"), "qwen3", 0),
    "llama, adapters": (
        replace(LLAMA_STYLE, lora={"attn.1": LoraSpec(2, 3.0), "lm_head": LoraSpec(4, 4.0), "wte": LoraSpec(3, 7.0)}),
        "llama",
        1,
    ),
    "qwen3": (replace(LLAMA_STYLE, qk_norm=True, head_size=12), "qwen3", 0),
    "LayerNorm, rotary": (replace(ROTARY, n_kv_head=2, rotary_scale=3.0), "starcoder2", 0),
    "LayerNorm, rotary, biases": (replace(ROTARY, bias=True, head_size=6, activation="relu2"), "starcoder2", 0),
    "RMSNorm, no gate": (replace(ROTARY, norm="rmsnorm", activation="relu2", head_size=6), "arcee", 0),
    "RMSNorm, no gate, biases": (replace(ROTARY, norm="rmsnorm", bias=True, rotary_scale=2.0), "arcee", 0),
}


@pytest.mark.parametrize("config, family, steps", EXACT.values(), ids=EXACT)
def test_transformers_compute_our_logits(config, family, steps, tmp_path):
    from orchestrate.model.hugging_face import load

    ours = shaken(config)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    form = forms.form_of(ours)
    assert (form.family.name, len(form.steps)) == (family, steps)
    forms.write_hugging_face(form, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    assert difference(ours, theirs(tmp_path)) <= 1e-5
    assert difference(ours, load(str(tmp_path)).eval()) <= 1e-5, "and read back"
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


FADING = {"attn.0": Fade(3, 0.25), "mlp.0": Fade(0, 0.5), "mlp.1": Fade(100, 0.75), "attn.1": Fade(0, 0.3)}


def test_what_fades_in_is_exported_as_far_as_it_has_come(tmp_path):
    lora = {"attn.0": LoraSpec(2, 3.0), "mlp.1": LoraSpec(2, 3.0)}
    ours = shaken(replace(GPT2_STYLE, bias=True, lora=lora), FADING)
    form = forms.form_of(ours)
    forms.write_hugging_face(form, tmp_path)
    assert difference(ours, theirs(tmp_path)) <= 1e-5 and len(form.steps) == 2
    assert difference(ours, shaken(ours.config)) > 1e-2, "the masks count"
    assert forms.nanogpt_form_of(ours).model.fading == {}
    with pytest.raises(forms.NoForm, match="new words are fading in") as refused:
        forms.form_of(shaken(GPT2_STYLE, {"lm_head": Fade(60, 0.5)}))
    assert refused.value.options == {"vocab_size"}


@pytest.mark.parametrize(
    "changes, message, options",
    [
        ({"norm": "rmsnorm"}, "GPT-2 cannot hold norm 'rmsnorm'; Arcee cannot hold position 'learned'$", {"norm"}),
        ({"activation": "swiglu"}, "GPT-2 cannot hold activation 'swiglu'", {"activation"}),
        ({"head_size": 6}, "GPT-2 cannot hold head_size 6", {"head_size"}),
        ({"qk_norm": True}, "GPT-2 cannot hold qk_norm True", {"qk_norm"}),
    ],
)
def test_what_nothing_holds_is_refused_by_the_nearest(changes, message, options):
    with pytest.raises(forms.NoForm, match=message) as refused:
        forms.form_of(shaken(replace(GPT2_STYLE, **changes)))
    assert refused.value.options == options


def test_shards_and_their_index(tmp_path):
    """Files of at most so many bytes, every tensor in one of them, and the mode that any other file has."""
    ours = shaken(replace(LLAMA_STYLE, bias=True))
    old = os.umask(0o022)
    try:
        forms.write_hugging_face(forms.form_of(ours), tmp_path, shard_bytes=20_000)
    finally:
        os.umask(old)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) >= 3 and {path.name for path in files} == set(index["weight_map"].values())
    assert all(path.stat().st_size < 20_000 + 8_000 and path.stat().st_mode & 0o777 == 0o644 for path in files)
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in ours.parameters())
    assert difference(ours, theirs(tmp_path)) <= 1e-5


def test_number_types(tmp_path):
    ours = shaken(GPT2_STYLE)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        folder = tmp_path / name
        folder.mkdir()
        forms.write_hugging_face(forms.form_of(ours), folder, dtype)
        loaded = theirs(folder, dtype="auto")
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert 0 < difference(ours, loaded.float()) < 0.1
    with torch.no_grad():
        ours.transformer["wte"].weight[3, 4] = 1e5
    with pytest.raises(ValueError, match="transformer.wte.weight has numbers that float16 cannot hold"):
        forms.write_hugging_face(forms.form_of(ours), tmp_path / "float16", torch.float16)


def test_ids_of_special_tokens_are_ours_alone(tmp_path):
    """GPT-2's configuration ends texts with token 50256 and Llama's with token 2, unless it is told otherwise."""
    for config in (GPT2_STYLE, LLAMA_STYLE):
        folder = tmp_path / config.norm
        folder.mkdir()
        forms.write_hugging_face(forms.form_of(shaken(config)), folder, special={"eos_token_id": 7})
        for file in ("config.json", "generation_config.json"):
            told = json.loads((folder / file).read_text())
            assert (told.get("bos_token_id"), told.get("eos_token_id")) == (None, 7), file


# nanoGPT's own names and shapes, written by hand, of 2 layers, width 32, 61 tokens and 32 positions.
def nanogpt_shapes(bias: bool) -> dict[str, tuple[int, ...]]:
    shapes = {"transformer.wte.weight": (61, 32), "transformer.wpe.weight": (32, 32), "lm_head.weight": (61, 32)}
    shapes["transformer.ln_f.weight"] = (32,)
    for n in (0, 1):
        block = {
            "ln_1": (32,),
            "attn.c_attn": (96, 32),
            "attn.c_proj": (32, 32),
            "ln_2": (32,),
            "mlp.c_fc": (128, 32),
            "mlp.c_proj": (32, 128),
        }
        shapes |= {f"transformer.h.{n}.{name}.weight": shape for name, shape in block.items()}
    if bias:
        vectors = {name: shape[:1] for name, shape in shapes.items() if ".h." in name or "ln_f" in name}
        shapes |= {name.replace("weight", "bias"): shape for name, shape in vectors.items()}
    return shapes


@pytest.mark.parametrize(
    "changes, steps",
    [
        ({}, 0),
        ({"bias": True}, 0),
        ({"bias": True, "n_hidden": (24, 128), "n_kv_head": 2}, 2),
        ({"lora": {"attn.1": LoraSpec(2, 3.0), "wte": LoraSpec(2, 3.0)}}, 1),
    ],
)
def test_nanogpt_reads_what_we_write(changes, steps, tmp_path):
    ours, file = shaken(replace(GPT2_STYLE, **changes)), tmp_path / "ckpt.pt"
    form = forms.nanogpt_form_of(ours)
    forms.write_nanogpt(form, file, iter_num=5, best_val_loss=1.5, config={"dataset": "x"})
    written = torch.load(file, weights_only=True)
    assert {name: tuple(value.shape) for name, value in written["model"].items()} == nanogpt_shapes(ours.config.bias)
    wanted = dict(n_layer=2, n_head=4, n_embd=32, block_size=32, bias=ours.config.bias, vocab_size=61, dropout=0.0)
    assert written["model_args"] == wanted and len(form.steps) == steps
    assert (written["iter_num"], written["best_val_loss"], written["config"]) == (5, 1.5, {"dataset": "x"})
    assert difference(ours, load_checkpoint(file).eval()) <= 1e-5
    size = sum(value.numel() for value in written["model"].values()) - 61 * 32  # the head is stored once
    assert file.stat().st_size < 4 * size + 12_000


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tie_weights": False}, "tie_weights False"),
        ({"activation": "gelu_tanh"}, "activation 'gelu_tanh'"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
        ({"position": "rotary"}, "position 'rotary'"),
        ({"n_hidden": (128, 129)}, r"n_hidden \(129, 129\)"),
        ({"n_hidden": 129}, r"n_hidden \(129, 129\)"),
    ],
)
def test_what_nanogpt_lacks_is_refused(changes, message):
    with pytest.raises(forms.NoForm, match=f"nanoGPT cannot hold {message}"):
        forms.nanogpt_form_of(shaken(replace(GPT2_STYLE, **changes)))


def test_narrow_layers_are_filled_up_for_nanogpt():
    """It has no other width than four times its stream's."""
    ours = shaken(replace(GPT2_STYLE, n_hidden=(100, 96)))
    form = forms.nanogpt_form_of(ours)
    assert form.model.config.n_hidden == (128, 128) and difference(ours, form.model) <= 1e-5


# ---------------------------------------------------------------------------------------------- runs

SCHEDULE = [
    {"name": "stack_layers", "value": {"times": 2, "how": "identity"}, "at_iter": 2, "reevaluate": True},
    {"name": "widen_mlp", "value": 128, "at_iter": 3, "desc": "wider | <b>now</b>\nat last"},
    {"name": "set_layer_lora_rank", "value": ["attn.2", 4], "at_iter": 4},
    {"name": "untie_head", "at_iter": 6},
]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    (folder / "s.json").write_text(json.dumps(SCHEDULE))
    keys = dict(schedule=folder / "s.json", max_iters=8, keep_last=9, learning_rate=0.05)
    assert train_orchestrated.main(arguments(data, folder / "run", **keys)) == 0
    return folder / "run"


def test_a_run_as_a_folder_for_transformers(run, tmp_path, capsys):
    assert export.main([str(run), "--to", "hf", str(tmp_path / "a" / "hf")]) == 0
    told = capsys.readouterr().out
    assert "GPT-2, float32" in told and "- adapters are merged into their layers" in told
    source = exporting.open_source(str(run))
    model = theirs(tmp_path / "a" / "hf")
    x = torch.randint(0, source.model.config.vocab_size, (2, 16))
    with torch.no_grad():
        assert (model(x).logits - source.model.eval().logits(x)).abs().max() <= 1e-5
    assert source.model.config.lora and model.config.n_layer == 4
    assert os.listdir(tmp_path / "a") == ["hf"], "nothing is left beside it"
    with torch.no_grad():
        assert torch.equal(model.train()(x).logits, model(x).logits), "no dropout that nobody asked for"
    model.eval()
    written = model.generate(x[:, :4], max_new_tokens=6, do_sample=False)
    assert written.shape == (2, 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(x, labels=x).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)
    # Out, trained there, and in again.
    model.save_pretrained(tmp_path / "theirs")
    from orchestrate.model.hugging_face import load

    with torch.no_grad():
        assert (model.eval()(x).logits - load(str(tmp_path / "theirs")).eval().logits(x)).abs().max() <= 1e-5


def test_the_tokenizer_goes_along(run, data, tmp_path):
    from transformers import AutoTokenizer, pipeline

    from orchestrate.data.stream import read_meta
    from orchestrate.data.tokenizer import CharTokenizer

    assert export.main([str(run), "--to", "hf", str(tmp_path / "hf")]) == 0
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), CharTokenizer(read_meta(data).itos)
    text = "To be, or not to be"
    assert tokenizer.encode(text) == ours.encode(text) and tokenizer.decode(ours.encode(text)) == text
    written = pipeline("text-generation", model=str(tmp_path / "hf"), device="cpu")(
        text[:8], max_new_tokens=5, do_sample=False
    )[0]["generated_text"]
    assert written.startswith(text[:8]) and len(written) == 13
    # Out of an export with a chat template and its own end of a text: both are kept.
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    config |= {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "eos_token": "T"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    assert export.main([str(tmp_path / "hf"), "--to", "hf", str(tmp_path / "again")]) == 0
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / file).read_text())["eos_token_id"] == ours.encode("T")[0]


def test_a_trained_tokenizer_and_its_chat_template_go_through_a_run(tmp_path, tiny):
    """The data set's tokenizer is kept by the run: where the data is no more, the export has it all the same."""
    import shutil

    from conftest import TEXT
    from transformers import AutoTokenizer

    from orchestrate.data import keeping
    from orchestrate.data.prepare import prepare, trained_tokenizer

    keeping.save(trained_tokenizer(280, [TEXT]), tmp_path / "tokenizer")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    (tmp_path / "in.txt").write_text(TEXT)
    prepare([tmp_path / "in.txt"], tmp_path / "data", str(tmp_path / "tokenizer"))
    assert tiny(dataset=tmp_path / "data", max_iters=2)[0] == 0
    shutil.rmtree(tmp_path / "data")
    assert export.main([str(tiny.folder("run")), "--to", "hf", str(tmp_path / "hf")]) == 0
    there, back = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("tokenizer", "hf"))
    assert back.encode("to suffer<|endoftext|>") == there.encode("to suffer<|endoftext|>") and len(back) == len(there)
    assert back.apply_chat_template([{"role": "user", "content": "to be"}], tokenize=False) == "[user] to be"
    end = back.convert_tokens_to_ids("<|endoftext|>")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == end


def test_frozen_weights_that_are_kept_short(tmp_path, tiny):
    """What is merged into a bfloat16 matrix is not rounded to it again."""
    code, out = tiny(max_iters=3, attn_lora_rank=2, weights_dtype="bfloat16", learning_rate=0.05)
    ours = exporting.open_source(str(out)).model.eval()
    assert code == 0 and torch.bfloat16 in {p.dtype for p in ours.parameters()}
    assert export.main([str(out), "--to", "hf", str(tmp_path / "hf")]) == 0
    x = torch.randint(0, ours.config.vocab_size, (2, 16))
    with torch.no_grad():
        assert (theirs(tmp_path / "hf")(x).logits - ours.logits(x)).abs().max() <= 1e-5


def test_why_no_tokenizer_goes_along_is_said(data, tmp_path, capsys, tiny):
    import numpy as np

    size = json.loads((data / "meta.json").read_text())["vocab_size"]
    np.save(tmp_path / "r.npy", np.minimum(np.arange(size), 9))
    tiny(shrunken_vocab_size=10, vocab_remapping_file=tmp_path / "r.npy", max_iters=2)
    assert export.main([str(tiny.folder("run")), "--to", "hf", str(tmp_path / "hf")]) == 0
    said = "there is no tokenizer in it: the run's vocabulary is a remapped one"
    assert said in capsys.readouterr().out and said in (tmp_path / "hf" / "README.md").read_text()
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_a_tokenizer_that_transformers_cannot_open_is_said(run, tmp_path):
    folder = tmp_path / "hf"
    exporting.export(exporting.open_source(str(run)), "hf", str(folder))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": 5}))
    done = exporting.export(exporting.open_source(str(folder)), "hf", str(tmp_path / "again"))
    assert any("transformers cannot open the tokenizer in it (AttributeError" in note for note in done.notes)
    assert theirs(tmp_path / "again").config.eos_token_id is None


def test_a_tokenizer_of_more_tokens_than_the_model_stays_behind(run, tmp_path):
    source = exporting.open_source(str(run))
    source = replace(source, model=shaken(replace(source.model.config, vocab_size=22, lora={})))
    done = exporting.export(source, "hf", str(tmp_path / "hf"))
    assert "there is no tokenizer in it: it has 23 tokens and the model 22" in done.notes
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


@pytest.mark.parametrize("base", ["#x", "[x", "a: b", "openai-community/gpt2", "yes", "'"])
def test_any_name_of_a_base_stands_in_the_head_of_a_card(base):
    text = card(ModelConfig(n_layer=1, n_head=1, n_embd=4), {}, [], None, None, base_model=base)
    assert yaml.safe_load(text.split("---")[1])["base_model"] == base


def test_the_model_card(run, tmp_path):
    export.main([str(run), "--to", "hf", str(tmp_path / "hf"), "--dtype", "bfloat16"])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n")
    for line in (
        "| architecture | GPT-2 |",
        "| number type | bfloat16 |",
        "| began with | random weights |",
        "| data set | tiny |",
        "| steps | 8 |",
        "| tokens | 1,024 |",
    ):
        assert line in card.splitlines(), line
    rows = [line for line in card.splitlines() if line.startswith(("| 2 |", "| 3 |", "| 4 |", "| 6 |"))]
    assert [row.split(" | ")[1] for row in rows] == ["stack_layers", "widen_mlp", "set_layer_lora_rank", "untie_head"]
    assert "wider &#124; &#60;b&#62;now&#60;/b&#62; at last" in rows[1] and all(row.count("|") == 9 for row in rows)
    assert '{"times": 2, "how": "identity"}' in rows[0] and "(at_iter 2)" in rows[0]
    losses = rows[0].split(" | ")[5:7]
    assert losses[0] == losses[1] and float(losses[0]) > 1, "measured, and kept"


def test_a_named_checkpoint_and_its_operations(run, tmp_path):
    """What came later is neither in the weights nor on the card."""
    assert export.main([str(run), "--to", "hf", str(tmp_path / "hf"), "--checkpoint", "iter_000000004"]) == 0
    assert theirs(tmp_path / "hf").config.tie_word_embeddings
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| steps | 4 |" in card and "set_layer_lora_rank" in card and "untie_head" not in card
    export.main([str(run), "--to", "hf", str(tmp_path / "best"), "--checkpoint", "best"])
    best = Path(os.path.realpath(run / "checkpoints" / "best")).name
    assert f"| steps | {int(best.removeprefix('iter_'))} |" in (tmp_path / "best" / "README.md").read_text()


def test_which_operations_made_a_checkpoint():
    """Recoveries (no entry) and entries of other tracks go by iteration, those of the checkpoint's own by number."""
    lines = [(1, 9), (4, None), (4, 2), (4, 3), (5, None), (5, 2)]
    events = [{"kind": "operation", "iter": at, "entry": entry} for at, entry in lines]
    events += [{"kind": "operation", "iter": 1, "entry": 1, "void": True}, {"kind": "decision", "iter": 1, "entry": 1}]
    record = RunRecord(Path(), None, [], events, [], {})
    state = replace(state_of(iter=4), orchestrator={"position": {"fired": 2}, "ramps": []})
    assert [(event["iter"], event["entry"]) for event in fired(state, record)] == lines[:3]


def test_the_start_that_counts_is_the_one_that_came_to_a_checkpoint(tmp_path):
    starts = [{"kind": "start", "config": {"init_from": name}} for name in ("a", "b")]
    record = RunRecord(Path(), None, [], [*starts, {"kind": "resume", "config": {"init_from": "c"}}], [], {})
    assert record.began_with == {"init_from": "b"} and replace(record, events=[]).began_with == {}
    source = exporting.Source("run", shaken(GPT2_STYLE), record=record)
    with pytest.raises(Refused, match="run: began with b, which is no Hugging Face folder here"):
        exporting._base(source)
    assert "| began with | b |" in card(GPT2_STYLE, {}, [], state_of(), record)


def test_a_run_in_the_middle_of_a_fade(tmp_path, tiny):
    schedule = [{"name": "widen_mlp", "value": 96, "over": 10, "at_iter": 1}]
    assert tiny(schedule, max_iters=4, learning_rate=0.05)[0] == 0
    source = exporting.open_source(str(tiny.folder("run")))
    shares = {layer: fade.share for layer, fade in source.state.settings.fading.items()}
    assert open_run_folder(str(tiny.folder("run")))[0].fading == source.state.settings.fading, "a sample is of that too"
    assert shares.keys() == {"mlp.0", "mlp.1"} and all(0 < share < 1 for share in shares.values())
    assert export.main([str(tiny.folder("run")), "--to", "hf", str(tmp_path / "hf")]) == 0
    plain = from_weights(source.model.config, source.model.state_dict()).eval()
    x = torch.arange(16)[None]
    with torch.no_grad():
        logits, faded = theirs(tmp_path / "hf")(x).logits, plain.logits(x)
        plain.set_fading(source.state.settings.fading)
        assert (logits - plain.logits(x)).abs().max() <= 1e-5 < (logits - faded).abs().max()


def test_a_run_for_nanogpt(run, data, tmp_path, capsys, tiny):
    with pytest.raises(Refused) as refused:
        export.main([str(run), "--to", "nanogpt", str(tmp_path / "ckpt.pt")])
    first, *causes, help_ = refused.value.problems
    assert "nanoGPT cannot hold n_hidden (128, 128, 128, 128), tie_weights False" in first
    assert [cause.split(": ", 1)[1] for cause in causes] == [
        "n_hidden is what widen_mlp (entry 2, iteration 3) made it: a checkpoint from before it has another "
        "(--checkpoint NAME)",
        "tie_weights is what untie_head (entry 4, iteration 6) made it: a checkpoint from before it has another "
        "(--checkpoint NAME)",
    ]
    assert help_ == "--to hf holds this model, as GPT-2" and not list(tmp_path.iterdir())
    code, plain = tiny(schedule=SCHEDULE[:1], max_iters=4)
    assert code == 0 and export.main([str(plain), "--to", "nanogpt", str(tmp_path / "ckpt.pt")]) == 0
    assert "characters from data/tiny/meta.pkl" in capsys.readouterr().out
    written = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert written["iter_num"] == 4 and written["config"]["dataset"] == "tiny" and written["best_val_loss"] < 9
    ours = exporting.open_source(str(plain)).model.eval()
    x = torch.randint(0, ours.config.vocab_size, (2, 16))
    assert torch.equal(load_checkpoint(tmp_path / "ckpt.pt").eval().logits(x), ours.logits(x))
    # From nanoGPT's file to a folder, without a run.
    assert export.main([str(tmp_path / "ckpt.pt"), "--to", "hf", str(tmp_path / "hf")]) == 0
    with torch.no_grad():
        assert (theirs(tmp_path / "hf")(x).logits - ours.logits(x)).abs().max() <= 1e-5
    assert "## Training" not in (tmp_path / "hf" / "README.md").read_text()


def test_empty_names_are_refused(run):
    with pytest.raises(Refused, match="^where to write is empty"):
        export.main([str(run), "--to", "hf", ""])
    with pytest.raises(Refused, match="there is no checkpoint ''; there are iter_"):
        export.main([str(run), "--to", "hf", "x", "--checkpoint="])


def test_targets_are_whole_or_as_they_were(run, tmp_path, monkeypatch):
    there = tmp_path / "hf"
    there.mkdir()
    inside = there.stat().st_ino
    assert export.main([str(run), "--to", "hf", str(there)]) == 0
    assert there.stat().st_ino == inside, "an empty folder is filled, not replaced: somebody may stand in it"
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    with pytest.raises(Refused, match="is there already; --overwrite replaces it"):
        export.main([str(run), "--to", "hf", str(there), "--dtype", "bfloat16"])

    def full(*args, **keys):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(forms, "save_file", full)
        with pytest.raises(Stopped, match="hf: cannot be written .No space left on device"):
            export.main([str(run), "--to", "hf", str(there), "--overwrite"])
        with pytest.raises(Stopped):
            export.main([str(run), "--to", "hf", str(tmp_path / "new")])
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before
    assert os.listdir(tmp_path) == ["hf"]
    assert export.main([str(run), "--to", "hf", str(there), "--dtype", "bfloat16", "--overwrite"]) == 0
    assert {path.name for path in there.iterdir()} == set(before)
    assert (there / "model.safetensors").stat().st_size < len(before["model.safetensors"]) * 0.6


def test_what_must_not_be_replaced(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    for format, target, message in [
        ("hf", tmp_path / "file", "there is a file of that name, and a folder is written"),
        ("nanogpt", tmp_path / "folder", "there is a folder of that name, and a file is written"),
        ("hf", tmp_path / "folder", "holds no exported model"),
        ("hf", run, "is, or holds, what is exported"),
        ("hf", run.parent, "is, or holds, what is exported"),
        ("hf", "/", "is, or holds, what is exported"),
    ]:
        with pytest.raises(Refused, match=message):
            export.main([str(run), "--to", format, str(target), "--overwrite"])
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "config.json").write_text("{}")
    with pytest.raises(Refused, match="holds no exported model"):
        export.main([str(run), "--to", "hf", str(other), "--overwrite"])
    with pytest.raises(Refused, match="its folder cannot be made"):
        export.main([str(run), "--to", "hf", str(tmp_path / "file" / "hf")])


@pytest.mark.parametrize(
    "args, message",
    [
        (["nowhere", "--to", "hf", "x"], "^nowhere: there is no such run folder"),
        (["FOLDER", "--to", "hf", "x"], "neither a run folder .no checkpoints/. nor a Hugging Face folder"),
        (["EMPTY", "--to", "hf", "x"], "there is no complete checkpoint"),
        (["RUN", "--to", "onnx", "x"], "--to onnx: allowed are hf, peft, nanogpt"),
        (["RUN", "--to", "hf", "x", "--checkpoint", "iter_9"], "no checkpoint 'iter_9'; there are iter_000000008"),
        (["FILE", "--to", "hf", "x"], "not a checkpoint"),
        (["FILE", "--to", "hf", "x", "--checkpoint", "best"], "is no run folder and has no checkpoints"),
        (["DAMAGED", "--to", "hf", "x"], "damaged"),
    ],
)
def test_bad_input_is_refused(run, tmp_path, monkeypatch, args, message):
    import shutil

    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "EMPTY" / "checkpoints").mkdir(parents=True)
    (tmp_path / "FILE").write_bytes(b"hello")
    shutil.copytree(run, tmp_path / "DAMAGED", symlinks=True)
    for file in (tmp_path / "DAMAGED" / "checkpoints").glob("iter_*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    (tmp_path / "RUN").symlink_to(run)
    with pytest.raises(ValueError, match=message):
        export.main(args)
    assert not (tmp_path / "x").exists()


def test_the_command(run, tmp_path):
    import subprocess
    import sys

    def command(*args: str) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "orchestrate", "export", *args]
        return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT)

    done = command(str(run), "--to", "nanogpt", str(tmp_path / "ckpt.pt"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    done = command(str(run), "--to", "hf", str(tmp_path / "hf"))
    assert (done.returncode, done.stderr) == (0, "") and str(tmp_path / "hf") in done.stdout


# ---------------------------------------------------------------------------------------------- peft


def test_adapters_for_peft(tmp_path, tiny, capsys):
    """On the base that the run began with they give the run's logits, and read back they are the same model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "base")
    schedule = [{"name": "set_layer_lora_rank", "value": ["attn.1.o", 3], "at_iter": 1}]
    keys = dict(max_iters=4, lora_targets="q_proj,v_proj,down_proj", lora_rank=2, lora_dropout=0.1, learning_rate=0.05)
    keys |= dict(n_head=4, n_embd=32)
    code, out = tiny(schedule, init_from=tmp_path / "base", **keys)
    assert code == 0 and export.main([str(out), "--to", "peft", str(tmp_path / "peft")]) == 0
    ours = exporting.open_source(str(out)).model.eval()
    model = PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "peft").eval()
    x = torch.randint(0, 40, (2, 16))
    with torch.no_grad():
        logits = ours.logits(x)
        assert (model(x).logits - logits).abs().max() <= 1e-5
        assert (theirs(tmp_path / "base")(x).logits - logits).abs().max() > 1e-3, "the adapters count"
        read = exporting.open_source(str(tmp_path / "peft"))
        assert read.model.config.lora and (read.model.eval().logits(x) - logits).abs().max() <= 1e-5
        # An adapter and its base in one folder.
        assert export.main([str(tmp_path / "peft"), "--to", "hf", str(tmp_path / "merged")]) == 0
        assert (theirs(tmp_path / "merged")(x).logits - logits).abs().max() <= 1e-5
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "library_name: peft" in card and "base_model: base" in card and "set_layer_lora_rank" in card
    (tmp_path / "file").touch()
    with pytest.raises(Refused) as refused:
        export.main([str(out), "--to", "peft", str(tmp_path / "file" / "peft")])
    assert str(refused.value).startswith(f"{tmp_path / 'file' / 'peft'}: its folder cannot be made")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(Refused, match="no Hugging Face folder here: adapters are on one .--base FOLDER"):
        export.main([str(out), "--to", "peft", str(tmp_path / "peft"), "--overwrite"])
    for typo in ("./typo", "~/typo", "/typo", "a/b/typo", str(tmp_path / "peft" / "README.md")):
        with pytest.raises(Refused, match=f"^--base {typo}: there is no such folder; allowed are a Hugging Face"):
            export.main([str(out), "--to", "peft", str(tmp_path / "peft"), "--overwrite", "--base", typo])
    given = ["--overwrite", "--base", "organisation/name"]  # which may be on the hub
    assert export.main([str(out), "--to", "peft", str(tmp_path / "peft"), *given]) == 0
    given = ["--overwrite", "--base", str(tmp_path / "moved")]
    assert export.main([str(out), "--to", "peft", str(tmp_path / "peft"), *given]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == given[2]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--to", "peft", "x"], "began with scratch, which is no Hugging Face folder here"),
        (["--to", "peft", "x", "--dtype", "float16"], "--dtype float16: adapters are written in float32"),
        (["--to", "hf", "x", "--base", "y"], "--base y: --to hf has no base"),
    ],
)
def test_what_has_no_form_for_peft_is_refused(run, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=message):
        export.main([str(run), *args])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- every family

SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=40, max_position_embeddings=32,
)  # fmt: skip
GROWN = [
    {"name": "stack_layers", "value": {"n_layer": 3, "how": "identity"}, "at_iter": 1},
    {"name": "widen_mlp", "value": 64, "at_iter": 1},
    {"name": "add_heads", "value": 8, "at_iter": 2},
    {"name": "resize_vocabulary", "value": {"size": 47, "init": "mean", "noise": 0.1}, "at_iter": 2},
    {"name": "extend_context", "value": 32, "at_iter": 3},
    {"name": "set_attn_lora_rank", "value": 2, "at_iter": 3},
]


@pytest.mark.parametrize(
    "kind, keys, family",
    [
        ("GPT2", dict(n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=32, vocab_size=40), "gpt2"),
        ("Llama", SHAPE, "llama"),
        ("Llama", {**SHAPE, "tie_word_embeddings": True, "attention_bias": True}, "llama"),
        ("Mistral", {**SHAPE, "head_dim": 6}, "mistral"),
        ("Qwen2", {**SHAPE, "num_key_value_heads": 4}, "qwen2"),
        ("Qwen3", {**SHAPE, "head_dim": 12, "tie_word_embeddings": True}, "qwen3"),
        ("Starcoder2", SHAPE, "starcoder2"),
        ("Arcee", {**SHAPE, "hidden_act": "relu2", "mlp_bias": True}, "arcee"),
    ],
)
def test_in_trained_out_and_in_again(kind, keys, family, tmp_path, tiny):
    """Each family: grown and adapted in a run, exported, continued by transformers, and read back."""
    import transformers

    from orchestrate.model.hugging_face import load

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**keys)
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    made.save_pretrained(tmp_path / "in")
    code, out = tiny(GROWN, init_from=tmp_path / "in", max_iters=5, eval_interval=5, n_head=4, n_embd=32)
    assert code == 0 and export.main([str(out), "--to", "hf", str(tmp_path / "out")]) == 0
    ours, model = exporting.open_source(str(out)).model.eval(), theirs(tmp_path / "out")
    c = ours.config
    assert (c.n_layer, c.n_hidden, c.n_head, c.vocab_size, c.block_size) == (3, (64, 64, 64), 8, 47, 32) and c.lora
    assert model.config.model_type == family
    x = torch.randint(0, 47, (2, 32))
    with torch.no_grad():
        logits = ours.logits(x)
        assert (model(x).logits - logits).abs().max() <= 1e-5 and logits.std() > 0.1
        assert (load(str(tmp_path / "out")).eval().logits(x) - logits).abs().max() <= 1e-5
    written = model.generate(x[:1, :5], max_new_tokens=10, do_sample=False)  # with their cache
    assert written.shape == (1, 15)
    with torch.no_grad():
        assert torch.equal(written[:, 5:], ours.logits(written[:, :-1])[:, 4:].argmax(-1))
    loss = model.train()(x, labels=x).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert model(x, labels=x).loss < loss
    model.save_pretrained(tmp_path / "continued")
    with torch.no_grad():
        again = load(str(tmp_path / "continued")).eval().logits(x)
        assert (model.eval()(x).logits - again).abs().max() <= 1e-5 and not torch.allclose(again, logits)
