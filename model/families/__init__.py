"""Families of published models; a new one is a file here, and a line below."""

from orchestrate.model.families.family import Family
from orchestrate.model.families.gpt2 import GPT2
from orchestrate.model.families.llama import ARCEE, LLAMA, MISTRAL, QWEN2, QWEN3, STARCODER2

FAMILIES: dict[str, Family] = {
    family.name: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, STARCODER2, ARCEE)
}
"""By transformers' model type."""
REFUSED: dict[str, str] = {
    "gpt_neox": "attention and MLP beside each other, and rotary positions on a part of each head",
    "olmo2": "norms after attention and MLP, and norms of queries and keys over all heads together",
    "olmo": "norms without weights",
    "gemma": "GeGLU, norms of 1 + weight, and a scaled embedding",
    "gemma2": "GeGLU, norms before and after, soft caps on logits, and windows that slide",
    "mixtral": "a mixture of experts",
    "qwen2_moe": "a mixture of experts",
    "qwen3_moe": "a mixture of experts",
}
"""Well-known model types that are not understood, and what they have that no option here is."""
