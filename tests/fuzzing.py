"""Files and values that somebody else may have written, made up at random: what the fuzz tests and bench/fuzz.py try.

A target makes one case out of hypothesis' `data`, gives it to the project as a user would, and returns "accepted" or
"refused". Anything else (an exception that is no refusal, a case that takes too long, something accepted that must not
be) escapes as an error.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import ROOT, TINY, write_data
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from operation_examples import BEFORE, EXAMPLES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train_orchestrated
from orchestrate.data.conversations import END, ROLES, START, TASKS, Message, task
from orchestrate.data.files import packed
from orchestrate.data.keeping import as_hugging_face, for_conversations, save
from orchestrate.data.prepare import Reading, prepare, trained_tokenizer
from orchestrate.data.stream import Meta, gather, open_data, read_meta, read_remap
from orchestrate.data.tokenizer import CharTokenizer, HuggingFaceTokenizer, Pieces
from orchestrate.model import hugging_face, nanogpt
from orchestrate.model.config import Fade, LoraSpec, ModelConfig
from orchestrate.model.export import NoForm, form_of, nanogpt_form_of, write_hugging_face, write_nanogpt
from orchestrate.model.gpt import GPT, init_weights
from orchestrate.tools.watch import view
from orchestrate.training.report.data import read_story
from orchestrate.training.report.live import Watcher
from orchestrate.training.report.page import page, plotly_js
from orchestrate.training.schedule.file import entry_fields
from orchestrate.training.session.talking import Talk, chat_format
from orchestrate.training.settings.config import KEYS, TrainConfig
from orchestrate.training.settings.errors import OperationFailed, Refused, ScheduleError
from orchestrate.training.store.manifest import checksum
from orchestrate.training.store.run_folder import EVENT_KINDS, EVENTS, METRICS, METRICS_KINDS

SECONDS, BYTES = 10, 2**30
"""What a case may take, beyond the memory that is in use before it."""
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 48, -1, 2**31, 2**63, 2**64, 10**30]),
    st.sampled_from([0.0, 0.5, -0.0, 1e-300, 1e300, 1e400]),
    st.integers(-(2**70), 2**70),
    st.floats(),
)  # fmt: skip
LAYERS = st.sampled_from(
    [
        "attn.0",
        "attn.0.q",
        "attn.*.v",
        "q_proj",
        "all-linear",
        "mlp.1",
        "mlp.*",
        "block.0",
        "block.-1",
        "wte",
        "ln_f",
        "lm_head",
        "*",
        "attn.9",
        "",
    ]
)
TEXTS = st.one_of(
    st.text(max_size=8),
    LAYERS,
    st.sampled_from(["copy", "identity", "identity_copy", "depth_up_scaling", "mean", "relu2", "1e-3", "!!str"]),
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


# Shapes of the model that schedules are tried on.
MODELS = [
    {},
    {"qk_norm": True, "head_size": 6, "use_rotary_embeddings": True, "n_kv_head": 1, "tie_weights": False},
    {
        "qk_norm": True,
        "bias": True,
        "attn_lora_rank": 2,
        "activation": "swiglu",
        "norm": "rmsnorm",
        "activation_checkpointing": True,
        "document_mask": True,
        "weights_dtype": "bfloat16",
    },
    {"lora_targets": "q_proj,v_proj,down_proj,wte", "lora_rank": 2, "use_rslora": True, "lora_dropout": 0.1},
]
FIELDS = {
    "reevaluate": True,
    "desc": "why",
    "style": "power",
    "exponent": 2.0,
    "on_error": "skip",
    "guard": {"max_increase": 0.1, "within_iters": 3, "then": "keep"},
    "label": "x",
    "after": "first",
    "repeat": {"times": 2, "until": {"metric": "loss", "below": 1.0}},
    "all_of": [{"trigger_loss": 2.0}, {"max_wait_iters": 3}],
    "trigger_plateau": {"evals": 2, "min_delta": 0.1},
    "trigger": {"metric": "loss", "plateau": {"evals": 2, "min_delta": 0.1}},
}


class Slow(Exception):
    """A case that did not end in time."""


@contextlib.contextmanager
def in_bounds() -> Iterator[None]:
    """Raise Slow inside the block after SECONDS; BYTES more than there are now cannot be allocated in it.

    They are seconds of computing, because other processes may be busy beside; what only waits has six times as long.
    """

    def ring(number: int, frame: Any) -> None:
        raise Slow(f"more than {SECONDS} s")

    before = [(number, signal.signal(number, ring)) for number in (signal.SIGPROF, signal.SIGALRM)]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if Path("/proc/self/statm").exists():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in before:
            signal.signal(number, handler)


def command(*arguments: str) -> str:
    """The entry script's own way of saying yes or no."""
    with in_bounds(), contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
        try:
            code = train_orchestrated.run(list(arguments))
        except SystemExit as exit_:  # argparse
            code = exit_.code
    assert code in (0, 2), code
    if code == 2:
        assert "error" in told.getvalue() and "Traceback" not in told.getvalue()
    return "accepted" if code == 0 else "refused"


def mutated(data: st.DataObject, value: Any) -> Any:
    """A JSON document with one or two of its values replaced, removed or doubled."""
    document = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 2))):
        inner, key = document, None
        while isinstance(inner, dict | list) and inner:
            if key is not None and data.draw(st.integers(0, 3)) == 0:
                break
            outer = inner
            key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
            inner = outer[key]
        if key is None:
            return data.draw(JSON)
        kind = data.draw(st.integers(0, 5))
        if kind == 0:
            del outer[key]
        elif kind == 1 and isinstance(outer, list):
            outer.append(outer[key])
        elif kind == 2 and isinstance(outer, dict):
            outer[data.draw(TEXTS)] = outer[key]
        else:
            outer[key] = data.draw(JSON)
    return document


