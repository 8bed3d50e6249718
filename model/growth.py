"""Growing a model: deeper, wider, more heads, more words, longer; and where every parameter of the result came from.

Each function takes a model and the configuration of the grown one, and returns the new model with its lineage; the old
model is left as it is, and what does not change is shared. A growth is written once, as what happens to the two axes
of each matrix (`Axis`): weights, adapters, biases and moments all follow from that. It also runs on the meta device,
where it checks shapes and allocates nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from orchestrate.model.adapters import ADAPTER
from orchestrate.model.config import BLOCK_LAYERS, Fade, ModelConfig, layer_of_adapter
from orchestrate.model.gpt import GPT, initial_value, put_parameter, weights_of
from orchestrate.model.lineage import Lineage, Origin, follow, known
from orchestrate.model.lora import reshape_lora
from orchestrate.model.narrow import wide

Grown = tuple[GPT, Lineage]


@dataclass(frozen=True)
class Axis:
    """How one axis of a parameter changes.

    Attributes:
        index: the old index of each new one, -1 where it is new; (new size,) int64.
        weight, grad: scales of the values and of their gradients along the axis, (new size,) or 1.0.
        exact: whether `grad` is the exact scale.
    """

    index: Tensor
    weight: Tensor | float = 1.0
    grad: Tensor | float = 1.0
    exact: bool = True
    note: str = ""


Axes = Mapping[str, Axis]
"""How the axes that the modules declare change (model/gpt.py, Weights): by name, or by name and number of a block where
blocks differ ("units.3"). Absent: unchanged."""


@dataclass(frozen=True)
class New:
    """A module without a source in the old model: its path there whose moments are its kin, and how it starts."""

    kin: str


_LEAF = re.compile(
    rf"^(?P<path>.*?)\.(?P<leaf>(?:base_layer\.)?(?:weight|bias)|lora_[AB]\.(?:{ADAPTER}|[qkv])\.weight"
    rf"|lora_embedding_[AB]\.{ADAPTER})$"
)


def _roles(
    path: str, leaf: str, dims: int, axes: Axes, before: ModelConfig, after: ModelConfig
) -> tuple[Axis | None, ...]:
    """How each dimension of a parameter changes: of a weight, a bias, or a LoRA factor."""
    weights, block = weights_of(path)
    rows, columns = (axes.get(f"{axis}.{block}", axes.get(axis)) for axis in (weights.rows, weights.columns))
    match leaf.split("."):
        case ["lora_A", *_]:
            return (None, columns)
        case ["lora_B", "q" | "k" | "v" as part, *_]:
            return (rows and _part(rows, before.qkv_rows[part], after.qkv_rows[part]), None)
        case ["lora_B", *_]:
            return (rows, None)
        case ["lora_embedding_A", *_]:
            return (None, rows)
        case ["lora_embedding_B", *_]:
            return (columns, None)
    return (rows, columns)[:dims]


def _part(axis: Axis, before: slice, after: slice) -> Axis:
    """The axis of a part of these rows, which comes from that part of the old ones alone."""

    def cut(value: Tensor | float) -> Tensor | float:
        return value[after] if isinstance(value, Tensor) else value

    index = axis.index[after]
    index = torch.where(index < 0, index, index - before.start)
    return replace(axis, index=index, weight=cut(axis.weight), grad=cut(axis.grad))


def _product(axes: Sequence[Axis | None], what: Callable[[Axis], Tensor | float]) -> Tensor | float:
    """Scales of all dimensions multiplied, broadcastable to the parameter."""
    result: Tensor | float = 1.0
    for dim, axis in enumerate(axes):
        scale = 1.0 if axis is None else what(axis)
        if isinstance(scale, Tensor):
            scale = scale.view([-1 if d == dim else 1 for d in range(len(axes))])
        elif scale == 1.0:
            continue
        result = scale * result
    return result


def transform(
    model: GPT,
    target: ModelConfig,
    generator: torch.Generator,
    axes: Axes | None = None,
    renamed: Callable[[str], str | New] = lambda path: path,
    fresh: Callable[[str, Tensor, Origin], Tensor | None] = lambda name, value, origin: None,
    origins: Mapping[str, Origin] | None = None,
) -> Grown:
    """A model of the target's shape whose parameters follow the old ones along `axes`.

    Args:
        generator: seeded alike on every rank; fresh values come from it alone.
        renamed: the old path of a new module, or New.
        fresh: what stands where a parameter has no image, given its name, its value with zeros there, and its origin;
            None leaves the zeros.
        origins: of parameters (by new name) that `axes` cannot express.

    Adapter factors are never given fresh values: a new row of an adapted matrix starts without an adapter's part.
    """
    axes, origins = axes or {}, origins or {}
    old = dict(model.named_parameters())
    with torch.device("meta"):
        grown = GPT(target)
    lineage: Lineage = {}
    for name, parameter in list(grown.named_parameters()):
        match = _LEAF.match(name)
        assert match, name
        path, leaf = match["path"], match["leaf"]
        source = renamed(path)
        if isinstance(source, New):
            kin = next((n for n in (f"{source.kin}.{leaf}", f"{source.kin}.base_layer.{leaf}") if n in old), None)
            origin = Origin(None, prior=kin, note="new")
            like = next(iter(old.values()))
            value = initial_value(name, parameter.shape, target, generator, like.device).to(wide(like.dtype))
            value = _or(fresh(name, value, origin), value)
        else:
            roles = _roles(path, leaf, parameter.dim(), axes, model.config, target)
            origin = origins.get(name) or Origin(
                f"{source}.{leaf}",
                tuple(axis.index if axis else None for axis in roles) if any(roles) else (),
                _product(roles, lambda axis: axis.weight),
                _product(roles, lambda axis: axis.grad),
                exact=all(axis.exact for axis in roles if axis),
                note="; ".join(sorted({axis.note for axis in roles if axis and axis.note})),
            )
            assert origin.name is not None
            before = old[origin.name]
            if not origin.index and isinstance(origin.weight_scale, float) and origin.weight_scale == 1.0:
                lineage[name] = origin
                put_parameter(grown, name, before)
                continue
            value = follow(before.detach().to(wide(before.dtype)), origin, parameter.shape, origin.weight_scale)
            mask = known(origin, value.device)
            if mask is not None and "lora_" not in leaf:
                drawn = fresh(name, value, origin)
                if drawn is not None:
                    value = torch.where(mask, value, drawn.to(device=value.device, dtype=value.dtype))
        lineage[name] = origin
        put_parameter(grown, name, nn.Parameter(value.contiguous()))
    grown.reset_buffers(next(iter(old.values())).device)
    return grown, lineage


def _or(value: Tensor | None, default: Tensor) -> Tensor:
    return default if value is None else value.to(device=default.device, dtype=default.dtype)


def _split(index: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Factors of copies that add up to 1 over the copies of each source; (len(index),) float64.

    Equal for noise 0; otherwise each is drawn within +-noise of equal, so that copies can drift apart: under Adam,
    copies with equal factors get equal updates forever.
    """
    factors = 1.0 + noise * (2.0 * torch.rand(len(index), generator=generator, dtype=torch.float64) - 1.0)
    total = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, factors)
    return factors / total[index]


