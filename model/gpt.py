"""One GPT, built from one ModelConfig and nothing else.

GPT-2 style (learned positions, LayerNorm, GELU, tied head) and Llama style (rotary positions, RMSNorm, SwiGLU,
grouped-query attention, untied head) are settings of the same blocks. Parameters carry nanoGPT's names. The model
knows no optimizer, no data and no schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrate.model.config import Fade, ModelConfig

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of the positions seen, one pair a block, each (batch, n_kv_head, positions, head_size)."""


class Dropout(nn.Module):
    """Dropout whose probability may change while compiled blocks stay compiled: it lives in a tensor.

    At 0 it costs one comparison and leaves no trace in a compiled graph.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.active = p > 0
        self.register_buffer("keep", torch.tensor(1.0 - p), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.active):
            return x
        mask = (torch.rand_like(x, dtype=torch.float32) < self.keep).to(x.dtype)
        return x * mask / self.keep.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864), halves rotated as in Hugging Face's Llama."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def _attention_with_dropout(attn: Attention, q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> Tensor:
    """Kept out of compiled graphs (compile_blocks): the probability is a constant of the fused kernels' signature."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=attn.dropout_p, is_causal=True, enable_gqa=gqa)


class _Fading(nn.Module):
    """What attention and MLP share: masks that fade new units, or all that the layer adds, in (ModelConfig.fading).

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
    """Causal self-attention; c_attn makes query, key and value in this order, c_proj brings the heads back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = config.n_head, config.n_kv_head, config.head_size
        self.widths = [config.n_head * config.head_size, *[config.n_kv_head * config.head_size] * 2]
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)
        self.c_proj = nn.Linear(self.widths[0], config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        self.dropout_p = config.dropout
        self.dropout_active = config.dropout > 0
        self.attend_with_dropout = _attention_with_dropout

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(batch, time, n_embd) -> the same, and keys and values so far (for a cache)."""
        batch, time, _ = x.shape
        q, k, v = self.c_attn(x).split(self.widths, dim=2)
        q = q.view(batch, time, self.n_head, self.head_size).transpose(1, 2)
        k = k.view(batch, time, self.n_kv_head, self.head_size).transpose(1, 2)
        v = v.view(batch, time, self.n_kv_head, self.head_size).transpose(1, 2)
        if rope is not None:
            q, k = _rotate(q, *rope), _rotate(k, *rope)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        gqa = self.n_head != self.n_kv_head
        if self.training and self.dropout_active:
            y = self.attend_with_dropout(self, q, k, v, gqa)
        elif past is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        else:
            # New queries see everything cached and, among themselves, what is before them.
            mask = torch.ones(time, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - time)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
        y = y.transpose(1, 2).reshape(batch, time, self.widths[0])
        if self.fade_units is not None:
            y = y * self.fade_units
        y = self.resid_dropout(self.c_proj(y))
        return (y if self.fade_output is None else y * self.fade_output), (k, v)


class MLP(_Fading):
    """n_embd -> n_hidden -> n_embd with GELU, squared ReLU (So et al. 2021, arXiv:2109.08668) or SwiGLU."""

    def __init__(self, config: ModelConfig, n_hidden: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, n_hidden, bias=config.bias)
        if config.activation == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, n_hidden, bias=config.bias)
        self.c_proj = nn.Linear(n_hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

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


class _LayerNorm(nn.LayerNorm):
    """In the input's type, also where sharding gathers the weights in a shorter one."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class _RMSNorm(nn.RMSNorm):
    """Likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return _RMSNorm(config.n_embd, eps=config.norm_eps)
    return _LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def _embedding(rows: int, columns: int) -> nn.Embedding:
    """Without torch's initial values: every weight is set later, and drawing normals on meta imports the compiler."""
    return nn.Embedding(rows, columns, _weight=torch.empty(rows, columns))


class Block(nn.Module):
    """One transformer block, normed before each half."""

    def __init__(self, config: ModelConfig, n_hidden: int) -> None:
        super().__init__()
        self.ln_1 = _norm(config)
        self.attn = Attention(config)
        self.ln_2 = _norm(config)
        self.mlp = MLP(config, n_hidden)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.attn(self.ln_1(x), rope, past)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), present


