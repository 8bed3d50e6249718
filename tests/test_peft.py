"""PEFT folders in and out: logits are PeftModel's, what has no form is refused by its name; adapters on projections."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import arguments, assert_same_tensors, events, tensors
from safetensors.torch import load_file, save_file
from test_data_and_model import both_refuse
from test_operations import apply, live_run

import train_orchestrated
from orchestrate.data.keeping import save
from orchestrate.data.tokenizer import CharTokenizer, HuggingFaceTokenizer
from orchestrate.model import hugging_face, peft_folder
from orchestrate.model.config import LoraSpec, ModelConfig, expand_adapters
from orchestrate.model.gpt import GPT, from_weights, init_weights, set_lora_dropout
from orchestrate.model.lora import reshape_lora, trainable_parameters
from orchestrate.training.plan import _graphs
from orchestrate.training.session import exporting
from orchestrate.training.session.sampling import open_foreign
from orchestrate.training.session.start import opened, settings_from
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint

IDS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(5))


def transformers_model(style: str, seed: int = 0):
    import transformers as t

    torch.manual_seed(seed)
    if style == "gpt2":
        config = t.GPT2Config(
            vocab_size=40, n_positions=16, n_layer=2, n_head=2, n_embd=16, bos_token_id=0, eos_token_id=0
        )
        model = t.GPT2LMHeadModel(config)
    else:
        shape = dict(
            vocab_size=40, max_position_embeddings=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, hidden_size=16, intermediate_size=24, tie_word_embeddings="tied" in style,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        name = {"qwen3": "Qwen3", "qwen2": "Qwen2", "mistral": "Mistral"}.get(style, "Llama")
        shape |= {"qwen3": {"head_dim": 6}, "mistral": {"head_dim": 6, "sliding_window": None}}.get(style, {})
        model = getattr(t, f"{name}ForCausalLM")(getattr(t, f"{name}Config")(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture
def base(request, tmp_path):
    """A small random model of a style as a folder."""
    folder = tmp_path / "base"
    transformers_model(request.param).save_pretrained(folder)
    return folder


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapter(base_folder, folder, **options):
    """A PEFT folder made by peft, nothing in it zero, and its logits."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(loaded(base_folder), LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * torch.randn(parameter.shape)
        logits = model(IDS).logits
    model.save_pretrained(folder)
    return logits


def peft_logits(base_folder, folder):
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(loaded(base_folder), folder).eval()(IDS).logits


def on(*styles):
    return pytest.mark.parametrize("base", styles, indirect=True)


# ---------------------------------------------------------------------------------------------- in