def _append(old: int, new: int, copies: bool) -> Tensor:
    """Index of an axis that grows at its end: by copies in turn, or by new elements; (new,) int64."""
    added = torch.arange(old, new) % old if copies else torch.full((new - old,), -1)
    return torch.cat([torch.arange(old), added])


# ---------------------------------------------------------------------------------------------- deeper


@dataclass(frozen=True)
class Layer:
    """A block of the new model: the old block it is, or is a copy of; or a new one beside the old block `kin`."""

    source: int | None
    kin: int


def stack(
    model: GPT,
    target: ModelConfig,
    layers: Sequence[Layer],
    zero: bool,
    generator: torch.Generator,
    masked: bool = False,
    copied: bool = False,
) -> Grown:
    """The blocks `layers` in their order. New blocks are fresh, with zero output projections where `zero`.

    With zero output projections a new block adds nothing to the residual stream: the function is kept exactly, and so
    are all gradients of what was there (Chen et al. 2016, arXiv:1511.05641 for the idea of identity layers). The same
    holds where what is new is `masked`: it starts with nothing of it showing. Where new blocks are `copied`, what reads
    in them is as in the block that is their kin, adapters folded in (Wu et al. 2024, arXiv:2401.02415).
    """
    seen: set[int] = set()
    first = [layer.source is not None and not (layer.source in seen or seen.add(layer.source)) for layer in layers]
    added = [n for n, kept in enumerate(first) if not kept]
    silent = masked or all(zero and layers[n].source is None for n in added)
    same = silent and [layer.source for n, layer in enumerate(layers) if first[n]] == list(range(model.config.n_layer))

    def renamed(path: str) -> str | New:
        if match := re.match(r"transformer\.h\.(\d+)\.(.*)", path):
            layer = layers[int(match[1])]
            if layer.source is None:
                return New(f"transformer.h.{layer.kin}.{match[2]}")
            return f"transformer.h.{layer.source}.{match[2]}"
        return path

    sources: dict[str, Tensor] = {}
    if copied:
        merged, _ = reshape_lora(model, replace(model.config, lora={}), generator)
        sources = {name: parameter.detach().clone() for name, parameter in merged.transformer["h"].named_parameters()}

    def fresh(name: str, value: Tensor, origin: Origin) -> Tensor | None:
        if zero and weights_of(name)[0].rows == "writes":
            return torch.zeros_like(value)
        if not copied:
            return None
        _, _, number, rest = name.split(".", 3)
        return sources[f"{layers[int(number)].kin}.{rest}"].clone()

    grown, lineage = transform(model, target, generator, renamed=renamed, fresh=fresh)
    note = "" if same else "the function has changed: the moments are those of the layer that this one was"
    copies = tuple(f"transformer.h.{n}." for n in added)
    for name, origin in lineage.items():
        if origin.name is not None and (not same or name.startswith(copies)):
            lineage[name] = replace(origin, exact=False, note=note or "a copy, with the moments of its source")
    # A block that stands twice must not share its parameters.
    for n in added:
        if layers[n].source is not None:
            for name, parameter in list(grown.transformer["h"][n].named_parameters()):
                put_parameter(grown.transformer["h"][n], name, nn.Parameter(parameter.detach().clone()))
    return grown, lineage


