"""Text from a model, one token at a time, with a cache of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrate.model.gpt import GPT, Cache


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue token sequences.

    Args:
        idx: prompts, (batch, time) with time >= 1; of a long prompt the last block_size tokens count.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are drawn.
        use_cache: keep keys and values. The result is that of computing every position anew. Once the text is longer
            than block_size the window slides, every position changes, and no cache can help: each token then costs a
            full forward pass.

    Returns:
        (batch, time + max_new_tokens), the prompt included.
    """
    block_size = model.config.block_size
    was_training = model.training
    model.eval()
    cache: Cache | None = None
    try:
        for _ in range(max_new_tokens):
            if use_cache and idx.shape[1] <= block_size:
                new = idx if cache is None else idx[:, -1:]
                logits, cache = model.extend(new, cache)
            else:
                logits, _ = model.extend(idx[:, -block_size:], None)
            idx = torch.cat((idx, _draw(logits, temperature, top_k, generator)), dim=1)
    finally:
        model.train(was_training)
    return idx


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits (batch, vocab): (batch, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kept = torch.topk(logits, min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)