GPT2_OPTIONS = [
    dict(r=3, lora_alpha=5, target_modules=["c_attn"]),
    dict(r=2, target_modules=["c_attn", "c_proj", "c_fc"], rank_pattern={"mlp.c_proj": 4, "h.1.attn.c_attn": 1}),
    dict(r=2, target_modules="all-linear", use_rslora=True, alpha_pattern={"c_fc": 3.5}),
    dict(r=2, target_modules=r".*\.h\.1\.(attn|mlp)\.c_proj"),
    dict(r=2, target_modules=["wte", "lm_head", "c_fc"], ensure_weight_tying=True, lora_alpha=3),
    dict(r=2, target_modules=["c_attn"], init_lora_weights="pissa", lora_dropout=0.2),
]
LLAMA_OPTIONS = [
    dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
    dict(r=2, target_modules="all-linear", rank_pattern={"k_proj": 1, "layers.0.mlp.up_proj": 4}, use_rslora=True),
    dict(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    dict(r=2, target_modules=["o_proj", "k_proj"], exclude_modules=["model.layers.0.self_attn.k_proj"]),
    dict(r=2, target_modules=["gate_proj", "v_proj"], init_lora_weights="pissa", lora_alpha=3, use_rslora=True),
]
CASES = [
    *(("gpt2", options) for options in GPT2_OPTIONS),
    *(("llama", options) for options in LLAMA_OPTIONS),
    ("llama", dict(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    ("llama tied", dict(r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)),
    ("qwen3", LLAMA_OPTIONS[1]),
    *(("mistral", options) for options in LLAMA_OPTIONS),
    *(("qwen2", options) for options in LLAMA_OPTIONS),
]


@pytest.mark.parametrize("base, options", CASES, indirect=["base"], ids=str)
def test_a_folder_of_peft_in_and_out_again(base, options, tmp_path):
    """Logits are PeftModel's; and written again, on the same base, they still are."""
    logits = adapter(base, tmp_path / "adapter", **options)
    plain = loaded(base)(IDS).logits
    assert (logits - plain).abs().max() > 0.05, "the adapter does something"
    described = peft_folder.describe(str(tmp_path / "adapter"))
    model = peft_folder.load(str(tmp_path / "adapter")).eval()
    assert model.config == described.model and described.base == str(base)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(IDS), logits, atol=1e-5, rtol=0)
    assert peft_folder.write(model, tmp_path / "out", str(base), lora_dropout=0.25) == []
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), logits, atol=1e-5, rtol=0)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["lora_dropout"] == 0.25 and said["base_model_name_or_path"] == str(base)
    again = peft_folder.load(str(tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again.logits(IDS), logits, atol=1e-5, rtol=0)


@on("llama")
def test_a_run_goes_on_from_a_folder(base, data, tiny, tmp_path, resume):
    """--plan, training and a resume; the adapters alone train, so that the result fits the base again."""
    options = dict(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_rslora=True, lora_dropout=0.125)
    logits = adapter(base, tmp_path / "adapter", **options)
    given = {"init_from": tmp_path / "adapter", "block_size": 12, "max_iters": 6, "eval_interval": 3}
    assert train_orchestrated.main([*arguments(data, tmp_path / "p", **given, n_embd=16, n_head=4), "--plan"]) == 0
    code, out_dir = tiny(schedule=[{"name": "set_layer_lora_rank", "value": ["attn.*.q", 3], "at_iter": 2}], **given,
                         n_embd=16, n_head=4)  # fmt: skip
    assert code == 0
    settings = events(out_dir, "start")[0]["settings"]
    assert settings["lora_dropout"] == 0.125 and settings["use_rslora"] and settings["lora_alpha"] == 5
    assert settings["model"]["lora"]["mlp.1.down"] == {"rank": 2, "alpha": 5.0, "use_rslora": True}
    assert settings["frozen"] == [
        "wte", "ln_1.0", "ln_2.0", "ln_1.1", "ln_2.1", "ln_f", "lm_head"
    ]  # fmt: skip
    assert resume(out_dir, max_iters=8) == 0
    loaded_ = checkpoint.load(checkpoint.folder(out_dir) / "latest")
    model = from_weights(loaded_.state.settings.model, loaded_.model).eval()
    assert peft_folder.write(model, tmp_path / "out", str(base)) == []
    with torch.no_grad():
        ours = model.logits(IDS)
    assert (ours - logits).abs().max() > 1e-3, "it has learnt"
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), ours, atol=1e-5, rtol=0)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["r"], said["use_rslora"], said["target_modules"]) == (3, True, ["down_proj", "q_proj"])
    assert sorted(said["rank_pattern"].values()) == [2, 2]


@on("gpt2")
def test_keys_that_contradict_a_folder_are_refused(base, data, tmp_path):
    adapter(base, tmp_path / "adapter", r=2, lora_alpha=5, target_modules=["c_attn"])
    common = {"init_from": tmp_path / "adapter", "n_embd": 16, "n_head": 2, "block_size": 12}
    for keys, said in (
        ({"lora_alpha": 4.0}, "lora_alpha: got 4.0, but the weights of .* have lora_alpha 5.0"),
        ({"attn_lora_rank": 3}, "attn_lora_rank: got 3"),
        ({"lora_targets": "c_attn", "lora_rank": 2}, "lora_targets: got 'c_attn'"),
        ({"use_rslora": True}, "use_rslora: got True"),
        ({"n_layer": 3}, "n_layer: got 3"),
        (
            {"base_model": tmp_path / "none"},
            "its base model .*none: there is no such folder; base_model says where it is",
        ),
        ({"init_from": base, "base_model": base}, "is no PEFT folder and has no base"),
    ):
        both_refuse(arguments(data, tmp_path / "run", **{**common, "n_layer": 2, **keys}), said)