def rename_layers(names: Mapping[str, object] | Sequence[str], layers: Sequence[Layer]) -> list[tuple[str, str]]:
    """(new name, old one) of every leaf layer or projection under the new numbering.

    Copies have all that their source has.
    """
    pairs = [(name, name) for name in names if name.split(".")[0] not in BLOCK_LAYERS]
    for n, layer in enumerate(layers):
        for kind in BLOCK_LAYERS if layer.source is not None else ():
            source = f"{kind}.{layer.source}"
            pairs += [(f"{kind}.{n}{old[len(source) :]}", old) for old in names if layer_of_adapter(old) == source]
    return pairs


# ---------------------------------------------------------------------------------------------- wider MLPs


def widen_mlp(model: GPT, target: ModelConfig, how: str, noise: float, generator: torch.Generator) -> Grown:
    """MLPs as wide as the target's.

    duplicate: new hidden units are copies of old ones; what a unit wrote is split among its copies by unequal factors
        (Net2WiderNet, Chen et al. 2016, arXiv:1511.05641). Exact for every activation, since copies compute alike.
    zero: new units are fresh and write zeros. random: fresh throughout, to be masked while they fade in.
    """
    axes: dict[str, Axis] = {}
    for n, (before, after) in enumerate(zip(model.config.n_hidden, target.n_hidden, strict=True)):
        if before == after:
            continue
        index = _append(before, after, how == "duplicate")
        share = _split(index, noise, generator) if how == "duplicate" else 1.0
        axes[f"units.{n}"], axes[f"units_read.{n}"] = Axis(index, 1.0, share), Axis(index, share, 1.0)
    return transform(model, target, generator, axes, fresh=_fresh_units(target, how, generator))


