"""Weights from elsewhere: Hugging Face's families, nanoGPT's ckpt.pt; what cannot be represented, what is damaged."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from orchestrate.model.config import LoraSpec, ModelConfig
from orchestrate.model.families import FAMILIES
from orchestrate.model.gpt import GPT, from_weights, init_weights
from orchestrate.model.hugging_face import (
    GPT2_MODELS,
    config_from_folder,
    family_of,
    gpt2_config,
    load,
)
from orchestrate.model.nanogpt import load_checkpoint, open_model


def to_hf(model):
    """Hugging Face's names and tensors, of the first family that holds the model."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return family_of(model.config).to_hf(model.config, weights)


def from_hf(config, weights, kind):
    """The inverse, of the family that transformers call so."""
    ours = {name: value.detach().clone() for name, value in GPT(config).named_parameters()}
    for name, place in FAMILIES[kind].places(config).items():
        place.read(weights.__getitem__, ours[name])
    return ours


def gpt2(**keys):
    shape = dict(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(GPT2Config(**{**shape, **keys}))


SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60,
    max_position_embeddings=32, num_key_value_heads=2,
)  # fmt: skip


def llama(**keys):
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **keys}))


def mistral(**keys):
    return MistralForCausalLM(MistralConfig(**{**SHAPE, "sliding_window": None, **keys}))


def qwen2(**keys):
    return Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, **keys}))


def qwen3(**keys):
    return Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "head_dim": 12, **keys}))


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


