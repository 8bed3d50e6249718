"""Families of published models; a new one is a file here, and a line below."""

from orchestrate.model.families.family import Family
from orchestrate.model.families.gpt2 import GPT2
from orchestrate.model.families.llama import LLAMA, QWEN3

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT2, LLAMA, QWEN3)}
"""By transformers' model type."""
