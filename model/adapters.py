"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) as peft's own layers, named as peft names them.

For any adapted matrix W (rows, cols) the product is written s * L @ R here, with s = LoraSpec.scaling: L (rows, rank)
starts at zero and R (rank, cols) does not. For a Linear L is peft's B and R its A; for an Embedding they are the
transposes of A and B. Queries, keys and values are rows of one matrix: an adapter on one of them alone is RowsLinear,
which computes as peft's layer and has peft's names, with the part's instead of ADAPTER. How a rank changes while the
model trains is lora.py's to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrate.model.config import LoraSpec
from orchestrate.model.narrow import linear

ADAPTER = "default"
"""peft's name of the one adapter of a whole matrix."""
Adapted = Mapping[str, Mapping[str, LoraSpec]]
"""Path of each matrix that carries adapters -> part of it (ADAPTER: all of it, or q, k, v) -> the adapter."""


class RowsLinear(nn.Module):
    """A Linear with adapters on some of its rows. Weights are those of peft's Linear, one pair a part."""

    def __init__(
        self,
        base: nn.Linear,
        specs: Mapping[str, LoraSpec],
        rows: Mapping[str, slice],
        dropout: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.parts = [(part, rows[part].stop - rows[part].start) for part in rows]
        self.scaling = {part: spec.scaling for part, spec in specs.items()}
        self.lora_dropout = nn.ModuleDict({part: dropout() for part in specs})
        self.lora_A = nn.ModuleDict(
            {part: nn.Linear(base.in_features, spec.rank, bias=False) for part, spec in specs.items()}
        )
        sizes = dict(self.parts)
        self.lora_B = nn.ModuleDict({part: nn.Linear(s.rank, sizes[part], bias=False) for part, s in specs.items()})

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        pieces = list(result.split([size for _, size in self.parts], dim=-1))
        for n, (part, _) in enumerate(self.parts):
            if part in self.scaling:
                right, left = self.lora_A[part], self.lora_B[part]
                added = left(right(self.lora_dropout[part](x.to(right.weight.dtype)))) * self.scaling[part]
                pieces[n] = (pieces[n] + added).to(result.dtype)
        return torch.cat(pieces, dim=-1)


def attach(model: nn.Module, adapted: Adapted, rows: Mapping[str, slice], dropout: Callable[[], nn.Module]) -> None:
    """Wrap the modules at these paths. Values are set by whoever makes or loads the weights.

    Args:
        rows: of each part of a matrix.
        dropout: makes the module that drops from what an adapter reads (peft's Embedding has none).
    """
    # Here and not above: importing peft takes seconds, and a run without adapters should not pay for it.
    from peft import LoraConfig
    from peft.tuners.lora import layer as peft_layers

    for path, specs in adapted.items():
        parent, _, child = path.rpartition(".")
        owner = model.get_submodule(parent)
        base = owner[child] if isinstance(owner, nn.ModuleDict) else getattr(owner, child)
        if spec := specs.get(ADAPTER):
            kind = peft_layers.Embedding if isinstance(base, nn.Embedding) else peft_layers.Linear
            options = LoraConfig(
                r=spec.rank,
                lora_alpha=spec.alpha,
                lora_dropout=0.0,
                init_lora_weights=False,
                use_rslora=spec.use_rslora,
            )
            wrapped = kind(base, ADAPTER, config=options, r=spec.rank, lora_alpha=spec.alpha)
            if kind is peft_layers.Linear:
                wrapped.lora_dropout[ADAPTER] = dropout()
        else:
            wrapped = RowsLinear(base, specs, rows, dropout)
        if isinstance(owner, nn.ModuleDict):
            owner[child] = wrapped
        else:
            setattr(owner, child, wrapped)


def factor_names(path: str, embedding: bool, part: str = ADAPTER) -> tuple[str, str]:
    """Parameter names of (L, R)."""
    if embedding:
        return f"{path}.lora_embedding_A.{ADAPTER}", f"{path}.lora_embedding_B.{ADAPTER}"
    return f"{path}.lora_B.{part}.weight", f"{path}.lora_A.{part}.weight"


def fresh_right(rank: int, cols: int, embedding: bool, generator: torch.Generator) -> Tensor:
    """New rows of R, (rank, cols), drawn as peft does: uniform in 1/sqrt(cols), for an Embedding normal."""
    values = torch.empty(rank, cols)
    if embedding:
        return values.normal_(generator=generator)
    bound = 1.0 / math.sqrt(cols)
    return values.uniform_(-bound, bound, generator=generator)


def principal(weight: Tensor, spec: LoraSpec) -> tuple[Tensor, Tensor]:
    """(L, R) of PiSSA, in float32 as peft computes them: the strongest directions of a weight, equally strong in both.

    Where they are, the weight has to give s * L @ R away.
    """
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (s[: spec.rank] / spec.scaling).sqrt()
    return u[:, : spec.rank] * root, root[:, None] * vh[: spec.rank]


def init_adapters(model: nn.Module, adapted: Adapted, rows: Mapping[str, slice], generator: torch.Generator) -> None:
    """Fresh factors for every adapter, from the generator and the weights alone: L zero and R random, or PiSSA."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, part, spec in [(path, *one) for path, specs in adapted.items() for one in specs.items()]:
            embedding = path == "transformer.wte"
            left, right = (parameters[name] for name in factor_names(path, embedding, part))
            base = parameters[f"{path}.base_layer.weight"][rows.get(part, slice(None))]
            if spec.init_lora_weights == "pissa":
                new_left, new_right = principal(base, spec)
                base -= spec.scaling * (new_left @ new_right)
            else:
                new_left = torch.zeros(len(base), spec.rank)
                new_right = fresh_right(spec.rank, base.shape[1], embedding, generator)
            left.copy_(new_left.T if embedding else new_left)
            right.copy_(new_right.T if embedding else new_right)


def tied_logits(wte: nn.Module, x: Tensor) -> Tensor:
    """Logits of a head tied to an adapted embedding (peft's Embedding): x @ (W + s * L @ R).T, sharing the factors."""
    left, right = wte.lora_embedding_A[ADAPTER].T, wte.lora_embedding_B[ADAPTER].T
    return linear(x, wte.base_layer.weight) + F.linear(F.linear(x, right), left) * wte.scaling[ADAPTER]
