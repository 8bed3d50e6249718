"""The directions of imports, and that documents name what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT
from orchestrate.training.operations import OPERATIONS

ROOMS = ("model", "data", "training")
# Inside training: a file may import only files of a lower floor (docs/architecture.md).
FLOORS = [
    {"errors", "values", "injection", "optimizer", "out_of_memory"},
    {"sharding"},
    {"records", "config", "distributed"},
    {"learning_rate", "triggers", "checkpoint", "stopping", "evaluation"},
    {"operations"},
    {"schedule"},
    {"run"},
    {"memory", "orchestrator", "reporting", "setup"},
    {"session", "plan"},
    {"loop"},
]


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it is loaded (not inside functions or for type checking)."""
    found = set()
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(room: str) -> list[Path]:
    return [path for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"]


def test_model_and_data_know_neither_each_other_nor_training():
    for room in ("model", "data"):
        for path in files(room):
            others = {other for other in ROOMS if other != room}
            used = {name.split(".")[0] for name in imports(path)}
            assert not used & others, path
    for path in files("data"):
        assert "torch" not in {name.split(".")[0] for name in imports(path)}, path


def floor(module: str) -> int:
    name = module.split(".")[1]
    return next(i for i, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("path", files("training"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_in_training_go_down(path):
    here = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for module in imports(path):
        if module.startswith("training.") and module.split(".")[1] != here.split(".")[1]:
            assert floor(module) < floor(here), f"{here} imports {module}"


@pytest.mark.parametrize(
    "what, pattern, allowed",
    [
        (
            "torch.distributed",
            r"import torch\.distributed(?!\.checkpoint)|from torch\.distributed|DistributedDataParallel",
            {"training/run/distributed.py", "training/run/sharding.py"},
        ),
        ("print", r"^\s*print\(", {"training/store/reporting.py", "train_orchestrated.py", "sample.py"}),
        ("save_file", r"save_file|torch\.save\(|distributed\.checkpoint", {"training/store/checkpoint.py"}),
        ("requires_grad_", r"requires_grad_\(", {"training/run/run.py"}),
        ("unpickling", r"pickle\.load|torch\.load\((?!path, map_location=.cpu., weights_only=True)", set()),
    ],
)
def test_one_file_for_each_power(what, pattern, allowed):
    sources = [*files("training"), *files("model"), ROOT / "train_orchestrated.py", ROOT / "sample.py"]
    found = {
        str(path.relative_to(ROOT))
        for path in sources
        if re.search(pattern, re.sub(r'""".*?"""', "", path.read_text("utf-8"), flags=re.S), re.M)
    }
    assert found <= allowed, what


def test_the_loop_fits_on_one_screen():
    assert len((ROOT / "training/loop.py").read_text().splitlines()) <= 70


def test_every_file_says_what_it_is():
    for room in (*ROOMS, "config", "tests", "bench"):
        for path in (ROOT / room).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path
    for path in (ROOT / "schedules").glob("*.yaml"):
        assert path.read_text("utf-8").startswith("# "), path


def test_documents_name_files_and_operations_that_exist():
    text = "".join(path.read_text("utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for name in set(
        re.findall(r"\b(?:training|model|data|config|schedules|docs|tests|bench)/[\w/]+\.(?:py|md|yaml|json)\b", text)
    ):
        assert (ROOT / name).exists(), name
    tree = re.search(r"## Files\s+```text\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)[1]
    for path in [*files("training"), *files("model"), *files("data")]:
        if "operations" not in path.parts and path.name != "prepare.py":
            assert path.name in tree, f"{path.name} is missing from the README's file tree"
    for name in OPERATIONS:
        assert f"`{name}`" in text, f"{name} is not in the documents"
