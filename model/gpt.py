"""One GPT, built from one ModelConfig and nothing else.

GPT-2 style (learned positions, LayerNorm, GELU, tied head) and Llama style (rotary positions, RMSNorm, SwiGLU,
grouped-query attention, untied head) are settings of the same blocks. Parameters carry nanoGPT's names. The model
knows no optimizer, no data and no schedule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orchestrate.model.adapters import ADAPTER, attach, init_adapters, tied_logits
from orchestrate.model.config import PROJECTIONS, Fade, LoraSpec, ModelConfig
from orchestrate.model.narrow import Embedding, Linear, WithoutDrawing, linear

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, each (time, head_size)."""


class Cache:
    """Keys and values of the tokens that each row has so far. Its room is made once and written in place.

    Rows may have unequal numbers of tokens. Those of a row stand in its columns from 0 on, and nothing sees what stands
    after them. A pass may be over some rows only, those that follow each other from `first` on.

    Args:
        rows: how many there are at most.
        capacity: tokens that a row may have, at most cache_length of the configuration.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int) -> None:
        assert capacity <= config.cache_length, f"{capacity} tokens; a cache is of use up to {config.cache_length}"
        self.capacity, self.last_position = capacity, config.cache_length - 1
        self.lengths = [0] * rows
        """How many tokens each row has."""
        self._layers: list[tuple[Tensor, Tensor]] = []  # each (rows, capacity, n_kv_head, head_size)

    def place(self, time: int, counts: Sequence[int], device: torch.device, first: int = 0) -> Tensor:
        """Take up so many tokens of each row (of `time` given, the first ones); their positions, (batch, time)."""
        rows = range(first, first + len(counts))
        before = self.lengths[first : rows.stop]
        after = [length + count for length, count in zip(before, counts, strict=True)]
        assert max(after) <= self.capacity, f"{max(after)} tokens in a cache of {self.capacity}"
        self.lengths[first : rows.stop] = after
        self._rows, self._seen = slice(first, rows.stop), max(after)
        offsets = torch.arange(time, device=device)
        at = torch.tensor(before, device=device)[:, None] + offsets
        to = at + torch.arange(first * self.capacity, rows.stop * self.capacity, self.capacity, device=device)[:, None]
        # Where a row has fewer tokens than `time`, what fills it up is not written: it might be beyond the room.
        self._to, self._given = to.flatten(), None
        if min(counts) < time:
            self._given = (offsets < torch.tensor(counts, device=device)[:, None]).flatten().nonzero()[:, 0]
            self._to = self._to[self._given]
        # Without anything before, it is plain causal attention; and a single token sees all, where no row has less.
        self._alone = not any(before)
        self._mask: Tensor | None = None
        if not self._alone and (time > 1 or min(after) < self._seen):
            self._mask = (torch.arange(self._seen, device=device) <= at[:, :, None])[:, None]
        return at.clamp(max=self.last_position)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write a layer's keys and values where they were placed, and let the queries see all that there is of it.

        Args:
            q: (batch, n_head, time, head_size); k, v: (batch, n_kv_head, time, head_size).
        """
        if layer == len(self._layers):
            self._make(k.transpose(1, 2))
        seen = []
        for room, new in zip(self._layers[layer], (k, v), strict=True):
            flat = new.transpose(1, 2).flatten(0, 1)
            room.flatten(0, 1).index_copy_(0, self._to, flat if self._given is None else flat[self._given])
            if not self._alone:
                seen.append(room[self._rows, : self._seen].transpose(1, 2))
        gqa = q.shape[1] != k.shape[1]
        if self._alone:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        if self._mask is not None and self._mask.dtype == torch.bool:
            self._mask = torch.zeros_like(self._mask, dtype=q.dtype).masked_fill_(~self._mask, -torch.inf)
        if gqa and q.shape[2] == 1:  # the queries of a group as so many tokens: no head of keys is repeated
            y = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, q.shape[3]), *seen, self._mask)
            return y.reshape(q.shape)
        return F.scaled_dot_product_attention(q, *seen, self._mask, enable_gqa=gqa)

    def fill(self, row: int, source: Cache, of: int, length: int) -> None:
        """Let a row have the first tokens of a row of a cache of the same model, which may be this one: a copy."""
        assert length <= min(self.capacity, source.lengths[of]), f"{length} tokens of a row of {source.lengths[of]}"
        self.free(row)
        self.lengths[row] = length
        for layer, parts in enumerate(source._layers):
            if layer == len(self._layers):
                self._make(parts[0])
            for mine, theirs in zip(self._layers[layer], parts, strict=True):
                mine[row, :length] = theirs[of, :length]

    def free(self, row: int) -> None:
        """Let a row have no tokens."""
        # Attention weighs what a longer neighbour has and this row has not by 0, which no infinite number bears.
        for part in (part for pair in self._layers for part in pair):
            part[row, : self.lengths[row]].nan_to_num_(0.0, 0.0, 0.0)
        self.lengths[row] = 0

    def _make(self, like: Tensor) -> None:
        """The room of one more layer; like: (..., n_kv_head, head_size)."""
        shape = (len(self.lengths), self.capacity, *like.shape[2:])
        self._layers.append((like.new_zeros(shape), like.new_zeros(shape)))


