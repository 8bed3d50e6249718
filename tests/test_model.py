"""The model: shapes from its configuration, exact cached generation, adapters that keep the function, compile."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from test_foreign_weights import to_hf
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrate.model.adapters import tied_logits
from orchestrate.model.config import Fade, LoraSpec, ModelConfig, expand_layers, layer_names, layer_of_parameter
from orchestrate.model.gpt import (
    GPT,
    WEIGHTS,
    compile_blocks,
    crop_block_size,
    from_weights,
    init_weights,
    parameter_count,
    rotary_frequencies,
    set_dropout,
    weights_of,
)
from orchestrate.model.growth import Layer, stack
from orchestrate.model.lineage import carry
from orchestrate.model.lora import reshape_lora, trainable_parameters
from orchestrate.training.plan import flops_per_token
from orchestrate.training.run.optimizers import AdamW

GPT2 = ModelConfig(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32, bias=True)
LLAMA = replace(
    GPT2, norm="rmsnorm", activation="swiglu", position="rotary", tie_weights=False, bias=False, n_kv_head=2, n_hidden=48
)  # fmt: skip
QK_NORM = replace(LLAMA, qk_norm=True, head_size=10)
LLAMA3 = replace(LLAMA, rotary_llama3_factor=8.0, rotary_original_length=8, n_kv_head=1)
QWEN2 = replace(LLAMA, attn_bias="qkv", tie_weights=True)
STYLES = {"gpt2": GPT2, "llama": LLAMA, "llama3": LLAMA3, "qwen2": QWEN2, "qk_norm": QK_NORM}
BOTH = pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)


def trained(config: ModelConfig, seed: int = 0) -> GPT:
    """A model in which nothing is at its initial zero."""
    model = GPT(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tokens(batch: int = 3, time: int = 16) -> torch.Tensor:
    return torch.randint(0, 50, (batch, time), generator=torch.Generator().manual_seed(5))


def test_parameter_counts():
    gpt2 = ModelConfig(vocab_size=50257, bias=True)
    assert parameter_count(gpt2) == 124_439_808
    assert flops_per_token(gpt2, 124_439_808, 1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(gpt2, 124_439_808, 512) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 512
    # Llama 2 7B
    llama = ModelConfig(4096, 32000, 32, 32, None, 4096, n_hidden=11008, norm="rmsnorm", activation="swiglu",
                        position="rotary", tie_weights=False)  # fmt: skip
    assert parameter_count(llama) == 6_738_415_616


@BOTH
def test_config_goes_through_json(config):
    config = replace(config, lora={"mlp.1": LoraSpec(4, 8.0), "attn.0": LoraSpec(2, 8.0)})
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert list(config.lora) == ["attn.0", "mlp.1"], "model order, so that equal adapters are equal settings"
    with pytest.raises(ValueError, match="n_layers"):
        ModelConfig.from_json({"n_layers": 3})


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"n_embd": 30}, "multiple of n_head"),
        ({"n_kv_head": 3}, "multiple of n_kv_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"activation": "relu"}, "activation must be one of gelu, gelu_tanh, relu2, swiglu, got 'relu'"),
        ({"qk_norm": 1}, "qk_norm must be true or false, got 1"),
        ({"head_size": 0}, "head_size must be a whole number from 1 to 1048576, got 0"),
        ({"n_hidden": (8, 0)}, "n_hidden must be a whole number from 1 to 4194304, got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive and finite, got 0.0"),
        ({"lora": {"attn.5": LoraSpec(1, 1.0)}}, "attn.5"),
        ({"lora": {"attn.0": LoraSpec(99, 1.0)}}, "from 1 to 32"),
        ({"lora": {"lm_head": LoraSpec(1, 1.0)}}, "untied lm_head"),
        ({"position": "rotary", "n_head": 32, "head_size": 1}, "even head size"),
        ({"attn_bias": "q"}, "attn_bias must be one of none, qkv, all, got 'q'"),
        ({"mlp_bias": 1}, "mlp_bias must be true or false, got 1"),
        ({"rotary_scale": 2.0}, "^rotary_scale 2.0 needs rotary positions$"),
        ({"rotary_llama3_factor": 8.0}, "^rotary_llama3_factor 8.0 needs rotary positions$"),
        ({"position": "rotary", "rotary_llama3_factor": 0.0}, "rotary_llama3_factor must be positive and finite"),
        ({"position": "rotary", "rotary_high_freq_factor": 5}, "means nothing where rotary_llama3_factor is 1"),
        ({"position": "rotary", "rotary_original_length": 64}, "means nothing where rotary_llama3_factor is 1"),
        ({"rotary_dynamic_factor": 2.0}, "^rotary_dynamic_factor 2.0 needs rotary positions$"),
        (
            {"position": "rotary", "rotary_dynamic_factor": 2.0, "rotary_llama3_factor": 8.0},
            "^rotary_dynamic_factor 2.0 and rotary_llama3_factor 8.0: one of them$",
        ),
        ({"position": "rotary", "rotary_dynamic_factor": 0.99}, "^rotary_dynamic_factor must be 0, or 1 or more, got"),
        ({"position": "rotary", "rotary_dynamic_factor": -1}, "rotary_dynamic_factor must be 0 or more and finite"),
        (
            {"position": "rotary", "rotary_dynamic_factor": 1, "head_size": 2},
            "^rotary_dynamic_factor 1.0 needs a head size of 4 or more, got 2$",
        ),
        (
            {"position": "rotary", "rotary_dynamic_factor": 2, "rotary_low_freq_factor": 2},
            "^rotary_low_freq_factor 2.0 means nothing where rotary_llama3_factor is 1$",
        ),
        (
            {"position": "rotary", "rotary_llama3_factor": 8.0, "rotary_low_freq_factor": 4.0},
            "rotary_low_freq_factor 4.0 must be below rotary_high_freq_factor 4.0",
        ),
    ],
)
def test_impossible_shapes_are_refused(keys, message):
    base = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**base, **keys})


def test_layer_names():
    assert expand_layers(GPT2, "block.1") == ["ln_1.1", "attn.1", "ln_2.1", "mlp.1"]
    assert expand_layers(GPT2, ["mlp.*", "wte"]) == ["wte", "mlp.0", "mlp.1"]
    assert expand_layers(GPT2, "lm_head") == ["wte"] and expand_layers(LLAMA, "lm_head") == ["lm_head"]
    assert "wpe" not in layer_names(LLAMA) and "wpe" in layer_names(GPT2)
    with pytest.raises(ValueError, match="did you mean attn.1"):
        expand_layers(GPT2, "atn.1")
    for config in (GPT2, replace(LLAMA, lora={"attn.0": LoraSpec(2, 4.0), "lm_head": LoraSpec(2, 4.0)})):
        assert {layer_of_parameter(name) for name, _ in GPT(config).named_parameters()} == set(layer_names(config))


@BOTH
def test_every_weight_is_declared(config):
    """What the modules declare of their weights is what the model has: growth and initial values follow from it."""
    config = replace(config, n_embd=24, vocab_size=50, n_hidden=40, block_size=16)
    sizes = {
        "vocabulary": 50, "positions": 16, "writes": 24, "attn_norm": 24, "mlp_norm": 24, "head_norm": 24,
        "attn_reads": 24, "mlp_reads": 24, "head_reads": 24, "units": 40, "units_read": 40,
        "qkv": (config.n_head + 2 * config.n_kv_head) * config.head_size, "heads_read": config.n_head * config.head_size,
        "head_features": config.head_size,
    }  # fmt: skip
    model, found = GPT(config), set()
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        weights, block = weights_of(name)
        found.add(name.removeprefix("transformer.").removeprefix(f"h.{block}.").rpartition(".")[0])
        assert weights.exists(config) and (block is not None) == (".h." in name)
        axes = [axis for axis in (weights.rows, weights.columns) if axis]
        assert parameter.shape == tuple(sizes[axis] for axis in axes[: parameter.dim()]), name
        flat = {"ones": 1.0}.get(weights.initial) if name.endswith("weight") else 0.0
        assert flat is None or (parameter == flat).all(), name
    assert found == {path for path, weights in WEIGHTS.items() if weights.exists(config)}


def test_qk_norm_bounds_the_product_of_queries_and_keys():
    """A head's attention is the same however large its queries are, but for the norm's epsilon."""
    model = trained(replace(QK_NORM, norm_eps=1e-12))
    was = model.logits(tokens())
    with torch.no_grad():
        for block in model.transformer["h"]:
            block.attn.c_attn.weight[: 4 * 10] *= 30.0
        torch.testing.assert_close(model.logits(tokens()), was, atol=1e-4, rtol=1e-4)
        model.transformer["h"][0].attn.q_norm.weight.mul_(3.0)
        assert (model.logits(tokens()) - was).abs().max() > 1e-3


@BOTH
def test_a_position_sees_only_what_is_before_it(config):
    model, x = trained(config), tokens()
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    one, other = model.logits(x), model.logits(changed)
    torch.testing.assert_close(one[:, :9], other[:, :9])
    assert (one[:, 9:] - other[:, 9:]).abs().max() > 1e-2


def test_the_loss_is_a_sum_over_the_targets_that_count():
    model, x = trained(GPT2), tokens()
    targets = x.roll(-1, 1)
    targets[0, 3:] = targets[2, :15] = -1
    loss = model(x, targets)
    chances = model.logits(x).log_softmax(-1)
    by_hand = [-chances[0, i, targets[0, i]] for i in range(3)] + [-chances[1, i, targets[1, i]] for i in range(16)]
    by_hand.append(-chances[2, 15, targets[2, 15]])
    assert loss.count == 20
    torch.testing.assert_close(loss.sum, torch.stack(by_hand).sum(), atol=1e-4, rtol=1e-6)
    assert [value.item() for value in model(x, torch.full_like(x, -1))] == [0.0, 0]


@pytest.mark.parametrize("base, scale", [(10000.0, 1.0), (500.0, 2.5)])
def test_rotary_positions_turn_by_their_place_divided_by_the_scale(base, scale):
    """Pair i of a head of 8 turns by position / scale * base ** (-i / 4), features i and i + 4 together."""
    config = replace(LLAMA, rotary_base=base, rotary_scale=scale)
    model, x = trained(config), tokens()[:, :9]
    with torch.device("meta"):
        built_on_meta = GPT(config)
    built_on_meta.reset_buffers(torch.device("cpu"))
    for built in (model, built_on_meta):
        for position in (0, 1, 7, 15):
            angles = [position / scale * base ** (-i / 4) for i in range(4)] * 2
            torch.testing.assert_close(built.rope_cos[position], torch.tensor(angles).cos(), atol=1e-6, rtol=0)
            torch.testing.assert_close(built.rope_sin[position], torch.tensor(angles).sin(), atol=1e-6, rtol=0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=50, max_position_embeddings=16, rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "linear", "factor": scale, "rope_theta": base},
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(to_hf(trained(replace(config, rotary_scale=1.0))))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(x), theirs(x).logits, atol=1e-4, rtol=1e-4)


def test_llama3_scaling_by_hand():
    """Base 1e4, heads of 8: frequencies 1, 1/10, 1/100, 1/1000; in 400 tokens they turn 400 f / 2 pi times.

    That is 63.7, 6.37, 0.637 and 0.0637 times. With low 0.5 and high 8, the first stays, the last is divided by 8, and
    of the others (6.366 - 0.5) / 7.5 = 0.7822 and (0.6366 - 0.5) / 7.5 = 0.01822 stay as they are.
    """
    config = replace(LLAMA, rotary_llama3_factor=8.0, rotary_low_freq_factor=0.5, rotary_high_freq_factor=8.0,
                     rotary_original_length=400)  # fmt: skip
    blended = [0.1 * (0.782160 + 0.217840 / 8), 0.01 * (0.0182160 + 0.981784 / 8)]
    by_hand = torch.tensor([1.0, *blended, 0.001 / 8])
    torch.testing.assert_close(rotary_frequencies(config), by_hand, atol=0, rtol=1e-5)
    interpolated = rotary_frequencies(replace(config, rotary_scale=2.5))
    torch.testing.assert_close(interpolated, by_hand / 2.5, atol=0, rtol=1e-5)
    cosines = GPT(replace(config, rotary_scale=2.5)).rope_cos[7]
    torch.testing.assert_close(cosines, (7 * by_hand / 2.5).cos().repeat(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "base, size, factor, low, high, original",
    [(5e5, 128, 8.0, 1.0, 4.0, 8192), (5e5, 64, 32.0, 1.0, 4.0, 8192), (100.0, 10, 3.0, 0.7, 1.1, 40)],
)
def test_llama3_scaling_is_that_of_transformers(base, size, factor, low, high, original):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = replace(LLAMA, head_size=size, rotary_base=base, rotary_llama3_factor=factor, rotary_low_freq_factor=low,
                     rotary_high_freq_factor=high, rotary_original_length=original)  # fmt: skip
    rope = {"rope_type": "llama3", "rope_theta": base, "factor": factor, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": original}  # fmt: skip
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=size, rope_parameters=rope), "cpu")
    ours = rotary_frequencies(config)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=3e-7)
    plain = rotary_frequencies(replace(LLAMA, head_size=size, rotary_base=base))
    kinds = {"kept": ours == plain, "divided": torch.isclose(ours, plain / factor, rtol=1e-6)}
    assert all(kind.any() for kind in kinds.values()) and not (kinds["kept"] | kinds["divided"]).all(), kinds


def test_dynamic_ntk_by_hand():
    """Base 1e4, heads of 8, factor 3 from 10 tokens on: in 25 the base is (3 * 25 / 10 - 2) ** (8 / 6) times that.

    5.5 ** (4 / 3) = 9.7085. Interpolation comes after it.
    """
    config = replace(LLAMA, block_size=40, rotary_dynamic_factor=3.0, rotary_original_length=10, rotary_scale=2.0)
    plain = [1 / 2, 0.1 / 2, 0.01 / 2, 0.001 / 2]
    for length in (0, 1, 10):
        torch.testing.assert_close(rotary_frequencies(config, length=length), torch.tensor(plain), atol=0, rtol=1e-6)
    by_hand = torch.tensor([f / 9.70854 ** (i / 4) for i, f in enumerate(plain)])
    torch.testing.assert_close(rotary_frequencies(config, length=25), by_hand, atol=0, rtol=1e-5)
    model = trained(config)
    with torch.autocast("cpu", torch.bfloat16):  # of which they take no notice
        _, (cos, sin) = model._start(torch.zeros(2, 25, dtype=torch.long), counts=[25, 10])
    assert cos.dtype == sin.dtype == torch.float32
    for row, frequencies in enumerate((by_hand, torch.tensor(plain))):
        angles = torch.arange(25)[:, None] * frequencies.repeat(2)
        torch.testing.assert_close(cos[row, 0], angles.cos(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sin[row, 0], angles.sin(), atol=1e-5, rtol=0)
    assert config.cache_length == 10 and replace(config, block_size=7).cache_length == 7
    assert replace(config, rotary_dynamic_factor=0, rotary_original_length=8192).cache_length == 40


def test_biases_where_the_options_say():
    def biased(**keys) -> set[str]:
        names = [n for n, _ in GPT(replace(LLAMA, **keys)).named_parameters() if n.endswith("bias")]
        return {re.sub(r"^transformer\.(h\.\d+\.)?", "", name).removesuffix(".bias") for name in names}

    mlp = {"mlp.c_fc", "mlp.c_gate", "mlp.c_proj"}
    attention, norms = {"attn.c_attn", "attn.c_proj"}, {"ln_1", "ln_2", "ln_f"}
    assert biased() == set()
    assert biased(attn_bias="qkv") == {"attn.c_attn"} and biased(attn_bias="all") == attention
    assert biased(mlp_bias=True) == mlp and biased(mlp_bias=True, attn_bias="qkv") == mlp | {"attn.c_attn"}
    assert biased(bias=True) == biased(bias=True, attn_bias="qkv") == attention | mlp
    assert biased(norm="layernorm", attn_bias="all", mlp_bias=True) == attention | mlp
    assert biased(norm="layernorm", bias=True) == attention | mlp | norms
    # One model is one configuration.
    same = [replace(LLAMA, **keys) for keys in ({"bias": True}, {"attn_bias": "all", "mlp_bias": True},
                                                {"bias": True, "attn_bias": "qkv"})]  # fmt: skip
    assert same[0] == same[1] == same[2] and replace(same[0], bias=False) == LLAMA
    assert replace(LLAMA, norm="layernorm", attn_bias="all", mlp_bias=True) != replace(
        LLAMA, norm="layernorm", bias=True
    )


def test_initial_weights_follow_the_seed_alone():
    one, other = GPT(GPT2), GPT(GPT2)
    torch.manual_seed(1)
    init_weights(one, 7)
    state = torch.random.get_rng_state()
    init_weights(other, 7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    init_weights(other, 8)
    assert not torch.equal(one.transformer["wte"].weight, other.transformer["wte"].weight)
    assert one.transformer["h"][0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 * 24**0.5 / 2, rel=0.1)
    loss = one(tokens(), tokens().roll(1, 1))
    assert loss.count == 48 and loss.sum.item() / 48 == pytest.approx(3.912, abs=0.3)  # ln 50: hardly a preference yet


def test_crop_and_from_weights():
    model = trained(GPT2)
    cropped = crop_block_size(model, 8)
    torch.testing.assert_close(cropped.logits(tokens(2, 8)), model.logits(tokens(2, 8)))
    with pytest.raises(ValueError, match="longer"):
        crop_block_size(model, 17)
    weights = dict(model.named_parameters())
    with pytest.raises(ValueError, match="missing transformer.wte.weight"):
        from_weights(GPT2, {name: value for name, value in weights.items() if "wte" not in name})
    with pytest.raises(ValueError, match="has shape"):
        from_weights(replace(GPT2, block_size=8), weights)


# ---------------------------------------------------------------------------------------------- adapters

RANKS = [
    {"attn.0": LoraSpec(4, 8.0), "mlp.1": LoraSpec(4, 8.0), "wte": LoraSpec(4, 8.0)},
    {"attn.0": LoraSpec(8, 8.0), "mlp.1": LoraSpec(2, 8.0), "wte": LoraSpec(6, 4.0)},  # up, down, up with alpha
    {"attn.0": LoraSpec(8, 16.0), "wte": LoraSpec(2, 4.0)},  # alpha, merged, down
    {},
]


@BOTH
def test_every_change_of_ranks_keeps_the_function(config):
    model, x = trained(config), tokens()
    plain = {name for name, _ in model.named_parameters()}
    for ranks in RANKS:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        target = replace(config, lora=ranks)
        new, lineage = reshape_lora(model, target, torch.Generator().manual_seed(0))
        assert new.config == target and list(lineage) == [name for name, _ in new.named_parameters()]
        torch.testing.assert_close(new.logits(x), model.logits(x), atol=2e-5, rtol=1e-5)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the old model is untouched"
        old = dict(model.named_parameters())
        untouched = "transformer.h.0.ln_1.weight"
        assert new.get_parameter(untouched) is old[untouched]
        with torch.no_grad():  # train on a bit, so that no factor is zero
            for name, parameter in new.named_parameters():
                if "lora" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        model = new.eval()
    assert {name for name, _ in model.named_parameters()} == plain


def test_shrinking_keeps_the_strongest_directions():
    config = replace(GPT2, lora={"mlp.0": LoraSpec(8, 8.0)})
    model = trained(config)
    fc = model.transformer["h"][0].mlp.c_fc
    product = (fc.lora_B["default"].weight @ fc.lora_A["default"].weight).detach().double()
    new, lineage = reshape_lora(model, replace(GPT2, lora={"mlp.0": LoraSpec(3, 3.0)}), torch.Generator())
    fc = new.transformer["h"][0].mlp.c_fc
    kept = (fc.lora_B["default"].weight @ fc.lora_A["default"].weight).detach().double()
    u, s, v = torch.linalg.svd(product)
    torch.testing.assert_close(kept, u[:, :3] @ torch.diag(s[:3]) @ v[:3], atol=1e-5, rtol=1e-4)
    assert lineage["transformer.h.0.mlp.c_fc.lora_A.default.weight"].name is None


@pytest.mark.parametrize("layer, path", [("mlp.0", "transformer.h.0.mlp.c_fc"), ("wte", "transformer.wte")])
@pytest.mark.parametrize("after", [LoraSpec(3, 8.0), LoraSpec(4, 32.0), LoraSpec(3, 0.5)], ids=str)
def test_shrinking_makes_up_for_another_scaling_in_the_factors(layer, path, after):
    """A product of rank 3 fits into a smaller adapter whole: nothing is folded into the frozen base weight."""
    config = replace(GPT2, lora={layer: LoraSpec(6, 8.0)})
    model = trained(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                rank = parameter.shape.index(6)
                parameter.narrow(rank, 3, 3).zero_()
    base = model.get_parameter(f"{path}.base_layer.weight").detach().clone()
    product = model.get_submodule(path).get_delta_weight("default").detach()
    assert product.abs().max() > 0.05
    new, _ = reshape_lora(model, replace(GPT2, lora={layer: after}), torch.Generator())
    torch.testing.assert_close(new.get_parameter(f"{path}.base_layer.weight"), base, atol=2e-6, rtol=0)
    torch.testing.assert_close(new.get_submodule(path).get_delta_weight("default"), product, atol=2e-6, rtol=1e-5)


@BOTH
def test_new_adapters_can_learn(config):
    model, _ = reshape_lora(trained(config), replace(config, lora=RANKS[0]), torch.Generator().manual_seed(0))
    grown, _ = reshape_lora(model, replace(config, lora={**RANKS[0], "attn.0": LoraSpec(8, 8.0)}), torch.Generator())
    grown(tokens(), tokens()).sum.backward()
    for name, parameter in grown.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            assert parameter.grad.abs().max() > 0, name
    rows = grown.get_parameter("transformer.h.0.attn.c_attn.lora_A.default.weight")
    assert (rows.detach().abs().amax(dim=1) > 0).all()


def test_tied_head_shares_the_adapted_embedding():
    model = trained(replace(GPT2, lora={"wte": LoraSpec(4, 8.0)}))
    wte = model.transformer["wte"]
    adapted = wte.base_layer.weight + wte.get_delta_weight("default")
    h = torch.randn(3, 32)
    torch.testing.assert_close(tied_logits(wte, h), h @ adapted.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(wte(torch.arange(50)), adapted, atol=1e-5, rtol=1e-4)


@BOTH
@pytest.mark.parametrize("after", [LoraSpec(6, 8.0), LoraSpec(4, 2.0)], ids=["grow", "alpha"])
def test_moments_follow_the_gradient(config, after):
    """What Adam would have gathered on the new model's own gradients is what the lineage carries over."""
    layers = ("attn.0", "mlp.1", "wte")
    model = trained(replace(config, lora={name: LoraSpec(4, 8.0) for name in layers}))
    new, lineage = reshape_lora(
        model, replace(config, lora={name: after for name in layers}), torch.Generator().manual_seed(0)
    )
    state: dict = {}
    for number, one in enumerate((model, new)):
        one.zero_grad()
        (one(tokens(), tokens().roll(1, 1)).sum / 48).backward()
        for name, parameter in one.named_parameters():
            gradient = parameter.grad
            state.setdefault(number, {})[name] = {
                "exp_avg": gradient, "exp_avg_sq": gradient**2, "step": torch.tensor(1.0)
            }  # fmt: skip
    shapes = {name: parameter.shape for name, parameter in new.named_parameters()}
    carried = carry(state[0], lineage, shapes, AdamW.slots)
    for name, origin in lineage.items():
        image = torch.ones(shapes[name], dtype=torch.bool)
        for dim, index in enumerate(origin.index):
            if index is not None:
                image &= (index >= 0).view([-1 if d == dim else 1 for d in range(2)])
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(carried[name][key][image], state[1][name][key][image], atol=1e-6, rtol=1e-4)
            if key == "exp_avg":
                assert not carried[name][key][~image].any()
            else:  # what is new starts with the mean of its kin
                assert (carried[name][key][~image] > 0).all()


