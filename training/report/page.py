"""report.html: one file that shows one run or compares several, and opens without a network.

plotly.js (the extra `report`) is inside the file, once. The page may load nothing: its Content-Security-Policy forbids
it. Whatever a run folder says is escaped, in HTML, in JSON and in what plotly reads as markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from orchestrate.training.report import drawing
from orchestrate.training.report.data import AXES, OperationRow, Story, duration, known_parts
from orchestrate.training.report.script import SCRIPT, STYLE
from orchestrate.training.settings.errors import Refused

MOST_SHAPES = 200
"""Lines across the panels; where more would be drawn there are none, and the markers say it all."""
PICTURE = ("loss (nats per token)", "learning rate", "parameters", "tokens per iteration")
"""Panels of a picture: the losses, and of the others those that change, two at most."""
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_FOOTER = (
    "Dotted lines are what the run went back from. A val loss in brackets was not measured around the operation: it is "
    "that of the evaluations next to it. Lines of numbers come every log_interval iterations, so a change between two "
    "of them is drawn at the later one."
)
_AXIS_NAMES = {"iter": "iterations", "tokens": "tokens", "seconds": "time"}


def plotly_js() -> str:
    """The text of plotly.js. Raises Refused where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise Refused(
            "a report needs plotly: pip install 'plotly>=6', or this project with its extra: '.[report]'"
        ) from None
    return get_plotlyjs()


def page(stories: Sequence[Story], *, reload_seconds: int = 0, picture: bool = False) -> str:
    """The whole file. Raises Refused where plotly is not installed.

    Args:
        stories: one is told, several are compared.
        reload_seconds: how often the page loads itself anew; 0: never.
        picture: the losses and little else, at a fixed width, for a screenshot.
    """
    library, names = plotly_js(), names_of(stories)
    title = ", ".join(names)
    panels = [_with_range(panel) for panel in drawing.panels(stories)]
    if picture:
        panels = _of_picture(panels)
    last = {
        axis: max((float(np.nanmax(s.at[axis])) for story in stories for s in story.series), default=0.0)
        for axis in AXES
    }
    facts = {
        "axes": AXES,
        "runs": names,
        "panels": panels,
        "markers": drawing.markers(stories),
        "lanes": list(drawing.LANES.values()),
        "last": last,
        "most_lines": MOST_SHAPES,
        "picture": picture,
    }
    body = [_run(name, story, len(stories) > 1) for name, story in zip(names, stories, strict=True)]
    if picture:
        body = [f"<h1>{escape(title)}</h1>"]
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{axis}"> {name}</label>' for axis, name in _AXIS_NAMES.items()
    )
    body += [
        f'<div class="bar"><span>over</span>{choices}<label><input type="checkbox" id="log"> log loss</label></div>',
        '<div class="panels" id="panels"></div>',
    ]
    if not picture:
        body += _comparison(names, stories) if len(stories) > 1 else []
        for name, story in zip(names, stories, strict=True):
            body += _tables(f"{name}: " if len(stories) > 1 else "", story)
        body.append(f"<footer>{_FOOTER}</footer>")
    reload = f'<meta http-equiv="refresh" content="{reload_seconds}">\n' if reload_seconds else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{reload}<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