def noisy(data: st.DataObject, content: bytes) -> bytes:
    """Bytes that were cut, flipped, doubled or replaced, or that have something foreign in them."""
    kind = data.draw(st.integers(0, 5))
    at = data.draw(st.integers(0, max(0, len(content) - 1)))
    length = data.draw(st.integers(0, 40))
    foreign = data.draw(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from(
                [b"!!python/object/apply:os.system [touch CANARY]", b"&a [*a]", b"<<: *a", b"{", b"]", b"\n- ", b": ",
                 b".nan", b"1e999", b"\t", b"\x00", b"null", b"0x10", b"__import__('os').system('touch CANARY')",
                 b"9" * 5000, b"[" * 3000, b"\n", b"#", b'"', b"~"]
            ),
        )
    )  # fmt: skip
    match kind:
        case 0:
            return content[:at]
        case 1:
            return content[:at] + content[at + length :]
        case 2:
            return content[:at] + content[at : at + length] * 3 + content[at + length :]
        case 3:
            return content[:at] + foreign + content[at:]
        case 4:
            flipped = bytearray(content or b"x")
            flipped[at] ^= 1 << data.draw(st.integers(0, 7))
            return bytes(flipped)
    return data.draw(st.binary(max_size=300))


class Workspace:
    """A folder with a data set and finished tiny runs, made once, of which every case uses a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_data(folder / "data", documents=True)
        schedule = [
            {"name": "set_attn_lora_rank", "value": 2, "at_iter": 2},
            {"name": "set_lr", "value": 1e-3, "over": 9},
        ]
        (folder / "s.json").write_text(json.dumps(schedule))
        self.run = folder / "run"
        assert (
            command(*self.arguments(max_iters=4, keep_last=1, schedule=folder / "s.json", out_dir=self.run))
            == "accepted"
        )
        self.canary = Path("CANARY")

    def arguments(self, **keys: Any) -> list[str]:
        values = {**TINY, "dataset": self.data, **keys}
        return [f"--{key}={value}" for key, value in values.items()]

    @contextlib.contextmanager
    def case(self) -> Iterator[Path]:
        """An empty folder that is the working directory; nothing a file says may have been executed in it."""
        here = os.getcwd()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            os.chdir(folder)
            try:
                yield Path(folder)
                assert not self.canary.exists(), "something in a file was executed"
            finally:
                os.chdir(here)


# ---------------------------------------------------------------------------------------------- schedules


def entries(data: st.DataObject) -> list[dict]:
    """Entries that are right, but for a value here and there."""
    made = []
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(EXAMPLES)))
        made += [{"name": n, "value": v} for n, v in BEFORE.get(name, []) if data.draw(st.booleans())]
        entry: dict[str, Any] = {"name": name}
        if EXAMPLES[name] is not None:
            entry["value"] = EXAMPLES[name] if data.draw(st.integers(0, 3)) else mutated(data, EXAMPLES[name])
        field = data.draw(st.sampled_from(sorted(entry_fields())))
        if field not in ("name", "value"):
            entry[field] = data.draw(JSON) if data.draw(st.integers(0, 4)) == 0 else FIELDS.get(field, 3)
        made.append(entry)
    return made


def in_tracks(data: st.DataObject, made: list[dict]) -> Any:
    """The entries as they are, or some of them in a block, or in several tracks; and something wrong with that."""
    made = [{"name": "save_checkpoint", "label": "first"}, *made]
    at = data.draw(st.integers(0, len(made)))
    if data.draw(st.booleans()):
        times = data.draw(st.one_of(st.integers(1, 3), JSON, st.just({"times": 2, "until": FIELDS["trigger"]})))
        block = {"repeat": times, "do": made[at:], data.draw(st.sampled_from(["label", "desc"])): "block"}
        made = [*made[:at], block]
    if data.draw(st.booleans()):
        return made
    tracks = {data.draw(st.one_of(st.just("a"), TEXTS)): made[:at], "b": data.draw(st.one_of(st.just(made[at:]), JSON))}
    return data.draw(st.sampled_from([{"tracks": tracks}, {"operations": made, "tracks": tracks}, {"tracks": made}]))


def schedule_entries(data: st.DataObject, workspace: Workspace) -> str:
    """A schedule whose entries have wrong values and fields; what has an unknown field or name must be refused."""
    made = entries(data)
    wrong = data.draw(st.integers(0, 5)) == 0
    if wrong:
        chosen = data.draw(st.sampled_from(made))
        chosen["name" if data.draw(st.booleans()) else "trigger_lost"] = "set_lrr"
    with workspace.case() as folder:
        # The examples' names of data sets, where there is one.
        made = in_tracks(data, made) if data.draw(st.booleans()) else made
        text = json.dumps(made).replace('"second"', json.dumps(str(workspace.data)))
        (folder / "s.json").write_text(text.replace('"first"', json.dumps(f"{workspace.data}/")))
        given = workspace.arguments(
            schedule=folder / "s.json", out_dir=folder / "out", **data.draw(st.sampled_from(MODELS))
        )
        answer = command(*given, "--plan=json")
        assert not wrong or answer == "refused", made
        assert not (folder / "out").exists(), "a plan wrote something"
    return answer


def schedule_text(data: st.DataObject, workspace: Workspace) -> str:
    """The text of one of the project's own schedules, damaged."""
    paths = sorted((ROOT / "schedules").glob("*.yaml"))
    text = data.draw(st.sampled_from(paths)).read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        text = noisy(data, text)
    with workspace.case() as folder:
        path = folder / data.draw(st.sampled_from(["s.yaml", "s.json"]))
        path.write_bytes(text)
        return command(*workspace.arguments(schedule=path, out_dir=folder / "out"), "--plan")


