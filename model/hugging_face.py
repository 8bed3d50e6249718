"""Configurations and weights from and to Hugging Face's names, for the families that we know.

transformers read config.json; the weights are read here, tensor by tensor (shards.py). What a tensor is
called there, and where it lies among ours, the families say (families/). What one side cannot represent exactly is
refused with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrate.model.config import ModelConfig
from orchestrate.model.families import FAMILIES, REFUSED, Family
from orchestrate.model.families.family import HEAD
from orchestrate.model.gpt import GPT, check_shapes, put_parameter
from orchestrate.model.shards import WHOLE, Shards

# n_layer, n_head, n_embd of OpenAI's releases; all have 50257 tokens, 1024 positions and biases.
GPT2_MODELS = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def gpt2_config(name: str) -> ModelConfig:
    """The configuration of a released GPT-2, known without a download."""
    n_layer, n_head, n_embd = GPT2_MODELS[name]
    return ModelConfig(
        block_size=1024,
        vocab_size=50257,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        bias=True,
        activation="gelu_tanh",
    )


Keep = Callable[[str, Tensor], Tensor]
"""keep(name, value): a weight in float32 as it is to be kept; it is called for one after the other."""


def as_is(name: str, value: Tensor) -> Tensor:
    return value


def open_model(name_or_folder: str | Path) -> tuple[ModelConfig, Callable[..., GPT]]:
    """The configuration of a released GPT-2 or a local folder, and `load(keep=as_is)`, which loads its weights.

    A folder is looked at whole, but for the values of its weights. A released model is fetched when it is loaded.
    Raises ValueError; so does loading.
    """
    if name_or_folder in GPT2_MODELS:
        config = gpt2_config(str(name_or_folder))
        return config, lambda keep=as_is: _fetched(str(name_or_folder), config, keep)
    place = f"init_from {name_or_folder}"
    theirs = _read_config(str(name_or_folder), place)
    family = FAMILIES[theirs.model_type]
    try:
        family.config(theirs)  # what it says is refused before its files are looked at
        shards = Shards(name_or_folder)
        config = family.config(theirs, [name for name in shards.shapes if not re.fullmatch(family.ignored, name)])
        names = _check(family, config, shards)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return config, lambda keep=as_is: _loaded(family, config, shards, names, place, keep)


def config_from_folder(folder: str | Path) -> ModelConfig:
    """The configuration of a local Hugging Face folder. Raises ValueError where the folder is not whole."""
    return open_model(folder)[0]


def load(name_or_folder: str, keep: Keep = as_is) -> GPT:
    """A released GPT-2 by name, or a local folder, with its weights in float32 or as `keep` says. Raises ValueError."""
    return open_model(name_or_folder)[1](keep)


def is_path(name: str) -> bool:
    """Whether a model's name can only be a path, and not NAME or ORGANISATION/NAME on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _read_config(name: str, place: str) -> Any:
    """A folder's configuration as transformers read it, of a family that we know. Raises ValueError."""
    folder = Path(name)
    if not folder.is_dir():
        hint = ""
        if "/" in name and not is_path(name):
            hint = "; of the hub's models only those of GPT-2 are fetched: download others and give the folder"
        raise ValueError(
            f"{place}: there is no such file or folder; allowed: scratch, resume, {', '.join(GPT2_MODELS)}, "
            f"a Hugging Face folder, a nanoGPT ckpt.pt{hint}"
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{place}: a PEFT adapter, and a base model is a whole one: merge the two with peft's "
            "merge_and_unload, save the result, and give that folder"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{place}: a Hugging Face folder has a config.json, and there is none")
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
        known = kind in FAMILIES
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{place}: config.json cannot be read ({type(error).__name__}: {error})") from None
    if not known:
        why = f", which has {REFUSED[kind]}: no option here says so" if kind in REFUSED else ""
        raise ValueError(f"{place}: model type {kind!r}{why}; understood are {', '.join(FAMILIES)}")
    from transformers import AutoConfig

    try:
        # Nothing that the folder brings along is run.
        theirs = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the checks of transformers and of what it uses raise all kinds
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{place}: config.json cannot be read ({type(error).__name__}: {first})") from None
    if getattr(theirs, "quantization_config", None):
        raise ValueError(f"{place}: its weights are quantized; allowed are float32, bfloat16 and float16")
    return theirs


def _check(family: Family, config: ModelConfig, shards: Shards) -> dict[str, str]:
    """What each of the family's tensors is called in the files. Raises ValueError where they do not fit the model."""
    # A model that was saved without its head's class leaves the first part of all names out.
    bare = not any(name.startswith(family.base) for name in shards.shapes)
    called = {
        f"{family.base}{name}" if bare and name != HEAD else name: name
        for name in shards.shapes
        if not re.fullmatch(family.ignored, name)
    }
    given = {name: shards.shapes[called[name]] for name in called}
    wanted = {name: shape for place in family.places(config).values() for name, shape in place.theirs().items()}
    if config.tie_weights and HEAD in given:
        wanted[HEAD] = torch.Size([config.vocab_size, config.n_embd])
    check_shapes(wanted, given)
    return called


def _loaded(family: Family, config: ModelConfig, shards: Shards, names: dict[str, str], place: str, keep: Keep) -> GPT:
    """The model with the values of its weights, which are read tensor by tensor into its parameters."""
    with torch.device("meta"):
        model = GPT(config)
    try:
        for name, where in family.places(config).items():
            value = torch.empty(model.get_parameter(name).shape)
            where.read(lambda theirs: shards.read(names[theirs]), value)
            put_parameter(model, name, nn.Parameter(keep(name, value)))
        model.reset_buffers(torch.device("cpu"))
        twice = config.tie_weights and HEAD in names
        wte = model.transformer["wte"].weight
        if twice and not torch.equal(shards.read(names[HEAD]).to(wte.dtype), wte):
            raise ValueError(f"config.json ties the head to the embedding, and {HEAD} is another matrix")
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return model


def _fetched(name: str, config: ModelConfig, keep: Keep) -> GPT:
    """A released GPT-2, from the hub or from its local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        shards = Shards(hf_hub_download(f"openai-community/{name}", WHOLE))
        names = _check(FAMILIES["gpt2"], config, shards)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"init_from {name}: the weights cannot be had ({first}); "
            "without network, download the model elsewhere and give its folder as init_from"
        ) from None
    return _loaded(FAMILIES["gpt2"], config, shards, names, f"init_from {name}", keep)


def family_of(config: ModelConfig) -> Family:
    """The first family that can hold a model of this shape. Raises ValueError with what each of them lacks."""
    reasons = []
    for family in FAMILIES.values():
        if not (lacking := family.lacks(config)):
            return family
        reasons.append(f"{family.title} cannot hold {', '.join(lacking)}")
    raise ValueError(f"this model has no Hugging Face form: {'; '.join(reasons)}")
