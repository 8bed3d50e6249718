"""The JSON schema of a schedule's file, by which editors complete and check it; schedules/schema.json is made of it.

It is made of the operations, triggers and fields that are registered, and holds no names of its own. Draft 7, which
every editor reads. What the reader of a schedule takes is valid; what a schema cannot say (layers that are not there,
an order that cannot be) is the reader's and the plan's to refuse.
"""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel

from orchestrate.training.operations import OPERATIONS, Operation
from orchestrate.training.schedule.file import EntryFields
from orchestrate.training.schedule.triggers import TRIGGERS

Schema = dict[str, Any]
_DEFINED = "#/definitions/"


def json_schema() -> Schema:
    """The schema of a schedule with the operations and triggers that are registered now."""
    definitions: dict[str, Schema] = {}
    triggers = {name: _value(cls, definitions) for name, cls in TRIGGERS.items()}
    alone = {name: body for name, body in triggers.items() if name != "all_of"}
    triggers["all_of"]["items"] = {
        "type": "object", "properties": alone, "additionalProperties": False, "minProperties": 1, "maxProperties": 1
    }  # fmt: skip
    fields = _described(EntryFields.model_json_schema(ref_template=_DEFINED + "{model}"), definitions)["properties"]
    del fields["repeat"]["default"]  # an editor would write it out
    given = {name: _or_null(body) for name, body in {**fields, **triggers}.items() if name != "name"}
    names = {
        "enum": list(OPERATIONS),
        "enumDescriptions": [inspect.getdoc(cls) for cls in OPERATIONS.values()],
        "description": "The operation.",
    }
    entry = {
        "type": "object",
        "properties": {"name": names, "value": {"description": "The operation's argument."}, **given},
        "required": ["name"],
        "additionalProperties": False,
        "dependencies": {"style": ["over"], "exponent": ["style"]},
        "allOf": [
            {"if": {"properties": {"name": {"const": name}}, "required": ["name"]}, "then": _of(cls, definitions)}
            for name, cls in OPERATIONS.items()
        ],
    }
    block = {
        "type": "object",
        "description": "Entries that are repeated together.",
        "properties": {
            "repeat": fields["repeat"],
            "do": {"type": "array", "minItems": 1, "items": {"$ref": _DEFINED + "Entry"}},
            "label": fields["label"],
        },
        "required": ["repeat", "do"],
        "additionalProperties": False,
    }
    items = {"if": {"required": ["do"]}, "then": {"$ref": _DEFINED + "Block"}, "else": {"$ref": _DEFINED + "Entry"}}
    entries = {"type": ["array", "null"], "items": items, "description": "Entries in the order in which they fire."}
    tracks = {
        "type": "object", "minProperties": 1, "description": "Queues beside each other, each in order by itself.",
        "propertyNames": {"minLength": 1, "maxLength": 60}, "additionalProperties": {"$ref": _DEFINED + "Entries"},
    }  # fmt: skip
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A schedule: what changes a run while it trains",
        "if": {"type": "object"},
        "then": {
            "properties": {"operations": {"$ref": _DEFINED + "Entries"}, "tracks": tracks},
            "additionalProperties": False,
            "minProperties": 1,
        },
        "else": {"$ref": _DEFINED + "Entries"},
        "definitions": {"Entries": entries, "Entry": entry, "Block": block, **definitions},
    }


def _of(cls: type[Operation], definitions: dict[str, Schema]) -> Schema:
    """What an entry with this operation has: its value, where it takes or wants one, and `over` where it has that."""
    value, doc = _value(cls, definitions), inspect.getdoc(cls)
    properties: dict[str, Schema] = {"value": {**value, "description": doc} if value else {"type": "null"}}
    if not (cls.ramps or cls.fades):
        properties["over"] = {"type": "null"}
    return {
        "description": doc,
        "properties": properties,
        **({"required": ["value"]} if value and cls.model_fields["value"].is_required() else {}),
    }


def _value(cls: type[BaseModel], definitions: dict[str, Schema]) -> Schema:
    """The schema of an operation's or a trigger's `value`, with what it is; empty where it takes none."""
    schema = _described(cls.model_json_schema(ref_template=_DEFINED + "{model}"), definitions)
    value = schema.get("properties", {}).get("value", {})
    return {**value, "description": schema["description"]} if value else {}


def _described(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """A schema of pydantic's in draft 7, what it defines put among the definitions."""
    definitions |= {name: _draft_7(body) for name, body in schema.pop("$defs", {}).items()}
    return _draft_7(schema)


def _draft_7(schema: Any) -> Any:
    """Tuples as draft 7 has them, no titles, which only repeat the names, and no siblings of a reference."""
    if isinstance(schema, list):
        return [_draft_7(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _draft_7(part) for key, part in schema.items() if not (key == "title" and isinstance(part, str))}
    if "prefixItems" in kept:
        kept["items"], kept["additionalItems"] = kept.pop("prefixItems"), False
    if "$ref" in kept and len(kept) > 1:
        kept["allOf"] = [{"$ref": kept.pop("$ref")}]
    return kept


def _or_null(schema: Schema) -> Schema:
    """A person writes `trigger_loss: null` for no trigger."""
    doc = {key: schema[key] for key in ("description", "default") if key in schema}
    choices = schema.get("anyOf", [{key: part for key, part in schema.items() if key not in doc}])
    return {**doc, "anyOf": [*(part for part in choices if part != {"type": "null"}), {"type": "null"}]}