class Loss(NamedTuple):
    """What a batch adds to a loss. The mean is for who knows all that it is to be taken over."""

    sum: Tensor
    """Of the cross entropies, in nats, of the targets that count, ()."""
    count: Tensor
    """How many those are, () int64."""


@dataclass(frozen=True)
class Weights:
    """The weight of a module, and its bias: what its rows and columns stand for, and how it starts.

    Each module of this file declares its own, and what follows from them follows for every option: growth from the axes
    (model/growth.py), initial values, and which matrices of a layer an adapter adapts (those with two axes).

    Attributes:
        rows, columns: names of axes; no columns for a vector. A bias has the rows. The axes are `vocabulary` and
            `positions`; `writes`, the residual stream for who writes to it; `X_norm` and `X_reads` for X of attn, mlp
            and head, the stream as a norm hands it on to X, and as X reads it; `qkv`, the features of all query, key
            and value heads; `heads_read`, those of the query heads for who reads what they found; `head_features`, of
            one head; `units` and `units_read`, the hidden units of an MLP, and the same for who reads them.
        initial: "normal" | "residual", normal, but smaller the more layers there are | "ones". A bias starts at 0.
        exists: whether a model of this shape has it.
    """

    rows: str
    columns: str = ""
    initial: str = "normal"
    exists: Callable[[ModelConfig], bool] = lambda config: True


