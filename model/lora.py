"""Every change of an adapter's rank or scaling while the model trains; the function stays.

Growing, shrinking, merging and starting anew are maps from one model to another, with the lineage of every parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrate.model.adapters import factor_names, fresh_right, principal
from orchestrate.model.config import LoraSpec, ModelConfig, layer_of_adapter, layer_of_parameter
from orchestrate.model.gpt import GPT, adapted_modules, put_parameter
from orchestrate.model.lineage import Lineage, Origin
from orchestrate.model.narrow import wide


def adapted_base_parameters(model: GPT) -> set[str]:
    """Names of the base weights and biases under adapters; PEFT's convention is that they do not train.

    Of a layer whose projections are adapted one by one, that is all but the adapters.
    """
    one_by_one = {layer_of_adapter(name) for name in model.config.lora if name.count(".") == 2}
    return {
        name
        for name, _ in model.named_parameters()
        if ".base_layer." in name or ("lora_" not in name and layer_of_parameter(name) in one_by_one)
    }


def trainable_parameters(model: GPT, frozen_layers: Iterable[str]) -> set[str]:
    """Names of the parameters that train: none of a frozen layer, none under an adapter."""
    frozen, bases = set(frozen_layers), adapted_base_parameters(model)
    return {
        name for name, _ in model.named_parameters() if name not in bases and layer_of_parameter(name) not in frozen
    }


def reshape_lora(model: GPT, target: ModelConfig, generator: torch.Generator) -> tuple[GPT, Lineage]:
    """A model with the target's ranks and alphas and the same function, and where its parameters came from.

    Growing pads L with zeros and R with fresh rows; shrinking keeps the strongest directions of the product (singular
    value decomposition) in the factors and folds the rest into the base weight; removing merges all of it. A new
    scaling is made up for in L. Parameters that do not change are the same objects in both models, and `model` is left
    as it is.

    Args:
        target: the model's configuration but for `lora`. Raises ValueError otherwise.
        generator: seeded alike on every rank.
    """
    source = model.config
    if replace(source, lora={}) != replace(target, lora={}):
        raise ValueError("reshape_lora changes adapters only, and the target differs in more")
    old = dict(model.named_parameters())
    with torch.device("meta"):
        new_model = GPT(target)
    before, after = adapted_modules(source), adapted_modules(target)
    made: dict[str, nn.Parameter] = {}
    origins: dict[str, Origin] = {}
    for path in [*before, *(path for path in after if path not in before)]:
        if before.get(path) != after.get(path):
            change = _change(path, before.get(path, {}), after.get(path, {}), source.qkv_rows, old, generator)
            for name, (parameter, origin) in change:
                made[name], origins[name] = parameter, origin

    lineage: Lineage = {}
    for name in [name for name, _ in new_model.named_parameters()]:
        if name not in made:
            # A bias under a new or removed adapter only changes its name.
            path, _, leaf = name.rpartition(".")
            bare = path.removesuffix(".base_layer")
            there = next(n for n in (name, f"{bare}.{leaf}", f"{path}.base_layer.{leaf}") if n in old)
            made[name], origins[name] = old[there], Origin(there)
        lineage[name] = origins[name]
        put_parameter(new_model, name, made[name])
    new_model.reset_buffers(next(iter(old.values())).device)
    return new_model, lineage


def restart_adapters(model: GPT, layers: Iterable[str], generator: torch.Generator) -> tuple[GPT, Lineage]:
    """Merge the adapters of these names into their bases and start new ones of the same ranks in their place."""
    config, again = model.config, set(layers)
    without = replace(config, lora={name: spec for name, spec in config.lora.items() if name not in again})
    merged, first = reshape_lora(model, without, generator)
    restarted, second = reshape_lora(merged, config, generator)
    # The second step only adds adapters, so what has an image in it is unchanged there.
    return restarted, {name: o if o.name is None else first[o.name] for name, o in second.items()}


Made = tuple[str, tuple[nn.Parameter, Origin]]


@torch.no_grad()
def _change(
    path: str,
    before: Mapping[str, LoraSpec],
    after: Mapping[str, LoraSpec],
    rows: Mapping[str, slice],
    old: dict[str, nn.Parameter],
    generator: torch.Generator,
) -> Iterator[Made]:
    """The weight of one matrix, and the factors of its parts, under other adapters."""
    old_name = f"{path}.base_layer.weight" if before else f"{path}.weight"
    new_name = f"{path}.base_layer.weight" if after else f"{path}.weight"
    base, folded = old[old_name], None
    precise = _precise(base)
    for part in [*before, *(part for part in after if part not in before)]:
        if before.get(part) == after.get(part):
            continue
        here = rows.get(part, slice(None))
        factors, rest = _factors(path, part, before.get(part), after.get(part), base[here], old, generator)
        yield from factors
        if rest is not None:
            folded = base.to(precise, copy=True) if folded is None else folded
            folded[here] += rest
    if folded is None:
        yield new_name, (base, Origin(old_name))
    else:
        value = nn.Parameter(folded.to(wide(base.dtype)).contiguous())
        yield new_name, (value, Origin(old_name, note="adapter folded in, or taken out"))


def _precise(weight: Tensor) -> torch.dtype:
    """Products are formed in float64 where the device has it: what is folded must not add rounding of its own."""
    return torch.float32 if weight.device.type == "mps" else torch.float64


def _factors(
    path: str,
    part: str,
    before: LoraSpec | None,
    after: LoraSpec | None,
    base: Tensor,
    old: dict[str, nn.Parameter],
    generator: torch.Generator,
) -> tuple[list[Made], Tensor | None]:
    """The factors of one adapter under another rank or scaling, and what its weight `base` takes of them, if it does.

    Args:
        base: the rows that the adapter is on.
    """
    embedding = path == "transformer.wte"
    left_name, right_name = factor_names(path, embedding, part)
    device, dtype, precise = base.device, wide(base.dtype), _precise(base)

    def made(name: str, value: Tensor, origin: Origin) -> Made:
        value = value.T if embedding else value
        return name, (nn.Parameter(value.to(device=device, dtype=dtype).contiguous()), origin)

    def fresh(rank: int) -> Tensor:
        return fresh_right(rank, base.shape[1], embedding, generator).to(device)

    if before is None:
        assert after is not None
        new = Origin(None, note="new adapter")
        if after.init_lora_weights == "pissa":
            left, right = (factor.to(dtype) for factor in principal(base, after))
            rest = -after.scaling * (left.to(precise) @ right.to(precise))
            return [made(left_name, left, new), made(right_name, right, new)], rest
        zeros = torch.zeros(len(base), after.rank)
        return [made(left_name, zeros, new), made(right_name, fresh(after.rank), new)], None

    left, right = old[left_name].to(precise), old[right_name].to(precise)
    if embedding:
        left, right = left.T, right.T
    if after is None:
        return [], before.scaling * (left @ right)
    if after.rank < before.rank:
        rest = before.scaling * (left @ right)
        new_left, new_right = _strongest(left, right, after.rank, before.scaling / after.scaling)
        new_left, new_right = new_left.to(dtype).to(precise), new_right.to(dtype).to(precise)
        rest -= after.scaling * (new_left @ new_right)
        mixed = Origin(
            None, note="the singular value decomposition mixes the directions: no exact image of the moments"
        )
        return [made(left_name, new_left, mixed), made(right_name, new_right, mixed)], rest

    # Same rank or more: the old directions keep their place, and L makes up for the new scaling.
    scale, added = before.scaling / after.scaling, after.rank - before.rank
    index = torch.cat([torch.arange(before.rank), torch.full((added,), -1)])
    rank_of_left, rank_of_right = ((index, None), (None, index)) if embedding else ((None, index), (index, None))
    of_left = Origin(left_name, rank_of_left, weight_scale=scale, grad_scale=1.0 / scale)
    grown = made(left_name, F.pad(left * scale, (0, added)), of_left)
    if not added:
        return [grown, (right_name, (old[right_name], Origin(right_name)))], None
    more = torch.cat([right, fresh(added).to(precise)])
    return [grown, made(right_name, more, Origin(right_name, rank_of_right))], None


def _strongest(left: Tensor, right: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors (L', R') of the best approximation of scale * left @ right of this rank, equally strong on both sides.

    The decomposition is of the small core between two QR factors, so the full matrix is never decomposed.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    root = (s[:rank] * scale).sqrt()
    return q_left @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ q_right.T