def _fresh_units(target: ModelConfig, how: str, generator: torch.Generator) -> Callable:
    """New units read at random, and write zeros unless `how` is random."""

    def fresh(name: str, value: Tensor, origin: Origin) -> Tensor | None:
        if weights_of(name)[0].rows == "writes" and how != "random":
            return None
        return initial_value(name, value.shape, target, generator, value.device)

    return fresh


# ---------------------------------------------------------------------------------------------- more heads


def _heads(rows: Tensor, size: int) -> Tensor:
    """An index over heads as one over their features."""
    features = rows[:, None] * size + torch.arange(size)
    return torch.where(rows[:, None] < 0, torch.full_like(features, -1), features).reshape(-1)


def _attention_axes(config: ModelConfig, queries: Tensor, keys: Tensor, share: Tensor | float) -> dict[str, Axis]:
    """Axes of one attention whose heads are these old ones.

    Args:
        queries, keys: the old head of each new query head, and of each new key/value head; -1 where it is new.
        share: what each new query head writes of what its source wrote.
    """
    c = config
    parts = [_heads(queries, c.head_size)]
    for offset in (c.n_head, c.n_head + c.n_kv_head):
        index = _heads(keys, c.head_size)
        parts.append(torch.where(index < 0, index, index + offset * c.head_size))
    grad: Tensor | float = 1.0
    if isinstance(share, Tensor):
        # Copies of a key/value head serve copies of its query heads, so its gradient is split as theirs is.
        group = len(queries) // len(keys)
        by_key = torch.zeros(len(keys), dtype=torch.float64)
        for m in range(len(keys)):
            first = queries[m * group]
            by_key[m] = share[m * group : (m + 1) * group][queries[m * group : (m + 1) * group] == first].sum()
        grad = torch.cat([share.repeat_interleave(c.head_size), *[by_key.repeat_interleave(c.head_size)] * 2])
        share = share.repeat_interleave(c.head_size)
    return {"qkv": Axis(torch.cat(parts), 1.0, grad), "heads_read": Axis(parts[0], share, 1.0)}


def head_sources(config: ModelConfig, n_head: int, n_kv_head: int, copies: bool) -> tuple[Tensor, Tensor]:
    """The old query head and key/value head of each new one (-1: new), every query beside its own key.

    Groups of query heads that share a key keep together; a larger group takes new query heads at its end.
    """
    group, old_group = n_head // n_kv_head, config.n_head // config.n_kv_head
    keys = _append(config.n_kv_head, n_kv_head, copies)
    queries = []
    for key in keys.tolist():
        for j in range(group):
            if key < 0 or (j >= old_group and not copies):
                queries.append(-1)
            else:
                queries.append(key * old_group + j % old_group)
    return torch.tensor(queries), keys


