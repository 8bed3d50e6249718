"""orchestrate evaluate: suites and their sums, local data, known results, what is refused, tables and plots."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import miniature
import numpy as np
import pytest
import torch
from conftest import arguments, on_ranks
from test_export import LLAMA_STYLE, shaken
from test_tokenizers import EOT, byte_level, saved

import train_orchestrated
from orchestrate.data.keeping import save
from orchestrate.data.tokenizer import CharTokenizer, RemappedTokenizer
from orchestrate.model import export as forms
from orchestrate.tools.main import run as orchestrate
from orchestrate.training.session import evaluating
from orchestrate.training.settings.errors import Refused
from orchestrate.training.tasks import harness
from orchestrate.training.tasks.adapter import Adapter
from orchestrate.training.tasks.harness import Loaded, Result
from orchestrate.training.tasks.suites import CORE, GAUNTLET, SUITES, Member, Number, Suite, mean, rescaled, summed_up

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return miniature.write(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder of a small model with room for every task's prompt, and its tokenizer."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    tokenizer = saved(byte_level(), folder, eos_token=EOT)
    shape = dict(vocab_size=tokenizer.vocab_size, block_size=2048, n_layer=1, n_hidden=(16,), n_embd=16, n_head=2)
    model = shaken(replace(LLAMA_STYLE, **shape, n_kv_head=1))
    special = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    forms.write_hugging_face(forms.form_of(model), folder, special=special)
    save(tokenizer, folder)
    return folder


@pytest.fixture
def adapter(exported) -> Adapter:
    return Adapter(*evaluating.open_foreign(str(exported)))


# ---------------------------------------------------------------------------------------------- suites


def test_scores_are_rescaled_above_guessing():
    assert 100 * rescaled(0.30, 0.25) == pytest.approx(6.67, abs=0.005)
    assert rescaled(0.25, 0.25) == 0 and rescaled(1.0, 0.62) == 1 and rescaled(0.4, 0.5) == pytest.approx(-0.2)


def result(name: str, value: float, error: float | None = 0.03) -> Result:
    return Result(name, "1", 0, 10, {"acc": (value, error), "f1": (0.1, None)})


SMALL = Suite(
    "small",
    (
        Member("a", "a", "acc", 0, 0.25, "one"),
        Member("b", "b", "acc", 0, 0.5, "one"),
        Member("c", "c", "acc", 0, 0.0, "two"),
    ),
    {},
)


def test_a_suite_is_the_mean_of_its_categories():
    results = {"a": result("a", 0.55), "b": result("b", 0.6), "c": result("c", 0.5, 0.02)}
    found = summed_up(SMALL, results)
    # one: (0.3/0.75 + 0.1/0.5) / 2; its error sqrt((0.03/0.75)^2 + (0.03/0.5)^2) / 2.
    assert found["one"].value == pytest.approx(0.3) and found["one"].error == pytest.approx(0.0360555)
    assert found["two"] == Number(0.5, 0.02)
    assert found["small"].value == pytest.approx(0.4)
    assert found["small"].error == pytest.approx((0.0360555**2 + 0.02**2) ** 0.5 / 2)
    one = SMALL._replace(members=tuple(member._replace(category="all") for member in SMALL.members))
    sums = summed_up(one, results)
    assert sums["small"].value == pytest.approx((0.4 + 0.2 + 0.5) / 3) and len(sums) == 1, "of one category: its tasks"


def test_a_task_without_a_result_is_no_zero():
    results = {"a": result("a", 0.55), "b": result("b", 0.6)}
    with pytest.raises(KeyError, match="c"):
        summed_up(SMALL, results)
    assert mean([Number(0.2, None), Number(0.4, 0.1)]) == (pytest.approx(0.3), None)
    scored = evaluating.Scored(evaluating.Subject("m", "", None, Path()), "", results, {"c": "why"})
    assert scored.sums(SMALL) == {} and scored.to_json(SMALL)["suite"] == {}


def test_every_task_of_the_suites_is_in_lm_eval():
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for suite in SUITES.values():
        for member in suite.members:
            assert member.task in manager.all_tasks, member
            quick = harness.index_of((member.task,)).task_index[member.task]
            assert quick.yaml_path == manager.task_index[member.task].yaml_path, "the quick look finds the same file"
        names = [member.name for member in suite.members]
        assert len(set(names)) == len(names) and not set(names) & set(suite.missing)
        assert all(0 <= member.baseline < 1 for member in suite.members)
    assert set(manager.all_subtasks) <= set(harness.every_name()) <= set(manager.all_tasks)
    assert len(CORE.members) + len(CORE.missing) == 22 and list(CORE.missing) == ["jeopardy"]
    assert len(GAUNTLET.members) >= 35
    assert set(GAUNTLET.categories) == {
        "reading_comprehension", "commonsense_reasoning", "world_knowledge", "symbolic_problem_solving",
        "language_understanding", "safety"}  # fmt: skip


@pytest.mark.timeout(600)
def test_both_suites_run_whole_on_local_files(data, exported, tmp_path, monkeypatch, capsys):
    """Twice: the second time each result is known, and nothing is asked of a model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for suite in SUITES.values():
        out = tmp_path / f"{suite.name}.json"
        args = [str(exported), "--suite", suite.name, "--data", str(data), "--limit", "2", "--out", str(out)]
        assert orchestrate("evaluate", [*args, "--plot", str(tmp_path / "plot.html")]) == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        (model,) = json.loads(out.read_text())["models"]
        assert set(model["results"]) == {member.name for member in suite.members} and not model["failed"]
        for member in suite.members:
            assert member.metric in model["results"][member.name]["scores"], member
        assert all(name in said for name in suite.missing), "what lm-eval lacks is named"
        assert "±: one standard error; the last rows are rescaled: 0 % is what guessing gets, 100 % no mistake" in said
        assert model["suite"][suite.name]["stderr"] > 0
        if suite is GAUNTLET:
            values = [model["suite"][name]["value"] for name in suite.categories]
            assert model["suite"]["gauntlet"]["value"] == pytest.approx(sum(values) / 6)
            assert model["results"]["mmlu"]["documents"] == 2 * 57
        page = (tmp_path / "plot.html").read_text()
        assert f"{suite.name} (rescaled)" in page and "src=" not in page.split("<body>")[0]
        with monkeypatch.context() as patched:
            patched.setattr(Loaded, "score", lambda *args, **keys: pytest.fail("it is known"))
            assert orchestrate("evaluate", args) == 0
        assert capsys.readouterr().out.count("(known)") == len(suite.members)


