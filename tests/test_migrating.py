"""docs/migrating.md: what is ours in it exists and is accepted, and theirs is taken or told as the page says."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import yaml
from conftest import ROOT

from orchestrate.tools.main import COMMANDS
from orchestrate.training.operations import OPERATIONS
from orchestrate.training.operations.base import OTHER_NAMES, make
from orchestrate.training.schedule.file import entry_fields, parse_schedule
from orchestrate.training.settings.config import ALIASES, KEYS, OTHER_KEYS, resolve
from orchestrate.training.settings.errors import Refused

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PAGE = (ROOT / "docs" / "migrating.md").read_text("utf-8")
ROWS = [
    tuple(cell.strip() for cell in row)
    for row in re.findall(r"^\| (\w+) \| (.*?) \| (.*) \|([^|]*)\|$", PAGE, re.M)
    if row[0] != "of"
]
IN_CODE = re.compile(r"`([^`]+)`")


def operation_of(text: str) -> str:
    """The name of "NAME: VALUE" or NAME where that is an operation of ours or a name of others; nothing otherwise."""
    name = text.partition(":")[0]
    return name if name in OPERATIONS or name in OTHER_NAMES else ""


def problems_of(text: str) -> list[str]:
    """Why an entry, a key or a field, as somebody has written it, is refused; none where it is accepted."""
    try:
        if text.startswith("--"):
            key, _, value = text.removeprefix("--").partition("=")
            resolve([], [(key, value)])
        elif operation_of(text):
            name, _, value = text.partition(": ")
            parse_schedule(f"- {{name: {name}, value: {value or 'null'}}}", "s.yaml")
        else:
            values = {"trigger_loss": "1.0", "max_wait_iters": "3", "reevaluate": "true", "desc": "why"}
            parse_schedule(f"- {{name: stop, {text}: {values.get(text, 'true')}}}", "s.yaml")
    except Refused as error:
        return error.problems
    return []


def test_the_page_has_a_row_for_all_four():
    assert {row[0] for row in ROWS} == {"nanoGPT", "fork", "CleanGPT", "124M"} and len(ROWS) > 80
    assert len(ROWS) == PAGE.count("\n| ") - 1, "a row that is none"
    assert {row[3] for row in ROWS} == {"", "same", "told"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][:40])
def test_what_is_ours_exists_and_is_accepted(row):
    for text in IN_CODE.findall(row[2]):
        first, _, rest = text.partition(" ")
        if first == "make":
            assert re.search(rf"^{rest}:", MAKEFILE, re.M), text
        elif first == "orchestrate":
            assert rest in COMMANDS, text
        elif first == "python" or re.fullmatch(r"[\w/]+\.(py|yaml)", text):
            assert all((ROOT / name).is_file() for name in text.removeprefix("python ").split()), text
        elif text in KEYS or text in entry_fields():
            continue
        elif operation_of(text):
            name, _, value = text.partition(": ")
            make(name, {"value": yaml.safe_load(value)}) if value else OPERATIONS[name]
        else:
            key, _, value = text.partition("=")
            # What only a whole command line can say is checked as such elsewhere.
            assert key in KEYS and (key == "checkpoint" or not problems_of(f"--{text}")), text
    assert IN_CODE.search(row[2]) or row[1] in ("`completed`", "`make kill-gpu`")


@pytest.mark.parametrize("row", [row for row in ROWS if row[3]], ids=lambda row: row[1][:60])
def test_theirs_is_taken_or_told(row):
    for text in IN_CODE.findall(row[1]):
        found = problems_of(text)
        if row[3] == "same":
            assert not found
            continue
        assert len(found) == 1
        names = [re.split(r"[:=]", name)[0] for name in IN_CODE.findall(row[2])]
        assert any(name in found[0] for name in names) or "run folder" in found[0], found


def test_every_replacement_that_a_message_names_is_ours():
    known = {*KEYS, *OPERATIONS, *entry_fields()}
    for key, hint in OTHER_KEYS.items():
        assert key not in KEYS and key not in ALIASES
        words = set(re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", hint)) | set(re.findall(r"^write (?!the)(\w+)", hint))
        assert words <= known, (key, words - known)
    for name, hint in OTHER_NAMES.items():
        assert name not in OPERATIONS
        assert set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", hint)) - {"ln_f"} <= known, name


# ---------------------------------------------------------------------------------------------- make


def made(*arguments: str) -> subprocess.CompletedProcess:
    """`make -n`: what would be done."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-n", "--no-print-directory", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    "arguments, command",
    [
        (
            ["train", "CONFIG=config/train_gpt2.py", "SCHEDULE=schedules/scale.yaml", "ARGS=--max_iters=3"],
            "train_orchestrated.py config/train_gpt2.py --schedule schedules/scale.yaml --max_iters=3",
        ),
        (["train", "CONFIG=config/train_gpt2.py"], "train_orchestrated.py config/train_gpt2.py"),
        (
            ["ddp-train", "NGPUS=4", "CONFIG=config/train_gpt2.py"],
            "-m torch.distributed.run --standalone --nproc_per_node=4 train_orchestrated.py config/train_gpt2.py",
        ),
        (["sample", "OUT=out-x", "START=To be"], 'sample.py --out_dir=out-x --start="To be"'),
        (["bench"], "bench/step.py config/shakespeare_char_cpu.py"),
        (["gpu-status"], "-m orchestrate.tools.gpu_status"),
    ],
)
def test_make_calls_what_it_says(arguments, command):
    done = made(*arguments)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].split() == [".venv/bin/python", *command.split()]


def test_make_train_asks_for_a_configuration():
    done = made("train")
    assert done.returncode == 2 and "give CONFIG=config/NAME.py" in done.stderr


def test_make_help_has_every_target_and_nothing_ends_a_process():
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()
    done = subprocess.run(["make", "-s", "-C", str(ROOT), "help"], capture_output=True, text=True, timeout=60)
    assert [line.split()[1] for line in done.stdout.splitlines()] == re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M)
    assert {line.split()[1] for line in done.stdout.splitlines()} == set(targets)
    assert not re.search(r"\b(p?kill|killall|fuser)\b", re.sub(r"#.*", "", MAKEFILE))
