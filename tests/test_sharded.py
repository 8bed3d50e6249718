"""parallel=fsdp against parallel=ddp: the same schedule, decisions and losses; checkpoints that either resumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, arguments, assert_same_tensors, events, lines, on_ranks
from fuzzing import seal, write_manifest
from safetensors.torch import load_file, save_file

import train_orchestrated
from orchestrate.tools import export
from orchestrate.training.run.fingerprint import bit_sums
from orchestrate.training.session.exporting import open_source
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint

SCHEDULE = [
    {"name": "freeze_layer", "value": ["block.0", "wte"], "at_iter": 2},
    {"name": "unfreeze_layer", "value": "*", "max_wait_iters": 2},
    {"name": "set_attn_lora_rank", "value": 3, "max_wait_iters": 1, "reevaluate": True},
    {"name": "set_embedding_lora_rank", "value": 2, "reevaluate": True},
    {"name": "stack_layers", "value": {"times": 2}, "max_wait_iters": 2, "reevaluate": True},
    {"name": "set_attn_lora_rank", "value": 1, "max_wait_iters": 1, "reevaluate": True},
    {"name": "widen_embd", "value": {"times": 2}, "max_wait_iters": 1, "reevaluate": True},
    {"name": "merge_lora_weights", "max_wait_iters": 1, "reevaluate": True},
    {"name": "set_layer_lora_rank", "value": [["attn.0.q", "attn.*.v", "mlp.1.up"], 2], "reevaluate": True},
    {"name": "widen_mlp", "value": {"times": 2, "how": "random"}, "max_wait_iters": 1, "over": 3},
    {"name": "adjust_batch_size", "value": {"target": 1.0, "max_batch_size": 2}, "max_wait_iters": 1},
    {"name": "resize_vocabulary", "value": {"size": 40}, "max_wait_iters": 2, "reevaluate": True},
    {
        "name": "set_lr", "value": 3.0, "max_wait_iters": 1,
        "guard": {"max_increase": 0.0, "within_iters": 2, "then": "revert"},
    },
]  # fmt: skip


def keys(**more) -> dict:
    return dict(
        gradient_accumulation_steps=6, max_iters=24, lr_decay_iters=24, learning_rate=3e-3, eval_iters=5, **more
    )


def _runs(rank: int, commands: list[list[str]]) -> list:
    """One command after the other in the same processes; exit codes, or what was raised."""
    port, codes = int(os.environ["MASTER_PORT"]), []
    for number, command in enumerate(commands):
        os.environ["MASTER_PORT"] = str(port + number)
        try:
            codes.append(train_orchestrated.main(command))
        except Exception as error:
            codes.append(f"{type(error).__name__}: {error}")
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return codes


def losses(out) -> list[tuple]:
    return [
        (m["kind"], m["iter"], m.get("why"), m.get("loss", m.get("val_loss"))) for m in lines(out / "metrics.jsonl")
    ]


def assert_same_curve(one, other, tolerance: float = 1e-4) -> None:
    ours, theirs = losses(one), losses(other)
    assert [line[:3] for line in ours] == [line[:3] for line in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine[3] == pytest.approx(its[3], abs=tolerance), mine[:3]


def fired(out) -> list[tuple]:
    return [(e["entry"], e["iter"], e["parameters_total"], e["parameters_trainable"]) for e in events(out, "operation")]


def resumed(out, **more) -> list[str]:
    return ["--init_from=resume", f"--out_dir={out}", *(f"--{key}={value}" for key, value in more.items())]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [2, 3])
def test_sharded_is_the_same_run(data, tmp_path, processes):
    """Freezing, adapters up and down, growth, a fade and a guard: losses equal to rounding, decisions equal."""
    schedule = tmp_path / "s.json"
    # Three ranks (uneven shards, some of them empty): freezing, adapters and growth.
    some = SCHEDULE if processes == 2 else SCHEDULE[:7]
    schedule.write_text(json.dumps(some))
    given = {
        **keys(schedule=schedule, dropout=0.1, qk_norm=True, head_size=6, attn_bias="qkv"),
        "max_iters": 24 if processes == 2 else 13,
    }
    commands = [
        arguments(data, tmp_path / "ddp", **given),
        arguments(data, tmp_path / "fsdp", parallel="fsdp", **given),
    ]
    assert on_ranks(_runs, commands, world_size=processes, seconds=400) == [[0, 0]] * processes
    assert_same_curve(tmp_path / "fsdp", tmp_path / "ddp")
    assert fired(tmp_path / "fsdp") == fired(tmp_path / "ddp")
    assert [e["entry"] for e in events(tmp_path / "fsdp", "operation")] == list(range(1, min(len(some), 12) + 1))
    assert [e["entry"] for e in events(tmp_path / "fsdp", "rollback")] == ([13] if processes == 2 else [])
    files = {path.name for path in (tmp_path / "fsdp" / "checkpoints" / "latest").iterdir()}
    assert sum(name.startswith("shard-") for name in files) == 2 * processes and "model.safetensors" not in files
    assert "".join(sample(tmp_path / "fsdp").split()), "text from shards"
    sharded, whole = (checkpoint.load(tmp_path / name / "checkpoints" / "latest") for name in ("fsdp", "ddp"))
    assert {n: t.shape for n, t in sharded.model.items()} == {n: t.shape for n, t in whole.model.items()}
    for name, parts in whole.optimizer.items():
        assert sharded.optimizer[name].keys() == parts.keys()
        torch.testing.assert_close(sharded.optimizer[name]["exp_avg"], parts["exp_avg"], atol=1e-3, rtol=0)


@pytest.mark.timeout(600)
def test_a_sharded_run_goes_on_to_the_bit_and_with_any_other_split(data, tmp_path):
    """Stopped in the middle: fsdp again is bitwise; ddp and three processes are the same curve. And back."""
    schedule = tmp_path / "s.json"
    schedule.write_text(json.dumps(SCHEDULE[:5]))
    given = {**keys(schedule=schedule), "max_iters": 14}
    stop = {**given, "max_iters": 7}  # in the middle of the schedule: adapters are there, layers are not
    part = tmp_path / "part"
    commands = [
        arguments(data, tmp_path / "whole", parallel="fsdp", async_save=True, **given),
        arguments(data, tmp_path / "plain", **given),
        arguments(data, part, parallel="fsdp", **stop),
    ]
    assert on_ranks(_runs, commands, seconds=400) == [[0, 0, 0]] * 2
    assert events(tmp_path / "whole", "checkpoint")[0]["path"] == "checkpoints/iter_000000004"
    ends = {}
    for name in ("fsdp", "ddp", "three"):
        shutil.copytree(part, tmp_path / name, symlinks=True)
        ends[name] = tmp_path / name
    assert (
        on_ranks(
            _runs,
            [resumed(ends["fsdp"], max_iters=14), resumed(ends["ddp"], parallel="ddp", max_iters=14)],
            seconds=300,
        )
        == [[0, 0]] * 2
    )
    assert_same_tensors(whole_tensors(ends["fsdp"]), whole_tensors(tmp_path / "whole"))
    assert on_ranks(_runs, [resumed(ends["three"], max_iters=14)], world_size=3, seconds=300) == [[0]] * 3
    for out in ends.values():
        assert_same_curve_from(out, tmp_path / "plain", 8)

    # A whole checkpoint, resumed sharded, and the sharded one on one process.
    back, alone = ends["ddp"], ends["three"]
    assert on_ranks(_runs, [resumed(back, max_iters=18, parallel="fsdp")], seconds=300) == [[0]] * 2
    assert train_orchestrated.main(resumed(alone, max_iters=18)) == 0
    assert events(back, "resume")[-1]["iter"] == 14
    assert_same_curve_from(back, alone, 14)


def sample(out) -> str:
    command = [sys.executable, str(ROOT / "sample.py"), f"--out_dir={out}", "--start=To", "--num_samples=1",
               "--max_new_tokens=20", "--device=cpu"]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout


def whole_tensors(out) -> dict[str, torch.Tensor]:
    loaded = checkpoint.load(out / "checkpoints" / "latest")
    moments = {f"{n}|{key}": t for n, parts in sorted(loaded.optimizer.items()) for key, t in sorted(parts.items())}
    return {**dict(sorted(loaded.model.items())), **moments}


def assert_same_curve_from(one, other, iteration: int) -> None:
    ours, theirs = ({line[:2]: line[3] for line in losses(out) if line[1] >= iteration} for out in (one, other))
    assert ours and ours.keys() == theirs.keys()
    for key in ours.keys() & theirs.keys():
        assert ours[key] == pytest.approx(theirs[key], abs=1e-4), key


def _no_room(rank: int, commands: list[list[str]]) -> list:
    """The disk is full for rank 1's shard in the second save."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    real, calls = HuggingFaceStorageWriter.write_data, []

    def write_data(self, plan, planner):
        calls.append(plan)
        if rank == 1 and len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(self, plan, planner)

    HuggingFaceStorageWriter.write_data = write_data
    return _runs(rank, commands)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("background", [False, True])
