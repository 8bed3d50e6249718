"""Mutation testing: small faults are put into the code one at a time, and the tests must notice.

    python bench/mutants.py [SUBJECT ...] [--mutants 40 | all] [--seed 0] [--workers 2] [--least 85] [--fresh]

For every subject (below: its files and the tests that concern it) the faults are those of cosmic-ray's operators, one
or two for each kind of expression, and statements that are left out. A sample of them, drawn by the seed, is tried:
each in a copy of the checkout, with `-x`, and within a few times what the tests take without it. What nobody can
notice is listed in bench/equivalent_mutants.json with the reason. The answers lie in .mutants/, so a call goes on
where the last one stopped; what was noticed once is not tried again, and what survived is when its tests have changed.
Exits with 1 where fewer than --least percent of a subject's mutants that are not equivalent were noticed.

The checkout itself is never changed. Test processes are forked from one that has imported torch.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import json
import multiprocessing
import os
import queue
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import parso.python.tree as syntax
import psutil
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = ROOT / ".mutants" / "answers.jsonl"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")
IMPORTED_ONCE = ["torch", "numpy", "pydantic", "yaml", "hypothesis", "safetensors.torch", "peft"]

SUBJECTS: dict[str, tuple[list[str], list[str]]] = {
    "learning rate": (["training/run/learning_rate.py"], ["learning_rate"]),
    "triggers": (
        ["training/schedule/triggers.py"],
        ["tracks", "orchestrator", "schedule", "own_operations", "metrics"],
    ),
    "stream": (["data/stream.py"], ["stream"]),
    "trackers": (["training/store/trackers.py"], ["trackers"]),
    "evaluation": (["training/run/evaluation.py"], ["evaluation", "data_and_model"]),
    "analysis": (["training/run/analysis.py"], ["analysis"]),
    "bits per byte": (["training/run/text_bytes.py"], ["eval_in_training"]),
    "adapter": (["training/tasks/adapter.py"], ["adapter"]),
    "suites": (["training/tasks/suites.py", "training/tasks/harness.py"], ["evaluate"]),
    "optimizer": (["training/run/optimizers.py"], ["adamw", "optimizers"]),
    "orchestrator": (
        ["training/schedule/orchestrator.py", "training/schedule/position.py"],
        ["tracks", "orchestrator", "guard", "resume", "metrics"],
    ),
    "schedule": (
        ["training/schedule/file.py", "training/schedule/stages.py", "training/schedule/ramps.py"],
        ["tracks", "schedule", "orchestrator", "hostile"],
    ),
    "plan table": (["tools/plan_table.py"], ["plan"]),
    "schema": (["training/schedule/file_schema.py"], ["schemas"]),
    "starter": (["training/session/starter.py"], ["starter"]),
    "ending": (["training/session/ending.py"], ["start"]),
    "session": (
        [
            "training/loop.py",
            "training/session/session.py",
            "training/session/healing.py",
            "training/session/saving.py",
        ],
        [
            "evaluation",
            "guard",
            "sickness",
            "rhythm",
            "sample_prompts",
            "survive",
            "resume",
            "run_folder",
            "reporting",
            "commands",
            "analysis",
        ],
    ),
    "run": (
        [f"training/run/{name}.py" for name in ("run", "step", "changes", "sickness", "batches")],
        ["step", "changes", "sickness", "data_files", "operations", "survive"],
    ),
    "checkpoint": (["training/store/checkpoint.py"], ["checkpoint", "sharded"]),
    "foreign weights": (
        ["model/hugging_face.py", "model/shards.py", *(f"model/families/{n}.py" for n in ("family", "gpt2", "llama"))],
        ["foreign_weights", "data_and_model"],
    ),
    "adapters": (["model/adapters.py", "model/lora.py", "model/peft_folder.py"], ["peft", "growth"]),
    "export": (["model/export.py", "training/session/exporting.py"], ["export"]),
    "tokenizers": (["data/tokenizer.py", "data/keeping.py"], ["tokenizers", "text_prepare", "chat", "data_sets"]),
    "texts": (["model/generate.py", "training/session/texts.py"], ["generate", "sample_prompts"]),
    "talking": (["data/chat_template.py", "training/session/talking.py", "tools/chat.py"], ["chat"]),
    "memory": (["model/narrow.py", "training/run/casting.py"], ["memory"]),
    "attention": (["model/gpt.py"], ["document_mask", "model", "generate"]),
    "data files": (
        [f"data/{name}.py" for name in ("files", "corpus", "conversations", "packing")],
        ["data_files", "data_sets", "text_prepare"],
    ),
    "watch": (["training/report/live.py", "tools/watch.py"], ["watch"]),
    "report": ([f"training/report/{name}.py" for name in ("data", "drawing", "page", "write")], ["report"]),
    "mixture": (["data/mixture.py", "data/proportions.py", "data/curriculum.py"], ["mixture", "curriculum"]),
    "serving": ([f"tools/serving/{name}.py" for name in ("engine", "api", "guard", "models", "app")], ["serve"]),
    "data sets": (
        [f"data/{name}.py" for name in ("prepare", "hub", "shrink_vocabulary")],
        ["data_sets", "text_prepare", "prepare", "curriculum"],
    ),
    "tasks": (
        ["data/arithmetic.py", "training/session/scores.py", "training/tasks/exact_match.py", "training/tasks/base.py"],
        ["arithmetic", "tasks"],
    ),
}
"""Files, and tests/test_NAME.py in the order in which they are run: those that notice most, and soon, come first."""
NOT_RUN = "not fuzz and not random_moments and not torchrun"
"""Tests that take long, or that are other tests each time."""

ARITHMETIC = (
    "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul FloorDiv_Div Mod_FloorDiv Pow_Mul RShift_LShift LShift_RShift "
    "BitOr_BitAnd BitAnd_BitOr BitXor_BitOr"
).split()
COMPARISONS = "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is".split()
OTHERS = (
    "ReplaceUnaryOperator_USub_UAdd ReplaceUnaryOperator_Invert_USub ReplaceUnaryOperator_Delete_Not AddNot "
    "ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue "
    "ReplaceContinueWithBreak NumberReplacer RemoveDecorator ZeroIterationForLoop"
).split()


class LeaveOut(Operator):
    """Leaves out a statement that acts: a call, a raise, or an assignment to anything but a plain name."""

    def mutation_positions(self, node):
        if node.parent is None or node.parent.type != "simple_stmt" or node.parent.parent.type == "file_input":
            return
        called = node.type in ("atom_expr", "power") and getattr(node.children[-1], "children", " ")[0] == "("
        assigned = node.type == "expr_stmt" and (
            node.children[0].type in ("atom_expr", "power")
            or isinstance(node.children[1], syntax.Operator)
            and node.children[1].value != "="
        )
        if called or assigned or node.type == "raise_stmt":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        return syntax.Keyword("pass", node.start_pos, prefix=node.get_first_leaf().prefix)

    @classmethod
    def examples(cls):
        return ()


class NotCaught(Operator):
    """Catches nothing: cosmic-ray's own replaces one name after the other, and fails on dotted ones."""

    def mutation_positions(self, node):
        if node.type == "except_clause":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.children[1] = syntax.Keyword("()", node.start_pos, prefix=" ")
        return node

    @classmethod
    def examples(cls):
        return ()