<script>{library}</script>
</head>
<body{' class="picture"' if picture else ""}>
{"".join(body)}
<script type="application/json" id="data">{_json(facts)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _json(facts: Any) -> str:
    """JSON that ends no script element, whatever the texts in it say."""
    text = json.dumps(facts, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 is escaped too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def names_of(stories: Sequence[Story]) -> list[str]:
    """A name for each run: that of its folder, with the folders above where two have the same."""
    paths = [story.folder.resolve().parts for story in stories]
    length = 1
    while len({path[-length:] for path in paths}) < len(paths) and length < max(map(len, paths)):
        length += 1
    return ["/".join(path[-length:]) for path in paths]


def _with_range(panel: dict[str, Any]) -> dict[str, Any]:
    """The losses of the beginning do not squeeze all others: the panel holds those of the last nine tenths.

    What was taken back may widen it to twice that, and goes on beyond its edge.
    """

    def late(void: bool) -> list[float]:
        traces = [t for t in panel["traces"] if (t["name"] == "loss" or t["main"]) and t["void"] == void]
        return [y for t in traces for y in t["y"][0 if void else len(t["y"]) // 10 :] if y is not None]

    counted, left = late(False), late(True)
    low, high = min(counted, default=0.0), max(counted, default=0.0)
    span = high - low
    if len(counted) < 20 or not 0 < span < 1e300:
        return panel
    high = max(high, min(high + span, max(left, default=high)))
    return {**panel, "range": [low - 0.05 * span, high + 0.05 * span]}


def _of_picture(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first panels of PICTURE, without those whose numbers stay as they are."""
    shown = [panel for panel in panels if panel["title"] in PICTURE]
    moving = [p for p in shown[1:] if any(len(set(trace["y"])) > 1 for trace in p["traces"])]
    return shown[:1] + moving[:2]


def picture_height(stories: Sequence[Story]) -> int:
    """Of a page that is a picture, in CSS pixels: its title, and panels with theirs (script.py has their heights)."""
    panels = len(_of_picture(drawing.panels(stories)))
    return 75 + 555 + 275 * (panels - 1)


# ---------------------------------------------------------------------------------------------- tables


def _run(name: str, story: Story, several: bool) -> str:
    facts = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(text)}</dd></div>" for key, text in story.facts.items())
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in story.notes)
    heading = "h2" if several else "h1"
    return (
        f'<section class="run"><{heading}>{escape(name)}</{heading}><div>{escape(story.state)}</div>'
        f"<dl>{facts}</dl>{notes}</section>"
    )


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows: a class, and cells that are HTML, elements and all."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f'<tr class="{kind}">{"".join(cells)}</tr>' for kind, cells in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(text: str) -> str:
    return f'<td class="text">{escape(text)}</td>'


def _number(text: str) -> str:
    return f'<td class="number">{escape(text)}</td>'


def _tables(of: str, story: Story) -> list[str]:
    """What the schedule was to do and what was done; where the time went; texts."""
    found = []
    if story.operations:
        heads = ["entry", "iteration", "operation", "why", "changes", "val loss", "took", "parameters", "trainable"]
        rows = [("void" if row.void else "", _operation(row)) for row in story.operations]
        found += [f"<h2>{escape(of)}operations</h2>", _table(heads, rows)]
    if story.plan:
        rows = [
            (
                "",
                [
                    _number(str(row.number)),
                    _text(row.what + (f" ({row.desc})" if row.desc else "")),
                    _text(row.when),
                    _text(row.happened) if row.happened else '<td class="none">not fired</td>',
                ],
            )
            for row in story.plan
        ]
        found += [f"<h2>{escape(of)}the plan, and what happened</h2>"]
        found += [_table(["entry", "operation", "when", "what happened"], rows)]
    if total := sum(story.seconds_by_part.values()):
        parts = known_parts(story.seconds_by_part)
        rows = [("", [_text(part), *_share(story.seconds_by_part[part], total)]) for part in parts]
        found += [f"<h2>{escape(of)}where the time went</h2>", _table(["part", "time", "share"], rows)]
    if story.texts:
        found.append(f"<details><summary>{escape(of)}texts that the model wrote</summary>")
        for text in story.texts:
            kind = ' class="void"' if text.void else ""
            found.append(
                f"<p>iteration {text.iter:,}, from {escape(repr(text.prompt))}</p><pre{kind}>{escape(text.text)}</pre>"
            )
        found.append("</details>")
    return found


def _share(seconds: float, total: float) -> list[str]:
    return [_number(duration(seconds)), _number(f"{100 * seconds / total:.1f} %")]


def _operation(row: OperationRow) -> list[str]:
    losses, (before, after) = row.losses, row.around
    if losses is not None:
        shown = f"{losses[0]:.4f} \u2192 {losses[1]:.4f}"
    else:
        near = [f"{value:.4f}" if value is not None else "\u2013" for value in (before, after)]
        shown = f"({near[0]} \u2192 {near[1]})" if before is not None or after is not None else ""
    over = f" over {row.over} iterations" if row.over else ""
    return [
        _number(row.entry),
        _number(f"{row.at['iter']:,.0f}"),
        _text(row.what + (f" ({row.desc})" if row.desc else "")),
        _text(row.reason),
        _text("; ".join(row.changes) + over),
        _number(shown),
        _number(duration(row.seconds)),
        _number(f"{row.parameters:,}"),
        _number(f"{row.trainable:,}"),
    ]


def _comparison(names: Sequence[str], stories: Sequence[Story]) -> list[str]:
    """The validation losses at places that all runs have reached."""
    found = []
    for axis, (places, rows) in drawing.comparison(stories).items():
        said = [f"{place:,.0f} tokens" if axis == "tokens" else duration(place) for place in places]
        cells = [
            ("", [_text(name), *(_number("" if value is None else f"{value:.4f}") for value in row)])
            for name, row in zip(names, rows, strict=True)
        ]
        found += [f"<h2>Validation loss at equal {_AXIS_NAMES[axis]}</h2>", _table(["run", *said], cells)]
    data = {story.facts.get("data") for story in stories}
    if len(data) > 1:
        found.append('<p class="note">The runs train on different data: their losses are not of one thing.</p>')
    return found
