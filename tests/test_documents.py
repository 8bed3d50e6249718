"""Every command of README.md and docs/ is one that works, and every schedule there is one that is read.

Each command is given to its own parser: options, keys, configurations and files must exist. Those without a mark
(docs/index.md says which marks there are) are then run, a page after the other in its order, in this process, in a
folder with a small model, small data and waits that are a fiftieth of what the page says.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import published_models
import pytest
import torch
import yaml
from conftest import ROOT, TEXT, events, write_data

from orchestrate.tools.main import COMMANDS, run
from orchestrate.training.schedule.file import parse_schedule
from orchestrate.training.schedule.own import registered
from orchestrate.training.settings.config import KEYS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKS = ("network", "minutes", "GPUs", "two machines", "Slurm", "a browser", "until Ctrl-C", "another program",
         "the shell's own")  # fmt: skip
WALKED_BY = {"finetuning.md": "test_finetuning.py", "adding_an_operation.md": "test_adding_an_operation.py"}
"""Pages whose commands a test of their own runs."""
SCRIPTS = {"train_orchestrated.py": "train", "sample.py": "sample"}
PROGRAMS = ("python", "torchrun", "orchestrate", "make")


# ---------------------------------------------------------------------------------------------- what pages say


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def mark_of(comment: str) -> str:
    """The mark in brackets at the end of a comment."""
    found = re.search(r"\(([^()]*)\)$", comment.strip())
    return found[1] if found and found[1] in MARKS else ""


def commands(page: Path) -> list[tuple[str, str]]:
    """Each command of the page's blocks, and its mark."""
    found = []
    for block in blocks(page, "bash"):
        lines = block.replace("\\\n", " ").splitlines()
        head = next((line for line in lines if not line.startswith("#!")), "")
        of_all = mark_of(head) if head.startswith("#") else ""
        for line in lines:
            text, _, comment = line.partition(" #") if not line.startswith("#") else ("", "", line)
            if text.strip():
                found.append((text.strip(), mark_of(comment) or of_all))
    return found


COMMANDS_OF = {page.name: commands(page) for page in PAGES}


def spoken(page: Path) -> list[str]:
    """Commands within the prose, but those that leave something out."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
    found = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    programs = [span for span in found if re.match(rf"({'|'.join(PROGRAMS)}) \w|python -m", span)]
    return [span for span in programs if not re.search(r"\.\.\.|\[", span)]


# ---------------------------------------------------------------------------------------------- their own parsers


class Parsed(BaseException):
    """Raised where a script has read its command line."""


def parses(arguments: Sequence[str]) -> None:
    """Nothing where the command's own parser takes it. Raises what the parser raises, or AssertionError."""
    program, *rest = arguments
    if program == "orchestrate":
        name, *rest = rest
        assert name in COMMANDS, f"orchestrate has no {name}"
        if name == "plan":
            name, rest = "train", [*(word for word in rest if word != "--json"), "--plan"]
        importlib.import_module(f"orchestrate.tools.{name}").parse(rest)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(rest)
        parses(["python", *(["-m"] if given.module else []), given.training_script, *given.training_script_args])
    elif program == "make":
        done = subprocess.run(["make", "-n", "-C", str(ROOT), *rest], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        (extra,) = re.findall(r"\[(\w+)\]", " ".join(rest))
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text("utf-8"), extra
    elif program == "python":
        if rest[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in rest[2:] if word.endswith(".py"))
        elif rest[:2] == ["-m", "orchestrate"]:
            parses(rest[1:])
        elif rest[0] in SCRIPTS or rest[0].startswith("tools/"):
            parses(["orchestrate", SCRIPTS.get(rest[0]) or Path(rest[0]).stem, *rest[1:]])
        else:
            _script_parses(rest)
    else:
        raise AssertionError(f"{program}: no test knows this program; mark the command with why it is not run")
    if program in ("orchestrate", "python"):
        for word in rest:
            if re.match(r"(config|schedules)/[\w/]+\.\w+$", word):
                assert (ROOT / word).exists(), word


def _script_parses(words: Sequence[str]) -> None:
    """A script's own parser, by running the script up to where it has read its options."""

    whole, known, within = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args, []

    def parse_args(parser, *given):
        within.append(parser)  # it calls parse_known_args
        whole(parser, *given)
        raise Parsed

    def parse_known_args(parser, *given):
        options, others = known(parser, *given)
        if within:
            return options, others
        assert not others or set(given_in(others)) <= set(KEYS), others
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        _as_script(words, patch)


def _as_script(words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "argv", list(words))
    patch.setattr(sys, "path", [str((ROOT / words[0]).parent), *sys.path])
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page, capsys):
    """Its options, keys, files and subcommands exist."""
    given = [(text, mark) for text, mark in COMMANDS_OF[page.name] if mark not in ("another program", "Slurm")]
    bare = re.compile(r"(orchestrate \w+|python [\w/.]+|torchrun --[\w-]+)$")
    if page.name != "migrating.md":  # what others type, too: test_migrating.py
        given += [(text, "") for text in spoken(page)]
    for text, mark in given:
        for part in text.partition(" > ")[0].split(" | "):
            if mark == "the shell's own" or part.startswith("printf "):
                continue
            words = shlex.split(part)
            if bare.match(part) and words[0] != "make":  # a name, without its options
                known = words[1] in COMMANDS if words[0] == "orchestrate" else (ROOT / words[1]).exists()
                assert known or words[0] == "torchrun", part
                continue
            try:
                parses(words)
            except (SystemExit, ValueError) as error:
                said = capsys.readouterr().err or str(error)
                pytest.fail(f"{page.name}: {text}\n{said}")