@on("gpt2")
def test_an_adapter_without_a_tokenizer_has_its_base_s(base, data, tmp_path):
    adapter(base, tmp_path / "adapter", r=2, target_modules=["c_attn"])
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    given = arguments(data, tmp_path / "run", init_from=tmp_path / "adapter", n_embd=16, n_head=2, block_size=12)
    both_refuse(given, "written in tokens of .*char.*and .*adapter speaks gpt2")


@on("llama")
def test_it_speaks_for_its_base(base, tmp_path):
    """What samples and exports takes the adapter with its base's weights and tokenizer."""
    logits = adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    spoken = CharTokenizer("abcdefgh")
    save(spoken, base)
    model, tokenizer = open_foreign(str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval().logits(IDS), logits, atol=1e-5, rtol=0)
    assert tokenizer.fingerprint == spoken.fingerprint
    exporting.export(exporting.open_source(str(tmp_path / "adapter")), "hf", str(tmp_path / "hf"))
    assert HuggingFaceTokenizer(tmp_path / "hf").fingerprint == spoken.fingerprint
    with pytest.raises(Refused, match="--checkpoint 'best': .*adapter is no run folder"):
        exporting.open_source(str(tmp_path / "adapter"), "best")


def test_on_a_release_the_base_is_its_name_on_the_hub(tmp_path):
    options = {"peft_type": "LORA", "r": 1, "target_modules": ["h.0.attn.c_proj"], "base_model_name_or_path": "gpt2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    name = "base_model.model.transformer.h.0.attn.c_proj.lora_"
    factors = {f"{name}A.weight": torch.zeros(1, 768), f"{name}B.weight": torch.zeros(768, 1)}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    source = exporting.Source(str(tmp_path), GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=8)))
    assert exporting._base(source) == "openai-community/gpt2"


@on("llama")
def test_tensors_that_peft_does_not_write_are_refused(base, tmp_path):
    adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(file)
    for changed, said in (
        ({name.removeprefix("base_model.model."): value for name, value in factors.items()}, "no module here takes"),
        ({name: value.to(torch.int64) for name, value in factors.items()}, "holds numbers of type I64"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=f"init_from .*adapter: .*{said}"):
            peft_folder.load(str(tmp_path / "adapter"))


def rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@on("llama")
@pytest.mark.parametrize(
    "changes, said",
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'; only LORA can be held"),
        ({"use_dora": True}, r"use_dora True \(DoRA scales the columns"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] \(trained copies"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"from_the_future": 3}, "from_the_future 3"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"target_modules": ["q_proj"]}, "no module here takes model.layers.0.self_attn.v_proj.lora_A.weight"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "missing model.layers.0.self_attn.o_proj"),
        ({"target_modules": ["nothing"]}, "target_modules .* names no module of the base"),
        ({"target_modules": "(("}, "adapter_config.json: "),
        ({"rank_pattern": {"v_proj": 3}}, r"v_proj.lora_A.weight has shape \(2, 16\), expected \(3, 16\)"),
        ({"r": 0}, "not what peft writes: r 0"),
        ({"lora_alpha": "8"}, "not what peft writes: lora_alpha '8'"),
        ({"lora_dropout": 1.0}, "not what peft writes: lora_dropout 1.0"),
        ({"base_model_name_or_path": None}, "does not name a base model: give its folder as base_model"),
        ({"base_model_name_or_path": "meta/x"}, "its base model meta/x is no folder here"),
    ],
    ids=str,
)
def test_what_cannot_be_held_is_refused_by_name(base, tmp_path, changes, said):
    adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj", "v_proj"])
    rewrite(tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=said) as refused:
        peft_folder.describe(str(tmp_path / "adapter"))
    assert str(tmp_path / "adapter") in str(refused.value)


@on("llama")
@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\udc80"], ids=["torn", "deep", "no text"])
def test_a_configuration_that_cannot_be_read_is_named(base, tmp_path, text):
    adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="adapter_config.json cannot be read"):
        peft_folder.describe(str(tmp_path / "adapter"))