# Positions 5 to 31 turn through high, blended and low frequencies of this one.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "make, keys, ours",
    [
        (gpt2, {}, {"bias": True, "activation": "gelu_tanh"}),
        (gpt2, {"activation_function": "gelu", "n_inner": 40, "tie_word_embeddings": False}, {"tie_weights": False}),
        (llama, {}, {"attn_bias": "none", "rotary_llama3_factor": 1.0, "n_kv_head": 2}),
        (llama, {"tie_word_embeddings": True, "num_key_value_heads": 4}, {"tie_weights": True}),
        (llama, {"rope_theta": 5e5, "head_dim": 16, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}, {"head_size": 16}),
        (llama, {"rope_parameters": LLAMA3}, {"rotary_llama3_factor": 8.0, "rotary_original_length": 16}),
        (llama, {"rope_parameters": {**LLAMA3, "factor": 1}}, {"rotary_llama3_factor": 1, "rotary_base": 100.0}),
        (llama, {"rope_parameters": LINEAR}, {"rotary_scale": 2.5, "rotary_llama3_factor": 1.0}),
        (llama, {"attention_bias": True}, {"attn_bias": "all", "mlp_bias": False, "bias": False}),
        (llama, {"mlp_bias": True}, {"attn_bias": "none", "mlp_bias": True, "bias": False}),
        (
            llama,
            {"attention_bias": True, "mlp_bias": True},
            {"bias": True, "attention_biases": "all", "mlp_biases": True},
        ),
        (mistral, {"head_dim": 10}, {"head_size": 10}),
        (mistral, {"sliding_window": 32, "num_key_value_heads": 4}, {"tie_weights": False}),
        (qwen2, {"sliding_window": 8}, {"attn_bias": "qkv"}),  # and use_sliding_window is false
        (qwen2, {"tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 2}, {"bias": False}),
        (qwen3, {}, {"qk_norm": True, "head_size": 12}),
        (qwen3, {"attention_bias": True, "rope_parameters": {**LINEAR, "factor": 3}}, {"attn_bias": "all"}),
        (qwen3, {"rms_norm_eps": 0.1, "tie_word_embeddings": True, "num_key_value_heads": 1}, {"norm_eps": 0.1}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # a function's own text has its address
)
def test_logits_equal_transformers(make, keys, ours, tmp_path):
    theirs = shaken(make(**keys))
    theirs.save_pretrained(tmp_path)
    model = load(str(tmp_path)).eval()
    assert model.config == config_from_folder(tmp_path)
    assert {name: getattr(model.config, name) for name in ours} == ours
    x = torch.randint(0, 60, (3, 32))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(x), theirs(x).logits, atol=1e-5, rtol=0)
    back = FAMILIES[theirs.config.model_type].to_hf(model.config, model.state_dict())
    assert set(back) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(back[name], value), name
    again = from_hf(model.config, back, theirs.config.model_type)
    assert all(torch.equal(again[name], value) for name, value in model.named_parameters())
    held = family_of(model.config)
    assert not held.lacks(model.config) and held.config_to_hf(model.config)["model_type"] in FAMILIES


@pytest.mark.parametrize(
    "make, keys, block_size",
    [
        (llama, {}, 96),
        (llama, {"rope_parameters": {**DYNAMIC, "factor": 1.0}}, 32),
        (llama, {"rope_parameters": {**DYNAMIC, "original_max_position_embeddings": 32, "factor": 1.35}}, 43),
        (mistral, {"sliding_window": 96, "head_dim": 4}, 96),
        (qwen2, {"tie_word_embeddings": True}, 96),
        (qwen3, {}, 96),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_dynamic_ntk_is_that_of_transformers(make, keys, block_size, tmp_path):
    """Below, at and above the length that it begins at, also in a batch that is filled up, and back again."""
    shaken(make(**{"rope_parameters": DYNAMIC, **keys})).save_pretrained(tmp_path)
    model = load(str(tmp_path)).eval()
    assert (model.config.block_size, model.config.rotary_original_length) == (block_size, 32)
    longer = from_weights(replace(model.config, block_size=96), model.state_dict()).eval()
    x = torch.randint(0, 60, (3, 96))
    with torch.no_grad():
        for length in (33, 20, 96, 31, 32, 50):
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path)  # anew: it would remember the longer ones before
            expected = theirs(x[:, :length]).logits
            torch.testing.assert_close(longer.logits(x[:, :length]), expected, atol=1e-5, rtol=0)
            filled = longer.extend(x, [length, 96, 7])[0]
            torch.testing.assert_close(filled, expected[0, -1], atol=1e-5, rtol=0)
        plain = from_weights(replace(model.config, rotary_dynamic_factor=0, rotary_original_length=8192),
                             model.state_dict()).eval()  # fmt: skip
        if block_size > 32:
            assert (plain.logits(x[:, :33]) - model.logits(x[:, :33])).abs().max() > 1e-4, "it makes a difference"
        torch.testing.assert_close(plain.logits(x[:, :32]), longer.logits(x[:, :32]), atol=0, rtol=0)
    family = FAMILIES[theirs.config.model_type]
    back = family.config_to_hf(longer.config)
    assert back["max_position_embeddings"] == 32 and not family.lacks(longer.config)
    assert back["rope_scaling"] == {"rope_type": "dynamic", "factor": model.config.rotary_dynamic_factor}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [gpt2, llama, mistral, qwen2, qwen3])
def test_files_of_any_number_type_sharded_or_not(make, kind, tmp_path):
    theirs = shaken(make()).to(kind)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, sharded = load(str(tmp_path / "whole")), load(str(tmp_path / "sharded"))
    exact = from_hf(whole.config, dict(theirs.state_dict()), theirs.config.model_type)
    for name, value in whole.named_parameters():
        assert value.dtype == torch.float32 and torch.equal(value, exact[name]), name
        assert torch.equal(value, sharded.get_parameter(name)), name


def test_gpt2_without_biases(tmp_path):
    theirs = shaken(gpt2())
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if name.endswith("bias"):
                value.zero_()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32), "transformer.h.0.attn.masked_bias": torch.ones(1)}
    save_file({**{n: v for n, v in tensors.items() if not n.endswith("bias")}, **mask}, tmp_path / "model.safetensors")
    ours, x = load(str(tmp_path)), torch.randint(0, 60, (3, 32))
    assert not ours.config.bias and ours.config.attention_biases == "none"
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(x), theirs(x).logits, atol=1e-5, rtol=0)
    back = to_hf(ours)
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


def test_files_of_the_model_without_its_head(tmp_path):
    """The released GPT-2 is such a file: its names lack their first part."""
    theirs = shaken(gpt2())
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n.removeprefix("transformer."): v for n, v in tensors.items()}, tmp_path / "model.safetensors")
    ours = load(str(tmp_path))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in to_hf(ours).items())
    shaken(llama()).model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        load(str(tmp_path / "headless"))