def test_a_shard_that_cannot_be_written(data, tmp_path, background):
    out = tmp_path / "run"
    given = {**keys(parallel="fsdp", async_save=background), "max_iters": 12}
    assert on_ranks(_no_room, [arguments(data, out, **given)]) == [[0]] * 2
    (error,) = events(out, "error")
    assert "No space left" in error["message"] and error["action"] == "go on"
    assert {path.name for path in checkpoint.find(out)} == {"iter_000000004", "iter_000000012"}


@pytest.mark.timeout(600)
def test_what_goes_wrong_in_a_sharded_run(data, tmp_path):
    """Sick steps are rolled back; an error of all ranks together is saved; one of a rank alone cannot be."""
    given = {**keys(parallel="fsdp"), "max_iters": 12}
    commands = [
        arguments(data, tmp_path / "nan", inject="nan@6:rank1", on_sick_step="rollback", **given),
        arguments(data, tmp_path / "stop", inject="nan@6:rank1", on_sick_step="stop", **given),
        arguments(data, tmp_path / "raise", inject="raise@6", **given),
        arguments(data, tmp_path / "oom", inject="oom@6", **given),
    ]
    one, _ = on_ranks(_runs, commands)
    assert "OutOfMemoryError" in one[3] and [e["saved"] for e in events(tmp_path / "oom", "emergency")] == [False]
    assert one[0] == 0 and one[1].startswith("Stopped: not finite") and "injected" in one[2]
    # The next start takes the same global batch in smaller pieces, once; nothing is lost or seen twice.
    assert on_ranks(_runs, [resumed(tmp_path / "oom"), resumed(tmp_path / "oom", max_iters=14)]) == [[0, 0]] * 2
    halved = [
        (e["key"], e["before"], e["after"]) for e in events(tmp_path / "oom", "override") if "memory" in e["reason"]
    ]
    assert halved == [("batch_size", 4, 2), ("gradient_accumulation_steps", 6, 12)]
    assert checkpoint.load(tmp_path / "oom/checkpoints/latest").state.progress.cursor.sample == 14 * 24
    (rollback,) = events(tmp_path / "nan", "rollback")
    assert rollback["checkpoint"] == "iter_000000004" and events(tmp_path / "nan", "end")[0]["iter"] == 12
    (saved,) = events(tmp_path / "stop", "emergency")
    assert checkpoint.load(tmp_path / "stop" / saved["path"]).state.progress.iter == 7
    (lost,) = events(tmp_path / "raise", "emergency")
    assert lost["saved"] is False and "other ranks" in lost["reason"]
    assert [path.name for path in checkpoint.find(tmp_path / "raise")] == ["iter_000000004"]


