"""What a run folder says, read back: every kind of line, void ones, and what is none of ours."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess

import pytest
from conftest import ROOT, events, state_of

from orchestrate.training.session import code
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint, run_folder
from orchestrate.training.store.run_folder import (
    EVENT_KINDS,
    METRICS_KINDS,
    SavedCheckpoint,
    event,
    read_lines,
    read_run,
)

TRAIN = {"kind": "train", "iter": 1, "tokens": 16, "seconds": 0.5, "loss": 2.5}
EVAL = {"kind": "eval", "iter": 1, "tokens": 16, "seconds": 0.5, "val_loss": None}


def text(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_run_that_went_back(tiny):
    """Void lines are there and marked; without them each iteration stands once."""
    hurts = {"name": "set_lr", "value": 3.0, "at_iter": 5, "guard": {"max_increase": 0.05, "within_iters": 4,
             "then": "revert"}}  # fmt: skip
    _, out = tiny([hurts])
    run = read_run(out)
    train = [[m["iter"] for m in record.metrics if m["kind"] == "train"] for record in (run, run.valid)]
    assert train == [[*range(1, 9), *range(6, 13)], [*range(1, 13)]]
    assert [e["kind"] for e in run.events if e.get("void")] == ["decision", "operation"], (
        "it went back to before the decision"
    )
    assert [e["entry"] for e in run.valid.events if e["kind"] == "rollback"] == [1]
    assert run.config["max_iters"] == 12 and run.foreign == {"metrics.jsonl": 0, "events.jsonl": 0}
    assert run.checkpoints[0] == SavedCheckpoint(
        "iter_000000012", 12, run.valid.metrics[-1]["val_loss"], latest=True, best=True
    )


def test_checkpoints_are_told_newest_first_and_the_damaged_left_out(tmp_path):
    for iteration, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        state = state_of(iter=iteration, last_val_loss=loss, last_eval_iter=iteration)
        checkpoint.save(tmp_path, state, {}, {}, keep_last=9, keep_best=9)
    (tmp_path / "checkpoints" / "iter_000000001" / "manifest.json").unlink()
    assert read_run(tmp_path).checkpoints == [
        SavedCheckpoint("iter_000000003", 3, 2.0, latest=True, best=False),
        SavedCheckpoint("iter_000000002", 2, 1.0, latest=False, best=True),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[]",
        b"[" * 5000,
        b'{"kind": "train"}',
        text({**TRAIN, "kind": "other"})[:-1],
        text({**TRAIN, "kind": ["train"]})[:-1],
        text({**TRAIN, "iter": -1})[:-1],
        text({**TRAIN, "iter": 1.0})[:-1],
        text({**TRAIN, "iter": True})[:-1],
        text({**TRAIN, "loss": "2.5"})[:-1],
        text({**TRAIN, "loss": float("nan")})[:-1],
        text({**TRAIN, "x": float("nan")})[:-1],
        text(TRAIN)[:-1].replace(b"0.5", b"1e999"),
        b"\xff" + text(TRAIN)[:-1],
        b" " * 200 + text(TRAIN)[:-1],
    ],
)
def test_what_is_no_line_of_metrics_is_counted(tmp_path, monkeypatch, line):
    monkeypatch.setattr(run_folder, "LONGEST_LINE", 100)
    assert len(text(TRAIN)) < 100
    (tmp_path / "metrics.jsonl").write_bytes(text(TRAIN) + line + b"\n" + text(EVAL))
    run = read_run(tmp_path)
    assert run.metrics == [TRAIN, EVAL] and run.foreign == {"metrics.jsonl": 1, "events.jsonl": 0}
    assert run.events == [] and run.config is None and run.checkpoints == []


@pytest.mark.parametrize("cut", range(1, 70))
def test_a_line_that_is_being_written_is_passed_over(tmp_path, cut):
    (tmp_path / "metrics.jsonl").write_bytes((text(TRAIN) + text(EVAL))[:-cut])
    assert len(text(EVAL)) > 69 and read_run(tmp_path).metrics == ([TRAIN, EVAL] if cut == 1 else [TRAIN])
    assert not read_run(tmp_path).foreign["metrics.jsonl"]


def test_lines_keep_their_numbers(tmp_path):
    (tmp_path / "log").write_bytes(text(TRAIN, {}, EVAL))
    assert list(read_lines(tmp_path / "log", METRICS_KINDS)) == [(1, TRAIN), (2, None), (3, EVAL)]


def test_a_reader_has_limits(tmp_path):
    with pytest.raises(Refused, match="there is no such folder"):
        read_run(tmp_path / "none")
    (tmp_path / "metrics.jsonl").write_bytes(text(TRAIN, TRAIN, TRAIN))
    assert len(read_run(tmp_path, most_lines=3).metrics) == 3
    with pytest.raises(Refused, match="metrics.jsonl: more than 2 lines"):
        read_run(tmp_path, most_lines=2)


def test_an_event_has_the_fields_of_its_kind():
    made = event("signal", {"iter": 3, "signal": 15})
    assert set(made) == {"kind", "iter", "signal", "time"} and made["time"] > 1.7e9
    with pytest.raises(TypeError, match=r"unknown: \['signal', 'singal'\]"):
        event("signal", {"iter": 3, "singal": 15})
    with pytest.raises(KeyError):
        event("surprise", {"iter": 3})


def test_every_field_of_a_line_says_what_it_is():
    """docs can be made from them: each kind has a docstring, and its name is the kind's."""
    for name, kind in {**METRICS_KINDS, **EVENT_KINDS}.items():
        assert kind.__doc__ and kind.__name__.lower() == name


