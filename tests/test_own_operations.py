"""--operations FILE.py: code of the user's own, named on the command line and nowhere else."""

from __future__ import annotations

import hashlib
import json

import pytest
from conftest import arguments, events, lines, on_ranks
from fuzzing import seal

import train_orchestrated
from orchestrate.tools import plan
from orchestrate.training.operations import OPERATIONS
from orchestrate.training.schedule.file import entry_fields, parse_schedule
from orchestrate.training.schedule.own import registered
from orchestrate.training.settings.errors import Refused

HALVE = '''
from dataclasses import replace
from orchestrate.training.operations.base import Operation, operation

@operation("halve_lr")
class HalveLr(Operation):
    """Half of it."""
    touches = ("learning_rate",)
    def plan(self, settings):
        return replace(settings, learning_rate=settings.learning_rate / 2)
'''
TRIGGER = '''
from orchestrate.training.schedule.triggers import Trigger, trigger

@trigger("{name}")
class Own(Trigger):
    """Of my own."""
    value: int
    def fires(self, elapsed, measured):
        return None
'''


@pytest.fixture
def own(tmp_path):
    """own(source) writes a file of operations and returns its path."""

    def write(source=HALVE, name="my_ops.py"):
        (tmp_path / name).write_text(source)
        return str(tmp_path / name)

    return write


@pytest.fixture
def command(data, tmp_path):
    """The command line of a run whose schedule names an operation of one's own."""
    (tmp_path / "s.json").write_text(json.dumps([{"name": "halve_lr", "at_iter": n} for n in (2, 6)]))
    return arguments(data, tmp_path / "run", schedule=tmp_path / "s.json", max_iters=4)


def test_a_run_remembers_its_files_and_a_resume_asks_for_them(own, command, tmp_path, capsys):
    out, file = tmp_path / "run", own()
    with pytest.raises(Refused, match="unknown operation 'halve_lr'"):
        train_orchestrated.main(command)
    assert train_orchestrated.main([*command, "--operations", file]) == 0
    assert "halve_lr" not in OPERATIONS, "it ends with the run that named it"
    record = {"file": "my_ops.py", "sha256": hashlib.sha256(HALVE.encode()).hexdigest()}
    assert events(out, "start")[0]["operations"] == [record]
    assert json.loads((out / "checkpoints/latest/state.json").read_text())["operations"] == [record]
    assert f"--out_dir={out} --operations {file} --max_iters=N" in capsys.readouterr().out

    again = ["--init_from=resume", f"--out_dir={out}", "--max_iters=8"]
    for more in ([], ["--plan"]):
        with pytest.raises(Refused, match=r"operations of my_ops.py \(SHA-256 .*\.\.\.\): give --operations my_ops.py"):
            train_orchestrated.main([*again, *more])
    own(HALVE.replace("/ 2", "/ 4"))
    assert train_orchestrated.main([*again, "--operations", file]) == 0
    told = f"override: operations my_ops.py {record['sha256']} -> "
    assert told in capsys.readouterr().out
    (override,) = [e for e in events(out, "override") if e["key"] == "operations my_ops.py"]
    assert override["before"] == record["sha256"] and "content has changed" in override["reason"]
    rates = [e["settings_after"]["learning_rate"] for e in events(out, "operation")]
    assert rates == [5e-3, 1.25e-3], "the second time by four"
    assert train_orchestrated.main(["--init_from=resume", f"--out_dir={out}", "--operations", file]) == 0
    assert len([e for e in events(out, "override") if e["key"].startswith("operations")]) == 1, "not told again"