OPERATORS: dict[str, Operator] = {
    "LeaveOut": LeaveOut(),
    "NotCaught": NotCaught(),
    **{f"ReplaceBinaryOperator_{name}": get_operator(f"core/ReplaceBinaryOperator_{name}")() for name in ARITHMETIC},
    **{f"ReplaceComparisonOperator_{n}": get_operator(f"core/ReplaceComparisonOperator_{n}")() for n in COMPARISONS},
    **{name: get_operator(f"core/{name}")() for name in OTHERS},
}


@dataclass(frozen=True)
class Mutant:
    """One file with one fault in it."""

    file: str
    line: int
    before: str
    after: str
    code: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.file}\n{self.code}".encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.file}:{self.line}\n    - {self.before}\n    + {self.after}"


def _computes(operator) -> bool:
    """Whether an operator stands between two values: no bare star of a signature, and no annotation, because what
    stands behind a colon or an arrow is not evaluated (`from __future__ import annotations`)."""
    if operator.parent.type not in ("arith_expr", "term", "shift_expr", "expr", "and_expr", "xor_expr", "power"):
        return False
    node = operator
    while node.parent is not None:
        parent = node.parent
        if parent.type in ("annassign", "tfpdef") and node is parent.children[1 if parent.type == "annassign" else 2]:
            return False
        if parent.type == "funcdef" and node is parent.annotation:
            return False
        node = parent
    return True


