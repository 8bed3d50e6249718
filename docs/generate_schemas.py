"""Writes schedules/schema.json and docs/plan.schema.json from the types: python docs/generate_schemas.py

The first is what editors complete and check schedules by, the second what `orchestrate plan --json` writes. A test
compares both files with what this makes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from orchestrate.training import plan  # noqa: E402
from orchestrate.training.schedule import file_schema  # noqa: E402

FILES = {"schedules/schema.json": file_schema.json_schema, "docs/plan.schema.json": plan.json_schema}


def text(path: str) -> str:
    """What one of the files says."""
    return json.dumps(FILES[path](), indent=1) + "\n"


if __name__ == "__main__":
    for path in FILES:
        (ROOT / path).write_text(text(path), "utf-8")
