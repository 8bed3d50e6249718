"""Writes a schedule that grows a model block by block: python schedules/generate_growth.py --target-layers 12

For each block: add it, train it while all that was there is frozen, then adapters on the attention of the older blocks
(of rank n_embd / 4, later / 16), which are merged before the next block comes. A run starts with one block:

    python schedules/generate_growth.py --target-layers 6 --n-embd 128 --output growth.yaml
    python train_orchestrated.py config/shakespeare_char_cpu.py --schedule growth.yaml --n_layer=1 --n_embd=128 \\
        --target_architecture=n_layer=6

Sources: LLaMA Pro (Wu et al. 2024, arXiv:2401.02415) for blocks that add nothing at first and train alone, LoRA (Hu et
al. 2021, arXiv:2106.09685). No existing file is overwritten.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def entries(layers: int, per_layer: int, freeze: int, width: int, extra: int, how: str) -> list[dict[str, Any]]:
    """The entries of the schedule, for a model of one block at the start.

    Args:
        per_layer: iterations from one block to the next; of the first `freeze` the new block trains alone.
        width: n_embd.
        extra: iterations after the last block's, until a checkpoint.
    """
    found: list[dict[str, Any]] = []

    def add(name: str, value: Any = None, wait: int = 0, **more: Any) -> None:
        entry = {"name": name, "value": value, "max_wait_iters": wait, **more}
        found.append({key: entry[key] for key in entry if not (key == "value" and value is None)})

    half = (per_layer - freeze) // 2
    for depth in range(2, layers + 1):
        wait = per_layer if depth == 2 else 0  # after that the merge has waited
        old = [*(f"block.{n}" for n in range(depth - 1)), "wte"]
        if freeze:
            add("freeze_layer", old, wait, desc="the new block trains alone")
        # The entry that is measured ends its round, so it comes last of those at one iteration.
        grown = {"n_layer": depth, "how": how}
        add("stack_layers", grown, 0 if freeze else wait, reevaluate=True, desc=f"block {depth} of {layers}")
        if freeze:
            add("unfreeze_layer", old, freeze)
        attention = [f"attn.{n}" for n in range(depth - 1)]
        ranks = dict.fromkeys((max(1, width // 4), max(1, width // 16)))
        for i, rank in enumerate(ranks):
            add("set_layer_lora_rank", [attention, rank], half if i or not freeze else 0)
        spent = freeze + half * (len(ranks) - (1 if freeze else 0))
        add("merge_lora_weights", None, per_layer - spent)
    add("save_checkpoint", None, extra)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-layers", type=int, required=True, help="blocks at the end, 2 or more")
    parser.add_argument("--iters-per-layer", type=int, default=1000, help="iterations from one block to the next")
    parser.add_argument("--freeze-iters", type=int, default=200, help="of them those in which the new block is alone")
    parser.add_argument("--n-embd", type=int, default=768, help="width of the model: ranks follow from it")
    parser.add_argument("--extra-iters", type=int, default=0, help="iterations before the last checkpoint")
    parser.add_argument("--how", choices=("identity_copy", "identity", "copy", "random"), default="identity_copy",
                        help="how a new block starts; copy is a jump of the loss")  # fmt: skip
    parser.add_argument("--output", type=Path, help="a new file; without it the schedule is printed")
    o = parser.parse_args(arguments)
    if o.target_layers < 2 or o.n_embd < 1 or o.extra_iters < 0 or not 0 <= o.freeze_iters < o.iters_per_layer:
        parser.error("wanted: target-layers >= 2, n-embd >= 1, extra-iters >= 0, 0 <= freeze-iters < iters-per-layer")
    made = entries(o.target_layers, o.iters_per_layer, o.freeze_iters, o.n_embd, o.extra_iters, o.how)
    options = f"--target-layers {o.target_layers} --iters-per-layer {o.iters_per_layer} "
    options += f"--freeze-iters {o.freeze_iters} --n-embd {o.n_embd} --extra-iters {o.extra_iters} --how {o.how}"
    head = f"# From 1 to {o.target_layers} blocks, one by one; start with n_layer 1. Written by generate_growth.py:\n"
    text = f"{head}#   {options}\n\n" + "".join(f"- {json.dumps(entry)}\n" for entry in made)
    if o.output is None:
        sys.stdout.write(text)
        return 0
    try:
        with open(o.output, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        parser.error(f"{o.output}: {error.strerror}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