# ---------------------------------------------------------------------------------------------- tasks


def test_a_score_is_counted_by_hand(data, adapter):
    """arc_easy's answers, by the likelihoods themselves; and lm-eval's formula of the standard error."""
    found = Loaded("arc_easy", data, 2).score(adapter)
    loaded = Loaded("arc_easy", data, 2)
    (task,) = loaded._found["tasks"].values()
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    right = []
    for number in range(miniature.ROWS):
        asked = [one for one in task.instances if one.doc_id == number]
        values = [value for value, _ in adapter.loglikelihood(asked)]
        right.append(int(np.argmax(values) == number % 4))
    share = np.mean(right)
    assert found.scores["acc"] == (pytest.approx(share), pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5))
    assert (found.version, found.few_shot, found.documents) == ("1.0", 2, miniature.ROWS) and loaded.metrics == (
        "acc",
        "acc_norm",
    )
    assert "ant" in asked[0].args[0] or asked[0].args[0].count("Question:") == 3


def test_a_score_leaves_random_numbers_alone(data, adapter):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    first = Loaded("hellaswag", data, 3).score(adapter)
    assert (random.random(), np.random.random(), torch.rand(1)) == expected
    assert Loaded("hellaswag", data, 3).score(adapter) == first


def test_words_of_squad():
    assert harness.squad_exact("The Cat!", "cat") == 1 and harness.squad_exact("cat", "cats") == 0
    assert harness.squad_f1("a black cat", "the black dog") == pytest.approx(0.5)
    assert harness.squad_f1("the", "a") == 1 and harness.squad_f1("cat", "the") == 0
    assert harness.squad_f1("cat cat dog", "cat bird") == pytest.approx(0.4)


@pytest.mark.parametrize(
    "name, message",
    [
        ("hellaswog", "there is no task 'hellaswog' in lm-eval; did you mean hellaswag"),
        ("mmlu_stem_tasks", "is a tag of lm-eval"),
        ("humaneval", "humaneval.*(code|runs what the model writes)"),
        ("sciq", r"there is no SPLIT.jsonl of the data set allenai/sciq"),
    ],
)
def test_tasks_that_are_refused(name, message, data):
    with pytest.raises(Refused, match=message):
        Loaded(name, data)