def test_a_checkpoint_from_before_there_were_own_operations_is_read(tiny, resume):
    _, out = tiny(max_iters=4)
    folder = out / "checkpoints" / "iter_000000004"
    state = json.loads((folder / "state.json").read_text())
    del state["operations"]
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
    assert resume(out, max_iters=6) == 0
    assert events(out, "resume")[0]["problems"] == []


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = 1\ny = (\n", r"my_ops.py:2: not Python \("),
        ("x = 1\n\nprint(1 / 0)\n", r"my_ops.py:3: ZeroDivisionError: division by zero"),
        ("def f():\n    raise SystemExit(3)\n\nf()\n", r"my_ops.py:2: SystemExit: 3"),
        ("import nothing_of_the_kind\n", r"my_ops.py:1: ModuleNotFoundError: "),
        (HALVE.replace("halve_lr", "set_lr"), r"my_ops.py:5: ValueError: there is an operation set_lr already"),
        (HALVE + HALVE, r"my_ops.py:15: ValueError: there is an operation halve_lr already"),
        (TRIGGER.format(name="at_iter"), r"my_ops.py:4: ValueError: there is a trigger at_iter already"),
        (TRIGGER.format(name="guard"), r"my_ops.py:4: guard is a field that every entry has"),
        ("x = 1\n", "registers no operation and no trigger"),
        ("x = '\0'\n", r"my_ops.py:1: not Python \("),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(own, command, tmp_path, source, message):
    known = dict(OPERATIONS), entry_fields()
    with pytest.raises(Refused, match=message):
        train_orchestrated.main([*command, "--operations", own(source)])
    assert (dict(OPERATIONS), entry_fields()) == known and not (tmp_path / "run").exists()


def test_files_that_are_not_there_or_called_alike(own, command, tmp_path):
    with pytest.raises(Refused, match=r"--operations none.py: cannot be read \(No such file or directory\)"):
        train_orchestrated.main([*command, "--operations", "none.py"])
    (tmp_path / "b").mkdir()
    both = ["--operations", own(), "--operations", own(TRIGGER.format(name="mine"), "b/my_ops.py")]
    with pytest.raises(Refused, match="a file called my_ops.py is given already"):
        train_orchestrated.main([*command, *both])


def test_a_trigger_is_a_field_while_its_file_is_registered(own):
    with registered([own(TRIGGER.format(name="my_trigger"))]):
        assert "my_trigger" in entry_fields()
    assert "my_trigger" not in entry_fields()


def test_a_trigger_that_looks_at_what_is_no_metric_is_refused(own):
    looks = "    @property\n    def looks_at(self):\n        return {{'grad_nrm': 0, 'loss': 2}}\n    def fires"
    told = r"s:1: entry 1: stop: mine looks at 'grad_nrm', which is no metric; did you mean grad_norm\?"
    file = own(TRIGGER.replace("    def fires", looks).format(name="mine"))
    with registered([file]), pytest.raises(Refused, match=told):
        parse_schedule("- {name: stop, mine: 3}", "s")


def test_nothing_else_may_name_code(own, command, tmp_path):
    (tmp_path / "c.py").write_text(f"operations = '{own()}'\n")
    with pytest.raises(Refused, match="c.py:1: unknown key operations"):
        train_orchestrated.main([str(tmp_path / "c.py"), *command])
    (tmp_path / "s.json").write_text(json.dumps({"operations": [], "files": [own()]}))
    with pytest.raises(Refused, match="unknown key 'files'"):
        train_orchestrated.main(command)


def test_plan_takes_them(own, command, capsys):
    assert plan.main([*command, "--json", "--operations", own()]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["settings"]["learning_rate"] for stage in stages] == [1e-2, 5e-3, 2.5e-3]


def _with_a_file_of_its_own(rank: int, command: list[str], files: list[str]):
    return train_orchestrated.run([*command, "--operations", files[rank]])


def test_every_rank_has_the_same_file(own, command, tmp_path):
    (tmp_path / "other").mkdir()
    same = own()
    other = own(HALVE.replace("/ 2", "/ 4"), "other/my_ops.py")
    assert on_ranks(_with_a_file_of_its_own, command, [same, other]) == [2, 2]
    assert not (tmp_path / "run").exists()
    assert on_ranks(_with_a_file_of_its_own, command, [same, same]) == [0, 0]
    assert [e["iter"] for e in lines(tmp_path / "run" / "events.jsonl") if e["kind"] == "operation"] == [2]
