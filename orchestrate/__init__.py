"""The one importable name of the project: orchestrate.training, orchestrate.model, orchestrate.data, orchestrate.tools.

In a checkout these rooms lie beside this folder, at the top level; in an installed package they lie inside it. Their
plain names are never imported, so a `data` or `model` folder of somebody else's cannot be taken for ours.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not (_HERE / "training").is_dir():  # a checkout
    __path__.append(str(_HERE.parent))