def test_no_code_of_a_data_set_or_a_metric_is_run(tmp_path, monkeypatch, data):
    import datasets
    import evaluate

    with pytest.raises(Refused, match="x: its metric bleu is code"), harness._reading("x", None):
        evaluate.load("bleu")
    seen = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **keys: seen.update(keys, path=path))
    with harness._reading("x", None):
        datasets.load_dataset("someone/set", trust_remote_code=True, split="test")
    assert seen == {"path": "someone/set", "split": "test"}

    def script(*args, **keys):
        raise RuntimeError("Dataset scripts are no longer supported, but found set.py")

    monkeypatch.setattr(datasets, "load_dataset", script)
    with pytest.raises(Refused, match="x: its data set is a script"), harness._reading("x", None):
        datasets.load_dataset("someone/set")
    assert datasets.load_dataset is script, "put back"


def test_local_data_of_other_shapes(tmp_path):
    (tmp_path / "o/n/c").mkdir(parents=True)
    (tmp_path / "o/n/c/test.jsonl").write_text('{"a": "x\\u2028y"}\n\n{"a": "z"}\n')
    assert harness.local_data(tmp_path, "o/n", "c", split="test")["a"] == ["x\u2028y", "z"]
    for text in (
        '{"a": 1',
        "[1]",
        '{"a": 1}\n{"a": "x"}',
        "",
        '{"a": 1}\n{}',
        "{}\n" + '{"a": 1}',
        f'{{"a": {10**30}}}',
    ):
        (tmp_path / "o/n/c/test.jsonl").write_text(text)
        with pytest.raises(Refused, match="test.jsonl: not JSON lines of one shape"):
            harness.local_data(tmp_path, "o/n", "c")
    with pytest.raises(Refused, match="o/two_digit.jsonl: cannot be read"):
        harness.local_data(tmp_path, "json", None, {"test": "hf://datasets/o/two_digit.jsonl"})


# ---------------------------------------------------------------------------------------------- the command


def words(folder: Path) -> Path:
    """A data set by characters that has all of the miniature tasks', and no token that begins a text."""
    characters = ["\n", *map(chr, range(32, 127)), "‘", "’"]
    text = f"Question: Which is a {' '.join(miniature.WORDS)}?\nAnswer:\n" * 60
    folder.mkdir()
    ids = np.array([characters.index(c) for c in text], dtype=np.uint16)
    ids[:-800].tofile(folder / "train.bin")
    ids[-800:].tofile(folder / "val.bin")
    meta = dict(format=1, vocab_size=len(characters), dtype="uint16", tokenizer="char", itos=characters)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    keys = dict(max_iters=4, save_interval=2, eval_interval=2, block_size=256, n_embd=16, n_head=2, n_layer=1)
    assert train_orchestrated.main(arguments(words(folder / "words"), folder / "run", batch_size=2, **keys)) == 0
    return folder / "run"


def test_checkpoints_of_runs_in_a_table_and_a_plot(trained, data, tmp_path, capsys):
    given = [str(trained), "--tasks", "copa,arc_easy", "--data", str(data), "--checkpoint", "all"]
    out, page = tmp_path / "o.json", tmp_path / "p.html"
    assert orchestrate("evaluate", [*given, "--out", str(out), "--plot", str(page)]) == 0
    said = capsys.readouterr().out
    models = json.loads(out.read_text())["models"]
    assert [model["iter"] for model in models] == [2, 4], "in the order of the iterations"
    assert [model["checkpoint"] for model in models] == ["iter_00000002", "iter_00000004"] or len(models) == 2
    head = next(line for line in said.splitlines() if line.startswith("task"))
    assert all(f"run/{model['checkpoint']}" in head for model in models)
    row = next(line for line in said.splitlines() if line.startswith("arc_easy"))
    for model in models:
        value, error = model["results"]["arc_easy"]["scores"]["acc"]
        assert f"acc {value:.4f} ± {error:.4f}" in row
    assert "copa (acc)" in page.read_text() and page.stat().st_size > 10**6, "plotly itself is in it"
    one = [*given[:-1], str(trained / "checkpoints" / models[0]["checkpoint"])]
    assert orchestrate("evaluate", one) == 0
    assert capsys.readouterr().out.count("(known)") == 2


