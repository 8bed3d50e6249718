"""Growth: the function that stays, and moments that are those the grown model would have had."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import events
from test_operations import apply, live_run, logits

from orchestrate.data.stream import Cursor
from orchestrate.model.config import LoraSpec, ModelConfig, layer_names
from orchestrate.model.gpt import GPT, init_weights
from orchestrate.model.lineage import carry, known
from orchestrate.model.lora import reshape_lora
from orchestrate.training.operations import make
from orchestrate.training.run.optimizers import SGD, AdamW
from orchestrate.training.session.start import settings_from
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import ScheduleError
from orchestrate.training.settings.records import Settings

GPT2 = ModelConfig(block_size=12, vocab_size=19, n_layer=3, n_head=2, n_embd=8, bias=True)
LLAMA = ModelConfig(
    block_size=12, vocab_size=19, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, n_hidden=24, norm="rmsnorm",
    activation="swiglu", position="rotary", tie_weights=False,
)  # fmt: skip
OTHER = replace(GPT2, norm="rmsnorm", activation="relu2", bias=False, n_hidden=(20, 32, 16))
PARTS = {
    "attn.0.q": LoraSpec(2, 4.0), "attn.0.v": LoraSpec(1, 3.0, use_rslora=True), "attn.0.o": LoraSpec(2, 2.0),
    "mlp.0.up": LoraSpec(2, 8.0), "mlp.1.down": LoraSpec(3, 1.0), "attn.1.k": LoraSpec(2, 5.0),
    "attn.1.v": LoraSpec(3, 2.0),
}  # fmt: skip
LORA = {"attn.0": LoraSpec(2, 4.0), "mlp.1": LoraSpec(3, 2.0), "wte": LoraSpec(2, 8.0), "attn.1": LoraSpec(1, 1.0)}
STYLES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "relu2": OTHER,
    "gpt2 with adapters": replace(GPT2, lora=LORA),
    "llama with adapters": replace(LLAMA, lora=LORA),
    "gpt2 with projections": replace(GPT2, lora={**PARTS, "attn.2.qkv": LoraSpec(3, 2.0)}),
    "llama with projections": replace(LLAMA, lora={**PARTS, "mlp.0.gate": LoraSpec(2, 3.0)}),
    "gpt2 with qk_norm": replace(GPT2, qk_norm=True, head_size=6, norm_eps=0.1),
    "llama3": replace(LLAMA, rotary_llama3_factor=8.0, rotary_original_length=16, rotary_base=100.0),
    "qwen2": replace(LLAMA, attn_bias="qkv", tie_weights=True, lora=LORA, rotary_scale=1.5),
    "dynamic NTK": replace(LLAMA, rotary_dynamic_factor=3.0, rotary_original_length=5, lora=LORA),
    "llama with qk_norm": replace(LLAMA, qk_norm=True, head_size=6, norm_eps=0.1, lora=LORA),
}
# Operations that keep the function, and whether all moments have an exact image.
EXACT = [
    ("stack_layers", {"n_layer": 5}, True),
    ("stack_layers", {"n_layer": 7, "where": "interleave"}, True),
    ("stack_layers", {"n_layer": 4, "where": "bottom"}, True),
    ("stack_layers", {"times": 2, "how": "identity_copy", "where": "interleave"}, True),
    ("stack_layers", {"n_layer": 4, "how": "identity_copy", "where": "bottom"}, True),
    ("widen_mlp", 48, True),
    ("widen_mlp", {"width": 33, "layers": ["mlp.0"], "noise": 0.9}, True),
    ("widen_mlp", {"width": 48, "how": "zero"}, True),
    ("add_heads", {"n_head": 8}, True),
    ("add_heads", {"n_head": 8, "how": "zero"}, True),
    ("widen_embd", {"n_embd": 48, "noise": 0.0}, True),
    ("widen_embd", {"n_embd": 48, "noise": 0.0, "heads": "larger"}, True),
    ("widen_embd", {"n_embd": 48, "noise": 0.0, "heads": "keep"}, True),
    ("widen_embd", {"n_embd": 32}, False),
    ("widen_embd", {"n_embd": 32, "heads": "larger"}, False),
    ("untie_head", None, False),
]


def settings_of(config: ModelConfig) -> Settings:
    return settings_from(TrainConfig(), config)


def shaken(config: ModelConfig, seed: int = 0) -> GPT:
    """A model in float64 with nothing at its initial zero or one."""
    model = GPT(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 19, (4, 13), generator=generator)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    named = dict(model.named_parameters())
    loss = model(tokens[:, :-1], tokens[:, 1:]).sum / 48
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)
    }  # an unused row of an embedding has no gradient


def grow(model: GPT, name: str, value, seed: int = 3):
    operation = make(name, {} if value is None else {"value": value})
    target = operation.plan(settings_of(model.config)).model
    return operation, *operation.reshape(model, target, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name, value, exact", EXACT, ids=lambda v: str(v))
def test_function_and_moments(style, name, value, exact):
    model = shaken(STYLES[style])
    if name == "untie_head" and not model.config.tie_weights:
        pytest.skip("the head is not tied")
    if name == "widen_mlp" and isinstance(value, dict) and value["width"] < max(model.config.n_hidden):
        value = {**value, "layers": ["mlp.0"]}
        if value["width"] < model.config.n_hidden[0]:
            pytest.skip("wider already")
    if model.config.rotary_dynamic_factor and isinstance(value, dict) and value.get("heads") == "larger":
        with pytest.raises(ScheduleError, match="heads: larger is not for dynamic NTK .rotary_dynamic_factor 3.0."):
            grow(model, name, value)
        return
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    idx = torch.arange(12)[None] % 19
    with torch.no_grad():
        was = model.logits(idx)
    operation, grown, lineage = grow(model, name, value)
    assert operation.keeps_function
    spread = model.config.qk_norm and isinstance(value, dict) and value.get("heads") == "larger"
    with torch.no_grad():
        torch.testing.assert_close(grown.logits(idx), was, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(model.logits(idx), was, atol=0, rtol=0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "the old model was touched"
    assert list(lineage) == [n for n, _ in grown.named_parameters()]
    assert grown.config == operation.plan(settings_of(model.config)).model

    old = gradients(model)
    state = {n: {"exp_avg": g, "exp_avg_sq": g * g, "step": torch.tensor(7.0)} for n, g in old.items()}
    shapes = {n: p.shape for n, p in grown.named_parameters()}
    carried = carry(state, lineage, shapes, AdamW.slots)
    buffers = carry({n: {"momentum_buffer": g} for n, g in old.items()}, lineage, shapes, SGD.slots)
    fresh = gradients(grown)
    inexact = []
    for n, gradient in fresh.items():
        origin = lineage[n]
        if origin.name is None:
            continue
        mask = known(origin, torch.device("cpu"))
        mask = torch.ones_like(gradient, dtype=torch.bool) if mask is None else mask.expand_as(gradient)
        if not origin.exact:
            inexact.append(n)
            assert origin.note, n
            continue
        torch.testing.assert_close(carried[n]["exp_avg"][mask], gradient[mask], atol=1e-8, rtol=1e-5, msg=n)
        torch.testing.assert_close(carried[n]["exp_avg_sq"][mask], gradient[mask] ** 2, atol=1e-12, rtol=1e-5, msg=n)
        assert carried[n]["step"] == 7.0
        torch.testing.assert_close(buffers[n]["momentum_buffer"][mask], gradient[mask], atol=1e-8, rtol=1e-5, msg=n)
        assert not buffers[n]["momentum_buffer"][~mask].any(), "what is new has no momentum"
    if spread and exact:  # test_larger_heads_under_their_norm
        assert inexact and not [n for n in inexact if ".attn.c_attn." not in n]
    else:
        assert bool(inexact) != exact, inexact


@pytest.mark.parametrize("style", ["gpt2 with qk_norm", "llama with qk_norm"])
def test_larger_heads_under_their_norm(style):
    """Keys and values have exact moments; the copies of a query share its gradient; new key features can learn."""
    model = shaken(replace(STYLES[style], lora={}))
    _, grown, lineage = grow(model, "widen_embd", {"times": 3, "noise": 0.0, "heads": "larger"})
    old, new, c = gradients(model), gradients(grown), grown.config
    state = {n: {"exp_avg": g, "exp_avg_sq": g * g, "step": torch.tensor(7.0)} for n, g in old.items()}
    carried = carry(state, lineage, {n: p.shape for n, p in grown.named_parameters()}, AdamW.slots)
    name, widths = "transformer.h.0.attn.c_attn.weight", [c.n_head * 18, c.n_kv_head * 18, c.n_kv_head * 18]
    queries, keys, values = new[name].split(widths)
    mask = known(lineage[name], torch.device("cpu")).expand_as(new[name]).split(widths)
    for part, gradient in ((1, keys), (2, values)):
        there = carried[name]["exp_avg"].split(widths)[part]
        torch.testing.assert_close(there[mask[part]], gradient[mask[part]], atol=1e-10, rtol=1e-7)
    assert (keys[~mask[1]].abs() > 1e-9).all() and not grown.get_parameter(name).split(widths)[1][~mask[1]].any()
    copies = torch.arange(18) // 3 if c.position == "rotary" else torch.arange(18) % 6
    summed = torch.zeros(c.n_head, 6, c.n_embd, dtype=torch.float64).index_add_(
        1, copies, queries.view(c.n_head, 18, c.n_embd)
    )
    before = old[name].split([c.n_head * 6, c.n_kv_head * 6, c.n_kv_head * 6])[0]
    torch.testing.assert_close(summed.flatten(0, 1), before.repeat(1, 3), atol=1e-10, rtol=1e-7)


def test_unequal_copies_drift_apart_and_equal_ones_do_not():
    for noise, drift in ((0.0, False), (0.5, True)):
        model = shaken(GPT2).float()
        _, grown, _ = grow(model, "widen_mlp", {"width": 64, "noise": noise})
        optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-2)
        for _ in range(5):
            for p, g in zip(grown.parameters(), gradients(grown).values(), strict=True):
                p.grad = g
            optimizer.step()
        rows = grown.transformer["h"][0].mlp.c_fc.weight
        assert torch.allclose(rows[:32], rows[32:], atol=1e-5) != drift


@pytest.mark.parametrize(
    "style",
    [
        "gpt2 with adapters",
        "llama with adapters",
        "llama with projections",
        "relu2",
        "gpt2 with qk_norm",
        "llama with qk_norm",
    ],
)
def test_growth_after_growth(style):
    """Everything on top of everything, and the function is still the first one."""
    model = shaken(STYLES[style])
    idx = torch.arange(12)[None] % 19
    with torch.no_grad():
        was = model.logits(idx)
        for name, value in (
            ("stack_layers", {"n_layer": 6, "where": "interleave"}),
            ("widen_embd", 32),
            ("widen_mlp", 80),
            ("add_heads", {"n_head": 16}),
            ("set_attn_lora_rank", 3) if "projections" not in style else ("set_layer_lora_rank", ["attn.*.v", 4]),
            ("widen_embd", {"n_embd": 64, "heads": "larger"}),
            ("merge_lora_weights", None),
            ("stack_layers", {"n_layer": 7}),
        ):
            _, model, _ = grow(model, name, value)
        torch.testing.assert_close(model.logits(idx), was, atol=1e-8, rtol=1e-8)


# ---------------------------------------------------------------------------------------------- which block is which


@pytest.mark.parametrize(
    "value, sources",
    [
        ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]),
        ([2, 0], [2, 0]),
        ({"n_layer": 6, "how": "cycle"}, [0, 1, 2, 0, 1, 2]),
        ({"n_layer": 6, "how": "copy", "where": "interleave"}, [0, 0, 1, 1, 2, 2]),
        ({"n_layer": 5, "how": "copy"}, [0, 1, 2, 2, 2]),
        ({"n_layer": 5, "how": "copy", "where": "bottom"}, [0, 0, 0, 1, 2]),
        ({"n_layer": 5, "how": "identity", "where": "interleave"}, [0, 1, None, 2, None]),
        ({"n_layer": 4, "how": "random", "where": "bottom"}, [None, 0, 1, 2]),
        ({"times": 2, "how": "identity_copy", "where": "interleave"}, [0, None, 1, None, 2, None]),
        ({"n_layer": 4, "how": "depth_up_scaling"}, [0, 1, 1, 2]),
        ({"times": 2, "how": "depth_up_scaling"}, [0, 1, 2, 0, 1, 2]),
        ({"times": 1.7, "how": "depth_up_scaling"}, [0, 1, 1, 2]),
        ({"times": 1.4, "how": "copy"}, [0, 1, 2, 2]),
        ({"times": 1.3333333}, [0, 1, 2, None]),
    ],
)
def test_which_block_comes_from_which(value, sources):
    operation = make("stack_layers", {"value": value})
    config = replace(OTHER, lora={"mlp.0": LoraSpec(2, 4.0), "attn.2": LoraSpec(1, 4.0)})
    assert [layer.source for layer in operation.layers(config)] == sources
    settings = replace(settings_of(config), frozen=("attn.0", "ln_f"))
    planned = operation.plan(settings)
    assert planned.model.n_layer == len(sources)
    assert [n for n in planned.frozen if n.startswith("attn")] == [f"attn.{n}" for n, s in enumerate(sources) if s == 0]
    assert "ln_f" in planned.frozen
    assert set(planned.model.lora) == {f"mlp.{n}" for n, s in enumerate(sources) if s == 0} | {
        f"attn.{n}" for n, s in enumerate(sources) if s == 2
    }
    model = shaken(config)
    _, grown, lineage = grow(model, "stack_layers", value)
    for n, source in enumerate(sources):
        for name, parameter in grown.transformer["h"][n].named_parameters():
            origin = lineage[f"transformer.h.{n}.{name}"]
            if source is None:
                assert origin.name is None
            else:
                assert origin.name == f"transformer.h.{source}.{name}"
                assert torch.equal(parameter, model.get_parameter(origin.name))
    pointers = [p.data_ptr() for p in grown.parameters()]
    assert len(set(pointers)) == len(pointers), "two blocks share a parameter"
    state = {n: {"exp_avg": p, "exp_avg_sq": p, "step": torch.tensor(1.0)} for n, p in model.named_parameters()}
    carried = carry(state, lineage, {n: p.shape for n, p in grown.named_parameters()}, AdamW.slots)
    for key in ("exp_avg", "step"):
        pointers = [moments[key].data_ptr() for moments in carried.values()]
        assert len(set(pointers)) == len(pointers), f"two parameters share {key}"


def test_depth_up_scaling_of_the_paper():
    """32 blocks to 48: without the last 8 of the first copy and the first 8 of the second (Kim et al. 2023)."""
    config = replace(GPT2, n_layer=32, n_hidden=None)
    for value in ({"times": 1.5, "how": "depth_up_scaling"}, {"n_layer": 48, "how": "depth_up_scaling"}):
        operation = make("stack_layers", {"value": value})
        assert [layer.source for layer in operation.layers(config)] == [*range(24), *range(8, 32)]
        assert not operation.keeps_function


@pytest.mark.parametrize("style", ["gpt2", "llama", "gpt2 with adapters", "llama with qk_norm"])
def test_identity_copies_read_as_their_source_and_write_nothing(style):
    """LLaMA Pro: all but the output projections is the block below, its adapters folded in."""
    model = shaken(STYLES[style])
    plain, _ = reshape_lora(model, replace(model.config, lora={}), torch.Generator())
    _, grown, lineage = grow(model, "stack_layers", {"times": 2, "how": "identity_copy", "where": "interleave"})
    assert grown.config.n_layer == 2 * model.config.n_layer
    for n in range(model.config.n_layer):
        source = dict(plain.transformer["h"][n].named_parameters())
        new = dict(grown.transformer["h"][2 * n + 1].named_parameters())
        assert new.keys() == source.keys(), "a copy has no adapters"
        for name, parameter in new.items():
            expected = torch.zeros_like(parameter) if ".c_proj." in name else source[name]
            torch.testing.assert_close(parameter, expected, atol=1e-12, rtol=0, msg=name)
            assert lineage[f"transformer.h.{2 * n + 1}.{name}"].name is None, "its moments start anew"
            assert parameter.data_ptr() not in {p.data_ptr() for p in model.parameters()}
    found = gradients(grown)
    assert all(found[f"transformer.h.1.{kind}.c_proj.weight"].abs().max() > 0 for kind in ("attn", "mlp"))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("stack_layers", {"times": 1.3}, "n_layer must be more than the 3 there are, got 3"),
        ("stack_layers", {"times": 1.0}, "n_layer must be more than the 3 there are, got 3"),
        ("stack_layers", {"times": 2, "how": "depth_up_scaling", "where": "bottom"}, "one stack on the other"),
        ("stack_layers", {"n_layer": 5, "how": "depth_up_scaling"}, "an even number of blocks, at most twice the 3"),
        ("stack_layers", {"n_layer": 8, "how": "depth_up_scaling"}, "an even number of blocks, at most twice the 3"),
        ("drop_layers", [0, 3], "blocks are 0 to 2 .-1 is the last., got 3"),
        ("drop_layers", [-4], "blocks are 0 to 2 .-1 is the last., got -4"),
        ("drop_layers", [-3, 1, -1], "would leave none of the 3 blocks"),
    ],
)
def test_impossible_depths(name, value, message):
    with pytest.raises(ScheduleError, match=message):
        make(name, {"value": value}).plan(settings_of(GPT2))


def test_layers_are_dropped_from_the_end_too():
    planned = make("drop_layers", {"value": [-2, 0]}).plan(settings_of(OTHER))
    assert planned.model.n_hidden == (16,)


def test_another_order_of_equal_blocks_is_a_change(data):
    run = live_run(data)
    first = run.model.transformer["h"][0].mlp.c_fc.weight.detach().clone()
    moments = run.optimizer.state_by_name()["transformer.h.0.mlp.c_fc.weight"]["exp_avg"].clone()
    apply(run, "stack_layers", [1, 0])
    assert torch.equal(run.model.transformer["h"][1].mlp.c_fc.weight, first)
    assert torch.equal(run.optimizer.state_by_name()["transformer.h.1.mlp.c_fc.weight"]["exp_avg"], moments)


def test_dropped_layers_close_up():
    operation = make("drop_layers", {"value": [1]})
    planned = operation.plan(replace(settings_of(OTHER), frozen=("mlp.1", "mlp.2")))
    assert planned.model.n_hidden == (20, 16) and planned.frozen == ("mlp.1",)
    assert not operation.keeps_function


# ---------------------------------------------------------------------------------------------- words and positions


def test_more_words_keep_the_old_logits():
    for style in ("gpt2 with adapters", "llama with adapters", "llama with qk_norm"):
        model = shaken(STYLES[style])
        idx = torch.arange(12)[None] % 19
        for init in ("mean", "zero", {"copy": 3}):
            _, grown, lineage = grow(model, "resize_vocabulary", {"size": 25, "init": init})
            with torch.no_grad():
                torch.testing.assert_close(grown.logits(idx)[..., :19], model.logits(idx), atol=1e-12, rtol=0)
            head = [n for n in lineage if n.startswith(("lm_head", "transformer.wte"))][0]
            rows, old = grown.get_parameter(head), model.get_parameter(head)
            expected = {"mean": old.mean(0), "zero": torch.zeros(len(old[0]))}.get(str(init), old[3])
            torch.testing.assert_close(rows[19:], expected.double().expand(6, -1), atol=1e-12, rtol=0)
        _, added, _ = grow(model, "resize_vocabulary", {"add": 6, "init": "mean"})
        _, sized, _ = grow(model, "resize_vocabulary", {"size": 25, "init": "mean"})
        assert added.config == sized.config and torch.equal(added.get_parameter(head), sized.get_parameter(head))
        _, noisy, _ = grow(model, "resize_vocabulary", {"size": 25, "noise": 0.5})
        rows = noisy.get_parameter(head)
        assert not torch.equal(rows[19], rows[20])


def test_fewer_words_by_a_map(data):
    run = live_run(data)
    ids = [i if i < 20 else 19 for i in range(30)]
    x, _ = run.stream.batch(run.progress.cursor, 2)
    old = run.model.get_parameter("transformer.wte.weight").detach().clone()
    apply(run, "resize_vocabulary", {"size": 20, "map": ids})
    new = run.model.get_parameter("transformer.wte.weight")
    assert torch.equal(new, old[:20])
    y, _ = run.stream.batch(run.progress.cursor, 2)
    assert (y == [[ids[i] for i in row] for row in x]).all()
    assert run.evaluate(lambda: 0) is not None
    run.step()


def test_a_shrunken_run_is_resumed_and_sampled_in_the_old_words(tiny, resume, capsys):
    import sample

    ids = [i if i < 20 else 19 for i in range(23)]
    code, out = tiny([{"name": "resize_vocabulary", "value": {"size": 20, "map": ids}, "at_iter": 3}], max_iters=6)
    assert code == 0 and resume(out, max_iters=8) == 0
    capsys.readouterr()
    assert sample.main([f"--out_dir={out}", "--start=To be", "--num_samples=1", "--max_new_tokens=20"]) == 0
    assert capsys.readouterr().out.startswith("To be")


@pytest.mark.parametrize(
    "value, message",
    [
        (19, "already"),
        (10, "needs `map`"),
        ({"size": 10, "map": [0] * 5}, "each of the 19"),
        ({"size": 2, "map": [0] * 19}, "every new id"),
        ({"size": 25, "map": [0] * 19}, "smaller"),
        ({"size": 25, "init": {"copy": 19}}, "below 19"),
        ({"size": 25, "add": 6}, "give either size or add, got both"),
        ({"init": "mean"}, "give either size or add, got neither"),
        ({"add": 1, "map": [0] * 19}, "smaller"),
    ],
)
def test_impossible_vocabularies(value, message):
    with pytest.raises(ScheduleError, match=message):
        make("resize_vocabulary", {"value": value}).plan(settings_of(GPT2))


def test_longer_contexts():
    idx = torch.arange(12)[None] % 19
    for config in (GPT2, LLAMA, STYLES["llama3"], STYLES["dynamic NTK"], STYLES["llama with qk_norm"]):
        model = shaken(config)
        _, grown, _ = grow(model, "extend_context", 24)
        with torch.no_grad():
            torch.testing.assert_close(grown.logits(idx), model.logits(idx), atol=1e-12, rtol=0)
            assert grown.logits(torch.arange(24)[None] % 19).shape == (1, 24, 19)
    _, grown, lineage = grow(shaken(GPT2), "extend_context", {"block_size": 24, "how": "interpolate"})
    old, new = shaken(GPT2).get_parameter("transformer.wpe.weight"), grown.get_parameter("transformer.wpe.weight")
    torch.testing.assert_close(new[0], old[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(new[-1], old[-1], atol=1e-6, rtol=0)
    assert new.shape == (24, 8) and not lineage["transformer.wpe.weight"].exact
    _, grown, _ = grow(shaken(LLAMA), "extend_context", {"block_size": 24, "how": "interpolate", "rotary_base": 5e4})
    assert grown.config.rotary_scale == 2.0 and grown.config.rotary_base == 5e4
    # Over a model with Llama 3's scaling, and over one that was interpolated already.
    model = shaken(replace(STYLES["llama3"], rotary_scale=1.5))
    _, grown, _ = grow(model, "extend_context", {"block_size": 30, "how": "interpolate"})
    assert grown.config == replace(model.config, block_size=30, rotary_scale=1.5 * 2.5)
    for table in ("rope_cos", "rope_sin"):  # position 5 i is where position 2 i was
        new, old = getattr(grown, table)[::5], getattr(model, table)[::2]
        torch.testing.assert_close(new, old.float(), atol=1e-6, rtol=0)
    planned = make("extend_context", {"value": 24}).plan(settings_of(GPT2))
    assert planned.sequence_length == 24
    planned = make("extend_context", {"value": 24}).plan(replace(settings_of(GPT2), sequence_length=6))
    assert planned.sequence_length == 6


def test_sequences_of_another_length_are_the_same_stream(data):
    run = live_run(data, steps=0)
    whole, _ = run.stream.batch(Cursor(16, 16), 8)
    pieces, targets = run.stream.batch(Cursor(16, 4), 32)
    assert (pieces.reshape(8, 16) == whole).all()
    assert (targets[:, :-1] == pieces[:, 1:]).all()
    run.step()
    apply(run, "set_sequence_length", 4)
    assert run.progress.cursor.sample == 8 * 4 and run.settings.tokens_per_iter == 8 * 4
    run.step()
    assert run.progress.tokens == 8 * 16 + 8 * 4 and run.progress.cursor.sample == 40
    apply(run, "set_sequence_length", 16)
    assert run.progress.cursor.sample == 10


# ---------------------------------------------------------------------------------------------- masked growth


@pytest.mark.parametrize(
    "style",
    ["gpt2", "llama", "gpt2 with adapters", "llama3", "qwen2", "llama with qk_norm", "llama with projections"],
)
@pytest.mark.parametrize(
    "name, value",
    [
        ("stack_layers", {"n_layer": 5, "how": "random"}),
        ("stack_layers", {"n_layer": 6, "how": "cycle"}),
        ("stack_layers", {"n_layer": 4, "how": "depth_up_scaling"}),
        ("stack_layers", [0, 0, 1, 1]),
        ("widen_mlp", {"width": 48, "how": "random"}),
        ("widen_mlp", 48),
        ("add_heads", {"n_head": 8, "how": "random"}),
        ("resize_vocabulary", {"size": 31, "noise": 1.0}),
    ],
    ids=lambda v: str(v),
)
def test_masked_growth_starts_from_the_old_function(style, name, value):
    if value == [0, 0, 1, 1] and STYLES[style].n_layer == 3:
        value = [0, 0, 1, 1, 2, 2]
    model = shaken(STYLES[style])
    idx = torch.arange(12)[None] % 19
    operation = make(name, {"value": value})
    settings = settings_of(model.config)
    target = operation.fade(settings, operation.plan(settings))
    grown, lineage = operation.reshape(model, target.model, torch.Generator().manual_seed(3), masked=True)
    grown.set_fading(target.fading)
    with torch.no_grad():
        was = model.logits(idx).log_softmax(-1)
        torch.testing.assert_close(grown.logits(idx).log_softmax(-1)[..., :19], was, atol=1e-8, rtol=0)
        grown.set_fading({layer: replace(fade, share=0.5) for layer, fade in target.fading.items()})
        moved = not torch.allclose(grown.logits(idx).log_softmax(-1)[..., :19], was, atol=1e-6)
        assert moved != (value == 48), "masked zeros stay zeros; everything else shows at half its strength"
        grown.set_fading({})
        plain = operation.reshape(model, operation.plan(settings).model, torch.Generator().manual_seed(3))[0]
        if name == "stack_layers" or isinstance(value, dict):
            torch.testing.assert_close(grown.logits(idx), plain.logits(idx), atol=1e-12, rtol=0)
        grown.set_fading(target.fading)
    old, new = gradients(model), gradients(grown)
    for n, origin in lineage.items():
        if origin.name in old and origin.exact and not origin.index:
            torch.testing.assert_close(new[n], old[origin.name], atol=1e-8, rtol=1e-4, msg=n)


def test_duplicates_cannot_be_masked():
    settings = settings_of(GPT2)
    for name, value in (
        ("widen_mlp", {"width": 64, "how": "duplicate"}),
        ("add_heads", {"n_head": 4, "how": "duplicate"}),
    ):
        operation = make(name, {"value": value})
        with pytest.raises(ScheduleError, match="cannot start masked"):
            operation.fade(settings, operation.plan(settings))


# ---------------------------------------------------------------------------------------------- moments of what is new


def test_what_is_new_starts_with_the_moments_of_its_kin():
    model = shaken(GPT2)
    state = {
        n: {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.full_like(p, 4.0), "step": torch.tensor(9.0)}
        for n, p in model.named_parameters()
    }
    for name, value in (("widen_mlp", {"width": 40, "how": "zero"}), ("stack_layers", {"n_layer": 4})):
        _, grown, lineage = grow(model, name, value)
        carried = carry(state, lineage, {n: p.shape for n, p in grown.named_parameters()}, AdamW.slots)
        assert set(carried) == set(lineage)
        for n, moments in carried.items():
            assert (moments["exp_avg_sq"] == 4.0).all() and moments["step"] == 9.0
            mask = known(lineage[n], torch.device("cpu"))
            if lineage[n].name is None:
                assert (moments["exp_avg"] == 0).all(), n
            elif mask is not None:
                assert (moments["exp_avg"][~mask.expand_as(moments["exp_avg"])] == 0).all(), n


def test_relora_keeps_the_function_and_starts_the_factors_anew(data):
    run = live_run(data)
    apply(run, "set_attn_lora_rank", 2)
    for _ in range(3):
        run.step()
    was, moments = logits(run), run.optimizer.state_by_name()
    apply(run, "relora", {"layers": "attn.0", "warmup_iters": 4})
    torch.testing.assert_close(logits(run), was, atol=1e-6, rtol=0)
    after = run.optimizer.state_by_name()
    factor = "transformer.h.{}.attn.c_attn.lora_{}.default.weight"
    assert factor.format(0, "A") not in after and factor.format(1, "A") in after
    assert (run.model.get_parameter(factor.format(0, "B")) == 0).all()
    assert torch.equal(after["transformer.wte.weight"]["exp_avg"], moments["transformer.wte.weight"]["exp_avg"])
    curve = run.current_lr() * 5
    run.step()
    assert run.current_lr() == pytest.approx(curve * 2 / 5, rel=0.05)


def test_frozen_flags_survive_growth(data):
    run = live_run(data)
    apply(run, "freeze_layer", ["mlp.0", "wte"])
    apply(run, "stack_layers", {"n_layer": 4, "where": "bottom"})
    apply(run, "widen_embd", 32)
    apply(run, "untie_head", None)
    assert set(run.settings.frozen) == {"wte", "mlp.2", "lm_head"}
    assert run.settings.frozen == tuple(n for n in layer_names(run.settings.model) if n in run.settings.frozen)
    frozen = {n: p.clone() for n, p in run.model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 6  # wte, lm_head, and two weights and biases of mlp.2
    run.step()
    assert all(torch.equal(run.model.get_parameter(n), p) for n, p in frozen.items())


def test_an_entry_that_fires_during_a_fade_tells_of_its_own_changes_only(tiny, capsys):
    schedule = [
        {"name": "set_lr", "value": 1e-3, "at_iter": 2, "over": 8},
        {"name": "widen_mlp", "value": {"times": 2, "how": "random"}, "max_wait_iters": 1, "over": 4},
        {"name": "set_batch_size", "value": 2, "max_wait_iters": 1},
        {"name": "set_lr", "value": 2e-3, "max_wait_iters": 1},
    ]
    code, out = tiny(schedule=schedule)
    assert code == 0
    widened, smaller, rate = events(out, "operation")[1:]
    assert list(widened["settings_before"]) == ["model.n_hidden"]
    assert (smaller["settings_before"], smaller["settings_after"]) == ({"batch_size": 4}, {"batch_size": 2})
    assert rate["settings_after"] == {"learning_rate": 2e-3}
    assert 1e-3 < rate["settings_before"]["learning_rate"] < 1e-2, "the rate in force on the way"