def changed(path, change):
    """The file with other tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGE = {
    "missing": (lambda t: t.pop("model.norm.weight"), "weights do not fit the model: missing model.norm.weight"),
    "superfluous": (lambda t: t.update(x=torch.ones(2)), "weights do not fit the model: unexpected x"),
    "shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(31)}),
        r"model.norm.weight has shape \(31,\), expected \(32,\)",
    ),
    "type": (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        "model.norm.weight holds numbers of type I8; allowed are F32, BF16, F16",
    ),
    "untied": (
        lambda t: t.update({"lm_head.weight": torch.ones(60, 32)}),
        "ties the head to the embedding, and lm_head.weight is another matrix",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_tensors_that_do_not_fit(kind, tmp_path):
    change, message = DAMAGE[kind]
    shaken(llama(tie_word_embeddings=True)).save_pretrained(tmp_path)
    changed(tmp_path / "model.safetensors", change)
    with pytest.raises(ValueError, match=f"^init_from {tmp_path}: .*{message}"):
        load(str(tmp_path))
    if kind != "untied":  # that takes values
        with pytest.raises(ValueError, match=message):
            config_from_folder(tmp_path)


def test_a_head_that_is_tied_and_stored_twice(tmp_path):
    theirs = shaken(llama(tie_word_embeddings=True))
    theirs.save_pretrained(tmp_path)
    changed(tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
    assert torch.equal(load(str(tmp_path)).transformer["wte"].weight, theirs.model.embed_tokens.weight)


def test_damaged_and_missing_files(tmp_path):
    shaken(llama()).save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    shards, listed = sorted(tmp_path.glob("*.safetensors")), json.loads(index.read_text())

    def refused(message):
        with pytest.raises(ValueError, match=message) as error:
            config_from_folder(tmp_path)
        assert str(error.value).startswith(f"init_from {tmp_path}: ") and "\n" not in str(error.value)

    whole = shards[1].read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 20, b"{}"):
        shards[1].write_bytes(damage)
        refused(f"{shards[1].name}: damaged or cut short")
    shards[1].unlink()
    refused(f"index.json names {shards[1].name}, and there is no such file")
    shards[1].write_bytes(whole)
    where = listed["weight_map"]
    name = next(n for n in where if where[n] == shards[1].name and list(where.values()).count(where[n]) > 1)
    index.write_text(json.dumps({"weight_map": {**where, name: shards[0].name}}))
    refused(f"tensors are not in the files .*index.json names: {name}$")
    index.write_text(json.dumps({"weight_map": {**where, "x": shards[0].name}}))
    refused("tensors are not in the files .*index.json names: x$")
    for wrong in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 3}}'):
        index.write_text(wrong)
        refused("not an index of safetensors files")
    index.write_text(json.dumps(listed))
    changed(shards[0], lambda tensors: tensors.update({name: torch.ones(2)}))
    refused(f"{shards[1].name}: {name} is also in {shards[0].name}$")
    for path in (index, *shards):
        path.unlink()
    refused("there are no weights; looked for model.safetensors and model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(str(tmp_path / "owned"))))
    refused("pytorch_model.bin is a pickle, .* never read; .*convert it: python -c .*save_pretrained")
    assert not (tmp_path / "owned").exists()


def on_meta(config):
    with torch.device("meta"):
        return GPT(config)


def test_loading_holds_the_weights_once(tmp_path):
    """Of 100 MB in float32, in one file: the peak of resident memory grows by less than 1.5 times that."""
    config = replace(LLAMA_STYLE, n_embd=640, n_head=10, n_kv_head=5, head_size=64, n_hidden=1600, vocab_size=8000)
    config = replace(config, n_layer=5, n_hidden=1600, tie_weights=False)
    save_file({name: torch.rand(p.shape) for name, p in to_hf(on_meta(config)).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(family_of(config).config_to_hf(config)))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 90e6 < size < 130e6
    script = """
import sys, torch, transformers
from orchestrate.model.hugging_face import open_model
def memory(key):
    return 1024 * int(open("/proc/self/status").read().partition(key + ":")[2].split()[0])
