"""Weights, gradients and moments sharded over the ranks: parallel=fsdp, with torch's FSDP2 and DTensors.

Every block, and what lies around the blocks, is one unit of `fully_shard`: its weights are gathered right before use
and freed after it. A change of shape takes the long way round: whole tensors in host memory, the same reshape with
the same lineage as without sharding, and shards again. torch.distributed is imported late: it takes a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from orchestrate.model.gpt import GPT, from_weights
from orchestrate.model.lineage import State
from orchestrate.model.narrow import wide

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: GPT, mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> GPT:
    """Shard a model in place along the first dimension of each parameter, on the mesh's device; also one on meta.

    Args:
        dtype: bfloat16 gathers the blocks' weights in it, which halves what is sent; shards and moments stay float32,
            and gradients are added up in float32. What lies around the blocks (embedding, last norm, head) is gathered
            as it is: the residual stream starts and the logits end in full precision.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    options = {}
    if dtype == torch.bfloat16:
        # Inputs are not cast: autocast decides what is computed in which type, as without sharding.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        options = {"mp_policy": policy}

    for block in model.transformer["h"]:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh)
    for module in (*model.transformer["h"], model):
        register_fsdp_forward_method(module, "extend")  # generating gathers weights as a forward pass does
    register_fsdp_forward_method(model, "score")
    return model


def shard_state(state: State, model: GPT) -> State:
    """Moments sharded as the parameters of a sharded model are; single numbers stay as they are.

    No rank sends anything.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = dict(model.named_parameters())

    def placed(name: str, value: Tensor) -> Tensor:
        like = parameters[name]
        if isinstance(value, DTensor) or not value.dim():
            return value.to(like.device)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    return {name: {key: placed(name, value) for key, value in moments.items()} for name, moments in state.items()}


def unshard(model: GPT, state: State) -> tuple[GPT, State]:
    """The whole model and its moments in host memory, on every rank. Collective."""
    weights = {name: whole(p.detach()).cpu() for name, p in model.named_parameters()}
    moments = {name: {k: whole(v).cpu() for k, v in parts.items()} for name, parts in state.items()}
    return from_weights(model.config, weights), moments


def empty(model: GPT, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype) -> GPT:
    """A model on meta as a sharded one without values, which never existed whole anywhere."""
    shard(model, mesh, dtype).to_empty(device=device)
    model.reset_buffers(device)
    return model


def empty_state(shape: torch.Size, like: Tensor) -> Tensor:
    """Zeros of a moment's shape, sharded as the parameter is; a single number is whole, on the CPU."""
    from torch.distributed.tensor import zeros

    if not shape:
        return torch.zeros(())
    return zeros(shape, dtype=wide(like.dtype), device_mesh=like.device_mesh, placements=like.placements)


def reshard(model: GPT) -> None:
    """After a forward pass without a backward pass: free what FSDP2 keeps whole for the backward pass.

    Until then the model's parameters are the whole ones, not those that the optimizer knows.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on this rank. Collective for a sharded one."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's part, and how many elements of the full tensor lie before it."""
    if not is_sharded(tensor):
        return tensor, 0
    # FSDP2 gives each rank as many rows as torch.chunk would: the same number, and the last ones fewer or none.
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    first = min(rows * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return tensor.to_local(), first * (tensor.numel() // max(tensor.shape[0], 1))


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing what one is."""
    return hasattr(tensor, "full_tensor")


def gradient_norm(parameters: list[nn.Parameter], clip: float) -> Tensor:
    """The norm of all gradients together, () on this rank's device; they are scaled down to `clip` if it is above 0."""
    if clip > 0:
        return whole(nn.utils.clip_grad_norm_(parameters, clip))
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