def test_what_trains_under_adapters_and_freezes():
    model = GPT(replace(GPT2, lora={"attn.0": LoraSpec(2, 4.0), "wte": LoraSpec(2, 4.0)}))
    trains = trainable_parameters(model, ["mlp.0", "attn.1"])
    assert "transformer.h.0.attn.c_attn.lora_A.default.weight" in trains
    assert not [name for name in trains if "base_layer" in name or ".mlp." in name and ".h.0." in name]
    assert not [name for name in trains if "h.1.attn" in name] and "transformer.h.1.mlp.c_fc.weight" in trains


# ---------------------------------------------------------------------------------------------- compile


def compiled(model: GPT, **options) -> GPT:
    compile_blocks(model.train(), **options)
    return model


@pytest.mark.parametrize("style", ["gpt2", "qk_norm", "adapters"])
def test_compiled_parts_share_graphs_and_schedules_recompile_nothing(style):
    """Three graphs: of the embedding, of all blocks, of head and loss. None of them breaks.

    A new batch size costs at most one more of each; a new block of the same shape none, nor does what a schedule
    changes by numbers.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend("eager")
    lora = {f"attn.{n}": LoraSpec(2, 4.0) for n in range(2)} | {"wte": LoraSpec(2, 4.0)}
    config = {"gpt2": GPT2, "qk_norm": QK_NORM, "adapters": replace(GPT2, lora=lora)}[style]
    model = compiled(trained(replace(config, n_layer=2, n_hidden=64)), backend=counter)

    def graphs(model: GPT, batch: int = 3) -> int:
        model(tokens(batch), tokens(batch)).sum.backward()
        return counter.frame_count

    assert graphs(model) == 3
    at_most = graphs(model, 5)
    assert at_most <= 6
    assert {graphs(model, batch) for batch in (2, 7, 4)} == {at_most}
    deeper = replace(model.config, n_layer=3, n_hidden=64)
    if style != "adapters":
        layers = [*(Layer(n, n) for n in range(2)), Layer(None, 1)]
        model = compiled(stack(model, deeper, layers, True, torch.Generator())[0], backend=counter)
        assert graphs(model) == at_most
    for share in (0.1, 0.7):
        model.set_fading({"mlp.1": Fade(32, share), "attn.0": Fade(0, share), "lm_head": Fade(40, share)})
        faded = graphs(model)
        assert share == 0.1 or faded == at_most
        at_most = faded
    assert not torch._dynamo.utils.counters["graph_break"]
    set_dropout(model, 0.1)
    with_dropout = graphs(model)
    for p in (0.2, 0.35, 0.05):
        set_dropout(model, p)
        assert graphs(model) == with_dropout
    torch._dynamo.reset()


def test_many_kinds_of_blocks_stay_compiled():
    """More than the 8 graphs after which torch would compute all further blocks without compiling, and warn once."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    widths = tuple(range(16, 26))
    model = compiled(trained(replace(GPT2, n_layer=10, n_hidden=widths)), backend=counter)
    model(tokens(), tokens()).sum.backward()
    assert counter.frame_count >= 12
    torch._dynamo.reset()


def test_compiled_model_computes_the_same():
    torch._dynamo.reset()
    model = trained(GPT2).train()
    plain = model(tokens(), tokens()).sum / 48
    compile_blocks(model)
    torch.testing.assert_close(model(tokens(), tokens()).sum / 48, plain, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_dropout_drops_its_share_and_keeps_the_mean():
    from orchestrate.model.gpt import Dropout

    drop, x = Dropout(), torch.ones(200, 200)
    assert drop(x) is x
    drop.set(0.25)
    out = drop(x)
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert drop.eval()(x) is x
