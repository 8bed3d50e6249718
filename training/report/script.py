"""The page's style and script: panels out of the JSON that lies in the page, in light and dark, for wide and narrow.

Nothing is fetched. Text from a run folder is only ever set as text, and escaped where plotly reads markup.
"""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2126; --soft: #5a6672; --line: #d9dfe5; --box: #f5f7f9;
  --link: #0b62a8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e8ec; --soft: #98a4b0; --line: #343b43;
  --box: #1d2227; --link: #7ab8f0; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
h2::first-letter { text-transform: uppercase; }
h3 { font-size: .95rem; font-weight: 600; margin: .6rem 0 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: .4rem 1.2rem;
  margin: .6rem 0; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; }
.run { border-left: 4px solid var(--line); padding-left: .8rem; margin: .8rem 0; }
.note { color: var(--bad); margin: .2rem 0; }
.bar { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; margin: .8rem 0; }
.bar label { cursor: pointer; }
.panels { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 1rem; }
.panel { min-width: 0; } .panel.first { grid-column: 1 / -1; }
@media (max-width: 50rem) { .panels { grid-template-columns: minmax(0, 1fr); } body { padding: .6rem; } }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; font-size: .85rem; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-top: 1px solid var(--line);
  overflow-wrap: normal; } td.text { min-width: 11rem; max-width: 22rem; overflow-wrap: anywhere; }
th { background: var(--box); border-top: 0; font-weight: 600; white-space: nowrap; } td.number { white-space: nowrap; }
tr.void td, pre.void { opacity: .6; text-decoration: line-through; } td.none { color: var(--soft); }
pre { white-space: pre-wrap; background: var(--box); padding: .6rem; margin: .3rem 0; border-radius: 4px; }
footer { color: var(--soft); font-size: .8rem; margin-top: 2rem; }
body.picture { max-width: none; width: 1200px; } body.picture .panel { grid-column: 1 / -1; }
body.picture .bar, body.picture footer { display: none; }
"""

SCRIPT = """
"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#3b7dd8", "#d9730d", "#2a9d6f", "#b5489a", "#8a7a1f", "#20a4b8", "#c2413a", "#7566cf"];
const KINDS = { operation: ["triangle-up", "#2a9d6f"], ramp: ["triangle-right", "#7fae98"],
  repetition: ["triangle-left", "#7fae98"],
  guard: ["diamond", "#8a7a1f"], rollback: ["x", "#d6453d"], override: ["square", "#7566cf"],
  start: ["circle", "#3b7dd8"], resume: ["triangle-right", "#3b7dd8"], checkpoint: ["line-ns-open", "#8794a0"],
  error: ["cross", "#d6453d"], emergency: ["cross", "#d6453d"], signal: ["square", "#8794a0"],
  end: ["circle", "#8794a0"] };
const dark = matchMedia("(prefers-color-scheme: dark)");
const wanted = location.hash.slice(1);
let axis = D.axes.includes(wanted) ? wanted : "iter";
const many = D.runs.length > 1;

