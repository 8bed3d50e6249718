"""W&B, TensorBoard and trackio get the run's valid curve: read back from the files that each of them writes."""

from __future__ import annotations

import builtins
import json
import os
import socket
import struct
from pathlib import Path

import pytest
from conftest import arguments, events, lines

import train_orchestrated
from orchestrate.training.settings.config import TrainConfig, resolve
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import trackers
from orchestrate.training.store.reporting import Reporter
from orchestrate.training.store.run_folder import METRICS, rewind
from orchestrate.training.store.trackers import About, Branch, Trackers, leave, read_branch

ALL = ("wandb", "tensorboard", "trackio")


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """Nothing is written outside of this test's folders, and nothing is asked of another machine."""
    pytest.importorskip("tensorboard", reason="the extra trackers is not installed")
    place = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(place))  # read when trackio is imported
        patch.setenv("HF_TOKEN", "hf_" + "a" * 34)  # with which it would ask who owns it
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        pytest.importorskip("trackio", reason="the extra trackers is not installed")
        real, asked = socket.getaddrinfo, []

        def only_here(host, *more, **options):
            if host not in (None, "localhost", "127.0.0.1", "::1", b"127.0.0.1"):
                asked.append(host)
                raise OSError(f"no network: {host}")
            return real(host, *more, **options)

        patch.setattr(socket, "getaddrinfo", only_here)
        yield
        assert asked == []


# ---------------------------------------------------------------------------------------------- reading back


def wandb_records(path: Path):
    """Records of a .wandb file: LevelDB's log format, with W&B's header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_files(out: Path) -> list[Path]:
    """Of all starts, in the order in which they began."""
    return sorted((out / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def wandb_rows(path: Path) -> list[tuple[int, dict]]:
    """(step, values) of each row of history."""
    rows = []
    for record in wandb_records(path):
        if record.HasField("history"):
            values = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            rows.append((record.history.step.num, values))
    return rows


def of_wandb(paths: list[Path], name: str) -> list[tuple[int, float]]:
    rows = [row for path in paths for _, row in wandb_rows(path)]
    return [(row["iter"], row[name]) for row in rows if name in row]


def of_tensorboard(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    if name in accumulator.Tags()["tensors"]:
        return [(e.step, e.tensor_proto.string_val[0].decode()) for e in accumulator.Tensors(name)]
    return [(e.step, e.value) for e in accumulator.Scalars(name)]


def of_trackio(project: str, run: str, name: str) -> list[tuple[int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    return [(log["step"], log[name]) for log in SQLiteStorage.get_logs(project, run) if name in log]


def measured(out: Path, kind: str, name: str) -> list[tuple[int, float]]:
    return [(m["iter"], m[name]) for m in lines(out / METRICS) if m["kind"] == kind and not m.get("void")]


def branches(out: Path) -> tuple[str, str]:
    """Names of the branch before and of the present one."""
    branch = read_branch(out)
    return Branch(branch.id, branch.number - 1).name, branch.name


# ---------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def went_back(data, tmp_path_factory) -> Path:
    """A run that goes back from iteration 7 to 4, changes its rate at 5, ends at 8 and is resumed to 10."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "s.json").write_text(json.dumps([{"name": "set_lr", "value": 0.5, "at_iter": 5, "desc": "<b>up|</b>"}]))
    keys = {"tracker": ",".join(ALL), "on_sick_step": "rollback", "inject": "nan@6", "max_iters": 8, "report": False}
    out = folder / "my run"
    assert train_orchestrated.main(arguments(data, out, schedule=folder / "s.json", **keys)) == 0
    assert train_orchestrated.main(["--init_from=resume", f"--out_dir={out}", "--max_iters=10"]) == 0
    assert [event["from_iter"] for event in events(out, "rollback")] == [7]
    return out