def test_a_misspelt_command_is_found(capsys):
    for text in (
        "python train_orchestrated.py config/python_docs.py --max_iter=3",
        "python train_orchestrated.py config/none.py",
        "python train_orchestrated.py config/python_docs.py --schedule schedules/none.yaml",
        "python data/text/prepare.py --inputs my.txt",
        "python bench/none.py --x",
        "orchestrate reports out",
        "orchestrate report out --pgn a.png",
        "torchrun --nprocs=2 train_orchestrated.py",
        "torchrun --standalone train_orchestrated.py --depths=3",
        "make demos",
        "pip install '.[served]'",
        "brew install it",
    ):
        with pytest.raises((SystemExit, ValueError, AssertionError, OSError)):
            parses(shlex.split(text))


def test_no_command_hides_in_an_indented_block():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
        assert not re.findall(rf"^    (?:{'|'.join(PROGRAMS)}) .*", text, re.M), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_schedule_is_read(page):
    with contextlib.ExitStack() as stack:
        if page.name == "adding_an_operation.md":
            own = io.StringIO("\n\n".join(blocks(page, "python"))).read()
            path = Path(stack.enter_context(_folder())) / "my_ops.py"
            path.write_text(own, "utf-8")
            stack.enter_context(registered([str(path)]))
        for text in blocks(page, "yaml"):
            assert parse_schedule(text, page.name).tracks


@contextlib.contextmanager
def _folder():
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        yield folder


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text("utf-8")):
            assert re.match(r"https?://", target) or (page.parent / target).exists(), f"{page.name}: {target}"
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([\w-]+)\)", page.read_text("utf-8")):
            text = (page.parent / target if target else page).read_text("utf-8")
            titles = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in
                      re.findall(r"^#+ (.*)$", text, re.M)]  # fmt: skip
            assert anchor in titles, f"{page.name}: {target}#{anchor}"


def test_the_map_has_every_page():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    for page in PAGES[1:]:
        assert page.name == "index.md" or f"]({page.name})" in index, page.name
    for mark in MARKS:
        assert f"({mark})" in " ".join(index.split()), mark


def test_the_readme_is_two_screens_before_its_reference():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert lines.index("# Reference") <= 105
    assert (ROOT / "docs" / "run.png").stat().st_size < 200_000


# ---------------------------------------------------------------------------------------------- run

FIFTIETH = re.compile(r"\b((?:max_wait_iters|at_iter|over|within_iters): *)(\d+)")
SMALL = dict(max_iters=16, lr_decay_iters=16, warmup_iters=2, eval_interval=4, eval_iters=1, log_interval=2,
             batch_size=2, gradient_accumulation_steps=2, block_size=32, device="cpu", compile=False,
             report=False)  # fmt: skip
SHAPE = dict(n_layer=4, n_head=2, n_embd=16)


def shorter(text: str) -> str:
    return FIFTIETH.sub(lambda found: f"{found[1]}{max(1, int(found[2]) // 50)}", text)


def given_in(words: Sequence[str]) -> dict[str, str]:
    """The keys of a command line, with their values."""
    return {key: value for key, _, value in (word.removeprefix("--").partition("=") for word in words)}


def train(words: Sequence[str]) -> None:
    """A training command, small."""
    given = given_in(words)
    if "max_iters" in given:
        words = [word for word in words if not word.startswith("--max_iters=")]
        words = [*words, f"--max_iters={int(given['max_iters']) // 50}"]
    more = SMALL | ({} if given.get("init_from") == "FOLDER" else SHAPE) | {"dataset": "data/python_docs"}
    more = {"device": "cpu"} if given.get("init_from") == "resume" else more
    more = {key: value for key, value in more.items() if key not in given}
    assert run("train", [*words, *(f"--{key}={value}" for key, value in more.items())]) == 0, words