class Dropout(nn.Module):
    """Dropout whose probability may change while compiled blocks stay compiled: it lives in a tensor.

    At 0 it costs one comparison and leaves no trace in a compiled graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.0
        self.active = False
        self.register_buffer("keep", torch.tensor(1.0), persistent=False)

    def set(self, p: float) -> None:
        """Drop with this probability from now on."""
        self.p, self.active = p, p > 0
        self.keep.fill_(1.0 - p)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.active):
            return x
        mask = (torch.rand_like(x, dtype=torch.float32) < self.keep).to(x.dtype)
        return x * mask / self.keep.to(x.dtype)


class AdapterDropout(Dropout):
    """Of what an adapter reads: the weight that it adapts reads the whole (lora_dropout)."""


def rotary_frequencies(config: ModelConfig, device: torch.device | str = "cpu", length: int = 0) -> Tensor:
    """The angle by which each pair of features turns from one position to the next, (head_size / 2,) float32 radians.

    rotary_base ** (-2 i / head_size) (Su et al. 2021, arXiv:2104.09864). Llama 3.1 (Grattafiori et al. 2024,
    arXiv:2407.21783; as in transformers' rope type "llama3") divides those that turn rarely in the length that it was
    first trained on. Dynamic NTK (bloc97 and emozilla 2023, in Peng et al., arXiv:2309.00071, appendix B; as in
    transformers' rope type "dynamic") has a larger base the longer a sequence is than that. All of them are divided by
    rotary_scale after that: position interpolation (Chen et al. 2023, arXiv:2306.15595), so it composes with either.

    Args:
        length: tokens of the whole sequence, which dynamic NTK goes by.
    """
    c, base = config, config.rotary_base
    if c.rotary_dynamic_factor and length > c.rotary_original_length:
        stretch = 1 + c.rotary_dynamic_factor * (length / c.rotary_original_length - 1)
        base *= stretch ** (c.head_size / (c.head_size - 2))
    exponents = torch.arange(0, c.head_size, 2, dtype=torch.float32, device=device) / c.head_size
    frequencies = 1.0 / base**exponents
    if c.rotary_llama3_factor != 1.0:
        turns = c.rotary_original_length * frequencies / (2 * math.pi)
        low, high = c.rotary_low_freq_factor, c.rotary_high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = kept * frequencies + (1.0 - kept) * frequencies / c.rotary_llama3_factor
    return frequencies / c.rotary_scale


def rotary_tables(config: ModelConfig, time: int, device: torch.device | str, length: int = 0) -> Rope:
    """Of the first positions of a sequence of so many tokens."""
    positions = torch.arange(time, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rotary_frequencies(config, device, length)).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864), halves rotated as in Hugging Face's Llama."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def document_mask(idx: Tensor, end: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of attention: 0 where a token sees another, else -inf, (batch, 1, time, time).

    A token sees itself and those before it in its own document (Llama 3: Grattafiori et al. 2024, arXiv:2407.21783,
    section 3.2). The token that ends a document belongs to it.

    Args:
        idx: token ids, (batch, time); what stands first in a row may be the rest of a document.
        end: the id that ends a document.
        dtype: that of queries and keys: a mask of bools would be turned into such numbers, and kept, in each block.
    """
    ends = idx == end
    document = ends.cumsum(1) - ends.long()
    seen = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def _attention_with_dropout(attn: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gqa: bool) -> Tensor:
    """Kept out of compiled graphs (compile_blocks): the probability is a constant of the fused kernels' signature."""
    return F.scaled_dot_product_attention(q, k, v, mask, attn.dropout_p, is_causal=mask is None, enable_gqa=gqa)


class _Fading(nn.Module):
    """What attention and MLP share: masks that fade new units, or all that the layer adds, in (set_fading).

    Masks are buffers: their values may change while compiled blocks stay compiled.
    """

    fade_units: Tensor | None
    fade_output: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fade_units", None, persistent=False)
        self.register_buffer("fade_output", None, persistent=False)

    def set_fade(self, fade: Fade | None, unit_size: int, device: torch.device) -> None:
        """Mask as `fade` says; a unit is `unit_size` columns of the layer's output projection."""
        units = output = None
        if fade is not None and fade.known == 0:
            output = torch.tensor(fade.share, device=device)
        elif fade is not None:
            units = torch.ones(self.c_proj.in_features, device=device)
            units[fade.known * unit_size :] = fade.share
        for name, mask in (("fade_units", units), ("fade_output", output)):
            old = getattr(self, name)
            if mask is not None and old is not None and old.shape == mask.shape and old.device == mask.device:
                old.copy_(mask)
            else:
                setattr(self, name, mask)


class Attention(_Fading):
    """Causal self-attention; c_attn makes query, key and value in this order, c_proj brings the heads back.

    With qk_norm an RMSNorm over the features of a head, with weights that all heads share, comes between c_attn and the
    rotary positions (Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442; as in Qwen3).
    """

    WEIGHTS: ClassVar = {
        "c_attn": Weights("qkv", "attn_reads"),
        "c_proj": Weights("writes", "heads_read", initial="residual"),
        "q_norm": Weights("head_features", initial="ones", exists=lambda config: config.qk_norm),
        "k_norm": Weights("head_features", initial="ones", exists=lambda config: config.qk_norm),
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = config.n_head, config.n_kv_head, config.head_size
        self.n_heads = (self.n_head, self.n_kv_head, self.n_kv_head)
        self.widths = [rows.stop - rows.start for rows in config.qkv_rows.values()]
        self.c_attn = Linear(config.n_embd, sum(self.widths), bias=config.attention_biases != "none")
        self.c_proj = Linear(self.widths[0], config.n_embd, bias=config.attention_biases == "all")
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps)
        self.resid_dropout = Dropout()
        self.dropout_p = 0.0
        self.dropout_active = False
        self.attend_with_dropout = _attention_with_dropout

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None = None) -> Tensor:
        """(batch, time, n_embd) -> the same; mask: of `document_mask`, None where a token sees all before it."""
        q, k, v = self._heads(x, rope)
        gqa = self.n_head != self.n_kv_head
        if gqa and mask is not None:  # no fused kernel of CUDA has both a mask and groups of heads
            k, v = (part.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for part in (k, v))
            gqa = False
        if self.training and self.dropout_active:
            return self._out(self.attend_with_dropout(self, q, k, v, mask, gqa))
        return self._out(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa))

    def extend(self, x: Tensor, rope: Rope | None, cache: Cache, layer: int) -> Tensor:
        """What `forward` makes of tokens that follow those of the cache, with them in it."""
        return self._out(cache.attend(layer, *self._heads(x, rope)))

    def _heads(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (batch, heads, time, head_size)."""
        heads = self.c_attn(x).view(*x.shape[:2], -1, self.head_size)
        if self.qk_norm or rope is None:
            q, k, v = (part.transpose(1, 2) for part in heads.split_with_sizes(self.n_heads, dim=2))
            if self.qk_norm:
                q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            if rope is not None:
                q, k = _rotate(q, *rope), _rotate(k, *rope)
            return q, k, v
        *both, values = self.n_heads
        turned, v = heads.split_with_sizes((sum(both), values), dim=2)
        q, k = _rotate(turned.transpose(1, 2), *rope).split_with_sizes(both, dim=1)
        return q, k, v.transpose(1, 2)

    def _out(self, y: Tensor) -> Tensor:
        """What the heads found, (batch, heads, time, head_size), as it is added to the residual stream."""
        y = y.transpose(1, 2).flatten(2)
        if self.fade_units is not None:
            y = y * self.fade_units
        y = self.resid_dropout(self.c_proj(y))
        return y if self.fade_output is None else y * self.fade_output


class MLP(_Fading):
    """n_embd -> n_hidden -> n_embd with GELU, squared ReLU (So et al. 2021, arXiv:2109.08668) or SwiGLU."""

    WEIGHTS: ClassVar = {
        "c_fc": Weights("units", "mlp_reads"),
        "c_gate": Weights("units", "mlp_reads", exists=lambda config: config.activation == "swiglu"),
        "c_proj": Weights("writes", "units_read", initial="residual"),
    }

    def __init__(self, config: ModelConfig, n_hidden: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.c_fc = Linear(config.n_embd, n_hidden, bias=config.mlp_biases)
        if config.activation == "swiglu":
            self.c_gate = Linear(config.n_embd, n_hidden, bias=config.mlp_biases)
        self.c_proj = Linear(n_hidden, config.n_embd, bias=config.mlp_biases)
        self.dropout = Dropout()

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        if self.activation == "gelu":
            h = F.gelu(h)
        elif self.activation == "gelu_tanh":
            h = F.gelu(h, approximate="tanh")
        elif self.activation == "relu2":
            h = F.relu(h).square()
        else:
            h = F.silu(self.c_gate(x)) * h
        if self.fade_units is not None:
            h = h * self.fade_units
        y = self.dropout(self.c_proj(h))
        return y if self.fade_output is None else y * self.fade_output


class _LayerNorm(WithoutDrawing, nn.LayerNorm):
    """In the input's type, also where sharding gathers the weights in a shorter one."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class _RMSNorm(WithoutDrawing, nn.RMSNorm):
    """Likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return _RMSNorm(config.n_embd, eps=config.norm_eps)
    return _LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """One transformer block, normed before each half."""

    WEIGHTS: ClassVar = {"ln_1": Weights("attn_norm", initial="ones"), "ln_2": Weights("mlp_norm", initial="ones")}

    def __init__(self, config: ModelConfig, n_hidden: int) -> None:
        super().__init__()
        self.ln_1 = _norm(config)
        self.attn = Attention(config)
        self.ln_2 = _norm(config)
        self.mlp = MLP(config, n_hidden)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, mask)
        return x + self.mlp(self.ln_2(x))

    def extend(self, x: Tensor, rope: Rope | None, cache: Cache, layer: int) -> Tensor:
        """What `forward` makes of tokens that follow those of the cache, with them in it."""
        x = x + self.attn.extend(self.ln_1(x), rope, cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer language model; `config` says all there is to know about its shape.

    Attributes: `dropout`, `lora_dropout` and `fading`, numbers that may change at any time (set_dropout,
    set_lora_dropout, set_fading). A new model has no dropout and fades nothing in. With `checkpointing` a block keeps
    only its input for the backward pass and computes the rest again there, with the same dropout (activation
    checkpointing, Chen et al. 2016, arXiv:1604.06174). With `document_end`, the id of a token that ends documents, no
    token of a batch sees another document of its row; `extend` goes on with one document and sees all of it.
    """

    WEIGHTS: ClassVar = {
        "wte": Weights("vocabulary", "writes"),
        "wpe": Weights("positions", "writes", exists=lambda config: config.position == "learned"),
        "ln_f": Weights("head_norm", initial="ones"),
        "lm_head": Weights("vocabulary", "head_reads", exists=lambda config: not config.tie_weights),
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed, self.measure = _embed, _measure
        self.dropout = self.lora_dropout = 0.0
        self.fading: dict[str, Fade] = {}
        self.checkpointing = False
        self.document_end: int | None = None
        parts: dict[str, nn.Module] = {"wte": Embedding(config.vocab_size, config.n_embd)}
        if config.position == "learned":
            parts["wpe"] = Embedding(config.block_size, config.n_embd)
        parts["drop"] = Dropout()
        parts["h"] = nn.ModuleList(Block(config, n_hidden) for n_hidden in config.n_hidden)
        parts["ln_f"] = _norm(config)
        self.transformer = nn.ModuleDict(parts)
        if not config.tie_weights:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        # Tables made of the configuration alone: not saved, and made again after construction on the meta device.
        self.register_buffer("rope_cos", torch.empty(0), persistent=False)
        self.register_buffer("rope_sin", torch.empty(0), persistent=False)
        self.register_buffer("fade_logits", None, persistent=False)
        self.reset_buffers(self.transformer["wte"].weight.device)
        if config.lora:
            attach(self, adapted_modules(config), config.qkv_rows, AdapterDropout)
            self.tied_logits = tied_logits

    def reset_buffers(self, device: torch.device) -> None:
        """Make the buffers (rotary tables, dropout, masks) anew on a device: for a model that was built on meta."""
        config = self.config
        if config.position == "rotary":
            self.rope_cos, self.rope_sin = rotary_tables(config, config.block_size, device)
        else:
            self.rope_cos = self.rope_sin = torch.empty(0, device=device)
        for module in self.modules():
            if isinstance(module, Dropout):
                module.keep = torch.tensor(1.0 - module.p, device=device)
        self.set_fading(self.fading)

    def set_fading(self, fading: dict[str, Fade]) -> None:
        """Fade in by these shares, in place; compiled blocks stay compiled while only shares move.

        Args:
            fading: attn.N, mlp.N or lm_head (tied or not) -> how far its newest part is faded in.
        """
        self.fading = fading
        device = self.transformer["wte"].weight.device
        for n, block in enumerate(self.transformer["h"]):
            block.attn.set_fade(fading.get(f"attn.{n}"), self.config.head_size, device)
            block.mlp.set_fade(fading.get(f"mlp.{n}"), 1, device)
        self.fade_logits = None
        if fade := fading.get("lm_head"):
            # A new word counts by `share` in the softmax; at share 0 by 1e-13, nothing in float32 but finite.
            self.fade_logits = torch.zeros(self.config.vocab_size, device=device)
            self.fade_logits[fade.known :] = math.log(max(fade.share, 1e-13))

    def _start(
        self, idx: Tensor, positions: Tensor | None = None, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, Rope | None]:
        """The residual stream (batch, time, n_embd) before the first block, and the rotary tables of these positions.

        Under dynamic NTK all positions of a sequence that is longer than rotary_original_length turn by frequencies
        that follow from its own length alone: not from the length that a batch is filled up to, nor from sequences
        before it, as in transformers (which keep a longer one's frequencies until a short one comes).

        Args:
            positions: of each token, (batch, time), below cache_length; None where every row begins at 0.
            counts: how many tokens each row has; None: all.
        """
        time, config = idx.shape[1], self.config
        assert time <= config.block_size, f"{time} positions in a model of block_size {config.block_size}"
        x = self.embed(self, idx, positions)
        if config.position != "rotary":
            return x, None
        if positions is not None:
            return x, (self.rope_cos[positions][:, None], self.rope_sin[positions][:, None])  # the same for all heads
        counts = counts or [time]
        if max(counts) <= config.cache_length:
            return x, (self.rope_cos[:time], self.rope_sin[:time])
        cos, sin = zip(*(rotary_tables(config, time, idx.device, count) for count in counts), strict=True)
        return x, (torch.stack(cos)[:, None], torch.stack(sin)[:, None])

    def _hidden(self, idx: Tensor, counts: Sequence[int] | None = None, mask: Tensor | None = None) -> Tensor:
        """The residual stream (batch, time, n_embd) after the last block."""
        x, rope = self._start(idx, counts=counts)
        # Around a compiled block and not in it: switching recompiles nothing, and dropout breaks no more graphs.
        for block in self.transformer["h"]:
            x = checkpoint(block, x, rope, mask, use_reentrant=False) if self.checkpointing else block(x, rope, mask)
        return x

    def _mask(self, idx: Tensor) -> Tensor | None:
        """That of the documents of a batch, made once for all blocks."""
        if self.document_end is None:
            return None
        kind = idx.device.type
        lowered = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if lowered else self.transformer["ln_f"].weight.dtype
        return document_mask(idx, self.document_end, dtype)

    def _head(self, x: Tensor) -> Tensor:
        """Logits of the residual stream after the last block."""
        x = self.transformer["ln_f"](x)
        if not self.config.tie_weights:
            logits = self.lm_head(x)
        elif "wte" in self.config.lora:
            logits = self.tied_logits(self.transformer["wte"], x)
        else:
            logits = linear(x, self.transformer["wte"].weight)
        return logits if self.fade_logits is None else logits + self.fade_logits

    def forward(self, idx: Tensor, targets: Tensor) -> Loss:
        """The loss.

        Args:
            idx: token ids, (batch, time), time at most block_size.
            targets: the token that follows each, same shape; -1 where none counts.
        """
        return Loss(*self.measure(self, self._hidden(idx, mask=self._mask(idx)), targets))

    def logits(self, idx: Tensor) -> Tensor:
        """Logits of every position, (batch, time, vocab)."""
        return self._head(self._hidden(idx, mask=self._mask(idx)))

    def extend(
        self, idx: Tensor, counts: Sequence[int], cache: Cache | None = None, first: int = 0, every: bool = False
    ) -> Tensor:
        """Logits after the last of some new tokens, (batch, vocab).

        Args:
            idx: new tokens, (batch, time). What stands after a row's count fills the table up, and nothing sees it.
            counts: how many new tokens each row has, 1 or more.
            cache: the tokens before them, and from now on the new ones too; None where there are none before.
            first: the row of the cache that the first row of idx is; the others follow it.
            every: logits after each new token, (batch, time, vocab); those after a row's count mean nothing.
        """
        x = self._extended(idx, counts, cache, first)
        if every:
            return self._head(x)
        if x.shape[1] > 1:
            x = x[torch.arange(len(x), device=idx.device), torch.tensor(counts, device=idx.device) - 1]
        return self._head(x.flatten(1))

    def score(self, idx: Tensor, counts: Sequence[int], targets: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """How likely given tokens are: log-probabilities in nats, and whether no token is likelier, each (targets,).

        Args:
            idx, counts, cache: as `extend` has them.
            targets: the token that follows each of idx, same shape; -1 where none is asked for. The results are those
                of the others, row by row.
        """
        asked = targets != -1
        x, wanted = self._extended(idx, counts, cache)[asked], targets[asked]
        found = []
        for part, tokens in zip(x.split(_SCORED), wanted.split(_SCORED), strict=True):
            logits = self._head(part).float()
            given = logits.gather(1, tokens[:, None])[:, 0]
            found.append((given - logits.logsumexp(-1), logits.argmax(-1) == tokens))
        return torch.cat([value for value, _ in found]), torch.cat([likeliest for _, likeliest in found])

    def _extended(self, idx: Tensor, counts: Sequence[int], cache: Cache | None, first: int = 0) -> Tensor:
        """The residual stream after the last block, of tokens that follow those of the cache."""
        if cache is None:
            return self._hidden(idx, counts)
        x, rope = self._start(idx, cache.place(idx.shape[1], counts, idx.device, first))
        for layer, block in enumerate(self.transformer["h"]):
            x = block.extend(x, rope, cache, layer)
        return x


_SCORED = 1024
"""Positions whose logits are in memory together."""


def _embed(model: GPT, idx: Tensor, positions: Tensor | None = None) -> Tensor:
    """What comes before the blocks: the embedding of tokens at these positions (from 0 on), (batch, time, n_embd)."""
    x = model.transformer["wte"](idx)
    if "wpe" in model.transformer:
        x = x + model.transformer["wpe"](
            torch.arange(idx.shape[1], device=idx.device) if positions is None else positions
        )
    return model.transformer["drop"](x)


def _measure(model: GPT, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What comes after the blocks: the last norm, the head, and the sum and count of Loss."""
    logits = model._head(x)
    total = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1, reduction="sum")
    return total, (targets != -1).sum()


WEIGHTS: dict[str, Weights] = {
    **GPT.WEIGHTS,
    **Block.WEIGHTS,
    **{f"attn.{child}": weights for child, weights in Attention.WEIGHTS.items()},
    **{f"mlp.{child}": weights for child, weights in MLP.WEIGHTS.items()},
}
"""What the modules declare, by their path in a block or in the model."""
_MODULE = re.compile(r"(?:transformer\.)?(?:h\.(\d+)\.)?((?:(?:attn|mlp)\.)?\w+)")


def weights_of(name: str) -> tuple[Weights, str | None]:
    """What is declared of a module, or of a parameter, by its full name; and the number of its block, if it is in one.

    A LoRA factor has the declaration of the matrix that it adapts.
    """
    match = _MODULE.match(name)
    assert match, name
    return WEIGHTS[match[2]], match[1]


def adapted_modules(config: ModelConfig) -> dict[str, dict[str, LoraSpec]]:
    """Path of each matrix that carries adapters -> part of its rows (ADAPTER: all, or q, k, v) -> the adapter.

    In model order.
    """

    def matrices(name: str) -> list[tuple[str, str]]:
        kind, index, part = (name + "..").split(".")[:3]
        if not index:
            return [("lm_head" if kind == "lm_head" else f"transformer.{kind}", ADAPTER)]
        if part:
            whole = part not in config.qkv_rows
            return [(f"transformer.h.{index}.{kind}.{PROJECTIONS[kind][part]}", ADAPTER if whole else part)]
        there = [path for path, w in WEIGHTS.items() if path.startswith(f"{kind}.") and w.columns and w.exists(config)]
        return [(f"transformer.h.{index}.{path}", ADAPTER) for path in there]

    found: dict[str, dict[str, LoraSpec]] = {}
    for name, spec in config.lora.items():
        for path, part in matrices(name):
            found.setdefault(path, {})[part] = spec
    return found


def init_weights(model: GPT, seed: int) -> None:
    """Fresh weights from a seed, the same on every rank and device; no global random state is used.

    Normal with 0.02 * sqrt(768 / n_embd), which is GPT-2's 0.02 at GPT-2's width and keeps the variance of activations
    at any other: at width 128 a plain 0.02 costs 0.15 nats after 1000 iterations of Tiny Shakespeare. Projections that
    write to the residual stream have it divided by sqrt(2 * n_layer) (GPT-2). Drawn in the order of the parameters, on
    the CPU. Adapters start so that they add nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.copy_(initial_value(name, parameter.shape, model.config, generator))
        if model.config.lora:
            init_adapters(model, adapted_modules(model.config), model.config.qkv_rows, generator)


def initial_value(
    name: str, shape: Sequence[int], config: ModelConfig, generator: torch.Generator, device: str | torch.device = "cpu"
) -> Tensor:
    """A parameter's fresh value by the rule of `init_weights`, drawn on the CPU; on the meta device only its shape."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, device="meta")
    initial = weights_of(name)[0].initial
    if name.endswith("bias") or initial == "ones":
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=device)
    std = 0.02 * math.sqrt(768 / config.n_embd)
    if initial == "residual":
        std /= math.sqrt(2 * config.n_layer)
    return torch.empty(shape).normal_(0.0, std, generator=generator).to(device)


def set_dropout(model: GPT, p: float) -> None:
    """Change the dropout probability of the whole model in place; compiled blocks stay compiled."""
    model.dropout = p
    for module in model.modules():
        if isinstance(module, Dropout) and not isinstance(module, AdapterDropout):
            module.set(p)
        elif isinstance(module, Attention):
            module.dropout_p = p
            module.dropout_active = p > 0


def set_lora_dropout(model: GPT, p: float) -> None:
    """Likewise the probability of dropout before the adapters of Linear layers."""
    model.lora_dropout = p
    for module in model.modules():
        if isinstance(module, AdapterDropout):
            module.set(p)


def compile_blocks(model: GPT, **options: Any) -> None:
    """torch.compile each block, what comes before the blocks and what comes after them, each by itself, in place.

    A block of a known shape reuses the graph that is there. `options` go to torch.compile.
    """
    import torch._dynamo  # takes a second

    # torch gives up on a function after 8 graphs, and computes it without compiling. All blocks are one function, and a
    # schedule that grows and freezes makes more kinds of them than that.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    # Functions of the model and not its methods: a copy of the model must not compute with the first one's weights.
    model.embed, model.measure = torch.compile(_embed, **options), torch.compile(_measure, **options)
    outside = torch.compiler.disable(_attention_with_dropout)
    for block in model.transformer["h"]:
        block.attn.attend_with_dropout = outside
        block.compile(**options)


def crop_block_size(model: GPT, block_size: int) -> GPT:
    """A model for shorter sequences with the same weights. Raises ValueError for longer ones."""
    if block_size > model.config.block_size:
        raise ValueError(f"block_size {block_size} is longer than the model's {model.config.block_size}")
    weights = model.state_dict()
    if model.config.position == "learned":
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size].clone()
    return from_weights(replace(model.config, block_size=block_size), weights)


def from_weights(config: ModelConfig, weights: dict[str, Tensor]) -> GPT:
    """A model that takes over these tensors by name, without initialising anything. Raises ValueError on a mismatch."""
    with torch.device("meta"):
        model = GPT(config)
    if wrong := [
        name for name, value in weights.items() if not isinstance(value, Tensor) or not value.is_floating_point()
    ]:
        raise ValueError(f"weights do not fit the model: {wrong[0]!r} is no tensor of floating-point numbers")
    check_shapes({n: p.shape for n, p in model.named_parameters()}, {n: w.shape for n, w in weights.items()})
    model.load_state_dict(weights, strict=True, assign=True)
    model.reset_buffers(next(iter(weights.values())).device)
    return model


def check_shapes(wanted: Mapping[str, torch.Size], given: Mapping[str, torch.Size]) -> None:
    """Raises ValueError that names tensors which are missing, unexpected, or of another shape."""
    problems = [f"missing {name}" for name in wanted if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in wanted]
    problems += [
        f"{name} has shape {tuple(given[name])}, expected {tuple(shape)}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ValueError(f"weights do not fit the model: {shown}")


def put_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter by its full name."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)


def parameter_count(config: ModelConfig) -> int:
    """Exact number of parameters, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())