def large_schedules(data: st.DataObject, workspace: Workspace) -> str:
    """A text that stands for much or is long: aliases of aliases, merges, circles, depth, digits, many of anything."""
    n = data.draw(st.sampled_from([1, 2, 3, 9, 30]))
    many = data.draw(st.sampled_from([2, 100, 20_000, 400_000]))
    wide = data.draw(st.sampled_from([1, 2, 9]))

    def chain(link: str) -> str:
        return "".join(f"\n    a{i}: &a{i} {link.replace('@', f'*a{i - 1}')}" for i in range(1, n + 1))

    value = data.draw(
        st.sampled_from(
            [
                "1e-3",
                f"\n    a0: &a0 [x]{chain('[' + ', '.join(['@'] * wide) + ']')}",
                f"\n    a0: &a0 {{x: 1}}{chain('{<<: [' + ', '.join(['@'] * wide) + ']}')}",
                "&a " + data.draw(st.sampled_from(["[*a]", "{x: [*a]}", "{*a : x}", "[&b [*a], *b]"])),
                "[" * many,
                "[" * n + "]" * n,
                "9" * many,
                "0x" + "f" * many,
                "1:" * many + "1",
                "!!int '" + "9" * many + "'",
                "!!float '" + "9" * many + "'",
                "!!binary " + "aaaa" * many,
                '"' + "\\x41" * many + '"',
                "[" + "x, " * many + "]",
                "{" + ", ".join(f"k{i}: 1" for i in range(many)) + "}",
                "{" + "k: 1, " * many + "}",
                "1e-3\n# " + "x" * many,
                "1e-3\n" + "- {name: set_lr, value: 1e-3}\n" * many,
                "1e-3\n" + "- {name: set_lrr}\n" * many,
                "1e-3\n  " + "\n  ".join(f"k{i}: 1" for i in range(many)),
            ]
        )
    )
    text = f"- name: set_lr\n  value: {value}\n"
    if data.draw(st.booleans()):
        made = data.draw(
            st.sampled_from(
                [
                    "[" * many,
                    '[{"name": "set_lr", "value": 1e-3}' + ', {"name": "set_lr", "value": 1e-3}' * many + "]",
                    '[{"name": "set_lr", "value": ' + "[" * n + "]" * n + "}]",
                    '[{"name": "set_lr", "value": ' + "9" * many + "}]",
                    '[{"name": "set_lr", "value": 1e-3' + ', "value": 1' * many + "}]",
                    '[{"name": "set_lr", "value": 1e-3' + "".join(f', "k{i}": 1' for i in range(many)) + "}]",
                    '[{"name": "freeze_layer", "value": ["attn.0"' + ', "attn.*"' * many + "]}]",
                    '[{"name": "resize_vocabulary", "value": {"size": 2, "map": [0' + ", 1" * many + "]}}]",
                ]
            )
        )
        text = made
    with workspace.case() as folder:
        path = folder / ("s.json" if text.startswith("[") else "s.yaml")
        path.write_text(text)
        return command(*workspace.arguments(schedule=path, out_dir=folder / "out"), "--plan")


def schedule_runs(data: st.DataObject, workspace: Workspace) -> str:
    """What the plan accepts can be carried out: every entry is applied to a live run, and a step is made after it."""
    from orchestrate.training.run.distributed import Ranks
    from orchestrate.training.schedule.file import parse_schedule
    from orchestrate.training.schedule.stages import check_settings, plan_stages
    from orchestrate.training.session.opening import open_run
    from orchestrate.training.session.start import check_lengths
    from orchestrate.training.settings.config import resolve

    model = data.draw(st.sampled_from(MODELS))
    given = [tuple(a.removeprefix("--").split("=", 1)) for a in workspace.arguments(out_dir="out", **model)]
    config, _ = resolve([], given)
    with workspace.case(), in_bounds():
        run = open_run(config, None, parse_schedule("", "s"), Ranks("cpu"))
        try:
            schedule = parse_schedule(json.dumps(entries(data)), "s.json")
            check_lengths(plan_stages(schedule, run.settings, 1), run.data)
        except Refused:
            return "refused"
        for entry in schedule.entries:
            if entry.operation.name == "adjust_batch_size":
                continue  # tries batches for seconds
            target = entry.plan(run.settings)
            if target.batch_size * target.grad_accum > 4096 or target.model.n_embd > 256 or target.model.n_layer > 32:
                return "accepted"  # possible, but not here and now
            check_settings(target, 1)
            try:
                run.adopt(target, entry.operation.reshape)
            except (OperationFailed, ScheduleError) as error:
                raise AssertionError(f"{entry} was planned and cannot be done: {error}") from error
            run.step()
            run.evaluate(lambda: 0)
    return "accepted"


# ---------------------------------------------------------------------------------------------- configuration


