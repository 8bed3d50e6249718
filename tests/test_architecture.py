"""The directions of imports, and that documents name what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

from orchestrate.training.operations import OPERATIONS

ROOMS = ("model", "data", "training", "tools")
# Inside training: a room may import only rooms of a lower floor (docs/architecture.md).
FLOORS = [
    {"settings"},
    {"run"},
    {"store", "operations", "tasks"},
    {"schedule"},
    {"report"},
    {"session"},
    {"plan"},
    {"loop"},
]


def files(room: str) -> list[Path]:
    return [path for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"]


def module_of(path: Path) -> str:
    return ".".join(("orchestrate", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for room in ROOMS for path in (ROOT / room).rglob("*.py")}


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, inside functions too; not those that only type checkers see."""
    found = set()
    hidden = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            hidden.update(id(inner) for inner in ast.walk(node))
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_import_of_ours_goes_by_its_one_name():
    """`import training` in a checkout would be a second copy of it, and somebody else's elsewhere."""
    for path in [*MODULES.values(), *(ROOT / "tests").glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        assert not {name for name in imports(path) if name.split(".")[0] in ROOMS}, path


def test_model_and_data_know_neither_each_other_nor_training():
    for room in ("model", "data"):
        for path in files(room):
            used = {name.split(".")[1] for name in imports(path) if name.startswith("orchestrate.")}
            assert used <= {room}, path
    for path in files("data"):
        assert "torch" not in {name.split(".")[0] for name in imports(path)}, path


def floor(module: str) -> int:
    name = module.split(".")[2]
    return next(i for i, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("path", files("training"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_in_training_go_down(path):
    here = module_of(path)
    for module in imports(path):
        if module.startswith("orchestrate.training.") and module.split(".")[2] != here.split(".")[2]:
            assert floor(module) < floor(here), f"{here} imports {module}"
        assert not module.startswith("orchestrate.tools"), f"{here} imports {module}"


def test_the_orchestrator_and_the_operations_do_not_know_the_live_run():
    """They say what they need of it (Steerable, Machine), so what is no Run can stand in for one."""
    for path in files("training/schedule"):
        assert "orchestrate.training.run.run" not in imports(path), path
    for path in files("training/operations"):
        assert not {name for name in imports(path) if name.startswith("orchestrate.training.run.")}, path


def test_no_import_leads_back():
    """Within a room too, and also through imports inside functions."""
    arrows = {name: {m for m in imports(path) if m in MODULES and m != name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


@pytest.mark.parametrize(
    "what, pattern, allowed",
    [
        (
            "torch.distributed",
            r"import torch\.distributed(?!\.checkpoint)|from torch\.distributed|DistributedDataParallel",
            {"training/run/distributed.py", "training/run/sharding.py"},
        ),
        ("print", r"^\s*print\(", {"training/store/reporting.py", "train_orchestrated.py", "sample.py"}),
        (
            "save_file",
            r"save_file|torch\.save\(|distributed\.checkpoint",
            {"training/store/checkpoint.py", "model/export.py", "model/peft_folder.py"},
        ),
        ("requires_grad_", r"requires_grad_\(", {"training/run/changes.py"}),
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
    # Other trainers' files are in one page, which has a test of its own (test_migrating.py).
    ours = text.replace((ROOT / "docs" / "migrating.md").read_text("utf-8"), "")
    for name in set(
        re.findall(r"\b(?:training|model|data|config|schedules|docs|tests|bench)/[\w/]+\.(?:py|md|yaml|json)\b", ours)
    ):
        assert (ROOT / name).exists(), name
    tree = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.S)[1]
    for path in MODULES.values():
        if path.name not in ("__init__.py", "prepare.py"):
            assert re.search(rf"\b{path.name}\b", tree), f"{path.name} is missing from the annotated tree"
    for name in OPERATIONS:
        assert f"`{name}`" in text, f"{name} is not in the documents"


def code_of(path: Path) -> str:
    """A file without its comments and docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))] or [
                ast.Pass()
            ]
    return ast.unparse(tree)


def test_to_add_something_touch_what_the_page_says():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (an? [^|]+) \| ([^|]+) \| `(\w+)` \|$", page, re.M)
    assert len(rows) >= 6
    texts = {str(path.relative_to(ROOT)): code_of(path) for path in MODULES.values()}
    for what, files, name in rows:
        named = {file for file, text in texts.items() if re.search(rf"\b{name}\b", text)}
        assert named == set(files.split(", ")), f"to add {what}: {name} stands in {sorted(named)}"


def test_prose_fits_a_screen():
    """No line over 120 characters, but in tables and in blocks of code."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "data").glob("*/README.md")]
    for path in pages:
        text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.S | re.M)
        long = [line for line in text.splitlines() if len(line) > 120 and not line.lstrip().startswith("|")]
        assert not long, f"{path.name}: {long[0]}"


def test_every_room_is_in_the_package():
    listed = set(re.findall(r'^    "(orchestrate[\w.]*)",$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M))
    assert listed == {module_of(path) for path in MODULES.values() if path.name == "__init__.py"} | {"orchestrate"}