def test_the_curve_is_the_valid_one_and_the_void_one_is_elsewhere(went_back):
    losses = measured(went_back, "train", "loss")
    assert [place for place, _ in losses] == list(range(1, 11))
    before, now = branches(went_back)
    project, run = went_back.parent.name, f"my-run-{now}"
    files = wandb_files(went_back)
    assert [path.name for path in files] == [f"run-{before}.wandb", f"run-{now}.wandb", f"run-{now}.wandb"]
    assert of_wandb(files[1:], "train/loss") == losses
    assert of_tensorboard(went_back / "tensorboard" / now, "train/loss") == [
        (place, pytest.approx(loss, rel=1e-6)) for place, loss in losses
    ]
    assert of_trackio(project, run, "train/loss") == losses
    validation = measured(went_back, "eval", "val_loss")
    assert [place for place, _ in validation][:2] == [0, 4] and validation[-1][0] == 10
    assert of_wandb(files[1:], "eval/val_loss") == of_trackio(project, run, "eval/val_loss") == validation
    void = [(m["iter"], m["loss"]) for m in lines(went_back / METRICS) if m.get("void")]
    assert void[0][0] == 5
    assert of_wandb(files[:1], "train/loss") == losses[:4] + void
    assert len(of_tensorboard(went_back / "tensorboard" / before, "train/loss")) == 4 + len(void)


def test_steps_of_wandb_grow_over_a_resume(went_back):
    steps = [step for path in wandb_files(went_back)[1:] for step, _ in wandb_rows(path)]
    assert steps == sorted(set(steps)) and len(steps) > 20


def test_what_is_void_is_told(went_back):
    before, now = branches(went_back)
    old, new, _ = wandb_files(went_back)
    runs = [record.run for record in wandb_records(old) if record.HasField("run")]
    assert "void" in runs[-1].tags and "after it is void" in runs[-1].notes
    summary = {item.key: item.value_json for r in wandb_records(old) for item in r.summary.update}
    assert summary["void_after"] == "4"
    first = next(record.run for record in wandb_records(new) if record.HasField("run"))
    assert first.notes == f"the run went back to iteration 4: what {before} has after it is void"
    assert (first.project, first.display_name, first.run_group) == (went_back.parent.name, "my-run-2", "my-run")
    ((at, said),) = of_tensorboard(went_back / "tensorboard" / now, "went back/text_summary")
    assert at == 4 and before in said


def test_operations_are_a_table_and_markers(went_back):
    before, now = branches(went_back)
    (event,) = events(went_back, "operation")
    assert event["iter"] == 5
    files = wandb_files(went_back)
    assert of_wandb(files[1:], "marker/operation") == [(5, 1)]
    assert of_wandb(files[1:], "marker/rollback") == [(4, 1)] and of_wandb(files[1:], "marker/resume") == [(8, 1)]
    assert of_wandb(files[1:], "operation/learning_rate") == [(5, 0.5)]
    tables = sorted((files[1].parent / "files" / "media" / "table").glob("operations*"))
    table = json.loads(tables[-1].read_text())
    (row,) = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert (row["iter"], row["entry"], row["name"], row["value"]) == (5, 1, "set_lr", "0.5")
    assert row["reason"] == "iteration 5 (at_iter 5)" and row["changes"] == "learning_rate 0.01 -> 0.5"
    assert row["desc"] == "<b>up|</b>" and row["val_loss_before"] is None and row["parameters_total"] > 0
    ((at, text),) = of_tensorboard(went_back / "tensorboard" / now, "operations/text_summary")
    assert at == 5 and "set\\_lr" in text and "\\<b\\>up\\|\\</b\\>" in text
    ((at, markdown),) = of_trackio(went_back.parent.name, f"my-run-{now}", "operations")
    assert at == 5 and "set\\_lr" in markdown["_value"] and "iteration 5" in markdown["_value"]


def test_configuration_schedule_and_plan_are_files(went_back):
    _, now = branches(went_back)
    kept = wandb_files(went_back)[1].parent / "files"
    assert json.loads((kept / "config.json").read_text())["max_iters"] in (8, 10)
    assert "set_lr" in (kept / "schedule.yaml").read_text()
    assert "1 entries have fired" in (kept / "plan.txt").read_text()
    saved = [f.path for r in wandb_records(wandb_files(went_back)[1]) for f in r.files.files]
    assert {"config.json", "schedule.yaml", "plan.txt"} <= set(saved)
    ((_, plan),) = of_trackio(went_back.parent.name, f"my-run-{now}", "plan.txt")
    assert "1      set_lr" in plan["_value"]
    ((at, plan),) = of_tensorboard(went_back / "tensorboard" / now, "plan.txt/text_summary")
    assert at == 0 and "    1      set_lr" in plan


# ---------------------------------------------------------------------------------------------- in pieces


def reporter(folder: Path, *names: str) -> Reporter:
    folder.mkdir(exist_ok=True)
    about = About.of(str(folder), "", "", {"lr": 1.0}, "")
    found = Trackers(names, about)
    found.open()
    return Reporter(folder, 99, 0, None, found)