def carry_out(text: str, patch: pytest.MonkeyPatch) -> None:
    text, _, file = text.partition(" > ")
    said, _, text = text.rpartition(" | ")
    lines = shlex.split(said)[1].replace("\\n", "\n") if said else "/quit\n"
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    program, *words = shlex.split(text)
    if program == "torchrun":  # on one process: tests/test_distributed.py and others have two
        words = words[next(i for i, word in enumerate(words) if not word.startswith("--")) :]
        program = "python"
    if program == "python" and words[0] not in SCRIPTS and words[0].startswith(("data/", "schedules/")):
        out = [] if "--out" in words else ["--out", str(Path(words[0]).parent)]
        with contextlib.suppress(SystemExit):
            _as_script([*words, *out], patch)
        return
    assert program in ("python", "orchestrate"), text
    name, *words = words if program == "orchestrate" else [SCRIPTS.get(words[0], Path(words[0]).stem), *words[1:]]
    if name in ("train", "plan"):
        train([*words, *(["--plan"] if name == "plan" else [])])
        return
    shell = io.StringIO()
    small = ["--max_new_tokens", "8", "--device", "cpu"] if name in ("sample", "chat") else []
    small += ["--every", "0.1"] if "--follow" in words else []
    with contextlib.redirect_stdout(shell):
        assert run(name, [*words, *small]) == 0, text
    assert not file or shell.getvalue().strip(), text


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with what the pages suppose: the shipped files, a text, a published model, a run or two."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(ROOT / "config", folder / "config")
    (folder / "schedules").mkdir()
    for path in (ROOT / "schedules").glob("*.*"):
        (folder / "schedules" / path.name).write_text(shorter(path.read_text("utf-8")), "utf-8")
    (folder / "my.txt").write_text(TEXT * 4, "utf-8")
    published_models.make("llama3", folder / "FOLDER", TEXT)
    from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

    words = AutoConfig.from_pretrained(folder / "FOLDER").vocab_size
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=words, n_positions=64, n_embd=16, n_layer=4, n_head=2, activation_function="gelu")
    GPT2LMHeadModel(shape).save_pretrained(folder / "FOLDER")
    (folder / "data").mkdir()
    write_data(folder / "data" / "python_docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        carry_out("python data/text/prepare.py --input my.txt --tokenizer FOLDER --out data/mine", patch)
        train(
            ["--init_from=FOLDER", "--dataset=mine", "--out_dir=out-run", "--lora_targets=all-linear", "--lora_rank=2"]
        )
    for name in ("out-chat", "out-demo", "out-a", "out-b", "out-c"):
        shutil.copytree(folder / "out-run", folder / name, symlinks=True)
    shutil.copytree(folder / "FOLDER", folder / "some-folder")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in WALKED_BY], ids=lambda page: page.name)
def test_the_commands_of_a_page_work(page, workshop, tmp_path, monkeypatch, capsys):
    todo = [text for text, mark in COMMANDS_OF[page.name] if not mark]
    if not todo:
        return
    folder = tmp_path / "here"
    shutil.copytree(workshop, folder, symlinks=True)
    if page.name == "chat.md":  # where other pages make it
        shutil.copytree(folder / "FOLDER", folder / "my-model")
    monkeypatch.chdir(folder)
    written = {}
    for text in blocks(page, "yaml"):
        if name := re.match(r"# (\w+\.yaml)\n", text):
            assert name[1] not in written, f"{page.name} has two of {name[1]}"
            written[name[1]] = text
            (folder / name[1]).write_text(shorter(text), "utf-8")
    for text in todo:
        carry_out(text, monkeypatch)
    for name, text in written.items():
        (trained,) = [one for one in todo if f"--schedule {name}" in one and "--plan" not in one]
        wanted = {entry["name"] for entry in _entries(yaml.safe_load(text))}
        fired = {event["name"] for event in events(Path(given_in(shlex.split(trained))["out_dir"]), "operation")}
        assert wanted <= fired, f"{page.name}, {name}: {wanted - fired} never fired"


def _entries(items: Sequence[dict]) -> list[dict]:
    return [entry for item in items for entry in item.get("do", [item])]


def test_pages_that_others_walk_are_walked():
    for page, test in WALKED_BY.items():
        assert page in (ROOT / "tests" / test).read_text("utf-8") and COMMANDS_OF[page]