@on("llama tied")
def test_tied_matrices_and_their_copies(base, tmp_path):
    folder = tmp_path / "adapter"
    adapter(base, folder, r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    held = load_file(folder / "adapter_model.safetensors")
    for name, said in (("lm_head.lora_A.weight", "is not that of the embedding"),
                       ("lm_head.base_layer.weight", "is not as in the base")):  # fmt: skip
        changed = {**held, f"base_model.model.{name}": held[f"base_model.model.{name}"] + 1}
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=said):
            peft_folder.load(str(folder))
    adapter(base, folder, r=2, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="model.embed_tokens and lm_head are one matrix"):
        peft_folder.describe(str(folder))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin is pickled and not read"):
        peft_folder.describe(str(folder))


# ---------------------------------------------------------------------------------------------- out


def adapted(folder, lora, seed=3) -> GPT:
    """The base with adapters of ours that have learnt something."""
    plain = hugging_face.load(str(folder))
    model, _ = reshape_lora(plain, replace(plain.config, lora=lora), torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


WHOLE = {"attn.0": LoraSpec(3, 4.0), "mlp.1": LoraSpec(2, 8.0, use_rslora=True), "attn.1": LoraSpec(1, 1.0)}
PARTS = {
    "attn.0.q": LoraSpec(3, 4.0), "attn.0.v": LoraSpec(1, 8.0, use_rslora=True), "attn.1.k": LoraSpec(2, 3.0),
    "attn.1.qkv": LoraSpec(2, 3.0), "mlp.0.up": LoraSpec(2, 2.0, True), "mlp.1.down": LoraSpec(2, 2.0, True),
    "wte": LoraSpec(2, 3.0),
}  # fmt: skip


@on("gpt2", "llama", "llama tied", "qwen3", "mistral", "qwen2")
@pytest.mark.parametrize("lora", [WHOLE, PARTS, {"attn.1.v": LoraSpec(2, 4.0)}], ids=["whole", "parts", "one"])
def test_adapters_of_ours_out(base, lora, tmp_path):
    lora = {name: spec for name, spec in lora.items() if name != "attn.1.k"}
    model = adapted(base, lora)
    with torch.no_grad():
        ours = model.logits(IDS)
    assert peft_folder.write(model, tmp_path / "out", str(base)) == []
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), ours, atol=1e-5, rtol=0)
    with torch.no_grad():
        again = peft_folder.load(str(tmp_path / "out"))
        torch.testing.assert_close(again.eval().logits(IDS), ours, atol=1e-5, rtol=0)


@on("llama")
def test_a_joint_adapter_shares_a(base, tmp_path):
    peft_folder.write(adapted(base, WHOLE), tmp_path / "out", str(base))
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"
    assert torch.equal(held[name.format("q", "A")], held[name.format("v", "A")])
    assert [tuple(held[name.format(part, "B")].shape) for part in "qkv"] == [(16, 3), (8, 3), (8, 3)]


@on("gpt2", "llama")
def test_what_was_folded_into_the_base_comes_along(base, tmp_path):
    """PiSSA's rest, a rank that shrank, and an adapter merged under another: the adapter fits the ORIGINAL base."""
    pissa = LoraSpec(2, 4.0, init_lora_weights="pissa")
    model = adapted(base, {"attn.0.q": pissa, "mlp.0": LoraSpec(3, 4.0), "mlp.1.up": LoraSpec(2, 2.0)})
    for lora in (
        {"attn.0.q": pissa, "mlp.0": LoraSpec(1, 4.0)},
        {"mlp.0": LoraSpec(1, 4.0), "mlp.1": LoraSpec(1, 1.0)},
    ):
        model, _ = reshape_lora(model, replace(model.config, lora=lora), torch.Generator().manual_seed(0))
        model.eval()
        with torch.no_grad():
            ours = model.logits(IDS)
        assert peft_folder.write(model, tmp_path / "out", str(base)) == []
        torch.testing.assert_close(peft_logits(base, tmp_path / "out"), ours, atol=1e-5, rtol=0)


