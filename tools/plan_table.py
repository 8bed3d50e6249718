"""A plan as tables for a person, in which what differs from the stage before stands out.

Narrow: 100 columns, with a paragraph of details a stage below. Wide: a line a stage, with every number. Without a
terminal the same text comes without colour. Nothing is worked out here.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrate.training.plan import Plan, Row
from orchestrate.training.settings.records import moved
from orchestrate.training.settings.values import cut

WIDTH = 100
_LONGEST = 300
"""Characters of one cell: nobody reads a whole vocabulary map."""
Cell = Callable[[Row], str]


def render(plan: Plan, wide: bool = False, colour: bool = False) -> str:
    """The tables, what they sum up to, and the plan's warnings and notes."""
    width = 10**5 if wide else WIDTH
    console = Console(file=io.StringIO(), width=width, force_terminal=colour, highlight=False, markup=False)
    for part in _parts(plan, wide):
        console.print(part, soft_wrap=isinstance(part, Text))  # a terminal breaks sentences itself
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _parts(plan: Plan, wide: bool) -> Iterator[RenderableType]:
    yield _stages(plan, wide)
    if not wide:
        yield "(an empty cell is as in the stage before; --wide has every number on one line)\n"
        yield _details(plan)
        yield ""
    rewraps, recompiles = (sum(getattr(row, name) for row in plan.rows) for name in ("rewraps", "recompiles"))
    yield f"{len(plan.rows) - 1} entries, no errors; {rewraps} re-wraps, {recompiles} recompiles*"
    yield "* estimated before the run: take it as a guess"
    yield from (Text(f"warning: {warning}", "bold yellow") for warning in plan.warnings)
    yield from (Text(f"note: {note}") for note in plan.notes)


# ---------------------------------------------------------------------------------------------- cells


def _bytes(count: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _operation(row: Row) -> str:
    return "" if row.entry is None else cut(row.operation, _LONGEST)


def _fires(plan: Plan, row: Row) -> str:
    """With --against: when the entry would have fired."""
    return "" if plan.fires is None or row.entry is None else f"fires at* {plan.fires[row.title]}"


def _how(row: Row) -> str:
    """What an entry says beside its operation and its triggers."""
    facts = []
    if row.over:
        power = "" if row.exponent is None else f" {row.exponent:g}"
        facts.append(f"over {row.over} iterations ({row.style}{power})")
    if row.guard:
        g = row.guard
        limit = f"-{g['max_decrease']:g}" if g["max_decrease"] else f"+{g['max_increase']:g}"
        facts.append(f"guard {g['metric']} {limit} within {g['within_iters']} iterations, else {g['then']}")
    facts += ["reevaluate"] if row.reevaluate else []
    facts += [f"on_error {row.on_error}"] if row.on_error != "stop" else []
    facts += [f"label {row.label}"] if row.label else []
    return "; ".join(facts)


def _changes(row: Row) -> str:
    before, after = ({name: ends[i] for name, ends in row.changes.items()} for i in (0, 1))
    return moved(before, after)


_SHAPE: dict[str, Cell] = {
    "layers": lambda row: str(row.n_layer),
    "width": lambda row: str(row.n_embd),
    "parameters": lambda row: f"{row.parameters:,}",
    "trainable": lambda row: f"{row.trainable:,}",
    "tokens/iter": lambda row: f"{row.tokens_per_iter:,}",
}
_COSTS: dict[str, Cell] = {
    "MFLOP/token": lambda row: f"{row.flops_per_token / 1e6:,.1f}",
    "model": lambda row: _bytes(row.model_bytes),
    "optimizer": lambda row: _bytes(row.optimizer_bytes),
    "activations*": lambda row: _bytes(row.activation_bytes),
}
_AT_THE_SWITCH: dict[str, Cell] = {
    "re-wraps": lambda row: str(row.rewraps),
    "recompiles*": lambda row: str(row.recompiles),
    "function": lambda row: {None: "", True: "kept", False: "CHANGES"}[row.keeps_function],
}


# ---------------------------------------------------------------------------------------------- tables


def _stages(plan: Plan, wide: bool) -> Table:
    """A line a stage. What is as in the stage before is dim in the wide table, and left out of the narrow one."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    entry: dict[str, Cell] = {"entry": lambda row: row.title}
    if any(row.track for row in plan.rows):
        entry["track"] = lambda row: row.track
    entry["operation"] = _operation
    more: dict[str, Cell] = {}
    if wide:
        entry["when"] = lambda row: row.when
        entry |= {"fires at*": lambda row: _fires(plan, row)} if plan.fires is not None else {}
        more = {**_AT_THE_SWITCH, "entry says": _how, "changes": _changes}
    facts = {**_SHAPE, **_COSTS} if wide else _SHAPE
    for head in entry:
        table.add_column(head, no_wrap=True, max_width=None if wide else {"track": 12, "operation": 1}.get(head))
    for head in facts:
        table.add_column(head, no_wrap=True, justify="right")
    for head in more:
        table.add_column(head, no_wrap=True)
    before = None
    for row in plan.rows:
        cells = [Text(cell(row).removeprefix("fires at* ")) for cell in entry.values()]
        for cell in facts.values():
            same = before is not None and cell(row) == cell(before)
            cells.append(Text("" if same and not wide else cell(row), "dim" if same else "bold" if before else ""))
        table.add_row(*cells, *(Text(cell(row), "bold" if cell is _changes else "") for cell in more.values()))
        before = row
    if not wide:  # an operation has the room that the numbers leave
        table.columns[len(entry) - 1].max_width = 1 + WIDTH - Console(width=10 * WIDTH).measure(table).maximum
    return table


def _details(plan: Plan) -> Table:
    """What the narrow table has no room for: all that an entry says, what it changes, costs other than before."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    before = None
    for row in plan.rows:
        said = [f"{_operation(row)}: {row.when}", _how(row), _fires(plan, row)] if row.entry is not None else []
        costs = [f"{head} {cell(row)}" for head, cell in _COSTS.items() if not before or cell(row) != cell(before)]
        costs += [f"{head} {cell(row)}" for head, cell in _AT_THE_SWITCH.items() if cell(row) not in ("0", "kept", "")]
        lines = [Text("; ".join(filter(None, said))), Text(_changes(row), "bold"), Text("; ".join(costs), "dim")]
        table.add_row(row.title, Text("\n").join(line for line in lines if line))
        before = row
    return table
