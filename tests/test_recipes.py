"""Every shipped schedule runs to its end on a small model, its waits shortened; the page of operations is current."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SHIPPED, events, tensors

from orchestrate.training.schedule.file import parse_schedule

WAITS = ("max_wait_iters", "max_wait_tokens", "at_iter", "at_tokens")


def shortened(path) -> list[dict] | dict:
    """The schedule as it is, but with waits of one iteration and ramps of two."""
    text = path.read_text("utf-8")
    schedule = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if isinstance(schedule, dict) and "operations" in schedule:
        schedule = schedule["operations"]
    lists = schedule["tracks"].values() if isinstance(schedule, dict) else [schedule]
    for entry in [entry for items in lists for item in items for entry in item.get("do", [item])]:
        for key in WAITS:
            entry.pop(key, None)
        if any(key.startswith("trigger") for key in entry) or "desc" in entry or entry.pop("all_of", None):
            entry["max_wait_iters"] = 1
        if "over" in entry:
            entry["over"] = 2
        if "guard" in entry:
            entry["guard"]["within_iters"] = 2
    return schedule


STYLES = {
    "gpt2": {"bias": True},
    "llama": {
        "norm": "rmsnorm", "activation": "swiglu", "use_rotary_embeddings": True, "tie_weights": False, "n_kv_head": 1,
        "n_hidden": 24,
    },
}  # fmt: skip
# Four layers, because recipes name the lower ones; accumulation 2 and batch 8 take the batch changes.
SMALL = dict(n_layer=4, batch_size=8, max_iters=24, eval_interval=8, eval_iters=1)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_runs_to_its_end(path, style, tiny, data):
    schedule = shortened(path)
    if path.name == "pretrain_midtrain_chat.yaml":  # which names data sets
        named = json.dumps(schedule).replace("fineweb_edu", str(data)).replace("task_mixture", f"{data}/.")
        schedule = json.loads(named)
    if path.name == "curriculum_digits.yaml":  # the same, and scores: tests/test_tasks.py
        named = json.dumps(schedule)
        for n in (1, 2, 3):
            named = named.replace(f"adder/{n}", f"{data}{'/.' * n}")
        schedule = [{key: entry[key] for key in entry if key != "trigger"} for entry in json.loads(named)]
    analyses = {"analyze_interval": 1} if path.name == "adaptive_batch.yaml" else {}
    code, out = tiny(schedule, **SMALL, **STYLES[style], **analyses)
    assert code == 0
    steps = parse_schedule(json.dumps(schedule), "s.json").tracks
    for name, track in steps.items():
        done = [(e["entry"], e.get("round", 1)) for e in events(out, "operation") if e.get("track", "") == name]
        assert done == [(entry.number, entry.round) for entry in track]
    assert not events(out, "error") and not events(out, "rollback")


def recipe(name: str) -> list[dict]:
    return shortened(ROOT / "schedules" / name)


@pytest.mark.parametrize("style", STYLES)
def test_llama_pro_trains_its_new_blocks_alone(style, tiny):
    entries = [{key: value for key, value in entry.items() if key != "max_wait_iters"} for entry in
               recipe("llama_pro.yaml")]  # fmt: skip
    _, first = tiny([], out="before", **{**SMALL, "max_iters": 0}, **STYLES[style])
    code, out = tiny(entries, **SMALL, **STYLES[style])
    assert code == 0
    stacked = events(out, "operation")[2]
    assert stacked["val_loss_before"] == pytest.approx(stacked["val_loss_after"], abs=1e-6)
    old = {name: value for name, value in tensors(first).items() if "|" not in name}
    new = {name: value for name, value in tensors(out).items() if "|" not in name}
    block = {name: value for name, value in new.items() if name.startswith("transformer.h.4.")}
    assert new.keys() - old.keys() == block.keys(), "one block of four is new, and it is the last"
    assert all(torch.equal(new[name], old[name]) for name in old), "what was there does not train"
    assert all(value.abs().max() > 0 for name, value in block.items() if name.endswith("weight")), "the new one does"
    assert stacked["parameters_trainable"] == sum(value.numel() for value in block.values())


@pytest.mark.parametrize("style", STYLES)
def test_depth_up_scaling_leaves_out_the_seam_and_dropping_the_block_before_the_last(style, tiny):
    for name, after in (("depth_up_scaling.yaml", [0, 1, 2, 1, 2, 3]), ("drop_and_heal.yaml", [0, 1, 3])):
        entry = {**recipe(name)[0], "max_wait_iters": 0}
        _, first = tiny([], out=f"{name} before", **{**SMALL, "max_iters": 0}, **STYLES[style])
        _, out = tiny([entry], out=name, **{**SMALL, "max_iters": 0}, **STYLES[style])
        old, new = tensors(first), tensors(out)
        assert not any(name.startswith(f"transformer.h.{len(after)}.") for name in new)
        for n, source in enumerate(after):
            weight = "transformer.h.{}.mlp.c_fc.weight"
            assert torch.equal(new[weight.format(n)], old[weight.format(source)]), (name, n)


@pytest.mark.parametrize("style", STYLES)
def test_new_words_are_learnt_from_the_next_data_set(style, tiny, resume, data, tmp_path):
    """As the recipe's head says it: the rows first, then a resume with data that has the new ids."""
    entries = recipe("new_words.yaml")
    code, out = tiny(entries, **{**SMALL, "max_iters": 8}, **STYLES[style])
    meta = json.loads((data / "meta.json").read_text())
    assert code == 0 and tensors(out)["transformer.wte.weight"].shape[0] == meta["vocab_size"] + 8
    loss = events(out, "operation")[-1]
    assert loss["val_loss_before"] == pytest.approx(loss["val_loss_after"], abs=1e-5)
    new = shutil.copytree(data, tmp_path / "new")
    for name in ("train.bin", "val.bin"):
        ids = np.fromfile(data / name, np.uint16)
        ids[::9] = meta["vocab_size"] + np.arange(len(ids[::9])) % 8
        ids.tofile(new / name)
    characters = [*meta["itos"], *"①②③④⑤⑥⑦⑧"]
    (new / "meta.json").write_text(json.dumps({**meta, "vocab_size": len(characters), "itos": characters}))
    rows = tensors(out)["transformer.wte.weight"][-8:]
    told = {"dataset": new, "allow_changed_data": True, "max_iters": 16}
    assert resume(out, **told, allow_other_tokenizer=True) == 0
    assert (tensors(out)["transformer.wte.weight"][-8:] != rows).any(dim=1).all()


def test_there_are_recipes_and_each_says_where_it_comes_from_and_what_to_expect():
    taught = 0
    for path in SHIPPED:
        if path.suffix == ".yaml":
            head = re.match(r"(#.*\n)+", path.read_text("utf-8"))[0]
            taught += "Source" in head and "xpect" in head
    assert taught >= 10


def test_the_page_of_operations_is_what_the_classes_say():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate_operations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert page == module.page(), "run: python docs/generate_operations.py"
