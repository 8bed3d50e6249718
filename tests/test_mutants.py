"""The faults that bench/mutants.py makes, on a text of a few lines."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import ROOT

pytest.importorskip("cosmic_ray", reason="requirements-dev.txt has it")
SOURCE = '''
NAME: int | None = 1


@property
def one(self, *, n: int | str) -> int | None:
    """Nothing in here is a fault: 1 + 1."""
    try:
        self.told = n
        plain = n
    except (OSError, ValueError.x) as error:
        raise KeyError from error
    self.tell(1)
    return -n if n >= 1 and not self else [0 for n in plain | {3}]
'''


@pytest.fixture
def mutants(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "bench" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "mutants", module)
    spec.loader.exec_module(module)
    (tmp_path / "file.py").write_text(SOURCE)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_the_faults_of_a_few_lines(mutants):
    last = "return -n if n >= 1 and not self else [0 for n in plain | {3}]"
    found = [(m.line, m.before, m.after) for m in mutants.mutants_at(mutants.places_of("file.py"))]
    assert sorted(found) == sorted(
        [
            (2, "NAME: int | None = 1", "NAME: int | None = 2"),
            (2, "NAME: int | None = 1", "NAME: int | None = 0"),
            (3, "@property", ""),
            (9, "self.told = n", "pass"),
            (11, "except (OSError, ValueError.x) as error:", "except () as error:"),
            (12, "raise KeyError from error", "pass"),
            (13, "self.tell(1)", "pass"),
            (13, "self.tell(1)", "self.tell( 2)"),
            (13, "self.tell(1)", "self.tell( 0)"),
            (14, last, last.replace("-n", "+n")),
            (14, last, last.replace("if n", "if not n")),
            (14, last, last.replace(">=", ">")),
            (14, last, last.replace(">=", "<")),
            (14, last, last.replace(">= 1", ">= 2")),
            (14, last, last.replace(">= 1", ">= 0")),
            (14, last, last.replace("and", "or")),
            (14, last, last.replace("not self", "self")),
            (14, last, last.replace("[0", "[ 1")),
            (14, last, last.replace("[0", "[ -1")),
            (14, last, last.replace("|", "&")),
            (14, last, last.replace("{3}", "{ 4}")),
            (14, last, last.replace("{3}", "{ 2}")),
        ]
    )


def test_what_nobody_can_notice_is_still_in_the_code(mutants, monkeypatch):
    """An entry of the list whose line has changed says nothing any more."""
    monkeypatch.setattr(mutants, "ROOT", ROOT)
    for file, before, _ in mutants.equivalents():
        assert before in " ".join((ROOT / file).read_text("utf-8").split()), (file, before)