def test_an_interrupted_evaluation_goes_on_task_by_task(trained, data, monkeypatch, capsys):
    real, done = Loaded.score, []

    def stops(self, *args, **keys):
        if done:
            raise KeyboardInterrupt
        done.append(self.name)
        return real(self, *args, **keys)

    given = [str(trained), "--tasks", "piqa,boolq", "--data", str(data), "--limit", "3"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Loaded, "score", stops)
        orchestrate("evaluate", given)
    capsys.readouterr()
    assert orchestrate("evaluate", given) == 0
    said = capsys.readouterr().out
    assert said.count("(known)") == 1 and "piqa: acc" in said.split("(known)")[0]


def test_what_a_result_depends_on(trained, data, tmp_path, monkeypatch, capsys):
    """Other documents, examples, files or a damaged file of a result: scored again."""
    given = [str(trained), "--tasks", "openbookqa", "--data", str(data)]

    def known(*more: str) -> bool:
        assert orchestrate("evaluate", [*given, *more]) == 0
        return "(known)" in capsys.readouterr().out

    assert not known() and known()
    for more in (("--limit", "2"), ("--few_shot", "1"), ("--dtype", "bfloat16"), ("--checkpoint", "iter_2")):
        if more[0] == "--checkpoint":
            more = (more[0], min(path.name for path in (trained / "checkpoints").iterdir() if path.name[:4] == "iter"))
        assert not known(*more) and known(*more), more
    assert not known("--again")
    for path in (trained / "evaluations").glob("*.json"):
        path.write_text(path.read_text()[:-20])
    assert not known() and known()
    monkeypatch.setattr(evaluating, "version_of", lambda name: "2.0")
    assert not known()
    other = miniature.write(tmp_path / "other")
    given[-1] = str(other)
    assert not known() and known()


