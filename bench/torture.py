"""Ends a scheduled run again and again at random moments, and compares its end with a run that was left alone.

    python bench/torture.py [--kills 200] [--signals 50] [--processes 1 2] [--parallel ddp] [--optimizer adamw]

The run grows, changes adapters, batch and accumulation, in three tracks with repetitions and a way back, and scores a
task, while it is ended in steps, evaluations, operations, saves and at start-up: with SIGKILL (--kills), or with
SIGTERM, SIGINT or SIGUSR1 to one rank or to all (--signals), after which all ranks must end by themselves within 60
seconds, with the same exit code, and with a checkpoint of where they were. A signal before the first boundary ends the
rank that it reaches at once, with nothing to save; the others are then ended as torchrun does it.
Every start uses the same two commands as a person would: the first one, or --init_from=resume once there is a
checkpoint. A run that ends must have the weights and moments of the undisturbed run to the bit, whole lines in its
logs, each iteration once, and no half checkpoint or leftover. Runs follow each other until the kills are done.
Processes are forked from one that has imported everything, so a start takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a run imports late, imported once for all children: a start would be little else.
import peft  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402, F401

import train_orchestrated  # noqa: E402
from orchestrate.data.tokenizer import END_OF_TEXT  # noqa: E402
from orchestrate.training.store import checkpoint  # noqa: E402
from orchestrate.training.store.manifest import survey  # noqa: E402
from orchestrate.training.store.run_folder import read_run  # noqa: E402

GROWTH = [
    # DATA and OTHER stand for two data sets.
    {"name": "set_data_mixture", "value": {"DATA": 0.3, "OTHER": 0.7}, "at_iter": 2, "over": 24, "style": "cosine"},
    {"name": "set_curriculum_alpha", "value": 0.8, "over": 12},
    {"name": "set_batch_size", "value": 6, "at_iter": 3},
    {"name": "stack_layers", "value": {"times": 2}, "max_wait_iters": 3, "reevaluate": True},
    {"name": "set_weights_dtype", "value": "bfloat16", "max_wait_iters": 1},
    {"name": "set_eval_interval_tokens", "value": 700, "max_wait_iters": 1},
    {"name": "set_attn_lora_rank", "value": 2, "max_wait_iters": 2},
    {"name": "set_lr", "value": 3e-3, "over": 4, "style": "power", "exponent": 2.0,
     "trigger": {"metric": "loss", "below": 99.0}},
    {"name": "widen_embd", "value": {"times": 2}, "max_wait_iters": 4, "reevaluate": True},
    {"name": "merge_lora_weights", "max_wait_iters": 9, "trigger": {"metric": "eval/adder_accuracy", "above": 0.3}},
    {"name": "set_eval_tasks", "value": [], "max_wait_iters": 6},
    {"name": "set_layer_lora_rank", "value": [["attn.*.q", "attn.*.v", "mlp.0.up"], 2], "max_wait_iters": 1},
    {"name": "set_lora_dropout", "value": 0.2, "over": 2},
    {"name": "merge_lora_weights", "max_wait_iters": 2},
    {"name": "set_activation_checkpointing", "value": True, "max_wait_iters": 1},
    {"name": "set_document_mask", "value": True},
    {"name": "set_grad_accum", "value": 4, "max_wait_iters": 2},
    {"name": "widen_mlp", "value": {"times": 2, "how": "random"}, "max_wait_iters": 1, "over": 3},
    {"name": "stack_layers", "value": {"times": 1.5, "how": "identity_copy", "where": "interleave"},
     "max_wait_iters": 4},
    {"name": "drop_layers", "value": [-2], "max_wait_iters": 1},
    {"name": "freeze_layer", "value": "block.0", "max_wait_iters": 4,
     "guard": {"max_increase": 5.0, "within_iters": 3, "then": "revert"}},
]  # fmt: skip
# Beside it: rounds with ramps, measurements and checkpoints inside, one track after the other, a guard that goes back.
TRACKS = {
    "growth": GROWTH,
    "numbers": [
        {"repeat": {"times": 4, "until": {"metric": "loss", "below": 0.1}}, "do": [
            {"name": "change_weight_decay", "value": 0.7, "max_wait_iters": 3, "over": 2, "label": "decayed"},
            {"name": "save_checkpoint"},
            {"name": "set_grad_clip", "value": 0.9, "after": "decayed", "max_wait_iters": 4, "reevaluate": True},
        ]},
    ],
    "notes": [
        {"name": "set_betas", "value": [0.9, 0.95], "after": "decayed", "max_wait_iters": 1, "repeat": 2},
        {"name": "set_dropout", "value": 0.9,
         "all_of": [{"at_iter": 12}, {"trigger": {"metric": "loss", "below": 99.0}}],
         "guard": {"metric": "loss", "max_increase": 0.05, "within_iters": 4, "then": "revert"}},
        {"name": "set_eval_iters", "value": 3, "max_wait_iters": 3, "repeat": 3},
    ],
}  # fmt: skip
KEYS = dict(
    n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=2, max_iters=40,
    lr_decay_iters=40, warmup_iters=2, learning_rate=1e-2, eval_interval=5, eval_iters=2, log_interval=1, dropout=0.1,
    device="cpu", compile=False, qk_norm=True, head_size=6, attn_bias="qkv", sample_prompts="The", sample_tokens=9,
    save_interval_tokens=900, keep_every=16, eval_tasks_interval=7, analyze_interval=4, report=False,
)  # fmt: skip


class Torture:
    """One number of processes on one folder of runs."""

    def __init__(self, folder: Path, processes: int, parallel: str, optimizer: str, seed: int) -> None:
        self.folder, self.processes, self.parallel, self.optimizer = folder, processes, parallel, optimizer
        self.random = random.Random(seed)
        self.kills = self.signals = self.at_start = self.starts = self.runs = 0
        self.slowest = 0.0
        texts = {"data": "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 60}
        # Sums that are soon learnt, and 3 of 10 held back that are not.
        texts["other"] = "1+2=30\n" * 578 + "2+2=40\n1+9=01\n3+2=50\n"
        texts["sums"] = texts["other"]  # for the task: of characters alone
        characters = sorted(set("".join(texts.values())))
        tracks = dict(TRACKS)
        if optimizer == "sgd":  # which has no betas
            tracks["notes"] = tracks["notes"][1:]
        schedule = json.dumps({"tracks": tracks})
        for name, text in texts.items():
            (folder / name).mkdir(parents=True)
            ids = np.array([characters.index(c) for c in text], dtype=np.uint16)
            ids[ids == characters.index(".")] = len(characters)  # the end of a document
            itos = characters if name == "sums" else [*characters, END_OF_TEXT]
            meta = {"format": 1, "vocab_size": len(itos), "tokenizer": "char", "itos": itos}
            ids[:3997].tofile(folder / name / "train.bin")
            ids[3997:].tofile(folder / name / "val.bin")
            (folder / name / "meta.json").write_text(json.dumps({**meta, "arithmetic": {"kind": "adder"}}))
            schedule = schedule.replace(name.upper(), str(folder / name))
        (folder / "schedule.json").write_text(schedule)

    def arguments(self, out_dir: Path) -> list[str]:
        """What a person would type now."""
        if checkpoint.find(out_dir):
            return ["--init_from=resume", f"--out_dir={out_dir}"]
        keys = {**KEYS, "dataset": self.folder / "other", "schedule": self.folder / "schedule.json", "out_dir": out_dir}
        keys |= {"parallel": self.parallel, "optimizer": self.optimizer, "eval_tasks": f"adder:{self.folder / 'sums'}"}
        return [f"--{key}={value}" for key, value in keys.items()]

    def start(self, out_dir: Path) -> list[int]:
        """Fork the processes of one start; their ids."""
        arguments = self.arguments(out_dir)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.starts += 1
        children = []
        for rank in range(self.processes):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.processes))
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                    with open(self.folder / "console.log", "a") as log:
                        os.dup2(log.fileno(), 1)
                        os.dup2(log.fileno(), 2)
                        code = train_orchestrated.run(arguments)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            children.append(child)
        return children

    def wait(self, children: list[int], seconds: float) -> list[int] | None:
        """Exit codes, or None when time is up first."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if all(map(self.has_ended, children)):
                return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            time.sleep(0.002)
        return None

    def send(self, children: list[int], number: int) -> None:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    def kill(self, children: list[int], out_dir: Path) -> None:
        """SIGKILL to all; whatever is there must be whole."""
        self.send(children, signal.SIGKILL)
        assert self.wait(children, 60) is not None
        self.kills += 1
        self.look_at(out_dir)

    def stop(self, children: list[int], out_dir: Path) -> bool:
        """A signal to one rank or to all, after which they must end together; whether that was the run's own end."""
        number = self.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        reached = self.random.choice([children, [self.random.choice(children)]])
        started, told, saved = time.monotonic(), self.signals_told(out_dir), checkpoint.find(out_dir)[:1]
        self.send(reached, number)
        while not (ended := [child for child in children if self.has_ended(child)]):
            assert time.monotonic() < started + 60, f"{number.name} to {len(reached)} of {len(children)}: none ended"
            time.sleep(0.002)
        # Whoever ends by agreement has told the signal before.
        is_start = self.has_ended(ended[0]).si_status > 0 and len(self.signals_told(out_dir)) == len(told)
        if is_start:
            self.send([child for child in children if not self.has_ended(child)], signal.SIGTERM)
        codes = self.wait(children, 60)
        if codes is None:
            self.send(children, signal.SIGKILL)
            raise AssertionError(f"{number.name} to {len(reached)} of {len(children)}: they did not end")
        self.signals += 1
        self.slowest = max(self.slowest, time.monotonic() - started)
        self.look_at(out_dir)
        if codes == [0] * len(children):
            return True
        if is_start:
            first = [code for child, code in zip(children, codes, strict=True) if child in reached]
            assert 128 + number in first, f"{number.name} at the start: {codes}"
            assert set(codes) <= {128 + number, 128 + signal.SIGTERM, 1}, f"{number.name} at the start: {codes}"
            assert checkpoint.find(out_dir)[:1] == saved, "a start that was ended has left a checkpoint"
            self.at_start += 1
        else:
            assert codes == [128 + number] * len(children), f"{number.name}: {codes}"
            last = self.signals_told(out_dir)[-1]
            state = checkpoint.load(checkpoint.find(out_dir)[0]).state
            assert state.progress.iter == last["iter"], "nothing was saved"
        return False

    def signals_told(self, out_dir: Path) -> list[dict]:
        """The events of kind `signal` in the run folder."""
        events = read_run(out_dir).events if out_dir.exists() else []
        return [event for event in events if event["kind"] == "signal"]

    def has_ended(self, child: int) -> os.waitid_result | None:
        """How a child has ended, if it has; `wait` will still find it."""
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def undisturbed(self) -> tuple[Path, float]:
        """The run that all others are compared with, and the seconds it took."""
        out_dir, started = self.folder / "undisturbed", time.monotonic()
        codes = self.wait(self.start(out_dir), 300)
        assert codes == [0] * self.processes, f"the undisturbed run ended with {codes}; see {self.folder}/console.log"
        return out_dir, time.monotonic() - started

    def run(self, kills: int, signals: int) -> None:
        """Runs until so many have struck; raises AssertionError with what was not as promised."""
        reference, seconds = self.undisturbed()
        while self.kills < kills or self.signals < signals:
            out_dir = self.folder / f"run_{self.runs}"
            self.runs += 1
            ended = False
            while not ended:
                # Short and long lives: most of them end on the way, some get far.
                left = [*["kill"] * (self.kills < kills), *["stop"] * (self.signals < signals)]
                # A signal is listened to from a few milliseconds after the start on.
                life = self.random.uniform(0.0 if left == ["kill"] else 0.1, 0.8 * seconds) if left else 300.0
                children = self.start(out_dir)
                codes = self.wait(children, life)
                if codes is not None:
                    assert codes == [0] * self.processes, f"start {self.starts} ended with {codes}: console.log"
                    ended = True
                elif self.random.choice(left) == "kill":
                    self.kill(children, out_dir)
                else:
                    ended = self.stop(children, out_dir)
            self.compare(out_dir, reference)
            shutil.rmtree(out_dir)

    def look_at(self, out_dir: Path) -> None:
        """What must hold after any kill: every checkpoint that can be found is whole, and few things lie about."""
        for path, _ in survey(out_dir):
            checkpoint.load(path)  # raises for a damaged one
        if (out_dir / "checkpoints").exists():
            names = sorted(path.name for path in (out_dir / "checkpoints").iterdir())
            assert len(names) <= 10, f"leftovers grow: {names}"
            assert not any(name.startswith("damaged_") for name in names), names

    def compare(self, out_dir: Path, reference: Path) -> None:
        """The end of a killed run beside that of the undisturbed one."""
        ends = [checkpoint.load(folder / "checkpoints" / "latest") for folder in (out_dir, reference)]
        for one, other in ((ends[0].model, ends[1].model), (ends[0].optimizer, ends[1].optimizer)):
            assert list(one) == list(other), "other parameters"
        for name, weight in ends[0].model.items():
            assert weight.equal(ends[1].model[name]), f"{name} differs"
        for name, moments in ends[0].optimizer.items():
            for key, value in moments.items():
                assert value.equal(ends[1].optimizer[name][key]), f"{key} of {name} differs"
        logs = []
        for folder in (out_dir, reference):
            record = read_run(folder)
            assert not any(record.foreign.values()), f"lines that are none: {record.foreign}"
            logs.append(
                (
                    [(m["kind"], m["iter"], m.get("loss"), m.get("val_loss")) for m in record.metrics],
                    [(e["entry"], e.get("round"), e["iter"]) for e in record.valid.events if e["kind"] == "operation"],
                    [(e["iter"], e["texts"]) for e in record.valid.events if e["kind"] == "samples"],
                    [(m["iter"], m["eval/adder_accuracy"]) for m in record.metrics if "eval/adder_accuracy" in m],
                )
            )
        assert logs[0][0] == logs[1][0], "the metrics differ"
        assert logs[0][1] == logs[1][1], "the operations differ"
        assert logs[0][2] == logs[1][2], "the texts of sample_prompts differ"
        assert logs[0][3] == logs[1][3] and len({score for _, score in logs[0][3]}) > 1, f"scores: {logs[0][3]}"
        hidden = [path.name for path in (out_dir / "checkpoints").iterdir() if path.name.startswith(".")]
        assert not hidden, f"leftovers: {hidden}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs, for each number of processes")
    parser.add_argument("--signals", type=int, default=50, help="SIGTERM, SIGINT and SIGUSR1, likewise")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| processes | SIGKILLs | other signals | slowest end, s | starts | runs compared | differences | seconds "
          "| signals before the first boundary |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            torture = Torture(Path(folder) / "torture", processes, options.parallel, options.optimizer, options.seed)
            try:
                torture.run(options.kills, options.signals)
            except BaseException:
                print((torture.folder / "console.log").read_text()[-3000:], file=sys.stderr)
                raise
            facts = [processes, torture.kills, torture.signals, f"{torture.slowest:.1f}", torture.starts, torture.runs]
            facts += [0, f"{time.monotonic() - started:.0f}", torture.at_start]
            print("|", " | ".join(map(str, facts)), "|", flush=True)


if __name__ == "__main__":
    main()