// plotly reads a little HTML in its texts.
const safe = text => text.replace(/[&<>"']/g, c => "&#" + c.charCodeAt(0) + ";");
const wrapped = text => safe(text).replace(/(.{60}[^\\s]{0,20})\\s/g, "$1<br>");

function unit() {
  if (axis !== "seconds") return [1, axis === "iter" ? "iteration" : "tokens"];
  const last = D.last.seconds;
  if (last >= 172800) return [86400, "days"];
  return last >= 7200 ? [3600, "hours"] : last >= 120 ? [60, "minutes"] : [1, "seconds"];
}
const scaled = (values, by) => by === 1 ? values : values.map(v => v === null ? null : v / by);

function trace(panel, t) {
  const by = unit()[0], several = new Set(panel.traces.map(one => one.name)).size > 1;
  const order = [...new Set(panel.traces.map(one => one.name))].indexOf(t.name);
  const mixed = panel.traces.some(one => one.main) && !t.main;
  const own = t.name.replace(/^(machine|seconds_by_part)[.]/, "");
  const name = [many ? D.runs[t.run] : "", several || !many ? own : "", t.void ? "(taken back)" : ""];
  const few = t.y.length < 60;
  return {
    type: "scatter", x: scaled(t.x[axis], by), y: t.y, name: safe(name.filter(Boolean).join(" ")),
    mode: t.main && few || t.y.length < 3 ? "lines+markers" : "lines", marker: { size: 5 },
    line: { color: COLOURS[(many ? t.run : order) % COLOURS.length], shape: t.step ? "hv" : "linear",
      width: mixed ? 1 : 2, dash: t.void ? "dot" : many && several && order % 2 ? "dash" : "solid" },
    opacity: t.void ? 0.55 : mixed ? 0.6 : 1,
    ...(t.stack && !many ? { stackgroup: "all", line: { width: 0.5, color: COLOURS[order % COLOURS.length] } } : {}),
  };
}

function lanes() {
  const by = unit()[0], groups = new Map();
  for (const m of D.markers) {
    const key = m.kind + " " + m.void;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(m);
  }
  return [...groups.values()].map(all => ({
    type: "scatter", mode: "markers", yaxis: "y2", cliponaxis: false, showlegend: false, hoverinfo: "text",
    x: all.map(m => m.x[axis] / by), y: all.map(m => m.lane), name: all[0].kind,
    hovertext: all.map(m => [many ? "<b>" + safe(D.runs[m.run]) + "</b>" : "", "<b>" + wrapped(m.title) + "</b>",
      "iteration " + m.x.iter.toLocaleString() + (m.void ? " (taken back)" : ""),
      ...m.details.map(wrapped)].filter(Boolean).join("<br>")),
    marker: { symbol: KINDS[all[0].kind][0], size: 11, opacity: all[0].void ? 0.4 : 1,
      color: many ? all.map(m => COLOURS[m.run % COLOURS.length]) : KINDS[all[0].kind][1],
      line: { width: all[0].kind === "checkpoint" ? 2 : 0 } },
  }));
}

function lines() {
  const by = unit()[0];
  const kinds = new Set(["operation", "rollback", "resume"]);
  const shown = D.markers.filter(m => kinds.has(m.kind));
  if (shown.length > D.most_lines) return [[], []];
  const shapes = shown.map(m => ({ type: "line", xref: "x", yref: "paper", x0: m.x[axis] / by, x1: m.x[axis] / by,
    y0: 0, y1: 1, layer: "above", opacity: m.void ? 0.35 : 0.7,
    line: { width: 1, color: many ? COLOURS[m.run % COLOURS.length] : KINDS[m.kind][1],
      dash: m.void ? "dot" : m.kind === "operation" ? "solid" : "dash" } }));
  const places = [];  // of names, one for those that stand too close together
  for (const m of D.picture && !many ? shown : []) {
    const name = m.kind === "operation" ? m.title.split(" ", 2).join(" ") + (m.void ? " (taken back)" : "") : m.kind;
    const x = m.x[axis] / by;
    const last = places[places.length - 1];
    if (last && Math.abs(x - last.x) < 0.02 * D.last[axis] / by) last.names.push(name);
    else places.push({ x, names: [name], color: KINDS[m.kind][1] });
  }
  const edge = 0.03 * D.last[axis] / by;  // on the left of the first line stands the scale
  const notes = places.map(p => ({ xref: "x", yref: "paper", x: p.x, y: 1, yanchor: "top",
    xanchor: p.x < edge ? "left" : "right",
    textangle: -90, showarrow: false, font: { size: 12, color: p.color }, text: safe(p.names.join(", ")) }));
  return [shapes, notes];
}

function layout(panel, first) {
  const ink = dark.matches ? "#e4e8ec" : "#1c2126", grid = dark.matches ? "#2d343b" : "#e6eaee";
  const narrow = innerWidth < 700, rows = [...new Set(D.lanes)].filter(l => D.markers.some(m => m.lane === l));
  const share = first && rows.length ? Math.min(0.5, rows.length * (narrow ? 0.045 : 0.05)) : 0;
  const [shapes, notes] = first && D.picture ? lines() : [lines()[0], []];
  const axes = { gridcolor: grid, zeroline: false, linecolor: grid, automargin: true };
  const log = document.getElementById("log").checked && first;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: narrow ? 11 : 12 },
    margin: { l: 48, r: 12, t: 24, b: 40 }, height: first ? (narrow ? 460 : 520) : 240,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: dark.matches ? "#98a4b0" : "#8794a0" },
    hovermode: "closest", hoverlabel: { align: "left" }, shapes,
    annotations: notes, uirevision: axis,
    showlegend: first || panel.traces.length > 1,
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", font: { size: narrow ? 10 : 11 } },
    xaxis: { ...axes, title: { text: unit()[1], standoff: 4 }, anchor: share ? "y2" : "y",
      exponentformat: "SI", range: [-0.01, 1.01].map(share => share * (D.last[axis] / unit()[0] || 1)) },
    yaxis: { ...axes, domain: [share ? share + 0.03 : 0, 1], type: log ? "log" : "linear", exponentformat: "SI",
      ...(panel.range && !log ? { range: panel.range } : {}) },
    ...(share ? { yaxis2: { ...axes, domain: [0, share], type: "category", categoryorder: "array",
      categoryarray: rows.slice().reverse(), range: [-0.6, rows.length - 0.4], fixedrange: true,
      tickfont: { size: narrow ? 9 : 11 } } } : {}),
  };
}

const divs = D.panels.map((panel, i) => {
  const div = document.createElement("div");
  const box = document.createElement("section"), title = document.createElement("h3");
  box.className = i ? "panel" : "panel first";
  title.textContent = panel.title;
  box.append(title, div);
  document.getElementById("panels").append(box);
  return div;
});

let following = false;
function draw() {
  divs.forEach((div, i) => {
    const panel = D.panels[i], traces = panel.traces.map(t => trace(panel, t));
    Plotly.react(div, i ? traces : [...traces, ...lanes()], layout(panel, !i), { responsive: true, displaylogo: false,
      displayModeBar: !i && !D.picture, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
    if (div.linked) return;
    div.linked = true;
    div.on("plotly_relayout", change => {  // all panels show the same stretch
      if (following || !Object.keys(change).some(key => key.startsWith("xaxis"))) return;
      following = true;
      const to = { "xaxis.range": div.layout.xaxis.range.slice() };
      Promise.all(divs.filter(other => other !== div).map(other => Plotly.relayout(other, to)))
        .finally(() => { following = false; });
    });
  });
  document.body.dataset.drawn = axis;
}
for (const box of document.querySelectorAll("input[name=axis]")) {
  box.checked = box.value === axis;
  box.addEventListener("change", () => { axis = box.value; history.replaceState(null, "", "#" + axis); draw(); });
}
document.getElementById("log").addEventListener("change", draw);
dark.addEventListener("change", draw);
matchMedia("(max-width: 700px)").addEventListener("change", draw);
draw();
"""