class GPT(nn.Module):
    """A decoder-only transformer language model; `config` says all there is to know about its shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        parts: dict[str, nn.Module] = {"wte": _embedding(config.vocab_size, config.n_embd)}
        if config.position == "learned":
            parts["wpe"] = _embedding(config.block_size, config.n_embd)
        parts["drop"] = Dropout(config.dropout)
        parts["h"] = nn.ModuleList(Block(config, n_hidden) for n_hidden in config.n_hidden)
        parts["ln_f"] = _norm(config)
        self.transformer = nn.ModuleDict(parts)
        if not config.tie_weights:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Tables made of the configuration alone: not saved, and made again after construction on the meta device.
        self.register_buffer("rope_cos", torch.empty(0), persistent=False)
        self.register_buffer("rope_sin", torch.empty(0), persistent=False)
        self.register_buffer("fade_logits", None, persistent=False)
        self.reset_buffers(self.transformer["wte"].weight.device)
        if config.lora:
            from orchestrate.model.lora import attach  # peft's layers wrap what is built here

            attach(self)

    def reset_buffers(self, device: torch.device) -> None:
        """Make the buffers (rotary tables, dropout, masks) anew on a device: for a model that was built on meta."""
        config = self.config
        if config.position == "rotary":
            half = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device) / config.head_size
            angles = torch.outer(
                torch.arange(config.block_size, dtype=torch.float32, device=device) / config.rotary_scale,
                config.rotary_base**-half,
            ).repeat(1, 2)
            self.rope_cos, self.rope_sin = angles.cos(), angles.sin()
        else:
            self.rope_cos = self.rope_sin = torch.empty(0, device=device)
        for module in self.modules():
            if isinstance(module, Dropout):
                module.keep = torch.tensor(1.0 - config.dropout, device=device)
        self.set_fading(config.fading)

    def set_fading(self, fading: dict[str, Fade]) -> None:
        """Follow other shares of what fades in, in place; compiled blocks stay compiled while only shares move."""
        self.config = replace(self.config, fading=fading)
        device = self.transformer["wte"].weight.device
        for n, block in enumerate(self.transformer["h"]):
            block.attn.set_fade(fading.get(f"attn.{n}"), self.config.head_size, device)
            block.mlp.set_fade(fading.get(f"mlp.{n}"), 1, device)
        self.fade_logits = None
        if fade := fading.get("lm_head"):
            # A new word counts by `share` in the softmax; at share 0 by 1e-13, nothing in float32 but finite.
            self.fade_logits = torch.zeros(self.config.vocab_size, device=device)
            self.fade_logits[fade.known :] = math.log(max(fade.share, 1e-13))

    def _hidden(self, idx: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """The normed residual stream (batch, time, n_embd) of tokens that follow what `past` has seen."""
        start = past[0][0].shape[2] if past else 0
        end = start + idx.shape[1]
        assert end <= self.config.block_size, f"{end} positions in a model of block_size {self.config.block_size}"
        x = self.transformer["wte"](idx)
        rope = None
        if self.config.position == "learned":
            x = x + self.transformer["wpe"](torch.arange(start, end, device=idx.device))
        else:
            rope = (self.rope_cos[start:end], self.rope_sin[start:end])
        x = self.transformer["drop"](x)
        present: Cache = []
        for i, block in enumerate(self.transformer["h"]):
            x, keys_values = block(x, rope, past[i] if past else None)
            present.append(keys_values)
        return self.transformer["ln_f"](x), present

    def _head(self, x: Tensor) -> Tensor:
        logits = self._full_logits(x)
        return logits if self.fade_logits is None else logits + self.fade_logits

    def _full_logits(self, x: Tensor) -> Tensor:
        if not self.config.tie_weights:
            return self.lm_head(x)
        if "wte" in self.config.lora:
            from orchestrate.model.lora import tied_logits

            return tied_logits(self.transformer["wte"], x)
        return F.linear(x, self.transformer["wte"].weight)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits, and with targets the loss.

        Args:
            idx: token ids, (batch, time), time at most block_size.
            targets: the token that follows each, same shape; -1 where none counts.

        Returns:
            (logits (batch, time, vocab), mean cross entropy in nats ()) with targets, else (logits of the last
            position (batch, 1, vocab), None).
        """
        x, _ = self._hidden(idx)
        if targets is None:
            return self._head(x[:, -1:]), None
        logits = self._head(x)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def logits(self, idx: Tensor) -> Tensor:
        """Logits of every position, (batch, time, vocab)."""
        return self._head(self._hidden(idx)[0])

    def extend(self, idx: Tensor, past: Cache | None) -> tuple[Tensor, Cache]:
        """Logits of the last of some new tokens, (batch, vocab), and the cache with them in it."""
        x, present = self._hidden(idx, past)
        return self._head(x[:, -1]), present


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
            from orchestrate.model.lora import init_adapters

            init_adapters(model, generator)


def initial_value(
    name: str, shape: Sequence[int], config: ModelConfig, generator: torch.Generator, device: str | torch.device = "cpu"
) -> Tensor:
    """A parameter's fresh value by the rule of `init_weights`, drawn on the CPU; on the meta device only its shape."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, device="meta")
    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=device)
    std = 0.02 * math.sqrt(768 / config.n_embd)
    if "c_proj" in name:
        std /= math.sqrt(2 * config.n_layer)
    return torch.empty(shape).normal_(0.0, std, generator=generator).to(device)


def set_dropout(model: GPT, p: float) -> None:
    """Change the dropout probability of the whole model in place; compiled blocks stay compiled."""
    model.config = replace(model.config, dropout=p)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.active = p > 0
            module.keep.fill_(1.0 - p)
        elif isinstance(module, Attention):
            module.dropout_p = p
            module.dropout_active = p > 0


def compile_blocks(model: GPT, **options: Any) -> None:
    """torch.compile each block by itself, in place: a block of a known shape reuses the graph that is there.

    `options` go to torch.compile.
    """
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
