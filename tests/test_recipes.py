"""Every shipped schedule runs to its end on a small model, its waits shortened; the page of operations is current."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import yaml
from conftest import ROOT, events

RECIPES = sorted((ROOT / "schedules").iterdir())
WAITS = ("max_wait_iters", "max_wait_tokens", "at_iter", "at_tokens")


def shortened(path) -> list[dict]:
    """The schedule as it is, but with waits of one iteration and ramps of two."""
    text = path.read_text("utf-8")
    entries = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    entries = entries["operations"] if isinstance(entries, dict) else entries
    for entry in entries:
        for key in WAITS:
            entry.pop(key, None)
        if any(key.startswith("trigger") for key in entry) or "desc" in entry:
            entry["max_wait_iters"] = 1
        if "over" in entry:
            entry["over"] = 2
        if "guard" in entry:
            entry["guard"]["within_iters"] = 2
    return entries


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_runs_to_its_end(path, tiny):
    schedule = shortened(path)
    # Four layers, because recipes name the lower ones; accumulation 2 and batch 8 take the batch changes.
    code, out = tiny(schedule, n_layer=4, batch_size=8, max_iters=24, eval_interval=8, eval_iters=1, embedding_rank=0)
    assert code == 0
    assert [e["entry"] for e in events(out, "operation")] == list(range(1, len(schedule) + 1))
    assert not events(out, "error") and not events(out, "rollback")


def test_there_are_recipes_and_each_says_where_it_comes_from_and_what_to_expect():
    taught = 0
    for path in RECIPES:
        if path.suffix == ".yaml":
            head = re.match(r"(#.*\n)+", path.read_text("utf-8"))[0]
            taught += "Source" in head and "xpect" in head
    assert taught >= 10


def test_the_page_of_operations_is_what_the_classes_say():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate_operations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert page == module.page(), "run: python docs/generate_operations.py"