def config_values(data: st.DataObject, workspace: Workspace) -> str:
    """--KEY=VALUE pairs, some of them of no key or no fitting value."""
    wild = st.one_of(NUMBERS.map(str), TEXTS, JSON.map(repr), st.sampled_from(["True", "False", "None", "", "1e-3"]))
    tame = st.one_of(
        st.integers(0, 64).map(str), st.sampled_from(["True", "False", "0.5", "1e-3", "cosine", "rmsnorm"])
    )
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(KEYS), st.one_of(tame, tame, wild)), min_size=1, max_size=2))
    unknown = data.draw(st.integers(0, 5)) == 0
    arguments = [f"--{key}={value}" for key, value in pairs] + ["--batchsize=3"] * unknown
    with workspace.case() as folder:
        given = workspace.arguments(out_dir=folder / "out")
        try:
            answer = command(*given, *arguments, "--plan")
        except AssertionError as error:
            raise AssertionError(f"{arguments}: {error}") from error
        assert not unknown or answer == "refused"
    if answer == "accepted":
        for key, text in dict(pairs).items():
            kind, value = TrainConfig.model_fields[key].annotation, train_orchestrated.configuration.parse_text(text)
            assert kind is not bool or type(value) is bool
            assert kind is not int or (type(value) in (int, float) and value == int(value))
    return answer


def config_file(data: st.DataObject, workspace: Workspace) -> str:
    """One of the project's own configuration files, damaged."""
    text = data.draw(st.sampled_from(sorted((ROOT / "config").glob("*.py")))).read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        text = noisy(data, text)
    with workspace.case() as folder:
        (folder / "c.py").write_bytes(text)
        return command(str(folder / "c.py"), f"--out_dir={folder / 'out'}", f"--dataset={workspace.data}", "--plan")


def growing_configs(data: st.DataObject, workspace: Workspace) -> str:
    """A file of plain assignments whose values grow from line to line."""
    lines = [data.draw(st.sampled_from(["_a = 'abcdefgh'", "_a = 99999", "_a = 1e300", "_a = -8", "_a = '9' + '9'"]))]
    step = data.draw(
        st.sampled_from(
            ["_a + _a", "_a * _a", "_a ** 64", "_a ** _a", "f'{_a}{_a}'", "f'" + "{_a}" * 300 + "'",
             "str(_a) + str(_a)", "int(_a)", "int(str(_a) + str(_a))", "round(_a, -10**9)", "round(_a, 10**9)",
             "min(_a, _a + _a)", "max(_a, _a * _a)", "abs(_a) + _a", "_a % _a", "'%9999999999d' % _a", "_a // 1e-300",
             "time.strftime(str(_a) + '%99999999d')", "_a if _a else _a * _a"]
        )
    )  # fmt: skip
    lines += [f"_a = {step}"] * data.draw(st.sampled_from([1, 2, 40, 2000]))
    if data.draw(st.integers(0, 2)) == 0:
        lines = [f"k{i} = 1" for i in range(data.draw(st.sampled_from([1, 900, 20_000])))]
    with workspace.case() as folder:
        (folder / "c.py").write_text("\n".join(lines))
        return command(str(folder / "c.py"), *workspace.arguments(out_dir=folder / "out"), "--plan")


# ---------------------------------------------------------------------------------------------- checkpoints and logs