@on("gpt2")
def test_what_has_no_form_as_adapters_is_refused(base, tmp_path):
    both = "transformer.h.0.mlp.c_fc.weight, transformer.h.1.ln_1.weight; export it with --to hf"
    model = adapted(base, {**WHOLE, "mlp.0": LoraSpec(1, 1.0)})
    with torch.no_grad():
        model.get_parameter("transformer.h.1.ln_1.weight")[3] += 1e-3
        model.get_parameter("transformer.h.0.mlp.c_fc.base_layer.weight").add_(0.01 * torch.randn(64, 16))
    with pytest.raises(ValueError, match=both):
        peft_folder.write(model, tmp_path / "out", str(base))
    model = adapted(base, WHOLE)
    assert "were not compared with me/mine" in peft_folder.write(model, tmp_path / "out", "me/mine")[0]
    with pytest.raises(ValueError, match="there is no adapter"):
        peft_folder.write(hugging_face.load(str(base)), tmp_path / "out", str(base))
    with pytest.raises(ValueError, match="mlp.0 started by PiSSA.*only with the base's folder"):
        model = adapted(base, {"mlp.0": LoraSpec(1, 1.0, init_lora_weights="pissa")})
        peft_folder.write(model, tmp_path / "out", "me/mine")
    transformers_model("llama").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not of the base's shape.*n_head 2 .there 4.*--to hf"):
        peft_folder.write(adapted(base, WHOLE), tmp_path / "out", str(tmp_path / "other"))


# ---------------------------------------------------------------------------------------------- single projections

SHAPE = ModelConfig(block_size=8, vocab_size=11, n_layer=12, n_head=4, n_kv_head=2, n_embd=16, activation="swiglu")


