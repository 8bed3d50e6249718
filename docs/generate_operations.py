"""Writes docs/operations.md from the operations' own classes: python docs/generate_operations.py

A test compares the page with what this makes, so a new operation is documented or the tests are red.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from operation_examples import BEFORE, EXAMPLES, written  # noqa: E402

from orchestrate.training.operations import OPERATIONS, Operation  # noqa: E402
from orchestrate.training.schedule.file import EntryFields, Guard  # noqa: E402
from orchestrate.training.schedule.triggers import TRIGGERS  # noqa: E402
from orchestrate.training.settings.metrics import ANALYSED, LOGGED, VAL_BPB, VAL_LOSS  # noqa: E402

HEAD = """# Operations

Written by docs/generate_operations.py from the classes in training/operations/; do not edit by hand.

An entry's `value` is the operation's argument. `over: N` moves a number there in N iterations
(`style: linear | cosine | constant | power`) where it says *over: moves*, and fades new weights in where it says
*over: fades*. `power` has an `exponent` (share of N to that power); `constant` holds the old value for N iterations.
"""
FIELDS = """Beside these an entry has any number of [triggers](#triggers); each fires it, and one without fires at once.
`schedules/schema.json` describes all of this for editors: with `# yaml-language-server: $schema=FILE` in a comment of
a schedule, those that speak to the YAML language server complete and check it.
"""
LANGUAGE = """## Repetitions, labels and tracks

```yaml
tracks:                            # queues beside each other, each strictly in order by itself
  rate:
    - name: change_lr              # one entry: half of the rate on every plateau, six times at most
      value: 0.5
      trigger_plateau: {evals: 3, min_delta: 0.01}
      repeat: {times: 6, until: {metric: val_loss, below: 1.5}}
  model:
    - repeat: 2                    # a block of entries: all of them, then all of them once more
      do:
        - {name: widen_mlp, value: {times: 2}, max_wait_iters: 500, label: wider}
        - {name: rewarm_lr, value: 50, after: wider, max_wait_iters: 20}
    - name: stop
      all_of: [{at_iter: 5000}, {trigger_loss: 1.5}]
```
"""
RULES = """
- `repeat: N` or `repeat: {times: N, until: {metric: NAME, below | above: X}}` (or `plateau`, as in `trigger`): so
  often, or no more once the metric is there. `until` is looked at while the next round has not begun, so one is
  made anyway.
- A block has `repeat`, `do` and perhaps a `label`. Inside it nothing is repeated once more.
- Waits begin anew in each round, and a plateau counts its values anew. Events say `round` and `rounds`.
- `label`: a name for an entry or a block; `name` is the operation. `after: LABEL` lets the waits of an entry count from
  when the entry of that label fired; until then it does not fire. A repetition's label is for its end: an entry or a
  block has fired when its last round is over. In later rounds of a repetition, waits count from the step before, unless
  the label is of the same block. What comes after an entry that is skipped or taken back by its guard never fires, and
  the end of the run says so.
- `all_of`: triggers that must hold together; it is one trigger, and any other beside it still fires the entry.
- `tracks`: names and lists. A plain list, or the list under `operations`, is the track without a name. At a boundary
  the first entry in the file that is due fires, then all heads are looked at again: what is due of the first track
  comes before what is due of the second.
- While a ramp (`over`) of one track moves a number, an entry of another track that changes it waits until the ramp has
  arrived; an entry of the same track takes it over. What each operation changes is listed above as *changes*.
- `reevaluate` ends the boundary for its own track, a `stop` and a guard with `then: stop` for all of them.
- A guard that goes back restores every track as it was then; what has fired since fires again when it is due.
- `--plan` shows the stages of several tracks in the order of their latest times, and checks that order. Where another
  comes, an entry that cannot be carried out then follows its `on_error`.
- A resume with another `--schedule` may change all that has not fired, add tracks, and change the number of rounds.
  A key that a resume changes ends the ramp on its number.
"""
METRICS = """## Metrics

`trigger`, `guard` and `early_stopping_metric` name a number of metrics.jsonl, with a dot where it is inside a mapping.

- with every evaluation at eval_interval: {}
- with the evaluations at which the model is analysed (`analyze_interval`, docs/analysis.md): {}
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
    body = definitions[schema["$ref"].rsplit("/", 1)[-1]] if "$ref" in schema else schema
    if "properties" in body:
        fields = []
        for name, field in body["properties"].items():
            optional = "" if name in body.get("required", []) else f" = {default(field.get('default'))}"
            fields.append(f"{name}: {kind(field, definitions)}{optional}")
        return "{" + ", ".join(fields) + "}"
    if body is not schema:
        return kind(body, definitions)
    if schema.get("format") == "metric":
        return "metric"
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
        case "object":
            return "mapping"
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
    return "\n".join([*lines, "", "```yaml", *example(cls.name), "```"])


def example(name: str) -> list[str]:
    """The entry that the tests have of an operation, behind those that it needs there."""
    entries = [written(*one) for one in (*BEFORE.get(name, []), (name, EXAMPLES[name]))]
    dumped = [yaml.safe_dump(one, default_flow_style=True, sort_keys=False, width=10**6) for one in entries]
    return [f"- {text.strip()}" for text in dumped]


def index() -> str:
    """Every operation by its room, and the sections behind them, as links."""
    lines = []
    for room, title in ROOMS.items():
        links = ", ".join(f"[`{name}`](#{name})" for name, cls in OPERATIONS.items() if of(cls, room))
        lines.append(f"- [{title}](#{anchor(title)}): {links}")
    more = ["Fields of an entry", "Triggers", "Guard", "Repetitions, labels and tracks", "Metrics"]
    return "\n".join([*lines, "- " + ", ".join(f"[{title}](#{anchor(title)})" for title in more)]) + "\n"


def anchor(title: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def of(cls: type[Operation], room: str) -> bool:
    return cls.__module__.endswith(f".{room}")


def entry_fields() -> str:
    """Every field of an entry but its triggers."""
    schema, lines = EntryFields.model_json_schema(), []
    for name, body in schema["properties"].items():
        needed = "" if body.get("default") in (None, "") or name == "repeat" else f" = {default(body['default'])}"
        needed = ", must be given" if name in schema["required"] else needed
        what = "see [Guard](#guard)" if name == "guard" else kind(body, schema["$defs"]).removesuffix(" or nothing")
        lines.append(f"- `{name}`: {what}{needed}. {' '.join(body['description'].split())}")
        if name == "name":
            lines.append("- `value`: the operation's argument, as it says above; left out where it takes none.")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole of docs/operations.md."""
    parts = [HEAD, index()]
    for room, title in ROOMS.items():
        parts.append(f"## {title}\n")
        parts += [section(cls) + "\n" for cls in OPERATIONS.values() if of(cls, room)]
    parts.append(f"## Fields of an entry\n\n{FIELDS}\n{entry_fields()}")
    parts.append("## Triggers\n")
    for name, trigger in TRIGGERS.items():
        schema = trigger.model_json_schema()
        doc = " ".join((trigger.__doc__ or "").split())
        parts.append(f"- `{name}`: {kind(schema['properties']['value'], schema.get('$defs', {}))}. {doc}")
    argument = kind({"$ref": "#/$defs/Guard"}, {"Guard": Guard.model_json_schema()})
    parts.append(f"\n## Guard\n\n`guard`: {argument}.\n{inspect.cleandoc(Guard.__doc__ or '')}\n")
    parts.append(LANGUAGE + re.sub(r"\n  +", " ", RULES))
    parts.append(
        re.sub(r"\n  +", " ", METRICS).format(
            *(", ".join(f"`{n}`" for n in names) for names in ((VAL_LOSS, VAL_BPB), ANALYSED, LOGGED))
        )
    )
    return "\n".join(wrapped(line) for line in "\n".join(parts).splitlines()) + "\n"


def wrapped(line: str) -> str:
    """A line of prose as lines that fit a screen; a list's go on under its first word."""
    under = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 118, subsequent_indent=under, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    (ROOT / "docs" / "operations.md").write_text(page(), "utf-8")
