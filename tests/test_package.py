"""pip install: one importable package, one command, whatever lies in the folder that it is called from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, arguments

ROOMS = ("data", "model", "tools", "training")


def run(*command, **keys) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200, **keys)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: what an earlier build has left in the checkout must not come in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("orchestrate", *ROOMS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.bin", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", source / "out", source)
    assert built.returncode == 0, built.stderr
    (path,) = (source / "out").glob("*.whl")
    return path


def test_everything_is_in_one_package(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"orchestrate"}
    wanted = {f"orchestrate/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    wanted |= {f"orchestrate/tools/serving/page.{kind}" for kind in ("html", "js", "css")}
    data_sets = {f"orchestrate/{path.relative_to(ROOT)}" for path in (ROOT / "data").glob("*/*.py")}
    assert {name for name in names if name.count("/") > 1} == wanted - data_sets


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of a fresh environment with the wheel; what it depends on comes from this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=100)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    done = run(*pip, wheel)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "heavy.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder with packages of the rooms' names, all of them somebody else's."""
    for name in ROOMS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('somebody else')\n")
    return tmp_path


def test_the_command_works_beside_folders_of_the_same_names(installed, elsewhere, data):
    keys = dict(cwd=elsewhere, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""})
    done = run(installed / "orchestrate", "train", *arguments(data, "run", max_iters=2), **keys)
    assert done.returncode == 0, done.stderr
    assert "to go on: orchestrate train --init_from=resume --out_dir=run --max_iters=N (N above 2)" in done.stdout
    place = run(installed / "python", "-c", "import orchestrate.training as t; print(t.__file__)", **keys)
    assert place.stdout.startswith(str(installed.parent))
    given = ["--out_dir=run", "--start=To be", "--num_samples=1", "--max_new_tokens=5", "--device=cpu"]
    done = run(installed / "python", "-m", "orchestrate", "sample", *given, **keys)
    assert done.returncode == 0 and done.stdout.startswith("To be"), done.stderr
    assert run(installed / "python", "-c", "import training", **keys).returncode, "the decoys are on the path"


def test_the_command_lists_and_refuses(installed, elsewhere):
    listed = run(installed / "orchestrate", cwd=elsewhere)
    assert listed.returncode == 0 and all(f"  {name} " in listed.stdout for name in ("train", "plan", "sample"))
    wrong = run(installed / "orchestrate", "sampel", cwd=elsewhere)
    assert wrong.returncode == 2 and wrong.stderr == "error: unknown command sampel; did you mean sample?\n"


def test_installed_in_place_it_is_the_checkout(tmp_path):
    """As `make` does it."""
    for name in ("orchestrate", *ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / "code" / name, ignore=shutil.ignore_patterns("*.bin"))
        else:
            shutil.copy(ROOT / name, tmp_path / "code")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True, timeout=100)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "heavy.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    done = run(*pip, "--no-build-isolation", "--editable", tmp_path / "code")
    assert done.returncode == 0, done.stderr
    code = "import orchestrate.training.settings.errors as e, orchestrate.tools as t; print(e.__file__, t.__file__)"
    places = run(python, "-c", code, cwd=tmp_path).stdout.split()
    assert places == [str(tmp_path / "code" / name) for name in ("training/settings/errors.py", "tools/__init__.py")]