def seal(folder: Path) -> None:
    """Make the manifest fit the files again, as somebody who means it would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(folder, manifest)


def write_manifest(folder: Path, facts: dict) -> None:
    """A manifest.json that says this, with the checksum of itself that its format asks for."""
    facts = {name: value for name, value in facts.items() if name != "sha256"}
    seal = {"sha256": checksum(facts)} if facts.get("format", 3) >= 3 else {}
    (folder / "manifest.json").write_text(json.dumps({**facts, **seal}))


@contextlib.contextmanager
def a_copy(workspace: Workspace) -> Iterator[tuple[Path, Path]]:
    """(run folder, its only checkpoint)."""
    with workspace.case() as folder:
        shutil.copytree(workspace.run, folder / "run", symlinks=True)
        yield folder / "run", folder / "run" / "checkpoints" / "iter_000000004"


def resumed(out: Path) -> str:
    """Resume for no more iterations than were made: everything is built and read, nothing is trained."""
    return command("--init_from=resume", f"--out_dir={out}", "--max_iters=4", "--device=cpu", "--inject=")


def forged_state(data: st.DataObject, workspace: Workspace) -> str:
    """state.json with other values, and a manifest that fits it."""
    with a_copy(workspace) as (out, folder):
        state = json.loads((folder / "state.json").read_text())
        state["config"].update(wandb_log=False, tracker=[])
        changed = mutated(data, state)
        if isinstance(changed, dict) and isinstance(changed.get("config"), dict):
            changed["config"].update({"wandb_log": False, "tracker": [], "file_logging": False, "log_dir": ""})
        (folder / "state.json").write_text(json.dumps(changed))
        seal(folder)
        return resumed(out)


def forged_tensors(data: st.DataObject, workspace: Workspace) -> str:
    """Tensors of other names, shapes and types, and a manifest that fits them."""
    with a_copy(workspace) as (out, folder):
        name = data.draw(st.sampled_from(["model.safetensors", "optimizer.safetensors"]))
        tensors = load_file(folder / name)
        key = data.draw(st.sampled_from(sorted(tensors)))
        value, kind = tensors.pop(key), data.draw(st.integers(0, 5))
        match kind:
            case 1:
                tensors[key + data.draw(st.sampled_from(["x", "|step", "|exp_avg", "|", "/../x"]))] = value
            case 2:
                tensors[key] = torch.zeros(data.draw(st.lists(st.integers(0, 40), max_size=3)))
            case 3:
                tensors[key] = value.to(data.draw(st.sampled_from([torch.int64, torch.float16, torch.bool])))
            case 4:
                tensors[key] = value.mT.contiguous() if value.dim() == 2 else value
            case 5:
                tensors[key] = value  # nothing is wrong
        save_file(tensors, folder / name)
        seal(folder)
        answer = resumed(out)
        assert (answer == "accepted") == (kind == 5 or (kind in (2, 4) and tensors[key].shape == value.shape)), (
            kind,
            key,
        )
        return answer


def damaged_files(data: st.DataObject, workspace: Workspace) -> str:
    """Noise in any file of a checkpoint; what the checksums cover is never used."""
    with a_copy(workspace) as (out, folder):
        name = data.draw(st.sampled_from(["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]))
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(noisy(data, before))
        changed = (folder / name).read_bytes() != before
        if name == "manifest.json":
            with contextlib.suppress(ValueError, RecursionError):  # blanks are no damage
                changed = json.loads((folder / name).read_bytes()) != json.loads(before)
        forged = name != "manifest.json" and data.draw(st.booleans())
        if forged:
            seal(folder)
        answer = resumed(out)
        assert not (changed and not forged) or answer == "refused", name
        return answer


def jsonl(data: st.DataObject, workspace: Workspace) -> str:
    """Noise in the logs: a resume goes on, a plan against them is made or refused."""
    with a_copy(workspace) as (out, folder):
        name = data.draw(st.sampled_from(["metrics.jsonl", "events.jsonl"]))
        content = (out / name).read_bytes()
        for _ in range(data.draw(st.integers(1, 3))):
            if data.draw(st.booleans()):
                content = noisy(data, content)
            else:
                line = json.dumps(data.draw(JSON)).encode() + b"\n"
                content = content + line if data.draw(st.booleans()) else line + content
        (out / name).write_bytes(content)
        if data.draw(st.booleans()):
            assert resumed(out) == "accepted", "logs are no input of a resume"
            return "accepted"
        plan = ["--plan", f"--schedule={workspace.folder / 's.json'}", "--against", str(out)]
        return command(*workspace.arguments(out_dir=out.parent / "new"), *plan)


def reports(data: st.DataObject, workspace: Workspace) -> str:
    """Forged lines of metrics and events with the right fields: a report and a terminal's view are made of them.

    The one holds no markup, the other nothing that drives a terminal.
    """
    with workspace.case() as folder:
        for name, kinds in ((METRICS, METRICS_KINDS), (EVENTS, EVENT_KINDS)):
            lines = []
            for _ in range(data.draw(st.integers(0, 5))):
                kind = data.draw(st.sampled_from(sorted(kinds)))
                record = {"kind": kind, **_forged(data, kinds[kind])}
                lines.append(
                    json.dumps(mutated(data, record) if data.draw(st.integers(0, 4)) == 0 else record).encode()
                )
            content = b"".join(line + b"\n" for line in lines)
            (folder / name).write_bytes(noisy(data, content) if data.draw(st.integers(0, 4)) == 0 else content)
        if data.draw(st.booleans()):
            (folder / "schedule.yaml").write_text(json.dumps(entries(data)), "utf-8", "replace")
        with in_bounds():
            seen = view(Watcher(folder).look(), 60)
            assert max(map(len, seen.split("\n"))) <= 60 and not re.search("[\x00-\x09\x0b-\x1f\u2028]", seen)
            try:
                story = read_story(folder)
                text = page([story, story]).replace(plotly_js(), "")
            except Refused:
                return "refused"
        assert text.count("<script") == text.count("</script>") == 3 and "<img" not in text
        return "accepted"


def _forged(data: st.DataObject, kind: Any) -> dict[str, Any]:
    """Values of the declared types for the fields of a line, as odd as these types allow."""
    values: dict[str, st.SearchStrategy] = {
        "_Count": st.one_of(st.integers(0, 30), st.integers(0, 10**400)),
        "Literal": st.none(),
        "bool": st.booleans(),
        "int": st.one_of(st.integers(-9, 30), st.integers(-(10**400), 10**400)),
        "_Real": st.one_of(st.floats(0, 30), st.integers(0, 10**400), st.floats(allow_nan=False, allow_infinity=False)),
        "_Number": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    }
    texts = st.sampled_from(["</script><img src=x>", "guard: x", "%{x}", "\ud800", "", "\u2028<b>"]) | st.text(
        max_size=9
    )
    record = {}
    for name in sorted(kind.__annotations__):
        if name == "kind" or (name in kind.__optional_keys__ and data.draw(st.booleans())):
            continue
        shape = str(kind.__annotations__[name])
        if "dict[str, str]" in shape or "Code" in shape or "Cast" in shape:
            continue
        elif "list[" in shape and "Text" in shape:
            value: Any = [{"prompt": data.draw(texts), "text": data.draw(texts)}]
        elif "list[int]" in shape:
            value = data.draw(st.lists(st.integers(), max_size=3))
        elif "list[str]" in shape:
            value = data.draw(st.lists(texts, max_size=3))
        elif "dict[str, typing.Any]" in shape:
            value = data.draw(st.dictionaries(texts | st.just("model"), JSON, max_size=3))
        elif "dict[str," in shape:
            value = data.draw(st.dictionaries(texts, values["_Real"], max_size=3))
        elif "Any" in shape and "float" not in shape:
            value = data.draw(JSON)
        elif "ge=0" in shape or "Ge(" in shape:
            value = data.draw(values["_Count"])
        elif "float" in shape:
            value = data.draw(values["_Number" if "None" in shape else "_Real"])
        elif "bool" in shape:
            value = data.draw(values["bool"])
        elif "int" in shape:
            value = data.draw(values["int"])
        else:
            value = data.draw(texts)
        record[name] = value
    if data.draw(st.integers(0, 3)) == 0:
        record[data.draw(texts)] = data.draw(values["_Number"])
    return record


# -------------------------------------------------------------------------------- data and foreign weights


class _Runs:
    """A pickle that runs something when it is read."""

    def __reduce__(self):
        return os.system, ("touch CANARY",)


def metas(data: st.DataObject, workspace: Workspace) -> str:
    """A data folder's meta.json or meta.pkl, or a vocabulary map."""
    with workspace.case() as folder, in_bounds():
        kind = data.draw(st.integers(0, 4))
        if kind == 4:
            size = data.draw(st.sampled_from([3, 2**24, 2**31 - 1, 2**40]))
            bomb = data.draw(
                st.sampled_from(
                    [
                        b"\x80\x04K\x01r" + struct.pack("<I", size % 2**32) + b".",
                        b"\x80\x05\x96" + struct.pack("<Q", size) + b".",
                        b"\x80\x04(" + b"}" * (size % 2**23) + b"l.",
                        pickle.dumps({"vocab_size": size, "itos": {0: "a"}}),
                    ]
                )
            )
            (folder / "meta.pkl").write_bytes(bomb)
        elif kind == 0:
            good = {"format": 1, "vocab_size": 9, "dtype": "uint16", "tokenizer": "char", "itos": list("abcdefghi")}
            (folder / "meta.json").write_text(json.dumps(mutated(data, good)))
        elif kind == 1:
            value = data.draw(JSON)
            bad = _Runs() if data.draw(st.booleans()) else value
            made = {"vocab_size": 3, "itos": {0: "a", 1: bad}, "stoi": bad}
            content = pickle.dumps(made, protocol=data.draw(st.integers(0, 5)))
            (folder / "meta.pkl").write_bytes(noisy(data, content) if data.draw(st.booleans()) else content)
        else:
            name = data.draw(st.sampled_from(["map.json", "map.npy"]))
            if name == "map.json":
                (folder / name).write_text(json.dumps(data.draw(st.one_of(st.lists(st.integers(-3, 9)), JSON))))
            else:
                kind = data.draw(st.sampled_from(["i4", "f4", "U3"]))
                array = np.array(data.draw(st.lists(st.integers(-3, 9), max_size=6)), dtype=kind)
                np.save(folder / name, array)
                (folder / name).write_bytes(noisy(data, (folder / name).read_bytes()))
            try:
                read_remap(str(folder / name), data.draw(st.sampled_from([None, 5])), data.draw(st.integers(1, 9)))
            except ValueError:
                return "refused"
            return "accepted"
        try:
            read_meta(folder)
        except ValueError:
            return "refused"
        return "accepted"


