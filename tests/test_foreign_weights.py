"""Weights from elsewhere: Hugging Face GPT-2 and Llama, nanoGPT's ckpt.pt; and what cannot be represented."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from orchestrate.model.config import LoraSpec, ModelConfig
from orchestrate.model.gpt import GPT, init_weights
from orchestrate.model.hugging_face import (
    GPT2_MODELS,
    config_from_folder,
    config_to_hf,
    family_of,
    from_hf,
    gpt2_config,
    load,
    to_hf,
)
from orchestrate.model.nanogpt import config_from_checkpoint, load_checkpoint


def gpt2(**keys):
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=4, **keys))


def llama(**keys):
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    return LlamaForCausalLM(LlamaConfig(**{**shape, "max_position_embeddings": 32, "num_key_value_heads": 2, **keys}))


def qwen3(**keys):
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    more = {"head_dim": 12, "max_position_embeddings": 32, "num_key_value_heads": 2, **keys}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **more))


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    "make, keys",
    [
        (gpt2, {}),
        (gpt2, {"activation_function": "gelu", "n_inner": 40}),
        (llama, {}),
        (llama, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        (llama, {"rope_theta": 500000.0, "head_dim": 16, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
        (qwen3, {}),
        (qwen3, {"rms_norm_eps": 0.1, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    ],
)
def test_logits_equal_transformers(make, keys, tmp_path):
    theirs = shaken(make(**keys))
    theirs.save_pretrained(tmp_path)
    ours = load(str(tmp_path)).eval()
    assert ours.config == config_from_folder(tmp_path)
    x = torch.randint(0, 60, (3, 32))
    with torch.no_grad():
        difference = (ours.logits(x) - theirs(x).logits).abs().max().item()
    assert difference <= 1e-4
    back = to_hf(ours)
    for name, value in theirs.state_dict().items():
        assert torch.equal(back[name], value), name
    again = from_hf(ours.config, back)
    assert all(torch.equal(again[name], value) for name, value in ours.named_parameters())


@pytest.mark.parametrize(
    "config, message",
    [
        (
            LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "rope scaling of type 'linear'",
        ),
        (LlamaConfig(attention_bias=True, mlp_bias=True), "attention_bias, mlp_bias"),
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
    with pytest.raises(ValueError, match="'bert'; understood are gpt2, llama, qwen3"):
        load(str(tmp_path))
    gpt2().config.save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="weights cannot be had"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="Hugging Face form"):
        to_hf(GPT(ModelConfig(vocab_size=8, n_layer=1, n_head=1, n_embd=8, position="rotary")))


SMALL = ModelConfig(block_size=32, vocab_size=60, n_layer=2, n_head=4, n_embd=32)
LLAMA_STYLE = replace(SMALL, norm="rmsnorm", activation="swiglu", position="rotary", n_kv_head=2, n_hidden=48)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, bias=True, tie_weights=False, n_hidden=40, activation="gelu_tanh", norm_eps=1e-4),
        replace(LLAMA_STYLE, head_size=6, rotary_base=5e4, norm_eps=1e-4),
        replace(LLAMA_STYLE, head_size=12, qk_norm=True, tie_weights=False),
    ],
    ids=["no biases", "gpt2", "llama", "qwen3"],
)
def test_transformers_read_what_we_write(config, tmp_path):
    """Configuration and weights, loaded by transformers, compute our logits."""
    from transformers import CONFIG_MAPPING

    ours = GPT(config)
    init_weights(ours, 1)
    shaken(ours)
    keys = config_to_hf(config)
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
            {"rotary_scale": 2.0},
            "Llama cannot hold rotary_scale 2.0; Qwen3 cannot hold qk_norm False, rotary_scale 2.0",
        ),
        ({"bias": True}, "Llama cannot hold bias True; Qwen3 cannot hold bias True, qk_norm False"),
        ({"activation": "gelu"}, "Llama cannot hold activation 'gelu'"),
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
    assert loaded.config == model.config == config_from_checkpoint(tmp_path / "ckpt.pt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


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
