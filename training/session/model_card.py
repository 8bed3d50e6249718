"""README.md of an exported model: what was trained, on what, under which schedule, how far, and what is not known.

All of it comes from the checkpoint and the run's events. What a user wrote stands in it as text, never as markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import parameter_count
from orchestrate.training.store.run_folder import RunRecord
from orchestrate.training.store.state import State

_LONGEST_CELL = 120


def card(
    config: ModelConfig,
    about: Mapping[str, str],
    notes: Iterable[str],
    state: State | None,
    record: RunRecord | None,
    library_name: str = "transformers",
    **head: str,
) -> str:
    """The text. Without state and record it is a model that was converted and not trained here.

    Args:
        about: of the form, for the first table.
        notes: what export did to the form.
        head: more lines of the head that Hugging Face reads.
    """
    head = {"license": "unknown", "library_name": library_name, "pipeline_tag": "text-generation", **head}
    lines = ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000).rstrip(), "---"]
    parameters = parameter_count(replace(config, lora={}))
    about = {
        **about,
        "parameters": f"{parameters:,}",
        "layers, heads, width": f"{config.n_layer}, {config.n_head}, {config.n_embd}",
        "vocabulary, context": f"{config.vocab_size}, {config.block_size} tokens",
        "license": "unknown: it depends on the data and on the weights that training began with",
    }
    lines += ["", "# A language model", "", *_table(["what", "is"], about.items()), ""]
    if notes := list(notes):
        lines += ["What export did to the form of the model, and not to its function:", ""]
        lines += [*(f"- {_text(note)}" for note in notes), ""]
    if state is not None and record is not None:
        lines += _training(state, record)
    return "\n".join(lines).rstrip() + "\n"


def fired(state: State, record: RunRecord) -> list[dict[str, Any]]:
    """The operations that made the run what it is at a checkpoint, in their order."""
    return [
        event
        for event in record.valid.events
        if event["kind"] == "operation"
        and event["iter"] <= state.progress.iter
        # Before an entry of the same iteration there may be a checkpoint.
        and (event["entry"] is None or event["iter"] < state.progress.iter or _is_done(event, state))
    ]


def _is_done(event: dict[str, Any], state: State) -> bool:
    return event.get("step", event["entry"]) <= state.fired.get(event.get("track", ""), 0)


def _training(state: State, record: RunRecord) -> list[str]:
    c, p = state.config, state.progress
    begun = str(record.began_with.get("init_from", "unknown"))
    facts = {
        "began with": "random weights" if begun == "scratch" else Path(begun).name,
        "data set": _data_name(c.dataset),
        "its tokens are of": state.tokenizer.tokenizer,
        "steps": f"{p.iter:,}",
        "tokens": f"{p.tokens:,}",
        "optimizer": f"{state.settings.optimizer}, learning rate {state.settings.learning_rate:g} at the end",
        "validation loss": _loss(state.val_loss, None),
        "best validation loss": _loss(p.best_val_loss, p.best_iter),
        "hours": f"{p.seconds / 3600:.2f}",
    }
    lines = ["## Training", "", *_table(["what", "is"], facts.items()), ""]
    for split, print_ in state.data.items():
        lines.append(f"- fingerprint of the {split} data: `{print_}`")
    lines += ["", "## Schedule", ""]
    operations = fired(state, record)
    if not operations:
        return [*lines, "No operation changed the run."]
    lines += ["Operations that changed the run while it trained, in their order:", ""]
    names = ["iteration", "operation", "value", "why", "in words", "val loss before", "after", "parameters"]
    rows = (
        [
            event["iter"],
            event["name"],
            json.dumps(event["value"]) if event["value"] is not None else "",
            event["reason"],
            event["desc"],
            *(_loss(event[key], None, "") for key in ("val_loss_before", "val_loss_after")),
            f"{event['parameters_total']:,}",
        ]
        for event in operations
    )
    return [*lines, *_table(names, rows)]


def _data_name(dataset: Any) -> str:
    """Names without the folders that they lie in."""
    if isinstance(dataset, Mapping):
        return ", ".join(f"{Path(name).name} ({share:g})" for name, share in dataset.items())
    return Path(dataset).name


def _loss(value: float | None, at: int | None, unknown: str = "not measured here") -> str:
    if value is None:
        return unknown
    return f"{value:.4f}" + ("" if at is None else f" at step {at:,}")


def _table(names: list[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    lines = [names, ["---"] * len(names), *([_text(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _text(value: Any) -> str:
    """On one line, not too long, and without meaning to Markdown or HTML."""
    text = " ".join(str(value).split())
    if len(text) > _LONGEST_CELL:
        text = text[: _LONGEST_CELL - 3] + "..."
    for sign in "\\|<>[]*`":
        text = text.replace(sign, f"&#{ord(sign)};")
    return text
