"""Every change of an adapter's rank or scaling while the model trains; the function stays.

Growing, shrinking, merging and starting anew are maps from one model to another, with the lineage of every parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrate.model.adapters import factor_names, fresh_right
from orchestrate.model.config import LoraSpec, ModelConfig, layer_of_parameter
from orchestrate.model.gpt import GPT, adapted_modules, put_parameter
from orchestrate.model.lineage import Lineage, Origin
from orchestrate.model.narrow import wide


def adapted_base_parameters(model: GPT) -> set[str]:
    """Names of the base weights and biases under adapters; PEFT's convention is that they do not train."""
    return {name for name, _ in model.named_parameters() if ".base_layer." in name}


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
            for name, (parameter, origin) in _change(path, before.get(path), after.get(path), old, generator):
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
    """Merge the adapters of these layers into their bases and start new ones of the same ranks in their place."""
    config, again = model.config, set(layers)
    without = replace(config, lora={name: spec for name, spec in config.lora.items() if name not in again})
    merged, first = reshape_lora(model, without, generator)
    restarted, second = reshape_lora(merged, config, generator)
    # The second step only adds adapters, so what has an image in it is unchanged there.
    return restarted, {name: o if o.name is None else first[o.name] for name, o in second.items()}


@torch.no_grad()
def _change(
    path: str,
    before: LoraSpec | None,
    after: LoraSpec | None,
    old: dict[str, nn.Parameter],
    generator: torch.Generator,
) -> Iterator[tuple[str, tuple[nn.Parameter, Origin]]]:
    """The weight and factors of one adapted matrix under another rank or alpha."""
    embedding = path == "transformer.wte"
    left_name, right_name = factor_names(path, embedding)
    old_weight_name = f"{path}.base_layer.weight" if before else f"{path}.weight"
    new_weight_name = f"{path}.base_layer.weight" if after else f"{path}.weight"
    base = old[old_weight_name]
    rows, cols = base.shape
    device, dtype = base.device, wide(base.dtype)

    def parameter(value: Tensor, transposed: bool = False) -> nn.Parameter:
        value = value.T if transposed else value
        return nn.Parameter(value.to(device=device, dtype=dtype).contiguous())

    def fresh(rank: int) -> Tensor:
        return fresh_right(rank, cols, embedding, generator).to(device)

    # Products are formed in float64 where the device has it: what is folded must not add rounding of its own.
    precise = torch.float32 if device.type == "mps" else torch.float64
    if before:
        left, right = old[left_name].to(precise), old[right_name].to(precise)
        if embedding:
            left, right = left.T, right.T

    shrinks = before is not None and (after is None or after.rank < before.rank)
    if not shrinks:
        yield new_weight_name, (base, Origin(old_weight_name))
    else:
        rest = before.scaling * (left @ right)
        if after:
            new_left, new_right = _strongest(left, right, after.rank, before.scaling / after.scaling)
            new_left, new_right = new_left.to(dtype).to(precise), new_right.to(dtype).to(precise)
            rest -= after.scaling * (new_left @ new_right)
            note = "the singular value decomposition mixes the directions: no exact image of the moments"
            yield left_name, (parameter(new_left, embedding), Origin(None, note=note))
            yield right_name, (parameter(new_right, embedding), Origin(None, note=note))
        yield (
            new_weight_name,
            (parameter(base.to(precise) + rest), Origin(old_weight_name, note="adapter folded in")),
        )
        return
    if after is None:
        return
    if before is None:
        yield (
            left_name,
            (parameter(torch.zeros(rows, after.rank), embedding), Origin(None, note="new adapter")),
        )
        yield right_name, (parameter(fresh(after.rank), embedding), Origin(None, note="new adapter"))
        return

    # Same rank or more: the old directions keep their place, and L makes up for the new scaling.
    scale, added = before.scaling / after.scaling, after.rank - before.rank
    index = torch.cat([torch.arange(before.rank), torch.full((added,), -1)])
    rank_of_left, rank_of_right = ((index, None), (None, index)) if embedding else ((None, index), (index, None))
    padded = F.pad(left * scale, (0, added))
    yield (
        left_name,
        (
            parameter(padded, embedding),
            Origin(left_name, rank_of_left, weight_scale=scale, grad_scale=1.0 / scale),
        ),
    )
    if added:
        grown = torch.cat([right, fresh(added).to(precise)])
        yield right_name, (parameter(grown, embedding), Origin(right_name, rank_of_right))
    else:
        yield right_name, (old[right_name], Origin(right_name))


def _strongest(left: Tensor, right: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors (L', R') of the best approximation of scale * left @ right of this rank, equally strong on both sides.

    The decomposition is of the small core between two QR factors, so the full matrix is never decomposed.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    root = (s[:rank] * scale).sqrt()
    return q_left @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ q_right.T
