"""The benchmarks still run: a few steps of each that no other test starts."""

from __future__ import annotations

import runpy
import sys

from conftest import ROOT, TINY


def run(monkeypatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "bench" / script), run_name="__main__")


def test_step(monkeypatch, capsys):
    keys = [f"--{key}={value}" for key, value in {**TINY, "dataset": "shakespeare_char"}.items()]
    run(monkeypatch, "step.py", "--rounds=1", "--steps=2", *keys)
    shown = capsys.readouterr().out
    assert "this project" in shown and "a consultation with 100 pending entries" in shown


def test_save(monkeypatch, capsys):
    run(monkeypatch, "save.py", "--rounds=1", "--megabytes=4")
    assert "ratio" in capsys.readouterr().out


def test_memory(monkeypatch, capsys):
    shape = ["--n_layer=4", "--n_embd=32", "--n_head=2", "--block_size=64", "--vocab_size=64", "--rank=2"]
    run(monkeypatch, "memory.py", "--dtype=float32", *shape)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    peaks = {row[0].strip(): float(row[5]) for row in rows}
    kept, again = peaks["all weights train"], peaks["... activation_checkpointing"]
    assert len(rows) >= 4 and again < 0.6 * kept


def test_generate(monkeypatch, capsys):
    run(monkeypatch, "generate.py", "--models=GPT-2 1 M,Llama 1 M", "--tokens=6", "--prompt=8", "--rounds=1")
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[3:]]
    assert len(rows) == 4 and [row[7].strip() for row in rows] == ["1 of 1", "8 of 8"] * 2


def test_resident_memory(monkeypatch, capsys):
    shape = ["--n_layer=2", "--n_embd=64", "--n_head=2", "--block_size=16", "--batch_size=1", "--vocab_size=64"]
    run(monkeypatch, "memory.py", "--resident", "--dtype=float32", "--rank=2", *shape)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    held = {row[0].strip(): float(row[3]) for row in rows}
    assert held["float32"] == 4 and 2 < held["bfloat16"] < 2.4
    assert rows[0][-1] == rows[1][-1], "the folder is bfloat16, so the loss is the same"


def test_data(monkeypatch, capsys):
    """What a read takes is waited for, and not where the next one is read while a step computes."""
    run(monkeypatch, "data.py", "--rounds=1", "--steps=2", "--milliseconds=60")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    waited = {(read, ahead): float(data) for read, ahead, data, _ in rows}
    assert waited["60 ms", "no"] > 60 and waited["60 ms", "yes"] < 0.5 * waited["60 ms", "no"]