def test_a_task_that_fails_is_an_error_and_not_a_zero(trained, data, tmp_path, capsys):
    """This model's characters have no token that begins a text, and block_size 256 has no room for 256 new tokens."""
    out = tmp_path / "o.json"
    given = [str(trained), "--tasks", "coqa,copa,sciq", "--data", str(data), "--out", str(out)]
    assert orchestrate("evaluate", given) == 1
    said = capsys.readouterr()
    (model,) = json.loads(out.read_text())["models"]
    assert list(model["results"]) == ["copa"] and set(model["failed"]) == {"coqa", "sciq"}
    assert "error: coqa: coqa: it asks for 256 new tokens, and the model has block_size 256" in said.err
    assert "error: sciq: " in said.err and "allenai/sciq" in said.err
    assert [line.split()[1] for line in said.out.splitlines() if line.startswith(("coqa ", "sciq "))] == ["failed"] * 2


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "give --tasks or --suite"),
        (["--tasks", "copa"], "RUN is missing"),
        (["RUN", "--tasks", "copa", "--suite", "core"], "give --tasks or --suite, one of them"),
        (["RUN", "--suite", "cores"], "--suite cores: allowed are core, gauntlet"),
        (["RUN", "--suite", "core", "--few_shot", "2"], "--few_shot: a suite says itself"),
        (["RUN", "--tasks", "copa", "--limit", "0"], "--limit: must be at least 1, got 0"),
        (["RUN", "--tasks", "copa", "--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["RUN", "--tasks", "copa", "--out", "nowhere/x.json"], "--out nowhere/x.json: there is no folder nowhere"),
        (["RUN", "--tasks", "copas,copa,copa"], "--tasks: there is no task 'copas' in lm-eval"),
        (["RUN", "--tasks", "copa,copa"], "--tasks: copa is there twice"),
        (["RUN", "--tasks", "adder"], "adder is a task of eval_tasks"),
        (["RUN", "--tasks", "copa", "--checkpoint", ".."], "there is no checkpoint '..'; there are iter"),
        (["RUN", "--tasks", "copa", "--checkpoint", ""], "there is no checkpoint ''; there are iter"),
        (["RUN", "--tasks", "copa", "--checkpoint", "/etc"], "there is no checkpoint '/etc'; there are iter"),
        (["RUN", "--tasks", "copa", "--out", "/"], "--out /: is a folder"),
        (["RUN", "--tasks", "copa", "--checkpoint", "iter_99"], "there is no checkpoint 'iter_99'; there are iter"),
        (["nowhere", "--tasks", "copa"], "nowhere"),
        (["nowhere", "--tasks", "copa", "--checkpoint", "iter_4"], "nowhere is no run folder and has none"),
    ],
)
def test_bad_input_is_refused(args, message, trained, capsys):
    assert orchestrate("evaluate", [str(trained) if arg == "RUN" else arg for arg in args]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_the_tasks_of_a_suite_are_listed(capsys):
    assert orchestrate("evaluate", ["--suite", "core", "--list"]) == 0
    said = capsys.readouterr().out
    assert "winograd  wsc273  acc  few-shot 0  guessing 50 %" in said
    assert "missing: jeopardy (lm-eval has no such task)" in said
    assert orchestrate("evaluate", ["--list"]) == 0
    assert {"hellaswag", "mmlu", "wikitext"} <= set(capsys.readouterr().out.split())


def _on_ranks(rank: int, given: list[str]) -> int:
    return orchestrate("evaluate", given)


def test_two_processes_have_the_scores_of_one(trained, data, tmp_path, capsys):
    given = [str(trained), "--tasks", "copa,piqa", "--data", str(data), "--again", "--checkpoint", "all", "--out"]
    assert on_ranks(_on_ranks, [*given, str(tmp_path / "two.json")]) == [0, 0]
    assert orchestrate("evaluate", [*given, str(tmp_path / "one.json")]) == 0
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()


def test_a_damaged_checkpoint_is_passed_over_and_said(trained, data, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    older, newest = sorted(path for path in (run / "checkpoints").iterdir() if not path.is_symlink())
    (newest / "model.safetensors").write_bytes(b"")
    given = [str(run), "--tasks", "copa", "--data", str(data)]
    assert orchestrate("evaluate", given) == 0
    said = capsys.readouterr()
    assert f"run/{older.name}" in said.out and f"passed over: checkpoint {newest}" in said.err
    assert orchestrate("evaluate", [*given, "--checkpoint", "all"]) == 1
    said = capsys.readouterr()
    assert "copa  acc" in said.out and newest.name not in said.out and f"error: checkpoint {newest}" in said.err
    assert orchestrate("evaluate", [*given, "--checkpoint", newest.name]) == 2
    (run / "checkpoints" / "best").unlink()
    (run / "checkpoints" / "best").symlink_to(tmp_path)
    assert orchestrate("evaluate", [*given, "--checkpoint", "best"]) == 2
    assert "there is no checkpoint 'best'" in capsys.readouterr().err


def test_tokenizers_with_the_same_tokens_are_told_apart():
    inner, other = CharTokenizer(["a", "b", EOT]), CharTokenizer(["b", "a", EOT])
    prints = {evaluating._tokenizer_print(t) for t in (inner, other)}
    for remap in ([0, 1, 2], [1, 0, 2]):
        prints |= {evaluating._tokenizer_print(RemappedTokenizer(t, np.array(remap))) for t in (inner, other)}
    assert len(prints) == 6
    inner.end_of_text = None
    assert evaluating._tokenizer_print(inner) not in prints


def test_a_known_result_that_cannot_be_is_made_again(tmp_path):
    path, whole = tmp_path / "r.json", result("a", 0.5).to_json()
    for wrong in ({"scores": {}}, {"scores": {"acc": [math.nan, None]}}, {"scores": {"acc": [0.5, -1]}},
                  {"few_shot": math.inf}, {"documents": "x"}):  # fmt: skip
        path.write_text(json.dumps({"facts": {}, "result": whole | wrong}))
        assert evaluating._read(path, {}) is None, wrong
    path.write_text(json.dumps({"facts": {}, "result": whole}))
    assert evaluating._read(path, {}) == whole and evaluating._read(path, {"limit": 1}) is None


@pytest.mark.parametrize("module, extra", [("lm_eval", "evaluate"), ("plotly", "report")])
def test_a_missing_extra_is_named(module, extra, trained, data, monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    given = [str(trained), "--tasks", "copa", "--data", str(data), "--limit", "1", "--plot", str(tmp_path / "p.html")]
    monkeypatch.setattr(evaluating, "opened", lambda *args: pytest.fail("it is said first"))
    monkeypatch.setattr("orchestrate.tools.evaluate.opened", evaluating.opened)
    assert orchestrate("evaluate", given) == 2
    assert f"pip install 'training-orchestrator[{extra}]'" in capsys.readouterr().err
