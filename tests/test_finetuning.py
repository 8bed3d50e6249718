"""docs/finetuning.md is true: its commands, in their order, from a folder to one that transformers reads."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TEXT, events
from test_data_and_model import _with_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import train_orchestrated
from orchestrate.tools import export

SMALL = "--max_iters=6 --eval_interval=3 --eval_iters=2 --warmup_iters=2 --block_size=16 --device=cpu --compile=False"


def commands(page: str) -> list[list[str]]:
    """Every command of the page's blocks, as a shell splits it."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.S)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_the_how_to_works(tmp_path, monkeypatch):
    """All weights, and adapters on bfloat16 weights: both learn, and the export knows what they learnt."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
    theirs = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=32, num_key_value_heads=2))
    _with_tokenizer(tmp_path / "FOLDER")
    theirs.to(torch.bfloat16).save_pretrained("FOLDER")
    (tmp_path / "my.txt").write_text(TEXT * 4, "utf-8")
    prepare, train, take_out, with_adapters = commands("finetuning.md")

    assert prepare[0] == "python" and take_out[:2] == ["orchestrate", "export"]
    subprocess.run([sys.executable, str(ROOT / prepare[1]), *prepare[2:]], check=True, capture_output=True)
    for number, command in enumerate((train, with_adapters)):
        assert command[:3] == ["python", "train_orchestrated.py", "config/finetune_hf.py"]
        out = f"out-{number}"
        arguments = [str(ROOT / command[2]), *command[3:], *shlex.split(SMALL), "--learning_rate=0.02"]
        assert train_orchestrated.main([*arguments, f"--out_dir={out}"]) == 0
        (start,) = events(tmp_path / out, "start")
        assert ("cast" in start) == (number == 1)
        if number:
            assert start["cast"]["error"] == 0 and start["parameters_trainable"] < start["parameters_total"] / 2
        target = [{"out-finetuned": out, "DIR": f"DIR-{number}"}.get(word, word) for word in take_out[2:]]
        assert export.main(target) == 0
        model = AutoModelForCausalLM.from_pretrained(f"DIR-{number}")
        ids = AutoTokenizer.from_pretrained(f"DIR-{number}")("To be, or not to be", return_tensors="pt").input_ids
        before = AutoModelForCausalLM.from_pretrained("FOLDER", dtype=torch.float32)
        with torch.no_grad():
            losses = [one(ids, labels=ids).loss.item() for one in (before, model)]
        assert losses[1] < losses[0] - 0.05, losses


@pytest.mark.parametrize("page", ["finetuning.md"])
def test_its_list_of_recipes_is_complete(page):
    """Every schedule that says what to start from with init_from is named."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    for path in sorted((ROOT / "schedules").glob("*.yaml")):
        if "init_from" in path.read_text("utf-8"):
            assert f"schedules/{path.name}" in text, path.name
