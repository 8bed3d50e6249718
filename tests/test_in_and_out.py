"""The whole way of a published model: in, trained under a schedule, killed, resumed, out, and in again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, events
from published_models import make
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from orchestrate.model.hugging_face import load
from orchestrate.training.session.sampling import open_run_folder
from orchestrate.training.store.run_folder import read_run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*args: object, expect: int | None = 0) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, args)], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert expect is None or done.returncode == expect, done.stderr[-3000:]
    return done.stdout + done.stderr


def on_two(*args: object, expect: int | None = 0) -> str:
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=0".split()
    return call(*launcher, "train_orchestrated.py", *args, expect=expect)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_a_published_model_goes_in_and_comes_out(family, tmp_path):
    """LLaMA Pro on two processes: the old weights come out as they went in, and the new blocks have learnt."""
    text = "".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    (tmp_path / "mine.txt").write_text(text, "utf-8")
    make(family, tmp_path / "in", text)
    prepare = ("data/text/prepare.py", "--input", tmp_path / "mine.txt", "--tokenizer", tmp_path / "in")
    call(*prepare, "--out", tmp_path / "data", "--workers", 2)
    out = tmp_path / "run"
    keys = [
        "config/finetune_hf.py", f"--init_from={tmp_path / 'in'}", f"--dataset={tmp_path / 'data'}", f"--out_dir={out}",
        "--schedule=schedules/llama_pro.yaml", "--block_size=64", "--batch_size=4", "--gradient_accumulation_steps=2",
        "--max_iters=12", "--warmup_iters=0", "--learning_rate=1e-2", "--eval_interval=4", "--eval_iters=2",
        "--log_interval=1", "--device=cpu", "--compile=False",
    ]  # fmt: skip
    assert "stack_layers" in call("train_orchestrated.py", *keys, "--plan") and not out.exists()
    on_two(*keys, "--inject=kill@7:rank1", expect=None)
    assert not events(out, "end")
    on_two("--init_from=resume", f"--out_dir={out}")
    assert events(out, "resume") and events(out, "end")[0]["iter"] == 12
    fired = [event["name"] for event in read_run(out).valid.events if event["kind"] == "operation"]
    assert fired == ["freeze_layer", "stack_layers", "freeze_layer"]

    call("tools/export.py", out, "--to", "hf", tmp_path / "out")
    ours, tokenizer, _ = open_run_folder(str(out), "latest")
    theirs, their_tokenizer = (
        kind.from_pretrained(tmp_path / "out", local_files_only=True) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "in", local_files_only=True).state_dict()
    after, new = theirs.state_dict(), ["model.layers.4."]  # of four blocks the fourth gets one behind it
    assert theirs.config.num_hidden_layers == 5 and theirs.config.model_type == {"llama3": "llama"}.get(family, family)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(after[name].abs().sum() > 0 for name in after if name.startswith(new[0]) and "o_proj" in name)
    assert their_tokenizer.encode(text[:500]) == list(tokenizer.encode(text[:500])) and their_tokenizer.chat_template
    x = torch.tensor([their_tokenizer.encode(text)[:64]])
    with torch.no_grad():
        logits = ours.eval().logits(x)
        assert (theirs.eval()(x).logits - logits).abs().max() <= 1e-5 and logits.std() > 0.1
    said = pipeline("text-generation", str(tmp_path / "out"), max_new_tokens=8, do_sample=False)("The run")
    assert said[0]["generated_text"].startswith("The run")

    loss = theirs.train()(x, labels=x).loss
    loss.backward()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    assert theirs(x, labels=x).loss < loss
    theirs.save_pretrained(tmp_path / "continued")
    with torch.no_grad():
        again = load(str(tmp_path / "continued")).eval().logits(x)
        assert (theirs.eval()(x).logits - again).abs().max() <= 1e-5 and not torch.allclose(again, logits)
