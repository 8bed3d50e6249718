"""A model in the shape that another program has, and the files that it reads: Hugging Face's folders, ckpt.pt.

The shape is reached by steps that keep the function exactly (to float rounding), and every step is said. What no step
reaches is refused as `NoForm`, with the options that stand in the way. Nothing here knows a run, a tokenizer, or what
was at the target before; weights are views of the model's until the file that holds them is written.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from orchestrate.model.config import OPTIONS, ModelConfig
from orchestrate.model.families import FAMILIES, Family
from orchestrate.model.gpt import GPT, from_weights
from orchestrate.model.growth import spell_out, widen_embd
from orchestrate.model.lora import reshape_lora
from orchestrate.model.nanogpt import NANOGPT

SHARD_BYTES = 5 * 10**9
"""A file of weights holds at most so many, unless one tensor alone is larger."""


class NoForm(ValueError):
    """A shape that a format cannot hold; `options` are the fields of ModelConfig that stand in the way."""

    def __init__(self, message: str, options: Iterable[str]) -> None:
        self.options = frozenset(options)
        super().__init__(message)


@dataclass(frozen=True)
class Form:
    """A model whose shape a family has, and how it came to that shape."""

    model: GPT
    family: Family
    steps: tuple[str, ...]
    """What was done to the weights, for a person; () where they are as they were."""

    def weights(self) -> dict[str, Tensor]:
        """The family's names and tensors, views of the model's weights where they can be."""
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return self.family.to_hf(self.model.config, weights)


# ---------------------------------------------------------------------------------------------- shapes


def _equal_widths(c: ModelConfig) -> ModelConfig:
    return replace(c, n_hidden=max(c.n_hidden))


def _fourfold_widths(c: ModelConfig) -> ModelConfig:
    return replace(c, n_hidden=max(4 * c.n_embd, *c.n_hidden))


def _own_keys(c: ModelConfig) -> ModelConfig:
    return replace(c, n_kv_head=c.n_head)


def _even_heads(c: ModelConfig) -> ModelConfig:
    """With heads of zeros until their number divides the width, which transformers ask of some families."""
    group = c.n_head // c.n_kv_head
    count = next((n for n in range(c.n_kv_head, c.n_embd + 1) if c.n_embd % (n * group) == 0), c.n_kv_head)
    return replace(c, n_head=count * group, n_kv_head=count)


def _wide_stream(c: ModelConfig) -> ModelConfig:
    """The stream so many times side by side that all heads together are as wide, and heads to fill it."""
    times = -(-c.n_head * c.head_size // c.n_embd)
    heads, rest = divmod(times * c.n_embd, c.head_size)
    return c if rest or times == 1 or c.n_kv_head != c.n_head else replace(
        c, n_embd=times * c.n_embd, n_head=heads, n_kv_head=heads
    )  # fmt: skip


_STEPS: tuple[tuple[Callable[[ModelConfig], ModelConfig], str], ...] = (
    (_equal_widths, "MLPs are filled up with zero units to the width of the widest"),
    (_fourfold_widths, "MLPs are filled up with zero units to 4 * n_embd"),
    (_own_keys, "keys and values that query heads share are repeated for each of them"),
    (_even_heads, "heads of zeros are added until their number divides the width"),
    (_wide_stream, "the residual stream stands several times side by side, as wide as all heads together"),
)
"""Each keeps the function. Those that are needed are taken in this order, and as few as possible."""


def _fit(config: ModelConfig, families: Iterable[Family]) -> tuple[Family, list[tuple[ModelConfig, str]]]:
    """The first family with the fewest steps (the shape after each, and what it is). Raises NoForm.

    Args:
        config: without adapters.
    """
    families = list(families)
    for count in range(len(_STEPS) + 1):
        for chosen in itertools.combinations(_STEPS, count):
            shape, path = config, []
            for step, said in chosen:
                if (after := step(shape)) != shape:
                    path.append((after, said))
                shape = after
            for family in families:
                if not problems(family, shape):
                    return family, path
    shape = _equal_widths(config)  # which every format can be given
    reasons = sorted(((problems(family, shape), family.title) for family in families), key=lambda pair: len(pair[0]))
    nearest = "; ".join(f"{title} cannot hold {', '.join(lacking)}" for lacking, title in reasons[:2])
    raise NoForm(nearest, {word for lacking in reasons[0][0] for word in lacking.split() if word in OPTIONS})


def problems(family: Family, config: ModelConfig) -> list[str]:
    """Why a family cannot hold a model of this shape, transformers' own limits included; [] if it can."""
    if lacking := family.lacks(config):
        return lacking
    if family.name in FAMILIES:
        try:
            configuration(family, config)
        except Exception as error:  # transformers raise their own of many kinds
            return [f"n_head {config.n_head} ({next(iter(str(error).splitlines()), '')})"]
    return []