def _head_shares(queries: Tensor, keys: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """What each copy of a query head writes, adding up to 1; the same factor for a whole group of copies."""
    group = len(queries) // len(keys)
    by_group = _split(keys, noise, generator)
    shares = torch.ones(len(queries), dtype=torch.float64)
    for m in range(len(keys)):
        here = slice(m * group, (m + 1) * group)
        shares[here] = by_group[m] * _split(queries[here], noise, generator)
    return shares


def add_heads(model: GPT, target: ModelConfig, how: str, noise: float, generator: torch.Generator) -> Grown:
    """Attention with the target's head counts: copies that share what they write, or new heads that write zeros."""
    axes: dict[str, Axis] = {}
    for n in range(target.n_layer):
        queries, keys = head_sources(model.config, target.n_head, target.n_kv_head, how == "duplicate")
        share = _head_shares(queries, keys, noise, generator) if how == "duplicate" else 1.0
        axes.update({f"{name}.{n}": axis for name, axis in _attention_axes(model.config, queries, keys, share).items()})
    return transform(model, target, generator, axes, fresh=_fresh_units(target, how, generator))


def spell_out(model: GPT, target: ModelConfig) -> GPT:
    """The same function in a shape that spells it out, for who has no other: nothing is drawn at random.

    Hidden units and heads beyond the old ones are zeros. Where the target has a key head for each query head, a key
    head that several share is repeated for each of them.
    """
    config, axes = model.config, {}
    for n, (before, after) in enumerate(zip(config.n_hidden, target.n_hidden, strict=True)):
        if before != after:
            axes[f"units.{n}"] = axes[f"units_read.{n}"] = Axis(_append(before, after, copies=False))
    if target.n_kv_head == target.n_head == config.n_head:
        queries = torch.arange(config.n_head)
        keys = queries // (config.n_head // config.n_kv_head)
    else:
        queries, keys = head_sources(config, target.n_head, target.n_kv_head, copies=False)
    if (config.n_head, config.n_kv_head) != (target.n_head, target.n_kv_head):
        axes |= _attention_axes(config, queries, keys, 1.0)
    return transform(model, target, torch.Generator(), axes)[0]


# ---------------------------------------------------------------------------------------------- a wider stream


def widen_embd(model: GPT, target: ModelConfig, noise: float, generator: torch.Generator) -> Grown:
    """A residual stream of k times the width, made of k copies side by side; heads as the target says.

    Copies have the mean and variance of the original, so LayerNorm and RMSNorm see what they saw. Who writes to the
    stream writes every copy alike; who reads it reads with weights split among the copies. A tied head reads with the
    embedding itself, so there the last norm is split instead. With unequal factors (noise > 0) copies drift apart;
    the gradients of who writes then have no exact image (the norms mix the copies), and 1/k is carried. With noise 0
    all moments are exact, and the copies stay copies.

    A larger head size (same head count) puts every old feature where the rotary frequency is the old one, and makes up
    for the softmax's 1/sqrt(head_size) (_larger_heads).
    """
    config, c = model.config, target
    k = c.n_embd // config.n_embd
    index = torch.arange(config.n_embd).repeat(k)
    note = "the norms mix unequal copies: 1/k is near the gradient's scale, not equal to it" if noise else ""
    writes = Axis(index, 1.0, 1.0 / k, exact=noise == 0, note=note)

    def reads() -> Axis:
        return Axis(index, _split(index, noise, generator), 1.0)

    axes: dict[str, Axis] = {"writes": writes}

    def norm(reader: Axis) -> Axis:
        """Each copy of a norm feeds readers whose weights are split: its gradient is split alike."""
        return Axis(index, 1.0, reader.weight)

    for n in range(c.n_layer):
        attention, mlp = reads(), reads()
        axes[f"attn_reads.{n}"], axes[f"attn_norm.{n}"] = attention, norm(attention)
        axes[f"mlp_reads.{n}"], axes[f"mlp_norm.{n}"] = mlp, norm(mlp)
        if c.head_size == config.head_size:
            queries, keys = head_sources(config, c.n_head, c.n_kv_head, copies=True)
            share: Tensor | float = _head_shares(queries, keys, noise, generator) if c.n_head > config.n_head else 1.0
            heads = _attention_axes(config, queries, keys, share)
        else:
            heads = _larger_heads(config, c)
        axes.update({f"{name}.{n}": axis for name, axis in heads.items()})
    last = reads()
    axes["head_reads"], axes["head_norm"] = last, Axis(index, last.weight, 1.0) if config.tie_weights else norm(last)

    features = c.head_size

    def fresh(name: str, value: Tensor, origin: Origin) -> Tensor | None:
        # Larger heads: new features of keys and of what is written are zero, of queries and values random.
        weights = weights_of(name)[0]
        if weights.rows == "writes":
            return None
        drawn = initial_value(name, value.shape, target, generator, value.device)
        if weights.rows == "qkv":
            drawn[c.n_head * features : (c.n_head + c.n_kv_head) * features] = 0.0
        return drawn

    return transform(model, target, generator, axes, fresh=fresh)


def _larger_heads(config: ModelConfig, target: ModelConfig) -> dict[str, Axis]:
    """Axes of an attention whose heads have k times the features."""
    k, size = target.head_size // config.head_size, config.head_size
    # The old feature that each new one is a copy of. With rotary positions frequency i of the old head is frequency
    # k * i of the new one; its two features stand half a head apart.
    copies = torch.arange(target.head_size)
    copies = copies // k if config.position == "rotary" else copies % size
    first = torch.arange(target.head_size) % k == 0 if config.position == "rotary" else torch.arange(k * size) < size
    place = torch.where(first, copies, -1)

    def over(heads: int, features: Tensor, offset: int = 0) -> Tensor:
        index = (torch.arange(heads)[:, None] + offset) * size + features
        return torch.where(features < 0, -1, index).reshape(-1)

    keys = over(config.n_kv_head, place, config.n_head)
    values = over(config.n_kv_head, place, config.n_head + config.n_kv_head)
    read, one = over(config.n_head, place), torch.ones(target.head_size, dtype=torch.float64)
    if not config.qk_norm:
        queries, exact, note = read, True, ""
        of_queries, of_keys = one * math.sqrt(k), one
        grad_of_queries = 1.0 / of_queries
    else:
        # The mean of squares must stay what it was. New features of the queries are copies of the old ones: each group
        # has the old mean. Those of the keys are zero, and the old ones larger by the root of k, which the norm hands
        # on to the product with the queries: it makes up for the softmax's 1/sqrt(head_size).
        queries, exact = over(config.n_head, copies), False
        note = "the norm spreads the gradient of a query over its copies: the old one and 1/k of it are near"
        of_queries, of_keys = one, one * math.sqrt(k)
        grad_of_queries = torch.where(first, 1.0, 1.0 / k).to(one.dtype)
    heads = (config.n_head, config.n_kv_head, config.n_kv_head)
    weight, grad = (
        torch.cat([part.repeat(count) for part, count in zip(parts, heads, strict=True)])
        for parts in ((of_queries, of_keys, one), (grad_of_queries, 1.0 / of_keys, one))
    )
    return {
        "qkv": Axis(torch.cat([queries, keys, values]), weight, grad, exact, note),
        "heads_read": Axis(read),
        "head_features": Axis(place),
    }


# ---------------------------------------------------------------------------------------------- words and positions


def resize_vocabulary(
    model: GPT,
    target: ModelConfig,
    init: str | tuple[str, int | Sequence[int]],
    noise: float,
    old_ids: Sequence[int] | None,
    generator: torch.Generator,
) -> Grown:
    """A vocabulary of another size. Old ids keep their rows, and so their logits.

    Args:
        init: new rows are the "mean" of the old ones, ("copy", id or the id for each row), or "zero"; plus noise.
        noise: standard deviation of what is added to a new row, as a share of that of the old rows.
        old_ids: when it shrinks or is restored, the old id whose row each new id takes; -1 for a new row.
    """
    before, after = model.config.vocab_size, target.vocab_size
    index = torch.tensor(old_ids) if old_ids is not None else _append(before, after, copies=False)
    note = "the words that are gone no longer share in the softmax" if after < before else ""
    rows = Axis(index, exact=False, note=note or "new words share in the softmax: near the gradient, not equal to it")

    def fresh(name: str, value: Tensor, origin: Origin) -> Tensor | None:
        assert origin.name is not None
        old = dict(model.named_parameters())[origin.name].detach()
        old = old.to(wide(old.dtype))
        row = torch.zeros_like(old[0])
        if init == "mean":
            row = old.mean(0)
        elif isinstance(init, tuple):
            row = old[init[1] if isinstance(init[1], int) else list(init[1])]
        drawn = row.expand_as(value).clone()
        if noise and value.device.type != "meta":
            drawn += noise * old.std() * torch.randn(value.shape, generator=generator).to(drawn)
        return drawn

    return transform(model, target, generator, {"vocabulary": rows}, fresh=fresh)


def extend_context(model: GPT, target: ModelConfig, how: str, generator: torch.Generator) -> Grown:
    """Room for longer sequences; with rotary positions the tables follow from the target's configuration.

    extend: learned positions keep their rows and new ones are fresh. interpolate: the table is stretched linearly
    over the new length, so what a position meant is now spread out: not function-preserving.
    """
    if model.config.position != "learned":
        return transform(model, target, generator)
    before, after = model.config.block_size, target.block_size
    path = "transformer.wpe"
    if how == "extend":
        rows = Axis(_append(before, after, copies=False))

        def fresh(name: str, value: Tensor, origin: Origin) -> Tensor | None:
            return initial_value(name, value.shape, target, generator, value.device)

        return transform(model, target, generator, {"positions": rows}, fresh=fresh)
    index = (torch.arange(after) * before) // after
    rows = Axis(index, exact=False, note="interpolated positions: the moments are those of the old position below")
    grown, lineage = transform(model, target, generator, {"positions": rows})
    table = model.get_parameter(f"{path}.weight").detach()
    stretched = nn.functional.interpolate(table.T[None].float(), size=after, mode="linear", align_corners=True)
    put_parameter(grown, f"{path}.weight", nn.Parameter(stretched[0].T.to(wide(table.dtype)).contiguous()))
    return grown, lineage


def untie(model: GPT, target: ModelConfig, generator: torch.Generator) -> Grown:
    """An output head of its own, starting as the embedding was (with its adapter folded in)."""
    old = dict(model.named_parameters())
    adapted = "wte" in model.config.lora
    weight = "transformer.wte.base_layer.weight" if adapted else "transformer.wte.weight"
    note = "the tied gradient was the sum of two: the head's is nearly all of it, the embedding's is less"
    carried = Origin(weight, exact=False, note=note)
    origins = {name: replace(carried, name=name) for name in old if name.startswith("transformer.wte.")}
    grown, lineage = transform(
        model, target, generator, renamed=lambda path: path, origins={**origins, "lm_head.weight": carried}
    )
    value = old[weight].detach().to(wide(old[weight].dtype), copy=True)
    if adapted:
        spec = model.config.lora["wte"]
        left = old[f"transformer.wte.lora_embedding_A.{ADAPTER}"].detach()
        right = old[f"transformer.wte.lora_embedding_B.{ADAPTER}"].detach()
        value += (spec.scaling * (left.T.double() @ right.T.double())).to(value.dtype)
        lineage["lm_head.weight"] = Origin(None, note="the adapted embedding did not train: no moments to carry")
    put_parameter(grown, "lm_head.weight", nn.Parameter(value))
    return grown, lineage


def fading_parts(before: ModelConfig, after: ModelConfig, new_layers: Sequence[int]) -> dict[str, Fade]:
    """What is new in `after` and can be masked, at share 0: new blocks, hidden units, heads and words."""
    parts = {f"{kind}.{n}": Fade(0, 0.0) for n in new_layers for kind in ("attn", "mlp")}
    if before.n_layer == after.n_layer:
        for n, (old, new) in enumerate(zip(before.n_hidden, after.n_hidden, strict=True)):
            if new > old:
                parts[f"mlp.{n}"] = Fade(old, 0.0)
        if after.n_head > before.n_head:
            parts.update({f"attn.{n}": Fade(before.n_head, 0.0) for n in range(after.n_layer)})
    if after.vocab_size > before.vocab_size:
        parts["lm_head"] = Fade(before.vocab_size, 0.0)
    return parts