def train(to: Reporter, first: int, last: int, shift: float = 0.0) -> None:
    for number in range(first, last + 1):
        to.metrics("train", iter=number, tokens=number, seconds=0.5, loss=number + shift)


def test_a_death_and_a_resume_from_an_earlier_checkpoint(tmp_path):
    """What was logged after it is in the branch before; a death between the cut and the trackers costs nothing."""
    out = tmp_path / "r"
    one = reporter(out, "tensorboard")
    train(one, 1, 3)
    sizes = one.sizes()
    train(one, 4, 6)
    one.close()
    first = read_branch(out)
    rewind(out, sizes, before=lambda: leave(out, 3))
    assert read_branch(out) == Branch(first.id, 2, 3)
    rewind(out, sizes, before=lambda: pytest.fail("there is nothing to take back"))
    two = reporter(out, "tensorboard")
    train(two, 4, 5, shift=0.5)
    two.close()
    assert of_tensorboard(out / "tensorboard" / f"{first.id}-2", "train/loss") == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5),
    ]  # fmt: skip
    assert [n for n, _ in of_tensorboard(out / "tensorboard" / first.id, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_events_that_are_taken_back_begin_a_branch_too(tmp_path):
    out = tmp_path / "r"
    one = reporter(out, "tensorboard")
    sizes = one.sizes()
    one.event("samples", iter=1, texts=[])
    one.close()
    rewind(out, sizes, before=lambda: leave(out, 0))
    assert read_branch(out).number == 2
    rewind(out, sizes, before=lambda: pytest.fail("it is void already"))


def test_a_tracker_that_comes_later_gets_what_was_before(tmp_path):
    out = tmp_path / "r"
    one = reporter(out)
    train(one, 1, 2)
    one.close()
    assert not (out / "trackers.json").exists()
    two = reporter(out, "tensorboard")
    train(two, 3, 3)
    two.close()
    (folder,) = (out / "tensorboard").iterdir()
    assert of_tensorboard(folder, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_death_while_lines_are_given_again_begins_a_branch(tmp_path):
    out = tmp_path / "r"
    one = reporter(out, "tensorboard")
    train(one, 1, 2)
    one.close()
    branch = read_branch(out)
    (out / "trackers.json").write_text(json.dumps({**branch.__dict__, "whole": []}))
    reporter(out, "tensorboard").close()
    assert read_branch(out).number == 2
    assert of_tensorboard(out / "tensorboard" / f"{branch.id}-2", "train/loss") == [(1, 1.0), (2, 2.0)]


def test_the_wandb_run_of_an_earlier_version_goes_on_unless_lines_were_taken_back(tmp_path):
    for taken_back, expected in ((False, "abcd1234"), (True, "abcd1234-2")):
        out = tmp_path / str(taken_back)
        out.mkdir()
        if taken_back:
            leave(out, 2, "abcd1234")
        Trackers(("wandb",), About.of(str(out), "", "", {}, ""), "abcd1234")
        assert read_branch(out).name == expected and ("wandb" in read_branch(out).begun) != taken_back


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '{"id": 3}', '{"id": "../x", "number": 1, "left_at": null, "begun": [], "whole": []}']
)
def test_a_broken_trackers_json_is_as_good_as_none(tmp_path, content):
    (tmp_path / "trackers.json").write_text(content)
    assert read_branch(tmp_path) is None
    one = reporter(tmp_path, "tensorboard")
    one.close()
    assert len(read_branch(tmp_path).id) == 8


def test_alerts_of_emergencies(tmp_path):
    from trackio.sqlite_storage import SQLiteStorage

    one = reporter(tmp_path / "alarm", *ALL)
    one.event("emergency", iter=7, reason="OSError: no space")
    one.close()
    (file,) = wandb_files(tmp_path / "alarm")
    (alert,) = [record.alert for record in wandb_records(file) if record.HasField("alert")]
    assert (alert.title, alert.text, alert.level) == ("emergency at iteration 7", "OSError: no space", "ERROR")
    name = read_branch(tmp_path / "alarm").name
    (alert,) = SQLiteStorage.get_alerts(tmp_path.name, f"alarm-{name}")
    assert (alert["text"], alert["level"], alert["step"]) == ("OSError: no space", "error", 7)
    ((at, text),) = of_tensorboard(tmp_path / "alarm" / "tensorboard" / name, "alert/text_summary")
    assert at == 7 and "no space" in text


def test_texts_are_a_table(tmp_path):
    one = reporter(tmp_path / "r", "wandb", "tensorboard")
    one.event("samples", iter=4, texts=[{"prompt": "a", "text": "ab"}, {"prompt": "c", "text": "c\n|d"}])
    one.close()
    (file,) = wandb_files(tmp_path / "r")
    (table,) = (file.parent / "files" / "media" / "table").glob("samples*")
    assert json.loads(table.read_text()) == {
        "columns": ["iter", "prompt", "text"], "data": [[4, "a", "ab"], [4, "c", "c\n|d"]],
    }  # fmt: skip
    ((at, text),) = of_tensorboard(
        tmp_path / "r" / "tensorboard" / read_branch(tmp_path / "r").name, "samples/text_summary"
    )
    assert at == 4 and text.splitlines()[2:] == ["| 4 | a | ab |", "| 4 | c | c \\|d |"]


def test_one_that_fails_is_told_once_and_the_run_goes_on(data, tmp_path, monkeypatch, capsys):
    real, calls = trackers.TensorBoard.log, []

    def fails(self, iteration, values):
        calls.append(iteration)
        if iteration >= 2:
            raise OSError("no space")
        real(self, iteration, values)

    monkeypatch.setattr(trackers.TensorBoard, "log", fails)
    out = tmp_path / "run"
    assert train_orchestrated.main(arguments(data, out, tracker="tensorboard", max_iters=4)) == 0
    told = "tracker tensorboard failed and gets nothing more (OSError: no space)"
    assert capsys.readouterr().out.count(told) == 1 and calls.count(2) == 1 and max(calls) == 2
    (event,) = events(out, "error")
    assert event["message"] == told and event["action"] == "go on"
    assert [place for place, _ in measured(out, "train", "loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "name, package, install",
    [
        ("tensorboard", "tensorboard", "'training-orchestrator[trackers]'"),
        ("trackio", "trackio", "'training-orchestrator[trackers]'"),
        ("wandb", "wandb", "wandb"),
    ],
)
def test_one_that_is_not_installed_is_refused_at_the_start(data, tmp_path, monkeypatch, capsys, name, package, install):
    real = builtins.__import__

    def without(wanted, *more):
        if wanted.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(wanted, *more)

    import sys

    for module in [m for m in sys.modules if m.partition(".")[0] == package or m == "torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(builtins, "__import__", without)
    assert train_orchestrated.run(arguments(data, tmp_path / "run", tracker=name)) == 2
    assert capsys.readouterr().err == f"error: tracker={name}: {package} is missing: pip install {install}\n"
    assert not (tmp_path / "run").exists()


def test_nothing_is_tracked_where_nothing_is_written(data, tmp_path):
    assert train_orchestrated.main(arguments(data, tmp_path / "run", tracker="tensorboard", eval_only=True)) == 0
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- keys and names


def test_the_key():
    def given(*keys):
        return resolve([], list(keys))[0]

    assert given(("tracker", "trackio, wandb,trackio")).tracker == ("trackio", "wandb")
    assert given(("tracker", "")).trackers == () == TrainConfig().trackers
    assert given(("tracker", "trackio"), ("wandb_log", "True")).trackers == ("wandb", "trackio")
    assert given(("tracker", "wandb"), ("wandb_log", "True")).trackers == ("wandb",)
    assert given(("tracker", "wandb"), ("eval_only", "True")).trackers == ()
    for wrong in ("mlflow", "wandb,,trackio", "3", "['wandb', 3]"):
        with pytest.raises(Refused, match="tracker"):
            given(("tracker", wrong))
    assert TrainConfig.model_validate(TrainConfig(tracker=("wandb",)).model_dump()).tracker == ("wandb",)
    as_recorded = json.loads(json.dumps(TrainConfig(tracker=("wandb", "trackio")).model_dump()))
    assert TrainConfig.model_validate(as_recorded).tracker == ("wandb", "trackio")


def test_names_follow_from_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = About.of("my lab/größe 1/", "", "", {}, "")
    assert (about.project, about.name) == ("my-lab", "gr-e-1")
    assert About.of("out", "", "", {}, "").project == trackers._plain(tmp_path.name)
    assert About.of("/", "", "", {}, "").name == "orchestrate"
    about = About.of("a/b", "P", "n", {}, "")
    assert (about.project, about.name) == ("P", "n")
    assert os.listdir(tmp_path) == []