def configuration(family: Family, config: ModelConfig, **more: Any) -> Any:
    """transformers' configuration of a model that the family can hold."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # Without a word from us, transformers take ids of a family's best-known model, which mean something else here.
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    keys = {**special, **family.config_to_hf(config), **more}
    keys["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.name]]
    return CONFIG_MAPPING[keys.pop("model_type")](**keys)


def form_of(model: GPT, families: Iterable[Family] = tuple(FAMILIES.values())) -> Form:
    """The model as the nearest of these families has it. Raises NoForm. The model is left as it is."""
    steps = []
    family, path = _fit(replace(model.config, lora={}), families)
    if model.config.lora:
        fading = model.fading
        model, _ = reshape_lora(model, replace(model.config, lora={}), torch.Generator())
        model.fading = fading
        steps.append("adapters are merged into their layers")
    if model.fading:
        model = _faded(model)
        steps.append("what was fading in is scaled by how far it had come")
    for shape, said in path:
        wider = shape.n_embd != model.config.n_embd
        model = widen_embd(model, shape, 0.0, torch.Generator())[0] if wider else spell_out(model, shape)
        steps.append(said)
    return Form(model, family, tuple(steps))


def nanogpt_form_of(model: GPT) -> Form:
    """The model as nanoGPT has it. Raises NoForm."""
    return form_of(model, [NANOGPT])


@torch.no_grad()
def _faded(model: GPT) -> GPT:
    """Masks of what fades in, multiplied into the matrices behind them. Raises NoForm for words, which have none."""
    weights = dict(model.named_parameters())
    for layer, fade in model.fading.items():
        kind, _, n = layer.partition(".")
        if not n:
            raise NoForm("new words are fading in, and no format has a share of a word", ["vocab_size"])
        path = f"transformer.h.{n}.{kind}.c_proj"
        columns = torch.ones(weights[f"{path}.weight"].shape[1])
        columns[fade.known * (model.config.head_size if kind == "attn" else 1) :] = fade.share
        weights[f"{path}.weight"] = weights[f"{path}.weight"] * columns
        if fade.known == 0 and f"{path}.bias" in weights:
            weights[f"{path}.bias"] = weights[f"{path}.bias"] * fade.share
    return from_weights(model.config, {name: value.detach() for name, value in weights.items()})


# ---------------------------------------------------------------------------------------------- files


def write_hugging_face(
    form: Form,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    special: Mapping[str, int | None] | None = None,
) -> list[str]:
    """config.json, generation_config.json and the weights, file by file; returns the names.

    Raises OSError, and ValueError for numbers that the type cannot hold.

    Args:
        folder: exists and is empty.
        special: ids of the tokens that begin and end a text: bos_token_id, eos_token_id, pad_token_id.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    config = configuration(form.family, form.model.config, dtype=dtype, **(special or {}))
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    weights = form.weights()
    if form.model.config.tie_weights:
        del weights["lm_head.weight"]  # the reader ties it to the embedding
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda value: value.numel() * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: _shorter(name, weights.pop(name), dtype) for name in names}
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error
        # safetensors makes files that only their owner can read, whatever the umask.
        (folder / file).chmod((folder / "config.json").stat().st_mode & 0o777)
        del shard  # before the next one is made
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return sorted(os.listdir(folder))


def _shorter(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Raises ValueError where the number type has no room for a number."""
    short = value.to(dtype).contiguous()
    if dtype == torch.float16 and not torch.equal(short.isfinite(), value.isfinite()):
        raise ValueError(f"{name} has numbers that float16 cannot hold (above 65504): bfloat16 and float32 can")
    return short


def write_nanogpt(form: Form, file: Path, dtype: torch.dtype = torch.float32, **facts: Any) -> None:
    """A ckpt.pt. Raises OSError and ValueError.

    Args:
        facts: iter_num, best_val_loss, config, as nanoGPT's train.py has them.
    """
    arguments = form.family.config_to_hf(form.model.config)
    del arguments["model_type"]
    weights = {name: _shorter(name, value, dtype) for name, value in form.weights().items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    try:
        torch.save({"model": weights, "model_args": arguments, **facts}, file)
    except RuntimeError as error:  # how torch reports a full disk
        raise OSError(next(iter(str(error).splitlines()), "")) from error
