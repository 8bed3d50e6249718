"""The JSON schemas: of a schedule's file, as validators and editors use it, and of what `--plan=json` writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import jsonschema
import pytest
from conftest import ROOT, SHIPPED, arguments
from operation_examples import EXAMPLES, written

import train_orchestrated
from orchestrate.training.operations import OPERATIONS
from orchestrate.training.schedule.file import EntryFields, _parse_json, _parse_yaml, parse_schedule
from orchestrate.training.settings.errors import Refused

sys.path.insert(0, str(ROOT / "docs"))
import generate_schemas  # noqa: E402

SCHEMA = json.loads((ROOT / "schedules/schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


@pytest.mark.parametrize("path", generate_schemas.FILES)
def test_the_committed_files_are_what_the_types_say(path):
    assert (ROOT / path).read_text("utf-8") == generate_schemas.text(path), f"run python {generate_schemas.__file__}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_schedules_are_valid_and_name_the_schema(path):
    text = path.read_text("utf-8")
    document, _ = (_parse_json if path.suffix == ".json" else _parse_yaml)(text)
    VALIDATOR.validate(document)
    assert path.suffix == ".json" or "\n# yaml-language-server: $schema=schema.json\n" in text


@pytest.mark.parametrize(("name", "value"), EXAMPLES.items(), ids=list(EXAMPLES))
def test_examples_of_operations_are_valid_and_nonsense_is_not(name, value):
    VALIDATOR.validate([written(name, value)])
    assert not VALIDATOR.is_valid([{"name": name, "value": {"no": ["such", "thing"]}}])


LR = {"name": "set_lr", "value": 1e-3}
RIGHT = [
    None,
    [],
    {"operations": None},
    {"tracks": {"rate": [LR], "model": None}, "operations": [{"name": "stop", "value": None}]},
    [{"repeat": {"times": 3, "until": {"metric": "loss", "below": 1}}, "do": [LR, {"name": "stop"}], "label": "all"}],
    [{**LR, "repeat": 2, "over": 5, "style": "power", "exponent": 2.5, "desc": None, "trigger_loss": None}],
    [{**LR, "trigger": {"metric": "val_loss/a", "plateau": {}}, "guard": {"metric": "grad_norm", "max_increase": 1}}],
    [{**LR, "all_of": [{"at_iter": 3}, {"trigger": {"metric": "eval/adder_accuracy", "above": 0.5}}]}],
    [
        {
            "name": "widen_mlp",
            "value": 128,
            "over": 5,
            "on_error": "skip",
            "reevaluate": True,
            "label": "a",
            "after": "b",
        }
    ],
]
WRONG = [
    {},
    "set_lr",
    {"operation": [LR]},
    {"operations": [LR], "track": {}},
    {"tracks": {}},
    {"tracks": {"": [LR]}},
    [{"name": "set_rl", "value": 1e-3}],
    [{"value": 1e-3}],
    [{"name": "set_lr"}],
    [{"name": "set_lr", "value": "1e-3"}],
    [{"name": "set_lr", "value": -1}],
    [{"name": "stop", "value": 3}],
    [{"name": "stop", "over": 3}],
    [{"name": "set_batch_size", "value": 2.5}],
    [{"name": "set_betas", "value": [0.9]}],
    [{"name": "set_betas", "value": [0.9, 0.95, 0.99]}],
    [{"name": "stack_layers", "value": {"n_layer": 4, "how": "sideways"}}],
    [{"name": "stack_layers", "value": {"layers": 4}}],
    [{**LR, "triger_loss": 3}],
    [{**LR, "trigger_loss": "3"}],
    [{**LR, "max_wait_iters": -1}],
    [{**LR, "reevaluate": "yes"}],
    [{**LR, "on_error": "ignore"}],
    [{**LR, "over": 0}],
    [{**LR, "style": "cosine"}],
    [{**LR, "over": 5, "style": "wavy"}],
    [{**LR, "over": 5, "exponent": 2}],
    [{**LR, "guard": {"max_rise": 0.1}}],
    [{**LR, "guard": {"metric": "val_los"}}],
    [{**LR, "trigger": {"metric": "grad_nrom", "below": 1}}],
    [{**LR, "trigger": {"below": 1}}],
    [{**LR, "trigger_plateau": {"evals": 0}}],
    [{**LR, "all_of": []}],
    [{**LR, "all_of": [{"at_iter": 3, "trigger_loss": 2}]}],
    [{**LR, "all_of": [{"all_of": [{"at_iter": 3}]}]}],
    [{**LR, "repeat": 0}],
    [{**LR, "repeat": {"until": {"metric": "loss", "below": 1}}}],
    [{"do": [LR]}],
    [{"repeat": 2, "do": []}],
    [{"repeat": 2, "do": [{"repeat": 2, "do": [LR]}]}],
    [{"repeat": 2, "do": [LR], "trigger_loss": 2}],
    [{**LR, "label": ""}],
]


@pytest.mark.parametrize("document", RIGHT, ids=repr)
def test_what_the_reader_takes_is_valid(document):
    VALIDATOR.validate(document)
    if any("after" in entry for entry in document or [] if isinstance(entry, dict)):
        document = [{"name": "save_checkpoint", "label": "b"}, *document]
    parse_schedule(json.dumps(document), "s.json")


@pytest.mark.parametrize("document", WRONG, ids=repr)
def test_what_the_reader_refuses_is_not_valid(document):
    assert not VALIDATOR.is_valid(document)
    with pytest.raises(Refused):
        parse_schedule(json.dumps(document), "s.json")


def test_the_page_of_operations_has_an_example_of_each_and_an_index_that_leads_there():
    page = (ROOT / "docs/operations.md").read_text("utf-8")
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", page, flags=re.M | re.S))
    assert set(sections) == set(OPERATIONS)
    for name, body in sections.items():
        (block,) = re.findall(r"```yaml\n(.*?)```", body, flags=re.S)
        entries = parse_schedule(block, f"{name}.yaml").entries
        assert (entries[-1].operation.name, entries[-1].value) == (name, EXAMPLES[name])
        VALIDATOR.validate(_parse_yaml(block)[0])
    headings = re.findall(r"^##+ (.*)$", page, flags=re.M)
    anchors = {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) == anchors
    fields = page.partition("## Fields of an entry")[2].partition("## Triggers")[0]
    assert re.findall(r"^- `(\w+)`", fields, flags=re.M) == ["name", "value", *list(EntryFields.model_fields)[1:]]


# ---------------------------------------------------------------------------------------------- an editor


def schemas_at(schema, instance, path):
    """The schemas that describe a place of a document, as a language server gathers them: references followed,
    of `if` the branch that the document takes, of choices all."""
    if "$ref" in schema:
        yield from schemas_at(SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]], instance, path)
        return
    for part in [*schema.get("allOf", []), *schema.get("anyOf", []), *schema.get("oneOf", [])]:
        yield from schemas_at(part, instance, path)
    if "if" in schema:
        holds = VALIDATOR.evolve(schema=schema["if"]).is_valid(instance)
        yield from schemas_at(schema.get("then" if holds else "else", {}), instance, path)
    if not path:
        yield schema
        return
    step, *rest = path
    inside = schema.get("items") if isinstance(step, int) else schema.get("properties", {}).get(step)
    inside = inside or (schema.get("additionalProperties") if isinstance(step, str) else None)
    if isinstance(inside, dict):
        yield from schemas_at(inside, instance[step] if step in instance or isinstance(step, int) else None, rest)


def completed(document, *path):
    """What an editor offers at a place: keys, or values, each with what it says of them."""
    keys, values = {}, {}
    for schema in schemas_at(SCHEMA, document, path):
        for key, body in schema.get("properties", {}).items():
            keys.setdefault(key, body.get("description", ""))
        values |= dict(zip(schema.get("enum", []), schema.get("enumDescriptions", [""] * 99), strict=False))
    return keys, values


def test_an_editor_completes_names_fields_and_values():
    document = {"tracks": {"model": [{"name": "stack_layers", "value": {}, "guard": {"then": ""}, "trigger": {}}]}}
    entry = ("tracks", "model", 0)
    _, names = completed(document, *entry, "name")
    assert set(names) == set(OPERATIONS) and names["set_lr"].startswith("Set the peak learning rate;")
    fields, _ = completed(document, *entry)
    assert {"name", "value", "over", "guard", "repeat", "trigger_loss", "all_of", "after"} <= set(fields)
    assert fields["max_wait_iters"].startswith("So many iterations have passed") and all(fields.values())
    inside, _ = completed(document, *entry, "value")
    assert {"n_layer", "how", "where"} <= set(inside), "the value's form is that of the operation at the cursor"
    _, hows = completed(document, *entry, "value", "how")
    assert "depth_up_scaling" in hows
    _, thens = completed(document, *entry, "guard", "then")
    assert set(thens) == {"revert", "keep", "stop"}
    _, metrics = completed(document, *entry, "trigger", "metric")
    assert {"val_loss", "grad_norm"} <= set(metrics)
    top, _ = completed({}, *())
    assert set(top) == {"operations", "tracks"}


class Server:
    """A language server over its standard input and output."""

    def __init__(self, folder):
        command = [shutil.which("yaml-language-server"), "--stdio"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.number, self.heard = 0, []
        capabilities = {"textDocument": {"completion": {"completionItem": {"documentationFormat": ["markdown"]}}}}
        self.ask("initialize", {"processId": None, "rootUri": folder.as_uri(), "capabilities": capabilities})
        self.tell("initialized", {})

    def send(self, **message):
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.process.stdin.flush()

    def tell(self, method, params):
        self.send(method=method, params=params)

    def read(self):
        length = 0
        while line := self.process.stdout.readline().strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        message = json.loads(self.process.stdout.read(length))
        if "id" in message and "method" in message:  # it asks for our settings
            items = message["params"].get("items", []) if isinstance(message.get("params"), dict) else []
            self.send(id=message["id"], result=[{} for _ in items])
        return message

    def ask(self, method, params):
        self.number += 1
        self.send(id=self.number, method=method, params=params)
        while (message := self.read()).get("id") != self.number or "method" in message:
            self.heard.append(message)
        return message["result"]

    def said_of(self, uri, text):
        """Open a document; what is wrong with it."""
        document = {"uri": uri, "languageId": "yaml", "version": 1, "text": text}
        self.tell("textDocument/didOpen", {"textDocument": document})
        while True:
            message = self.read()
            if message.get("method") == "textDocument/publishDiagnostics" and message["params"]["uri"] == uri:
                return [one["message"] for one in message["params"]["diagnostics"]]

    def completes(self, uri, line, character):
        place = {"textDocument": {"uri": uri}, "position": {"line": line, "character": character}}
        found = self.ask("textDocument/completion", place)
        return {item["label"]: item.get("documentation", "") for item in found["items"]}


@pytest.mark.skipif(not shutil.which("yaml-language-server"), reason="needs `npm install -g yaml-language-server`")
def test_the_language_server_of_editors_completes_and_checks(tmp_path):
    shutil.copy(ROOT / "schedules/schema.json", tmp_path)
    head = "# yaml-language-server: $schema=schema.json\n"
    server = Server(tmp_path)
    try:
        right = (tmp_path / "right.yaml").as_uri()
        text = head + "- name: stack_layers\n  value:\n    \n  trigger_loss: 2.5\n  \n- name: \n"
        server.said_of(right, text)
        assert {"n_layer", "how"} <= set(server.completes(right, 3, 4))
        fields = server.completes(right, 5, 2)
        assert {"guard", "over", "after"} <= set(fields) and "trigger_loss" not in fields
        names = server.completes(right, 6, 8)
        assert {"set_lr", "stop"} <= set(names) and "Set the peak learning rate" in str(names["set_lr"])
        wrong = (tmp_path / "wrong.yaml").as_uri()
        problems = server.said_of(
            wrong, head + "- {name: set_rl, value: 1}\n- {name: set_lr, value: 1, triger_loss: 2}\n"
        )
        assert any("set_lr" in problem for problem in problems) and any("triger_loss" in one for one in problems)
    finally:
        server.process.kill()
        server.process.wait()


# ---------------------------------------------------------------------------------------------- --plan=json


def test_a_plan_is_what_its_schema_says(data, tmp_path, capsys):
    schema = json.loads((ROOT / "docs/plan.schema.json").read_text("utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    schedule = [
        {"name": "set_attn_lora_rank", "value": 2, "guard": {"max_increase": 0.5}, "label": "first"},
        {"name": "change_lr", "value": 0.5, "over": 5, "style": "power", "exponent": 2, "repeat": 2, "after": "first"},
        {"name": "widen_mlp", "value": 128, "over": 5, "reevaluate": True, "on_error": "skip", "at_iter": 9},
    ]
    (tmp_path / "s.json").write_text(json.dumps(schedule))
    given = arguments(data, tmp_path / "run", schedule=tmp_path / "s.json")
    capsys.readouterr()
    assert train_orchestrated.main([*given, "--plan=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    validator.validate(found)
    assert len(found["stages"]) == 5
    first, again, last = found["stages"][1], found["stages"][3], found["stages"][4]
    assert first["guard"]["max_increase"] == 0.5 and first["guard"]["then"] == "revert" and first["label"] == "first"
    assert (again["over"], again["style"], again["exponent"], again["after"]) == (5, "power", 2.0, "")
    assert (last["reevaluate"], last["on_error"], last["over"]) == (True, "skip", 5)
    assert found["stages"][0]["style"] is first["over"] is last["guard"] is None
    for wrong in ({"over": "5"}, {"settings": {}}, {"changes": []}):
        broken = {**found, "stages": [{**last, **wrong}]}
        assert not validator.is_valid(broken), wrong
    assert not validator.is_valid({**found, "stages": [{k: v for k, v in last.items() if k != "guard"}]})