def token_folders(data: st.DataObject, workspace: Workspace) -> str:
    """A folder of token files and masks, its meta.json wrong or a file damaged: what opens gives whole batches."""
    with workspace.case() as folder, in_bounds():
        lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
        files = {name: [f"{name}_{i:03d}.bin" for i in range(len(lengths))] for name in ("train", "val")}
        for name in (name for names in files.values() for name in names):
            np.arange(lengths[int(name[-5])], dtype=np.uint16).tofile(folder / name)
            (folder / name).with_suffix(".mask.bin").write_bytes(packed(np.ones(lengths[int(name[-5])])))
        meta = Meta(20).to_json() | {"files": files, "masks": ["train", "val"]}
        if data.draw(st.booleans()):
            meta = mutated(data, meta)
        (folder / "meta.json").write_text(json.dumps(meta))
        if data.draw(st.booleans()):
            damaged = data.draw(st.sampled_from(sorted(folder.glob("*.bin"))))
            damaged.write_bytes(noisy(data, damaged.read_bytes()))
        try:
            opened = open_data(str(folder), 1)
            assert all(path.parent == folder for path in (*opened.train.paths, *opened.val.paths))
            x, y = gather(opened.train, np.arange(len(opened.train) - 1), 1, 20)
        except ValueError:
            return "refused"
        assert (
            x.shape == y.shape and x.min() >= 0 and y.min() >= -1 and (y == -1).any() <= (opened.train.mask is not None)
        )
        return "accepted"


def tokenizer_folders(data: st.DataObject, workspace: Workspace) -> str:
    """The files of a Hugging Face tokenizer with wrong parts, or with noise in them: what is read works on any text."""
    with workspace.case() as folder, in_bounds():
        made = data.draw(st.sampled_from(_tokenizers()))
        for name, content in as_hugging_face(made).files.items():
            match data.draw(st.integers(0, 3)):
                case 0:
                    content = noisy(data, content)
                case 1:
                    content = json.dumps(mutated(data, json.loads(content))).encode()
            (folder / name).write_bytes(content)
        try:
            tokenizer = HuggingFaceTokenizer(folder)
            assert len(tokenizer.fingerprint) == 64
            save(tokenizer, folder / "saved")
            text = data.draw(TEXTS)
            ids = tokenizer.encode_plain(text)
        except ValueError:
            return "refused"
        assert tokenizer.end_of_text not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
        pieces = Pieces(tokenizer)
        shown = [pieces.push(i) for i in [*ids, data.draw(st.integers(0, 2**20))]] + [pieces.end()]
        assert all(isinstance(piece, str) for piece in shown)
        return "accepted"


