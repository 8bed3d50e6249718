"""The validation loss: the same fixed windows every time, summed over all ranks, one number everywhere.

The sums of the batches are put together in the order of the batches whatever rank made them, so the loss is equal
to the last bit on every rank and, for equal weights, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from orchestrate.data.stream import TokenFile, eval_windows, gather
from orchestrate.model.gpt import GPT
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.sharding import reshard
from orchestrate.training.settings.errors import Refused, RefusedHere


@torch.no_grad()
def validation_loss(
    model: GPT,
    tokens: TokenFile,
    *,
    batches: int,
    batch_size: int,
    block_size: int,
    ranks: Ranks,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    poll: Callable[[], int],
) -> float | None:
    """Mean cross entropy in nats per target that counts, or None if `poll` said stop.

    Over at most batches * batch_size windows: more than the file has means each of them once. `poll` is called once a
    batch; every rank must see the same answer.
    """
    starts = eval_windows(tokens, batches * batch_size, block_size)
    chunks = [starts[i : i + batch_size] for i in range(0, len(starts), batch_size)]
    # A row of sums and a row of counts.
    losses = torch.zeros(2, len(chunks), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    was_training = model.training
    model.eval()
    try:
        for mine, counts in ranks.turns(len(chunks)):
            if poll():
                return None
            if mine is not None:
                chunk = chunks[mine]
                try:
                    pair = gather(tokens, chunk, block_size, model.config.vocab_size)
                except ValueError as error:
                    raise RefusedHere(f"the data does not fit the model: {error}") from None
                x, y = (torch.from_numpy(a).to(device) for a in pair)
                with autocast():
                    loss = model(x, y)
            if counts:
                for row, value in enumerate(loss):
                    losses[row, mine] = value.double() if device.type != "mps" else value.cpu().double()
    finally:
        model.train(was_training)
        if ranks.sharded:
            reshard(model)
    total, count = ranks.sum(losses.cpu().numpy()).sum(axis=1)
    if not count:
        raise Refused(f"{tokens.path}: its mask leaves out every target of an evaluation; more eval_iters see more")
    return float(total / count)