@dataclass(frozen=True)
class Place:
    """Where one operator can put one fault."""

    file: str
    start: tuple[int, int]
    operator: str
    occurrence: int


def places_of(file: str) -> list[Place]:
    """Every place of a file, in the order of the text."""
    nodes = list(ast_nodes(get_ast((ROOT / file).read_text("utf-8"))))
    found = []
    for name, operator in OPERATORS.items():
        hits = [(node, start) for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, (node, start) in enumerate(hits):
            if not name.startswith("ReplaceBinary") or _computes(node):
                found.append(Place(file, start, name, occurrence))
    return sorted(found, key=lambda place: place.start)


def mutants_at(places: list[Place]) -> list[Mutant]:
    """The faults of these places; two operators may make the same one, which then counts once."""
    found: dict[tuple[str, str], Mutant] = {}
    for place in places:
        source = (ROOT / place.file).read_text("utf-8")
        code = mutate_code(source, OPERATORS[place.operator], place.occurrence)
        old, new = source.splitlines(), code.splitlines()
        changes = [c for c in difflib.SequenceMatcher(None, old, new, False).get_opcodes() if c[0] != "equal"]
        if changes:
            (_, first, _, new_first, _), (_, _, last, _, new_last) = changes[0], changes[-1]
            before, after = (" ".join(" ".join(part).split()) for part in (old[first:last], new[new_first:new_last]))
            found.setdefault((place.file, code), Mutant(place.file, first + 1, before, after, code))
    return list(found.values())


# ---------------------------------------------------------------------------------------------- running the tests


def _run_tests(copy: str, tests: list[str], log: str) -> None:
    """In a process of its own: the tests on the code of a copy. Exits with pytest's code."""
    import pytest

    os.setsid()
    os.chdir(copy)
    resource.setrlimit(resource.RLIMIT_DATA, (16 * 2**30, 16 * 2**30))  # a mutant may fill a list for ever
    sys.path[:] = [place for place in sys.path if place and not place.startswith(str(ROOT / "bench"))]
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = pytest.main(["-x", "-n0", "--ff", "-k", NOT_RUN, "--tb=line", f"--basetemp={copy}/.tmp", *tests])
    sys.stdout.flush()
    os._exit(int(code))


class Copy:
    """A copy of the checkout in which one mutant after the other is tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def tests(self, names: list[str], limit: float) -> tuple[str, str]:
        """("passed" | "failed" | "timed out", the last lines that pytest printed)."""
        log = self.folder / ".log"
        context = multiprocessing.get_context("forkserver")
        paths = [f"tests/test_{name}.py" for name in names]
        process = context.Process(target=_run_tests, args=(str(self.folder), paths, str(log)))
        process.start()
        process.join(limit)
        late = process.is_alive()
        if late:
            for left in [*psutil.Process(process.pid).children(recursive=True), process]:
                left.kill()
        process.join()
        told = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
        failed = next((line for line in told if line.startswith(("FAILED", "ERROR"))), told[-1] if told else "")
        # 0: all passed, 5: none was collected; anything else, an import that fails included, is noticed.
        return ("timed out" if late else "passed" if process.exitcode == 0 else "failed"), failed

    def try_out(self, mutant: Mutant, names: list[str], limit: float) -> tuple[str, str]:
        path = self.folder / mutant.file
        original, times = path.read_bytes(), path.stat()
        path.write_text(mutant.code, "utf-8")
        try:
            return self.tests(names, limit)
        finally:
            path.write_bytes(original)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


ENDING = threading.Event()


def end_all() -> None:
    """End every process that this one has begun; what they have answered by then does not count."""
    ENDING.set()
    for left in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()


# ---------------------------------------------------------------------------------------------- the whole


def remembered() -> dict[str, dict]:
    if not ANSWERS.exists():
        return {}
    return {answer["key"]: answer for answer in map(json.loads, ANSWERS.read_text("utf-8").splitlines())}


def equivalents() -> dict[tuple[str, str, str], str]:
    listed = json.loads(EQUIVALENT.read_text("utf-8"))
    return {(one["file"], one["before"], one["after"]): one["why"] for one in listed}


def try_subject(subject: str, wanted: int | None, seed: int, copies: queue.Queue[Copy], workers: int) -> dict:
    """Counts of one subject, and its survivors."""
    files, names = SUBJECTS[subject]
    every = [place for file in files for place in places_of(file)]
    picked = range(len(every))
    if wanted is not None and wanted < len(every):
        picked = sorted(random.Random(f"{seed} {subject}").sample(picked, wanted))
    chosen = mutants_at([every[i] for i in picked])
    same, known = equivalents(), remembered()
    paths = [ROOT / "tests" / f"test_{name}.py" for name in names] + [ROOT / "tests" / "conftest.py"]
    tests = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    rest = [mutant for mutant in chosen if (mutant.file, mutant.before, mutant.after) not in same]
    pending = [
        mutant
        for mutant in rest
        if mutant.key not in known or (known[mutant.key]["outcome"] == "passed" and known[mutant.key]["tests"] != tests)
    ]
    if pending:
        copy = copies.get()
        started = time.perf_counter()
        outcome, told = copy.tests(names, 600.0)
        seconds = time.perf_counter() - started
        copies.put(copy)
        if outcome != "passed":
            raise SystemExit(f"{subject}: the tests do not pass on the code as it is: {told}")
        limit = max(30.0, 4.0 * seconds)
        print(f"{subject}: {len(pending)} to try, {seconds:.0f} s without a fault", file=sys.stderr, flush=True)

        def try_one(mutant: Mutant) -> None:
            copy = copies.get()
            try:
                outcome, told = copy.try_out(mutant, names, limit)
            finally:
                copies.put(copy)
            if ENDING.is_set():
                return
            if outcome == "passed":
                print(f"survived: {mutant}", file=sys.stderr, flush=True)
            known[mutant.key] = {"key": mutant.key, "outcome": outcome, "tests": tests, "told": told}
            with open(ANSWERS, "a", encoding="utf-8") as file:
                file.write(json.dumps({**known[mutant.key], "subject": subject, "mutant": str(mutant)}) + "\n")

        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(try_one, pending))
            except BaseException:  # Ctrl-C: what is under way ends, and nothing is begun
                pool.shutdown(wait=False, cancel_futures=True)
                end_all()
                raise
    outcomes = [known[mutant.key]["outcome"] for mutant in rest]
    survived = [mutant for mutant, outcome in zip(rest, outcomes, strict=True) if outcome == "passed"]
    return {
        "subject": subject,
        "of": len(every),
        "mutants": len(chosen),
        "equivalent": len(chosen) - len(rest),
        "noticed": outcomes.count("failed"),
        "timed out": outcomes.count("timed out"),
        "survived": len(survived),
        "share": 100.0 * (1 - len(survived) / len(rest)) if rest else 100.0,
        "survivors": survived,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--mutants", default="40", help="how many of each subject, or all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--least", type=float, default=85.0, help="percent of each subject that must be noticed")
    parser.add_argument("--fresh", action="store_true", help="forget the answers so far")
    options = parser.parse_args()
    if unknown := [subject for subject in options.subjects if subject not in SUBJECTS]:
        parser.error(f"no subject {unknown[0]!r}; there are {', '.join(SUBJECTS)}")
    if options.mutants != "all" and not options.mutants.isdigit():
        parser.error(f"--mutants: a number or all, got {options.mutants!r}")
    ANSWERS.parent.mkdir(exist_ok=True)
    if options.fresh:
        ANSWERS.unlink(missing_ok=True)
    os.environ.update(OMP_NUM_THREADS="1", HYPOTHESIS_STORAGE_DIRECTORY=os.devnull)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED_ONCE)
    copies: queue.Queue[Copy] = queue.Queue()
    wanted = None if options.mutants == "all" else int(options.mutants)
    with tempfile.TemporaryDirectory() as folder:
        for n in range(options.workers):
            copies.put(Copy(Path(folder) / str(n)))
        try:
            rows = [
                try_subject(subject, wanted, options.seed, copies, options.workers)
                for subject in options.subjects or SUBJECTS
            ]
        finally:
            end_all()
    columns = ["subject", "of", "mutants", "equivalent", "noticed", "timed out", "survived"]
    print("| " + " | ".join([*columns, "noticed %"]) + " |")
    print("|" + "---|" * (len(columns) + 1))
    for row in rows:
        print("| " + " | ".join([*(str(row[column]) for column in columns), f"{row['share']:.0f}"]) + " |")
    for mutant in [mutant for row in rows for mutant in row["survivors"]]:
        print(f"\nsurvived: {mutant}")
    return int(any(row["share"] < options.least for row in rows))


if __name__ == "__main__":
    sys.exit(main())
