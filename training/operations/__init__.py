"""All operations a schedule can name. Importing this package registers them."""

from orchestrate.training.operations import batch, control, data, freezing, growth, hyperparameters, lora, memory
from orchestrate.training.operations.base import OPERATIONS, Operation, make

__all__ = [
    "OPERATIONS",
    "Operation",
    "batch",
    "control",
    "data",
    "freezing",
    "growth",
    "hyperparameters",
    "lora",
    "make",
    "memory",
]