@pytest.fixture(scope="module")
def sharded(data, tmp_path_factory):
    """A checkpoint of two ranks, to be damaged in copies."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    assert on_ranks(_runs, [arguments(data, out, **{**keys(parallel="fsdp"), "max_iters": 4})]) == [[0], [0]]
    return out


SHARD = "shard-00002-model-00001-of-00002.safetensors"


def _hole(folder):
    """The first rows of one parameter are gone."""
    first = SHARD.replace("00002", "00001", 1)
    with checkpoint.safe_open(folder / first, framework="pt") as file:
        metadata = file.metadata()
    kept = load_file(folder / first)
    kept.popitem()
    save_file(kept, folder / first, metadata)
    seal(folder)


def _offsets(text):
    def change(folder):
        with checkpoint.safe_open(folder / SHARD, framework="pt") as file:
            metadata = {**file.metadata(), checkpoint._SHARDS: text}
        save_file(load_file(folder / SHARD), folder / SHARD, metadata)
        seal(folder)

    return change


def _starts(forge):
    """Every part of a shard says that it begins elsewhere in its tensor."""

    def change(folder):
        with checkpoint.safe_open(folder / SHARD, framework="pt") as file:
            parts = json.loads(file.metadata()[checkpoint._SHARDS])
        for part in parts.values():
            part[checkpoint._OFFSETS] = forge(part[checkpoint._OFFSETS])
        _offsets(json.dumps(parts))(folder)

    return change


def _listed(name):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {}
        write_manifest(folder, manifest)

    return change


def test_weights_and_moments_of_a_rank_lie_in_files_of_their_own(sharded):
    """Who samples need not read the moments."""
    for rank in (1, 2):
        for kind in (1, 2):
            name = f"shard-{rank:05d}-model-{kind:05d}-of-00002.safetensors"
            tensors = load_file(sharded / "checkpoints" / "iter_000000004" / name)
            assert tensors and {"|" in key for key in tensors} == {kind == 2}


def test_a_sharded_run_is_exported_as_any_other(sharded, tmp_path):
    from transformers import AutoModelForCausalLM

    assert export.main([str(sharded), "--to", "hf", str(tmp_path / "hf")]) == 0
    x = torch.arange(16)[None]
    ours, theirs = open_source(str(sharded)).model.eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert (theirs(x).logits - ours.logits(x)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
        (lambda folder: (folder / SHARD).write_bytes(b""), f"{SHARD} is damaged"),
        (lambda folder: shutil.copy(folder / SHARD, folder / "shard-9.safetensors"), "shard-9.safetensors is not in"),
        (_hole, "do not make up a tensor"),
        (_offsets("[]"), "not readable"),
        (_offsets("{}"), "not readable"),
        (_offsets("nonsense"), "not readable"),
        (_starts(lambda start: [*start, 0]), "starts at"),
        (_starts(lambda start: [-1] * len(start)), "starts at"),
        (_starts(lambda start: [0.0] * len(start)), "starts at"),
        (_listed("../../state.json"), "the manifest names '../../state.json'"),
        (_listed("/etc/passwd"), "the manifest names '/etc/passwd'"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    ],
)
def test_damaged_shards_are_refused(sharded, tmp_path, damage, said):
    folder = tmp_path / "copy"
    shutil.copytree(sharded / "checkpoints" / "iter_000000004", folder)
    checkpoint.load(folder)
    damage(folder)
    with pytest.raises(Refused, match=said.replace(".", r"\.")):
        checkpoint.load(folder)


def test_a_fingerprint_adds_up_over_the_parts():
    values = torch.randn(7)
    for cut in range(8):
        parts = bit_sums(values[:cut], 0) + bit_sums(values[cut:], cut)
        assert torch.equal(parts, bit_sums(values, 0)), cut
    assert not torch.equal(bit_sums(values.flip(0), 0), bit_sums(values.roll(1), 0)), "places count"


def test_the_plan_shows_the_memory_of_one_rank(data, tmp_path):
    from orchestrate.training import plan

    config = TrainConfig(**{"dataset": str(data), "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16})
    whole, shared = (plan.make(config.model_copy(update={"parallel": p}), {}, 4) for p in ("ddp", "fsdp"))
    assert shared.rows[0].model_bytes == whole.rows[0].model_bytes // 4
    assert shared.rows[0].optimizer_bytes == pytest.approx(whole.rows[0].optimizer_bytes / 4, rel=0.02)
    assert any("one of 4 processes" in note for note in shared.notes)


def _gathered(rank: int, data: str):
    """The types that a step sees: of a gathered block weight, of the gathered embedding, of shards and gradients."""
    from conftest import TINY

    from orchestrate.training.run.distributed import Ranks
    from orchestrate.training.schedule.file import Schedule
    from orchestrate.training.session.opening import open_run

    config = TrainConfig(**{**TINY, "dataset": data, "parallel": "fsdp", "dtype": "bfloat16"})
    run = open_run(config, None, Schedule(), Ranks("cpu", parallel="fsdp", dtype=torch.bfloat16))
    seen = {}
    block = run.model.transformer["h"][0].mlp.c_fc
    block.register_forward_pre_hook(lambda module, _: seen.update(block=str(module.weight.dtype)))
    wte = run.model.transformer["wte"]
    wte.register_forward_pre_hook(lambda module, _: seen.update(wte=str(module.weight.dtype)))
    batch = run.batches.read(run.progress.cursor, 2)
    with run.autocast():
        run.wrapped(batch.x, batch.y).sum.backward()
    seen["gradients"] = {str(p.grad.dtype) for p in run.optimizer.parameters}
    seen["shards"] = {str(p.dtype) for p in run.optimizer.parameters}
    run.ranks.close()
    return seen


def test_bfloat16_gathers_blocks_in_bfloat16_and_keeps_float32(data):
    for seen in on_ranks(_gathered, str(data)):
        kinds = {"gradients": {"torch.float32"}, "shards": {"torch.float32"}}
        assert seen == {"block": "torch.bfloat16", "wte": "torch.float32", **kinds}


def test_bfloat16_sharded_learns_as_on_copies(data, tmp_path):
    given = {**keys(dtype="bfloat16"), "max_iters": 12}
    commands = [
        arguments(data, tmp_path / "ddp", **given),
        arguments(data, tmp_path / "fsdp", parallel="fsdp", **given),
    ]
    assert on_ranks(_runs, commands) == [[0, 0]] * 2
    assert_same_curve(tmp_path / "fsdp", tmp_path / "ddp", tolerance=2e-2)
