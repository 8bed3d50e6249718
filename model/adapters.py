"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) as peft's own layers, named as peft names them.

For any adapted matrix W (rows, cols) the product is written s * L @ R here, with s = alpha / rank: L (rows, rank)
starts at zero and R (rank, cols) does not. For a Linear L is peft's B and R its A; for an Embedding they are the
transposes of A and B. How a rank changes while the model trains is lora.py's to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrate.model.config import LoraSpec
from orchestrate.model.narrow import linear

ADAPTER = "default"


def attach(model: nn.Module, adapted: Mapping[str, LoraSpec]) -> None:
    """Wrap the modules at these paths. Values are set by whoever makes or loads the weights."""
    # Here and not above: importing peft takes seconds, and a run without adapters should not pay for it.
    from peft import LoraConfig
    from peft.tuners.lora import layer as peft_layers

    for path, spec in adapted.items():
        parent, _, child = path.rpartition(".")
        owner = model.get_submodule(parent)
        base = owner[child] if isinstance(owner, nn.ModuleDict) else getattr(owner, child)
        kind = peft_layers.Embedding if isinstance(base, nn.Embedding) else peft_layers.Linear
        options = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=0.0, init_lora_weights=False)
        wrapped = kind(base, ADAPTER, config=options, r=spec.rank, lora_alpha=spec.alpha)
        if isinstance(owner, nn.ModuleDict):
            owner[child] = wrapped
        else:
            setattr(owner, child, wrapped)


def factor_names(path: str, embedding: bool) -> tuple[str, str]:
    """Parameter names of (L, R)."""
    if embedding:
        return f"{path}.lora_embedding_A.{ADAPTER}", f"{path}.lora_embedding_B.{ADAPTER}"
    return f"{path}.lora_B.{ADAPTER}.weight", f"{path}.lora_A.{ADAPTER}.weight"


def fresh_right(rank: int, cols: int, embedding: bool, generator: torch.Generator) -> Tensor:
    """New rows of R, (rank, cols), drawn as peft does: uniform in 1/sqrt(cols), for an Embedding normal."""
    values = torch.empty(rank, cols)
    if embedding:
        return values.normal_(generator=generator)
    bound = 1.0 / math.sqrt(cols)
    return values.uniform_(-bound, bound, generator=generator)


def init_adapters(model: nn.Module, adapted: Mapping[str, LoraSpec], generator: torch.Generator) -> None:
    """Fresh factors for every adapter, from the generator alone: L zero, R random."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, spec in adapted.items():
            embedding = path == "transformer.wte"
            left, right = (parameters[name] for name in factor_names(path, embedding))
            left.zero_()
            cols = right.shape[0] if embedding else right.shape[1]
            fresh = fresh_right(spec.rank, cols, embedding, generator)
            right.copy_(fresh.T if embedding else fresh)


def tied_logits(wte: nn.Module, x: Tensor) -> Tensor:
    """Logits of a head tied to an adapted embedding (peft's Embedding): x @ (W + s * L @ R).T, sharing the factors."""
    left, right = wte.lora_embedding_A[ADAPTER].T, wte.lora_embedding_B[ADAPTER].T
    return linear(x, wte.base_layer.weight) + F.linear(F.linear(x, right), left) * wte.scaling[ADAPTER]
