"""Writes docs/run_folder.md: every file and field of a run folder, from where the lines are declared.

    python docs/generate_run_folder.py

Kinds and fields, with their types and docstrings, are read from training/store/run_folder.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "training" / "store" / "run_folder.py"

HEAD = """# The run folder

What a run leaves in `out_dir`. Written by `docs/generate_run_folder.py` from the declarations in
training/store/run_folder.py, whose `read_run` is the reader in Python.

| file | what it is |
|---|---|
| `config.json` | the resolved configuration of the latest start |
| `schedule.yaml` | the schedule as it was given at the latest start |
| `metrics.jsonl` | what was measured: one JSON object a line |
| `events.jsonl` | what happened: one JSON object a line |
| `report.html` | how it went, for a browser ([docs/reports.md](reports.md)) |
| `trackers.json` | which runs of W&B, TensorBoard and trackio its lines are in |
| `plan.txt` | with a tracker: what `--plan` says at the latest start |
| `tensorboard/`, `wandb/` | what these write |
| `tokenizer/` | the tokenizers that the run has used, by fingerprint |
| `checkpoints/` | one folder a checkpoint; `latest` and `best` are links to two of them |
| `NAME.log` | the console's lines, with `file_logging` (NAME is the folder's; `log_dir` puts it elsewhere) |

A checkpoint folder holds `manifest.json` (written last: sizes and SHA-256 of the others), `state.json` (settings,
progress, schedule and configuration), `model.safetensors` and `optimizer.safetensors`; of sharded runs a piece of each
for every rank. Files beside these, such as `.lock`, are the run's own.

A line is whole or absent after a crash. Numbers are finite or `null`. A field that is not always there is marked with
a question mark. Further numbers may stand in a line of metrics under names of their own: of each of several data sets
(`val_loss/NAME`, `passes/NAME`, `coverage/NAME`) and of task scores (`eval/NAME`).

## What `void` means

A run can go back: a guard takes its entry back, or a sick step leads back to a checkpoint. Everything that was measured
and decided since is then marked `"void": true`, because it is not in the weights any more. Without these lines each
iteration stands once. On resume, metrics after the checkpoint are cut, and decisions, operations, samples and
rollbacks after it are marked `void`; what befell the process (a signal, an error, a checkpoint) stays true.

`iter` and `tokens` go back with the run, `seconds` never does.

## In pandas

```python
import json
from pathlib import Path
import pandas as pd

run = Path("out-demo")
metrics = pd.json_normalize([json.loads(line) for line in open(run / "metrics.jsonl", encoding="utf-8")])
events = pd.DataFrame([json.loads(line) for line in open(run / "events.jsonl", encoding="utf-8")])
metrics, events = (table[table.get("void", pd.Series(index=table.index)).isna()] for table in (metrics, events))
losses = metrics[metrics.kind == "eval"].set_index("iter").val_loss
operations = events[events.kind == "operation"].reindex(columns=["iter", "name", "value", "reason", "seconds"])
print(losses, operations, sep="\\n")
```
"""


def declared() -> dict[str, tuple[list[str], str, list[tuple[str, str, str]]]]:
    """Class -> bases, docstring, fields (name, type, meaning) of every TypedDict."""
    found = {}
    for node in ast.parse(SOURCE.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.bases:
            fields = []
            for item, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(item, ast.AnnAssign):
                    said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
                    fields.append((item.target.id, ast.unparse(item.annotation), said or ""))
            found[node.name] = [ast.unparse(base) for base in node.bases], ast.get_docstring(node) or "", fields
    return found


_TYPES = {"_Count": "int", "_Real": "float", "_Number": "float | null", "None": "null", "dict[str, Any]": "mapping",
          "Any": "anything"}  # fmt: skip


def type_of(annotation: str) -> tuple[str, bool]:
    """A type in JSON's words, and whether the field may be absent."""
    optional = annotation.startswith("NotRequired[")
    text = annotation.removeprefix("NotRequired[").removesuffix("]") if optional else annotation
    for name, word in _TYPES.items():
        text = text.replace(name, word)
    return text.lstrip("_").lower(), optional


def rows(fields: list[tuple[str, str, str]]) -> list[str]:
    """A table of fields."""
    lines = []
    for name, annotation, said in fields:
        word, optional = type_of(annotation)
        word, shown = word.replace("|", "\\|"), " ".join(said.split())
        if name != "kind":
            lines.append(f"| `{name}`{' ?' if optional else ''} | {word} | {shown} |")
    return ["| field | type | meaning |", "|---|---|---|", *lines]


def page() -> str:
    classes = declared()

    def fields_of(name: str) -> list[tuple[str, str, str]]:
        bases, _, fields = classes[name]
        inherited = [f for base in bases if base in classes and base not in COMMON for f in fields_of(base)]
        return [*fields, *inherited]

    parts = [HEAD]
    for file, base in (("metrics.jsonl", "_Metrics"), ("events.jsonl", "_Event")):
        parts += [f"## {file}", classes[base][1], "\n".join(rows(classes[base][2]))]
        for name, (_, meaning, _) in classes.items():
            if not name.startswith("_") and base in ancestors(name, classes):
                parts += [f'### "kind": "{name.lower()}"', meaning]
                if len(table := rows(fields_of(name))) > 2:
                    parts.append("\n".join(table))
    parts.append("## Parts of these")
    for name in ("Text", "_Cast", "_Code"):
        parts += [f"### {name.strip('_').lower()}", classes[name][1], "\n".join(rows(classes[name][2]))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


COMMON = ("_Metrics", "_Event")
"""Told once for each file."""


def ancestors(name: str, classes: dict) -> set[str]:
    return {name}.union(*(ancestors(base, classes) for base in classes[name][0] if base in classes))


if __name__ == "__main__":
    (ROOT / "docs" / "run_folder.md").write_text(page(), "utf-8")