# ---------------------------------------------------------------------------------------------- the page about it


def the_page():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate_run_folder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_run_folder_is_what_the_declarations_say():
    module, text = the_page(), (ROOT / "docs" / "run_folder.md").read_text("utf-8")
    assert text == module.page(), "run: python docs/generate_run_folder.py"
    assert not re.findall(r"^\| `.*\|\s*\|$", text, re.M), "a field without a word about it"
    for kind in (*METRICS_KINDS, *EVENT_KINDS):
        assert f'### "kind": "{kind}"' in text
    for kinds in (METRICS_KINDS, EVENT_KINDS):
        fields = set().union(*(kind.__annotations__ for kind in kinds.values())) - {"kind"}
        assert not [name for name in fields if f"| `{name}`" not in text]


def test_ten_lines_read_a_run_into_pandas(tiny, monkeypatch):
    pytest.importorskip("pandas", reason="pandas is not installed")
    hurts = {"name": "set_lr", "value": 3.0, "at_iter": 5, "guard": {"max_increase": 0.05, "within_iters": 4}}
    _, out = tiny([{"name": "set_weight_decay", "value": 0.2, "at_iter": 2}, hurts], out="out-demo")
    lines = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "run_folder.md").read_text("utf-8"), re.S)[1]
    assert len(lines.splitlines()) <= 11
    monkeypatch.chdir(out.parent)
    names: dict = {}
    exec(lines, names)
    assert names["operations"].name.tolist() == ["set_weight_decay"] and names["operations"].iter.tolist() == [2]
    valid = [(line["iter"], line["val_loss"]) for line in read_run(out).valid.metrics if line["kind"] == "eval"]
    assert list(names["losses"].items()) == valid and [i for i, _ in valid] == [0, 4, 5, 8, 12]
    assert names["metrics"]["machine.host_memory"].notna().sum() == 12, "mappings are columns with a dot"


def test_the_page_reads_a_run_without_void_lines(tiny, monkeypatch):
    pytest.importorskip("pandas", reason="pandas is not installed")
    _, out = tiny(out="out-demo", max_iters=2)
    monkeypatch.chdir(out.parent)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs" / "run_folder.md").read_text("utf-8"), re.S)[1], names)
    assert names["losses"].index.tolist() == [0, 2] and len(names["operations"]) == 0


# ---------------------------------------------------------------------------------------------- the code's version


def git(folder, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def version(monkeypatch):
    """The version of the code in a folder, asked anew each time."""

    def ask(folder):
        monkeypatch.setattr(code, "ROOT", folder)
        return code.code_version.__wrapped__()

    return ask


def test_the_version_is_the_commit_and_whether_it_is_clean(tmp_path, version, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    assert version(tmp_path) is None, "no commit yet"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "out").write_text("a run leaves files that git does not follow")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside a hook of another repository
    assert version(tmp_path) == {"commit": head, "clean": True} and len(head) == 40
    (tmp_path / "a.py").write_text("2")
    assert version(tmp_path) == {"commit": head, "clean": False}


def test_no_version_outside_a_checkout(tmp_path, version, monkeypatch):
    git(tmp_path, "init", "-q")
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert version(inside) is None, "a repository around it is somebody else's"
    monkeypatch.setenv("PATH", str(inside))
    assert version(tmp_path) is None, "there is no git"


def test_a_slow_disk_delays_no_start(tmp_path, version, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / "git").write_text("#!/bin/sh\ncase $4 in --porcelain) exec sleep 60;; esac\necho abc\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(code, "_SECONDS", 0.5)
    assert version(tmp_path) == {"commit": "abc", "clean": None}


def test_every_start_says_the_version(tiny, resume):
    _, out = tiny(max_iters=2)
    assert resume(out, max_iters=4) == 0
    said = [event["code"] for kind in ("start", "resume") for event in events(out, kind)]
    assert said == [code.code_version()] * 2 and (said[0] is None) == (not (ROOT / ".git").exists())
