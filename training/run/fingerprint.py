"""One short text made of the bits of tensors, to compare ranks and runs by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.sharding import local


def fingerprint(facts: Iterable[str], tensors: Mapping[str, Tensor], ranks: Ranks) -> str:
    """These facts, and names, shapes, trainability and bits of the tensors. Collective where they are sharded."""
    parts, sums = list(facts), []
    for name, tensor in sorted(tensors.items()):  # moments that came from a file are in another order
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.requires_grad}")
        sums.append(bit_sums(*local(tensor.detach())))
    totals = torch.stack(sums).numpy()
    if ranks.sharded:
        totals = sum(ranks.gather(totals))
    parts += [str(value) for value in totals.tolist()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def bit_sums(tensor: torch.Tensor, before: int) -> torch.Tensor:
    """Two integers made of the tensor's bits, whatever the order of summation; (2,) int64 on the CPU.

    `before`: elements of the full tensor that lie before this part of it; the integers of all parts add up.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    values = tensor.contiguous().reshape(-1).view(bits)
    # The second sum skips every other value, so that neighbours which changed places are seen.
    return torch.stack([values.sum(dtype=torch.int64), values[before % 2 :: 2].sum(dtype=torch.int64)]).cpu()