config, load = open_model(sys.argv[1])
torch.ones(2) @ torch.ones(2)
before = memory("VmRSS")
model = load()
print(memory("VmHWM") - before)
"""
    grown = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=100
    )
    assert 0.9 * size < int(grown.stdout) < 1.5 * size


@pytest.mark.parametrize(
    "config, message",
    [
        (
            LlamaConfig(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
            "rope scaling of type 'yarn' .it also scales the attention's logits",
        ),
        (
            LlamaConfig(rope_parameters={"rope_type": "ntk", "factor": 2.0, "rope_theta": 1e4}),
            "rope scaling of type 'ntk' .allowed are default, linear, dynamic .NTK. and llama3",
        ),
        (
            LlamaConfig(**SHAPE, rope_parameters={**DYNAMIC, "original_max_position_embeddings": 16}),
            "'dynamic' with original_max_position_embeddings 16 beside max_position_embeddings 32 .transformers go by",
        ),
        (LlamaConfig(**SHAPE, rope_parameters={**DYNAMIC, "alpha": 1000.0}), "'dynamic' with alpha .allowed is factor"),
        (LlamaConfig(**SHAPE, rope_parameters={**DYNAMIC, "factor": 0.5}), "factor must be 0, or 1 or more, got 0.5"),
        (
            LlamaConfig(**SHAPE, rope_parameters={**DYNAMIC, "factor": "3"}),
            "factor must be 0 or more and finite, got '3'",
        ),
        (
            LlamaConfig(**SHAPE, rope_parameters={**DYNAMIC, "factor": 1e300}),
            "block_size must be a whole number from 1 to 16777216",
        ),
        (
            MistralConfig(**SHAPE, sliding_window=95, rope_parameters=DYNAMIC),
            "sliding_window 95 .shorter than max_position_embeddings times the factor of rope scaling, 96",
        ),
        (
            LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor 0.5: rotary positions turn whole heads",
        ),
        (MistralConfig(**SHAPE, sliding_window=31), "sliding_window 31 .shorter than max_position_embeddings 32"),
        (
            Qwen2Config(**SHAPE, sliding_window=8, use_sliding_window=True, max_window_layers=1),
            "sliding_window 8 .shorter",
        ),
        (LlamaConfig(hidden_act="gelu"), "hidden_act 'gelu'"),
        (GPT2Config(activation_function="relu"), "activation_function 'relu'"),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_has_no_counterpart_is_refused(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        config_from_folder(tmp_path)


def test_missing_and_other_models(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="config.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert'; understood are gpt2, llama, mistral, qwen2, qwen3"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(ValueError, match="'gpt_neox', which has attention and MLP beside each other, and rotary"):
        load(str(tmp_path))
    for wrong in ("{", "[1]", "{}", '{"model_type": ["gpt2"]}', '{"model_type": "llama", "hidden_size": "x"}'):
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(ValueError, match="config.json cannot be read"):
            load(str(tmp_path))
    quantized = {**LlamaConfig(**SHAPE).to_dict(), "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ValueError, match="its weights are quantized"):
        load(str(tmp_path))
    gpt2().config.save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="there are no weights"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="Hugging Face form"):
        family_of(ModelConfig(vocab_size=8, n_layer=1, n_head=1, n_embd=8, norm="rmsnorm"))


SMALL = ModelConfig(block_size=32, vocab_size=60, n_layer=2, n_head=4, n_embd=32)
LLAMA_STYLE = replace(SMALL, norm="rmsnorm", activation="swiglu", position="rotary", n_kv_head=2, n_hidden=48)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, bias=True, tie_weights=False, n_hidden=40, activation="gelu_tanh", norm_eps=1e-4),
        replace(LLAMA_STYLE, head_size=6, rotary_base=5e4, norm_eps=1e-4),
        replace(LLAMA_STYLE, rotary_scale=2.0, mlp_bias=True, tie_weights=False),
        replace(
            LLAMA_STYLE, rotary_llama3_factor=8.0, rotary_low_freq_factor=0.5, rotary_original_length=24, bias=True
        ),
        replace(LLAMA_STYLE, attn_bias="qkv", head_size=6),
        replace(LLAMA_STYLE, head_size=12, qk_norm=True, tie_weights=False),
        replace(SMALL, attn_bias="qkv", mlp_bias=True),
    ],
    ids=["no biases", "gpt2", "llama", "linear", "llama3", "qwen2", "qwen3", "some biases"],
)
def test_transformers_read_what_we_write(config, tmp_path):
    """Configuration and weights, loaded by transformers, compute our logits."""
    from transformers import CONFIG_MAPPING

    ours = GPT(config)
    init_weights(ours, 1)
    shaken(ours)
    keys = family_of(config).config_to_hf(config)
    theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[keys.pop("model_type")](**keys))
    theirs.load_state_dict(to_hf(ours), strict=True)
    x = torch.randint(0, 60, (3, 32))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(x).logits, ours.logits(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, reasons",
    [
        (
            {"qk_norm": True},
            {"GPT-2": "qk_norm True", "Qwen3": "norm 'layernorm', activation 'gelu', position 'learned'"},
        ),
        ({"head_size": 16}, {"GPT-2": "head_size 16"}),
        ({"n_head": 6, "n_kv_head": 6}, {"GPT-2": "n_embd 32 must be a multiple of n_head 6"}),
        ({"n_kv_head": 1}, {"GPT-2": "n_kv_head 1"}),
        ({"activation": "swiglu"}, {"GPT-2": "activation 'swiglu'"}),
        ({"n_hidden": (8, 16)}, {"GPT-2": "MLPs of different widths"}),
        ({"lora": {"attn.0": LoraSpec(1, 1.0)}}, {"GPT-2": "adapters (merge_lora_weights first)"}),
    ],
)
def test_what_no_family_can_hold_is_refused_with_each_reason(changes, reasons):
    with pytest.raises(ValueError) as refused:
        family_of(replace(SMALL, **changes))
    for title, reason in reasons.items():
        assert f"{title} cannot hold {reason}" in str(refused.value)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (
            {"attn_bias": "qkv", "mlp_bias": True},
            "Llama cannot hold attn_bias 'qkv'; Mistral cannot hold attn_bias 'qkv', mlp_bias True; "
            "Qwen2 cannot hold mlp_bias True; Qwen3 cannot hold attn_bias 'qkv'",
        ),
        (
            {"rotary_scale": 2.0, "rotary_llama3_factor": 8.0},
            "Llama cannot hold rotary_scale 2.0 beside rotary_llama3_factor 8.0",
        ),
        (
            {"rotary_scale": 2.0, "rotary_dynamic_factor": 3.0},
            "Llama cannot hold rotary_scale 2.0 beside rotary_dynamic_factor 3.0",
        ),
        ({"activation": "gelu", "qk_norm": True}, "Llama cannot hold qk_norm True, activation 'gelu'"),
    ],
)
def test_what_llama_cannot_hold(changes, reason):
    with pytest.raises(ValueError) as refused:
        family_of(replace(LLAMA_STYLE, **changes))
    assert reason in str(refused.value)


def test_released_sizes():
    assert {name: gpt2_config(name).n_layer for name in GPT2_MODELS} == {
        "gpt2": 12, "gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48,
    }  # fmt: skip


def nanogpt_checkpoint(path, **changes) -> GPT:
    config = ModelConfig(block_size=16, vocab_size=30, n_layer=2, n_head=2, n_embd=16)
    model = GPT(config)
    init_weights(model, 3)
    weights = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    weights["_orig_mod.lm_head.weight"] = weights["_orig_mod.transformer.wte.weight"]
    arguments = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=30, dropout=0.0)
    saved = {
        "model": weights,
        "model_args": arguments,
        "iter_num": 5,
        "config": {"dataset": "x"},
        "best_val_loss": torch.tensor(1.0),
    }
    torch.save({**saved, **changes}, path)
    return model


def test_nanogpt_checkpoint(tmp_path):
    model = nanogpt_checkpoint(tmp_path / "ckpt.pt")
    loaded = load_checkpoint(tmp_path / "ckpt.pt")
    assert loaded.config == model.config == open_model(tmp_path / "ckpt.pt")[0]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_nanogpt_checkpoint_of_another_type_is_float32(tmp_path, dtype):
    model = nanogpt_checkpoint(tmp_path / "ckpt.pt")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    saved["model"] = {name: value.to(dtype) for name, value in saved["model"].items()}
    torch.save(saved, tmp_path / "ckpt.pt")
    loaded = load_checkpoint(tmp_path / "ckpt.pt")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    x = torch.arange(model.config.block_size)[None] % model.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(x), model.logits(x), atol=0.02, rtol=0)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_other_files_are_refused_and_run_nothing(tmp_path):
    path = tmp_path / "ckpt.pt"
    for write in (
        lambda: torch.save({"model": Evil(str(tmp_path / "owned")), "model_args": {}}, path),
        lambda: path.write_bytes(pickle.dumps(Evil(str(tmp_path / "owned")))),
        lambda: path.write_bytes(b"hello"),
        lambda: path.write_bytes(b""),
        lambda: torch.save([1], path),
        lambda: nanogpt_checkpoint(path, model_args={"n_layer": 2}),
        lambda: nanogpt_checkpoint(path, model={}),
    ):
        write()
        with pytest.raises(ValueError) as refused:
            load_checkpoint(path)
        told = str(refused.value).lower()
        assert "only" not in told and "mmap" not in told, "torch's advice is to run what is in the file"
    assert not (tmp_path / "owned").exists()


def test_training_starts_from_them(tiny, tmp_path):
    """init_from a folder or a ckpt.pt: the first loss is that of the loaded weights, adapters and crop included."""
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    code, out_dir = tiny(init_from=tmp_path / "ckpt.pt", max_iters=2, attn_lora_rank=2)
    assert code == 0
    gpt2().save_pretrained(tmp_path / "hf")
    code, out_dir = tiny(out="hf-run", init_from=tmp_path / "hf", max_iters=2, n_head=4, n_embd=32)
    assert code == 0
    from conftest import events

    start = events(out_dir, "start")[0]["settings"]["model"]
    assert (start["block_size"], start["activation"], start["bias"]) == (16, "gelu_tanh", True)