@functools.cache
def _tokenizers() -> list[Any]:
    return [CharTokenizer.of("to be, or not", several=True), trained_tokenizer(280, ["to be, or not to be"] * 9)]


@functools.cache
def _with_control() -> HuggingFaceTokenizer:
    return for_conversations(_tokenizers()[1])


def documents(data: st.DataObject, workspace: Workspace) -> str:
    """A file of documents with noise in it becomes a data set whose ids the tokenizer has, or is refused."""
    with workspace.case() as folder, in_bounds():
        lines = [{"text": data.draw(st.text(max_size=30))} for _ in range(data.draw(st.integers(1, 5)))]
        if data.draw(st.booleans()):
            lines = [mutated(data, line) for line in lines]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        name = data.draw(st.sampled_from(["in.jsonl", "in.txt", "in.jsonl.gz", "in.parquet"]))
        content = gzip.compress(content) if name.endswith(".gz") else content
        (folder / name).write_bytes(noisy(data, content) if data.draw(st.booleans()) else content)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                prepare([folder / name], folder / "out", data.draw(st.sampled_from(["char", _tokenizers()[1]])))
        except ValueError:
            assert not (folder / "out" / "train.bin").exists()
            return "refused"
        made = open_data(str(folder / "out"), 0)
        assert max(made.train.tokens.max(), made.val.tokens.max()) < made.meta.vocab_size
        return "accepted"


def conversations(data: st.DataObject, workspace: Workspace) -> str:
    """Records of chats and tasks, wrong or full of names of control tokens: only the template's become any."""
    with workspace.case() as folder, in_bounds():
        said = st.text(max_size=12) | st.sampled_from([START, f"{END}\n{START}system\n", "<|endoftext|>"])
        messages = data.draw(st.lists(st.builds(dict, role=st.sampled_from(ROLES), content=said), max_size=4))
        made = [{"messages": messages}, {"question": data.draw(said), "answer": data.draw(said)}]
        made.append(
            {"question": data.draw(said), "choices": ["a", data.draw(said)], "answer": data.draw(st.integers(0, 2))}
        )
        record = data.draw(st.sampled_from(made))
        record = mutated(data, record) if data.draw(st.booleans()) else record
        second = {"question": "to be?", "answer": "or not"}
        (folder / "in.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps(second)}\n")
        reading = Reading(render=task, sources=TASKS)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                prepare([folder / "in.jsonl"], folder / "out", _tokenizers()[1], reading=reading)
        except ValueError:
            assert not (folder / "out" / "train.bin").exists()
            return "refused"
        made_of = open_data(str(folder / "out"), 0)
        ids = np.concatenate([made_of.train.tokens, made_of.val.tokens])
        begins, ends = ((ids == i).sum() for i in range(made_of.meta.vocab_size - 2, made_of.meta.vocab_size))
        assert begins == ends == 2 + (len(record["messages"]) if "messages" in record else 2) and (ids == 0).sum() == 2
        return "accepted"


_TEMPLATES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set first = messages[0].content %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'assistant' %}{{ m.content }}"
    "{{ eos_token }}{% else %}[INST] {% if loop.first and first %}{{ first }}{% endif %}{{ m.content }} [/INST]"
    "{% endif %}{% endfor %}",
    "{% for m in messages %}{% if '<|x' in m.content %}{{ m.content.split('<|x')[-1] }}{% else %}<|im_{{ m.content }}|>"
    "{% endif %}{{ m.content }}{% endfor %}",
)


def chat_templates(data: st.DataObject, workspace: Workspace) -> str:
    """A template with noise in it, and messages that name control tokens, or parts of them: they stay text."""
    with workspace.case(), in_bounds():
        template = data.draw(st.sampled_from(_TEMPLATES))
        if data.draw(st.booleans()):
            template = noisy(data, template.encode()).decode("utf-8", "replace")
        files = dict(as_hugging_face(_with_control()).files)
        if data.draw(st.booleans()):
            files["tokenizer_config.json"] = json.dumps({"chat_template": template, "eos_token": END}).encode()
            files.pop("chat_template.jinja")
        else:
            files["chat_template.jinja"] = template.encode()
        parts = st.sampled_from([START, END, "<|im_", "start|>", "end|>", "|>", "<|", " ", "\n", "a", "b", ""])
        said = st.lists(parts, max_size=6).map("".join)
        talk = data.draw(st.lists(st.builds(Message, st.sampled_from(ROLES), said), min_size=1, max_size=4))
        tokenizer = HuggingFaceTokenizer.of(files)
        control = [tokenizer.control(name) for name in (START, END)]
        try:
            form = chat_format(tokenizer, 2**20, tokenizer.vocab_size)
            ids = form.encode(talk)
        except ValueError:
            return "refused"
        if form.plain or "<|x" in template:
            expected = [] if form.plain else None
        else:
            meek = [Message(role, re.sub(r"\S(.*\S)?", "c", text, flags=re.DOTALL)) for role, text in talk]
            expected = [i for i in form.encode(meek) if i in control]
        found = [i for i in ids if i in control]
        assert not found if expected is None else found == expected
        return "accepted"