def test_names_of_projections():
    def names(*asked):
        return expand_adapters(SHAPE, list(asked))

    assert names("attn.3.q") == ["attn.3.q"] and names("attn.-1.o") == ["attn.11.o"]
    assert names("attn.*") == [f"attn.{n}" for n in range(12)], "a glob of layers means layers"
    assert names("attn.*.q") == [f"attn.{n}.q" for n in range(12)]
    assert names("attn.1.*", "wte") == ["wte", "attn.1.q", "attn.1.k", "attn.1.v", "attn.1.o"]
    assert names("attn.1.qkv") == ["attn.1.qkv"]
    assert names("q_proj", "down_proj")[:3] == ["attn.0.q", "mlp.0.down", "attn.1.q"]
    assert len(names("all-linear")) == 12 * 7
    assert len(expand_adapters(replace(SHAPE, activation="gelu", n_hidden=64), "all-linear")) == 12 * 6
    for wrong, said in (("attn.12.q", "no projection is called 'attn.12.q'"), ("ln_1.0.q", "no projection"),
                        ("attn.0.x", "there are attn.0.q, attn.0.k"), ("k_prog", "no layer is called")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            names(wrong)
    with pytest.raises(ValueError, match="no projection"):
        expand_adapters(replace(SHAPE, activation="gelu", n_hidden=64), "mlp.0.gate")


@pytest.mark.parametrize(
    "lora, said",
    [
        ({"attn.3": 2, "attn.3.q": 2}, "attn.3 and attn.3.q cannot both carry an adapter"),
        ({"mlp.1.up": 2, "mlp.1": 2}, "mlp.1 and mlp.1.up cannot both"),
        ({"attn.3.qkv": 2, "attn.3.v": 2}, "attn.3.qkv and attn.3.v cannot both"),
        ({"attn.0.k": 9}, "LoRA rank of attn.0.k must be from 1 to 8"),
        ({"attn.0.qkv": 17}, "LoRA rank of attn.0.qkv must be from 1 to 16"),
        ({"ln_1.0.q": 1}, "cannot carry a LoRA adapter"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be(lora, said):
    with pytest.raises(ValueError, match=said):
        replace(SHAPE, lora={name: LoraSpec(rank, 1.0) for name, rank in lora.items()})


def test_only_the_adapters_of_such_a_layer_train():
    lora = {"attn.0.q": LoraSpec(2, 4.0), "mlp.1": LoraSpec(2, 4.0), "attn.1.o": LoraSpec(2, 1.0)}
    model = GPT(replace(SHAPE, n_layer=2, n_hidden=24, bias=True, qk_norm=True, lora=lora))
    trains = trainable_parameters(model, ["wte", "wpe", "ln_f", "mlp.0", "ln_1.0", "ln_2.0", "ln_1.1", "ln_2.1"])
    h = "transformer.h."
    assert trains == {
        *(f"{h}0.attn.c_attn.lora_{f}.q.weight" for f in "AB"),
        *(f"{h}1.attn.c_proj.lora_{f}.default.weight" for f in "AB"),
        *(f"{h}1.mlp.{m}.lora_{f}.default.weight" for m in ("c_fc", "c_gate", "c_proj") for f in "AB"),
    }
    whole = GPT(replace(SHAPE, n_layer=1, n_hidden=24, qk_norm=True, lora={"attn.0": LoraSpec(1, 1.0)}))
    assert f"{h}0.attn.q_norm.weight" in trainable_parameters(whole, []), "as it was under a whole layer's adapter"


def test_parts_are_rows_of_the_fused_matrix():
    """By hand: q, k, v of 16, 8 and 8 rows; each adapter adds scaling * B A to its own."""
    lora = {"attn.0.k": LoraSpec(2, 3.0), "attn.0.v": LoraSpec(4, 6.0, use_rslora=True)}
    config = replace(SHAPE, n_layer=1, n_hidden=24, bias=True, lora=lora)
    model = GPT(config)
    init_weights(model, 0)
    layer = model.transformer["h"][0].attn.c_attn
    torch.manual_seed(0)
    with torch.no_grad():
        for part in "kv":
            layer.lora_B[part].weight.normal_()
    x = torch.randn(2, 3, 16)
    weight = layer.base_layer.weight.detach().clone()
    weight[16:24] += 1.5 * (layer.lora_B["k"].weight @ layer.lora_A["k"].weight).detach()
    weight[24:32] += 3.0 * (layer.lora_B["v"].weight @ layer.lora_A["v"].weight).detach()
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, layer.base_layer.bias))


STEPS = [
    {"attn.0.q": LoraSpec(2, 4.0), "attn.0.v": LoraSpec(2, 4.0), "mlp.1.gate": LoraSpec(2, 3.0)},
    {"attn.0.q": LoraSpec(4, 4.0, use_rslora=True), "attn.0.v": LoraSpec(1, 4.0), "attn.0.k": LoraSpec(2, 1.0)},
    {"attn.0.k": LoraSpec(2, 1.0), "attn.0.o": LoraSpec(3, 2.0), "wte": LoraSpec(2, 2.0, init_lora_weights="pissa")},
    {"attn.0": LoraSpec(3, 2.0, init_lora_weights="pissa"), "wte": LoraSpec(3, 2.0, init_lora_weights="pissa")},
    {"attn.0.qkv": LoraSpec(3, 2.0), "attn.1.v": LoraSpec(2, 2.0, init_lora_weights="pissa")},
    {},
]


def test_every_change_keeps_the_function_and_other_factors():
    config = replace(SHAPE, n_layer=2, n_hidden=24, bias=True)
    model = GPT(config).eval()
    init_weights(model, 0)
    x, plain = torch.arange(8)[None], [name for name, _ in model.named_parameters()]
    torch.manual_seed(0)
    for lora in STEPS:
        new, lineage = reshape_lora(model, replace(config, lora=lora), torch.Generator().manual_seed(0))
        new.eval()
        torch.testing.assert_close(new.logits(x), model.logits(x), atol=2e-5, rtol=1e-5)
        assert list(lineage) == [name for name, _ in new.named_parameters()]
        for name in set(lora) & set(model.config.lora):
            if lora[name] == model.config.lora[name] and name == "attn.0.k":
                factor = "transformer.h.0.attn.c_attn.lora_A.k.weight"
                assert new.get_parameter(factor) is model.get_parameter(factor) and lineage[factor].name == factor
        with torch.no_grad():
            for name, parameter in new.named_parameters():
                if "lora_" in name:
                    parameter += 0.1 * torch.randn(parameter.shape)
        model = new
    assert [name for name, _ in model.named_parameters()] == plain


def test_pissa_takes_the_principal_part_out_of_the_weight():
    spec = LoraSpec(3, 6.0, init_lora_weights="pissa")
    config = replace(SHAPE, n_layer=1, n_hidden=24)
    plain, model = GPT(config), GPT(replace(config, lora={"attn.0.o": spec}))
    init_weights(plain, 0)
    init_weights(model, 0)
    was = plain.transformer["h"][0].attn.c_proj.weight.detach()
    layer = model.transformer["h"][0].attn.c_proj
    u, s, vh = torch.linalg.svd(was)
    product = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach() * 2.0
    torch.testing.assert_close(product, u[:, :3] @ torch.diag(s[:3]) @ vh[:3], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(layer.base_layer.weight, was - product, atol=1e-6, rtol=1e-4)
    norms = [factor["default"].weight.norm() for factor in (layer.lora_A, layer.lora_B)]
    torch.testing.assert_close(*norms, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- dropout, memory, runs


@pytest.mark.parametrize("name", ["attn.0.q", "attn.0.qkv"])
def test_dropout_is_of_what_the_adapter_reads(name):
    config = replace(SHAPE, n_layer=1, n_hidden=24, lora={name: LoraSpec(2, 4.0)})
    model = GPT(config)
    init_weights(model, 0)
    layer, part = model.transformer["h"][0].attn.c_attn, name.split(".")[-1].replace("qkv", "default")
    with torch.no_grad():
        layer.lora_B[part].weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    rows = slice(0, 16) if part == "q" else slice(0, 32)
    base, full = layer.base_layer(x), layer(x)
    set_lora_dropout(model, 0.5)
    assert model.dropout == 0.0 and not model.transformer["drop"].active
    torch.manual_seed(7)
    dropped = layer(x)
    torch.manual_seed(7)
    kept = (torch.rand(2, 8, 16) < 0.5) * x / 0.5
    by_hand = 2.0 * kept @ layer.lora_A[part].weight.T @ layer.lora_B[part].weight.T
    torch.testing.assert_close(dropped[..., rows], base[..., rows] + by_hand)
    assert not torch.allclose(dropped, full)
    torch.testing.assert_close(layer.eval()(x), full)


def test_frozen_base_weights_take_no_memory(data):
    """No slots and no gradients but those of the adapters, with accumulation over micro-steps."""
    run = live_run(data, model={"lora": {"attn.0.q": LoraSpec(2, 4.0), "mlp.1": LoraSpec(2, 4.0)}},
                   lora_targets="attn.0.q,mlp.1", lora_rank=2, gradient_accumulation_steps=4)  # fmt: skip
    run.optimizer.zero_grad = lambda: None  # the gradients of a step stay to be looked at
    run.step()
    for name, parameter in run.model.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad == (parameter.grad is not None), name
    state = run.optimizer.state_by_name()
    assert state and all("lora_" in name for name in state)
    held = sum(slot.numel() for slots in state.values() for name, slot in slots.items() if name != "step")
    assert held == 2 * sum(p.numel() for n, p in run.model.named_parameters() if "lora_" in n)


def test_targets_on_the_command_line(data, tiny, tmp_path):
    keys = {"lora_targets": "q_proj, v_proj,mlp.1", "lora_rank": 3, "init_lora_weights": "pissa", "use_rslora": True}
    code, out_dir = tiny(**keys, max_iters=2)
    assert code == 0
    settings = events(out_dir, "start")[0]["settings"]
    assert list(settings["model"]["lora"]) == ["attn.0.q", "attn.0.v", "attn.1.q", "attn.1.v", "mlp.1"]
    spec = {"rank": 3, "alpha": 8.0, "use_rslora": True, "init_lora_weights": "pissa"}
    assert settings["model"]["lora"]["mlp.1"] == spec
    assert settings["frozen"] == ["wte", "wpe", "ln_1.0", "ln_2.0", "mlp.0", "ln_1.1", "ln_2.1", "ln_f"]
    for wrong, said in (
        ({"lora_targets": "q_proj"}, "lora_targets and lora_rank go together"),
        ({"lora_rank": 2}, "lora_targets and lora_rank go together"),
        ({"lora_targets": "mlp.*", "lora_rank": 2, "mlp_lora_rank": 2}, "mlp.0 has a rank from another key"),
        ({"lora_targets": "mlp.0.up", "lora_rank": 2, "mlp_lora_rank": 2}, "mlp.0 and mlp.0.up cannot both"),
        ({"lora_targets": "gate_proj", "lora_rank": 2}, "lora_targets: no projection is called 'gate_proj'"),
        ({"lora_targets": "attn.*", "lora_rank": 2, "lora_dropout": 1.0}, "lora_dropout must be less than 1"),
    ):
        with pytest.raises(Exception, match=said):
            train_orchestrated.main([*arguments(data, tmp_path / "no", **wrong), "--plan"])


PROJECTIONS = [
    {"name": "set_layer_lora_rank", "value": [["attn.*.q", "attn.0.v", "mlp.1.up"], 2], "at_iter": 1},
    {"name": "set_lora_dropout", "value": 0.5, "max_wait_iters": 1, "over": 3},
    {"name": "widen_embd", "value": 32, "max_wait_iters": 2},
    {"name": "set_layer_lora_rank", "value": ["attn.0.q", 3], "max_wait_iters": 1},
    {"name": "relora", "value": {"layers": "attn.0", "warmup_iters": 2}, "max_wait_iters": 1},
    {"name": "stack_layers", "value": [0, 0, 1], "max_wait_iters": 1},
    {"name": "set_lora_alpha", "value": 3.0, "max_wait_iters": 1},
    {"name": "merge_lora_weights", "value": "attn.*.q", "max_wait_iters": 1},
]


def test_a_resumed_run_is_the_same_run(tiny, resume):
    """Bitwise, stopped under projections, dropout and PiSSA, at the end of a ramp and after a growth."""
    keys = {"max_iters": 12, "init_lora_weights": "pissa"}
    code, whole = tiny(PROJECTIONS, out="whole", **keys)
    assert code == 0
    for stop in (4, 7):
        code, parts = tiny(PROJECTIONS, out=f"parts{stop}", **{**keys, "max_iters": stop})
        assert code == 0 and resume(parts, max_iters=12) == 0
        assert_same_tensors(tensors(parts), tensors(whole))
    state = checkpoint.load(checkpoint.folder(whole) / "latest").state.settings
    assert list(state.model.lora) == ["attn.0.v", "attn.1.v", "mlp.2.up"] and state.lora_dropout == 0.5


def test_both_at_once_is_refused_in_a_schedule(data):
    run = live_run(data, steps=1)
    apply(run, "set_attn_lora_rank", 2)
    with pytest.raises(Exception, match="attn.1 and attn.1.q cannot both carry an adapter"):
        apply(run, "set_layer_lora_rank", ["attn.1.q", 2])
    apply(run, "merge_lora_weights", "attn.1")
    apply(run, "set_layer_lora_rank", [["attn.1.q", "attn.1.o"], 2])
    assert list(run.settings.model.lora) == ["attn.0", "attn.1.q", "attn.1.o"]
    apply(run, "set_attn_lora_rank", 0)
    assert not run.settings.model.lora, "rank 0 of a layer is that of its projections too"


@on("gpt2")
def test_dropout_of_a_folder_can_be_another(base, tmp_path):
    """It is a number of the training, as dropout is, and no property of the weights."""
    adapter(base, tmp_path / "adapter", r=2, target_modules=["c_attn"], lora_dropout=0.25)
    given = {"init_from": str(tmp_path / "adapter")}
    assert opened(TrainConfig(**given))[0].lora_dropout == 0.25
    assert opened(TrainConfig(**given, lora_dropout=0.5))[0].lora_dropout == 0.5
    there = opened(TrainConfig(**given, base_model=str(base)))[1]
    assert there is not None and list(there.model.lora) == ["attn.0.qkv", "attn.1.qkv"]


def test_the_plan_counts_graphs_by_projections_and_dropout():
    config = replace(SHAPE, n_layer=3, n_hidden=24)

    def graphs(*names, **more):
        model = replace(config, lora={name: LoraSpec(2, 4.0) for name in names})
        return _graphs(settings_from(TrainConfig(**more), model))

    plain = graphs()
    assert len(plain) == 3, "one for all blocks, one before them and one after"
    assert len(graphs("attn.0.q")) == 4 and len(graphs("attn.0.q", "attn.2.q")) == 4
    assert len(graphs("attn.0.q", "attn.2.k")) == 5 and len(graphs("attn.0.q", "attn.2")) == 5
    assert graphs(lora_dropout=0.5) == plain
    assert len(graphs("attn.0.q", lora_dropout=0.5) - graphs("attn.0.q")) == 1
