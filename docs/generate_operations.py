"""Writes docs/operations.md from the operations' own classes: python docs/generate_operations.py

A test compares the page with what this makes, so a new operation is documented or the tests are red.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from orchestrate.training.operations import OPERATIONS, Operation  # noqa: E402
from orchestrate.training.schedule.file import Guard  # noqa: E402
from orchestrate.training.schedule.triggers import TRIGGERS  # noqa: E402
from orchestrate.training.settings.metrics import EVALUATED, LOGGED  # noqa: E402

HEAD = """# Operations

Written by docs/generate_operations.py from the classes in training/operations/; do not edit by hand.

An entry's `value` is the operation's argument. `over: N` moves a number there in N iterations
(`style: linear | cosine | constant | power`) where it says *over: moves*, and fades new weights in where it says
*over: fades*. `power` has an `exponent` (share of N to that power); `constant` holds the old value for N iterations.
"""
METRICS = """## Metrics

`trigger`, `guard` and `early_stopping_metric` name a number of metrics.jsonl, with a dot where it is inside a mapping.

- with every evaluation at eval_interval: {}
- with every line of log_interval: {}
- with several data sets, of each: `val_loss/NAME` with evaluations, `passes/NAME` and `coverage/NAME` with the lines
- with the evaluations that score `eval_tasks`: the numbers of those tasks, such as `eval/adder_accuracy`, of which more
  is better: a plateau is one below the highest, and a guard gives `max_decrease`. Names that no task gives are refused.

Of clocks and machines (`tokens_per_second`, `seconds_by_part`, `machine`) rank 0's number counts.
"""
ROOMS = {
    "hyperparameters": "Learning rate, optimizer, dropout",
    "batch": "Batch",
    "data": "Data",
    "freezing": "Freezing",
    "lora": "LoRA adapters",
    "growth": "Growth",
    "memory": "Memory",
    "control": "The run's rhythm",
}


def kind(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        body = definitions[schema["$ref"].rsplit("/", 1)[-1]]
        fields = []
        for name, field in body["properties"].items():
            optional = "" if name in body.get("required", []) else f" = {default(field.get('default'))}"
            fields.append(f"{name}: {kind(field, definitions)}{optional}")
        return "{" + ", ".join(fields) + "}"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind(part, definitions) for part in schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    match schema.get("type"):
        case "null":
            return "nothing"
        case "string":
            return "text"
        case "boolean":
            return "true | false"
        case "array":
            items = schema.get("prefixItems")
            if items:
                return "[" + ", ".join(kind(item, definitions) for item in items) + "]"
            return f"list of {kind(schema['items'], definitions)}"
        case "integer" | "number" as name:
            limits = {
                "minimum": ">=",
                "exclusiveMinimum": ">",
                "maximum": "<=",
                "exclusiveMaximum": "<",
            }
            bounds = [f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema]
            return " ".join(["whole number" if name == "integer" else "number", *bounds])
    return "anything"


def default(value: Any) -> str:
    if isinstance(value, bool):  # 0.0 is no false, though they are equal
        return str(value).lower()
    return "nothing" if value is None else str(value)


def section(cls: type[Operation]) -> str:
    """One operation: what it does, its argument, what it keeps, where it comes from."""
    schema = cls.model_json_schema()
    value = schema["properties"].get("value") if "properties" in schema else None
    argument = "none" if value is None else kind(value, schema.get("$defs", {}))
    lines = [f"### `{cls.name}`", "", inspect.cleandoc(cls.__doc__ or ""), "", f"- value: {argument}"]
    if cls.ramps or cls.fades:
        lines.append("- over: moves the number" if cls.ramps else "- over: fades new weights in")
    lines.append(f"- changes: {', '.join(f'`{name}`' for name in cls.touches)}")
    lines.append(f"- keeps: {cls.keeps}")
    if cls.source:
        lines.append(f"- source: {cls.source}")
    return "\n".join(lines)


def page() -> str:
    """The whole of docs/operations.md."""
    parts = [HEAD]
    for room, title in ROOMS.items():
        parts.append(f"## {title}\n")
        parts += [section(cls) + "\n" for cls in OPERATIONS.values() if cls.__module__.endswith(f".{room}")]
    parts.append("## Triggers\n")
    for name, trigger in TRIGGERS.items():
        schema = trigger.model_json_schema()
        doc = " ".join((trigger.__doc__ or "").split())
        parts.append(f"- `{name}`: {kind(schema['properties']['value'], schema.get('$defs', {}))}. {doc}")
    argument = kind({"$ref": "#/$defs/Guard"}, {"Guard": Guard.model_json_schema()})
    parts.append(f"\n## Guard\n\n`guard`: {argument}.\n{inspect.cleandoc(Guard.__doc__ or '')}\n")
    parts.append(METRICS.format(*(", ".join(f"`{n}`" for n in names) for names in (EVALUATED, LOGGED))))
    return "\n".join(wrapped(line) for line in "\n".join(parts).splitlines()) + "\n"


def wrapped(line: str) -> str:
    """A line of prose as lines that fit a screen; a list's go on under its first word."""
    under = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 118, subsequent_indent=under, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    (ROOT / "docs" / "operations.md").write_text(page(), "utf-8")