def talk_files(data: st.DataObject, workspace: Workspace) -> str:
    """A file of conversations with wrong parts, or with noise in it: what is loaded can be said and saved again."""
    with workspace.case() as folder, in_bounds():
        record = {"messages": [dict(role=role, content=f"{END} to") for role in ("system", "user", "assistant")]}
        content = json.dumps(mutated(data, record) if data.draw(st.booleans()) else record).encode() + b"\n"
        (folder / "in.jsonl").write_bytes(noisy(data, content) if data.draw(st.booleans()) else content)
        tokenizer = _with_control()
        talk, other = (Talk(None, chat_format(tokenizer, 2**20, tokenizer.vocab_size)) for _ in range(2))
        try:
            talk.load(folder / "in.jsonl")
            ids = talk.form.prompt([*talk.messages, Message("user", END)], 1).ids
        except Refused:
            return "refused"
        assert ids.count(tokenizer.control(END)) == len(talk.messages) + 1 and ids.count(tokenizer.end_of_text) == 0
        talk.turns.append(Message("assistant", END))
        talk.save(folder / "out.jsonl")
        other.load(folder / "out.jsonl")
        assert other.messages == talk.messages
        return "accepted"


def foreign_checkpoints(data: st.DataObject, workspace: Workspace) -> str:
    """A nanoGPT ckpt.pt with wrong parts, or with noise in it, or with something to run."""
    with workspace.case() as folder, in_bounds():
        arguments = {"n_layer": 1, "n_head": 2, "n_embd": 4, "block_size": 4, "bias": False, "vocab_size": 5}
        weights: dict[str, Any] = {n: p.detach() for n, p in GPT(ModelConfig(**arguments)).named_parameters()}
        made: Any = {"model_args": arguments, "model": weights}
        match data.draw(st.integers(0, 4)):
            case 0:
                made["model_args"] = mutated(data, arguments)
            case 1:
                weights[data.draw(TEXTS)] = data.draw(JSON)
            case 2:
                made[data.draw(st.sampled_from(["optimizer", "config", "model"]))] = _Runs()
            case 3:
                made = data.draw(JSON)
        torch.save(made, folder / "ckpt.pt")
        if data.draw(st.booleans()):
            (folder / "ckpt.pt").write_bytes(noisy(data, (folder / "ckpt.pt").read_bytes()))
        try:
            nanogpt.open_model(folder / "ckpt.pt")
            nanogpt.load_checkpoint(folder / "ckpt.pt")
        except ValueError:
            return "refused"
        return "accepted"


def exported_shapes(data: st.DataObject, workspace: Workspace) -> str:
    """A model of any shape: what is exported computes the same, read by transformers and by ourselves."""

    def one_of(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    n_kv_head, n_layer = one_of(1, 2, 3), one_of(1, 2)
    shape = dict(
        block_size=8, vocab_size=11, n_layer=n_layer, n_embd=one_of(8, 12, 24), n_kv_head=n_kv_head,
        n_head=n_kv_head * one_of(1, 2, 3), head_size=one_of(2, 4, 8), activation=one_of("gelu", "relu2", "swiglu"),
        n_hidden=tuple(one_of(8, 12, 48, 96) for _ in range(n_layer)), norm=one_of("layernorm", "rmsnorm"),
        position=one_of("learned", "rotary"), bias=one_of(False, True), attn_bias=one_of("none", "qkv", "all"),
        tie_weights=one_of(True, False), norm_eps=one_of(1e-5, 1e-2), qk_norm=one_of(False, False, True),
        lora={layer: LoraSpec(1, 2.0) for layer in ("attn.0", "mlp.0", "wte") if one_of(True, False)},
    )  # fmt: skip
    try:
        model = GPT(ModelConfig(**shape))
    except ValueError:
        return "refused"
    init_weights(model, 1)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    model.set_fading({"attn.0": Fade(one_of(0, 1), 0.5)} if one_of(False, True) else {})
    x, answer = torch.arange(8)[None], "refused"
    wanted = model.eval().logits(x).detach()
    with workspace.case() as folder:
        with contextlib.suppress(NoForm):
            write_nanogpt(nanogpt_form_of(model), folder / "ckpt.pt")
            torch.testing.assert_close(nanogpt.load_checkpoint(folder / "ckpt.pt").eval().logits(x).detach(), wanted)
            answer = "accepted"
        with contextlib.suppress(NoForm):
            form = form_of(model)
            write_hugging_face(form, folder)
            assert (len(form.steps) > 0) or not (model.config.lora or model.fading)
            theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
            torch.testing.assert_close(theirs(x).logits.detach(), wanted, atol=1e-5, rtol=1e-5)
            again = hugging_face.load(str(folder)).eval()
            torch.testing.assert_close(again.logits(x).detach(), wanted, atol=1e-5, rtol=1e-5)
            answer = "accepted"
    return answer


TARGETS: dict[str, Callable[[st.DataObject, Workspace], str]] = {
    f.__name__: f
    for f in (schedule_entries, schedule_text, large_schedules, schedule_runs, config_values, config_file,
              growing_configs, forged_state, forged_tensors, damaged_files, jsonl, reports, metas, token_folders,
              tokenizer_folders, documents, conversations, chat_templates, talk_files, foreign_checkpoints,
              exported_shapes)
}  # fmt: skip


def fuzz(target: str, workspace: Workspace, cases: int, first_seed: int = 0) -> Counter[str]:
    """So many cases of a target; how many were accepted and refused. Raises what the smallest failing case raised."""
    answers: Counter[str] = Counter()

    @seed(first_seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(data=st.data())
    def case(data: st.DataObject) -> None:
        answers[TARGETS[target](data, workspace)] += 1

    case()
    return answers
