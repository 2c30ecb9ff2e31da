"""The tab of the training runs: which there are, how each went, and how several differ."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import gradio as gr

from serving.client import Run, RunDetails, ServiceError
from ui.api import publish
from ui.search.picture import Chosen, UploadFailed, notice, read, warn
from ui.search.query import Query
from ui.widgets import chart
from ui.widgets.chart import Curve

TITLE = "Runs"
POLL_S = 2.0
MOST = chart.MOST_COLOURS  # runs beside each other
MOST_POINTS = 300  # of a curve; the chart has no more pixels
PAIRS = 3
EMPTY = (
    "No run has been trained here yet. `python training/pretrain.py --data ~/Pictures` starts one, and its curves grow "
    "here."
)
FULL = f"{MOST} runs can be compared at a time; take one out first."
NO_PICTURE = "The collection is empty; drop a picture to draw views of it."
STATES = {"training": "training now", "finished": "finished", "stopped": "stopped"}
JUDGED = {"accuracy": "accuracy", "held_out": "held out", "knn": "kNN", "views_matched": "views matched"}  # best first
NOT_DRAWN = ("epoch", "step", "k", "bank", "queries", "pictures")
TITLES = {
    "loss": "Loss",
    "knn": "kNN accuracy",
    "views_matched": "Views matched",
    "held_out": "Held-out accuracy",
    "held_out_loss": "Held-out loss",
    "lr": "Learning rate",
    "images_per_s": "Images a second",
    "wait_share": "Time spent waiting for data",
}
SHARES = ("knn", "views_matched", "held_out", "wait_share")

LIST_JS = """
element.addEventListener("click", (event) => {
    const row = event.target.closest("button[data-run]");
    if (row) trigger("click", { ...row.dataset });
});
"""

CSS = f"""
{chart.CSS}
.runs {{ list-style: none; margin: 0; padding: 2px; max-height: 316px; overflow-y: auto; }}
.runs li {{ margin: 0; }}
.run {{
  display: grid; grid-template-columns: 14px minmax(0, 1.6fr) minmax(0, 1fr) 124px 92px 150px 84px; gap: 0 14px;
  width: 100%; align-items: center; padding: 8px 12px; border: 0; border-radius: 8px; background: none; cursor: pointer;
  font-size: 13px; text-align: left; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums;
}}
.run > span {{ overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
.run:hover {{ background: color-mix(in srgb, var(--neutral-500) 10%, transparent); }}
.run:focus-visible {{ outline: 2px solid var(--primary-500); outline-offset: -2px; }}
.run[aria-pressed="true"] {{ background: var(--background-fill-primary); }}
.run .swatch {{ width: 12px; height: 12px; border-radius: 4px; border: 1.5px solid var(--neutral-400); }}
.run[aria-pressed="true"] .swatch {{ background: var(--curve); border-color: var(--curve); }}
.run b {{ font-weight: 600; color: var(--body-text-color); }}
.run .judged {{ color: var(--body-text-color); }}
.run .when {{ text-align: right; }}
.run .training {{ color: var(--primary-700); font-weight: 600; }}
.dark .run .training {{ color: var(--primary-400); }}
.run .training::before {{
  content: ""; display: inline-block; width: 7px; height: 7px; margin-right: 7px; border-radius: 50%;
  background: currentColor; animation: breathe 2s infinite;
}}
@keyframes breathe {{ 50% {{ opacity: 0.25; }} }}
#run-curves {{ margin-top: 14px; }}
#run-curves .key {{ display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0 0 12px; font-size: 13px; }}
#run-curves .key span::before {{
  content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 7px; border-radius: 2px;
  vertical-align: middle; background: var(--curve);
}}
#run-settings table {{ border-collapse: collapse; font-size: 13px; width: 100%; }}
#run-settings .scroll {{ overflow-x: auto; }}
#run-settings :is(th, td) {{
  text-align: left; padding: 5px 14px 5px 8px; border-bottom: 1px solid var(--border-color-primary); font-weight: 400;
  white-space: nowrap;
}}
#run-settings th {{ color: var(--body-text-color-subdued); }}
#run-settings thead th {{ color: var(--body-text-color); font-weight: 600; }}
#run-settings .differs td {{ font-weight: 600; }}
#run-settings .differs :is(th, td) {{ background: color-mix(in srgb, var(--primary-500) 9%, transparent); }}
#run-settings summary {{ cursor: pointer; font-size: 13px; padding: 8px 0; color: var(--body-text-color-subdued); }}
#run-settings dl {{
  display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 0 28px; margin: 0; font-size: 13px;
}}
#run-settings dl div {{
  display: flex; justify-content: space-between; gap: 12px; padding: 5px 0;
  border-bottom: 1px solid var(--border-color-primary);
}}
#run-settings dt {{ color: var(--body-text-color-subdued); }}
#run-settings dd {{ margin: 0; overflow: hidden; text-overflow: ellipsis; }}
#runs-bar {{ align-items: center; }}
#runs-bar button {{ flex: 0 0 190px; }}
#run-views .pairs {{ grid-template-columns: repeat({PAIRS}, minmax(0, 230px)); gap: 12px; }}
#run-views .pair {{ padding: 5px; }}
#run-views h3, #run-settings h3 {{ font-size: 14px; font-weight: 600; margin: 10px 0 8px; }}
@media (max-width: 760px) {{
  .run {{ grid-template-columns: 14px minmax(0, 1fr) auto auto; }}
  .run :is(.data, .epochs, .when) {{ display: none; }}
}}
"""


def there(runs: Sequence[Run], chosen: Sequence[str]) -> tuple[str, ...]:
    """Names of the chosen that are still there; of the newest where there is none."""
    names = [run.name for run in runs]
    return tuple([name for name in chosen if name in names] or names[:1])


async def details(client, names: Sequence[str]) -> list[RunDetails]:
    """raises ServiceError"""
    return list(await asyncio.gather(*(client.run(name) for name in names)))


def list_html(runs: Sequence[Run], chosen: Sequence[str], now: float) -> str:
    return f'<ul class="runs">{"".join(f"<li>{_row(run, chosen, now)}</li>" for run in runs)}</ul>'


def _row(run: Run, chosen: Sequence[str], now: float) -> str:
    pressed = run.name in chosen
    colour = f" c{chosen.index(run.name)}" if pressed else ""
    encoder = run.encoder or f"from {run.init}"
    cells = {
        "name": f"<b>{escape(run.name)}</b>",
        "data": escape(f"{encoder}, {run.data}"),
        f"state {run.state}": STATES[run.state],
        "epochs": f"{run.epoch:,} of {run.epochs:,}",
        "judged": escape(_judged(run)),
        "when": _ago(now - run.changed),
    }
    about = f'aria-pressed="{str(pressed).lower()}" title="{escape(f"{run.name}: {run.kind}")}"'
    spans = "".join(f'<span class="{name}">{text}</span>' for name, text in cells.items())
    swatch = '<span class="swatch"></span>'
    return f'<button type="button" class="run{colour}" data-run="{escape(run.name)}" {about}>{swatch}{spans}</button>'


def _judged(run: Run) -> str:
    return next((f"{said} {run.figures[name]:.1%}" for name, said in JUDGED.items() if name in run.figures), "")


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def curves_html(runs: Sequence[RunDetails]) -> str:
    """A chart for each column that any of the runs has, with a key where they are several."""
    known = {name for run in runs for name, column in run.metrics.items() if any(v is not None for v in column)}
    columns = [name for name in dict.fromkeys([*TITLES, *sorted(known)]) if name in known and name not in NOT_DRAWN]
    if not columns:
        return notice("Its first epoch is not over yet; the curves begin with it.")
    charts = "".join(_chart(name, runs) for name in columns)
    names = "".join(f'<span class="c{i}">{escape(run.name)}</span>' for i, run in enumerate(runs))
    key = f'<p class="key">{names}</p>' if len(runs) > 1 else ""
    return f'{key}<div class="charts">{charts}</div>'


def _chart(column: str, runs: Sequence[RunDetails]) -> str:
    say: Callable[[float], str] = (lambda v: f"{100 * v:.3g}%") if column in SHARES else (lambda v: f"{v:.4g}")
    levels = {run.chance for run in runs}
    chance = levels.pop() if column == "loss" and len(levels) == 1 else None
    curves = [Curve(run.name, i, _points(run, column)) for i, run in enumerate(runs)]
    last = max(run.epochs if run.state == "training" else run.epoch for run in runs)
    return chart.chart(TITLES.get(column, column.replace("_", " ")), curves, last, say, chance)


def _points(run: RunDetails, column: str) -> list[tuple[float, float]]:
    values = run.metrics.get(column, [])
    epochs = run.metrics.get("epoch", [])
    points = [(e, v) for e, v in zip(epochs, values, strict=False) if e is not None and v is not None]
    every = -(-len(points) // MOST_POINTS) or 1
    return points[::-1][::every][::-1]  # the last is one of them


def settings_html(runs: Sequence[RunDetails]) -> str:
    """Of one run all settings; of several a table, what differs first."""
    flat = [dict(_flat(run.settings)) for run in runs]
    names = [name for name in dict.fromkeys(name for one in flat for name in one) if name not in ("name", "resume")]
    if len(runs) == 1:
        rows = "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(_said(flat[0][n]))}</dd></div>" for n in names)
        return f"<h3>Settings of {escape(runs[0].name)}</h3><dl>{rows}</dl>"
    told = {name: [_said(one.get(name)) for one in flat] for name in names}
    differing = [name for name in names if len(set(told[name])) > 1]
    same = [name for name in names if name not in differing]
    head = f"<thead><tr><th></th>{''.join(f'<th scope=col>{escape(run.name)}</th>' for run in runs)}</tr></thead>"

    def table(names: list[str], kind: str) -> str:
        rows = [
            f'<tr class="{kind}"><th scope="row">{escape(name)}</th>'
            + "".join(f"<td>{escape(value)}</td>" for value in told[name])
            + "</tr>"
            for name in names
        ]
        return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'

    first = table(differing, "differs") if differing else "<p>All are the same.</p>"
    rest = f"<details><summary>{len(same)} that are the same</summary>{table(same, 'same')}</details>"
    return f"<h3>Settings that differ</h3>{first}{rest}"


def _flat(settings: dict[str, Any], above: str = ""):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def _said(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " to ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


async def views_html(client, runs: Sequence[RunDetails], chosen: Chosen | None, collection: str) -> str:
    """Pairs of views of a picture as each run draws them. raises ServiceError, UploadFailed."""
    if chosen is None:  # any of the collection will do
        items = (await client.items(limit=1, collection=collection)).items
        if not items:
            return notice(NO_PICTURE)
        chosen = Chosen(items[0].name, id=items[0].id, collection=collection)
    picture = await read(client, chosen)
    parts = []
    for i, run in enumerate(runs):
        settings = run.settings.get("augment") or {}
        pairs = await client.views(picture, pairs=PAIRS, seed=0, **settings)
        drawn = "".join(
            '<li class="pair">'
            + "".join(f'<img src="{escape(view)}" alt="A view as {escape(run.name)} draws it">' for view in pair.views)
            + "</li>"
            for pair in pairs
        )
        parts.append(f'<h3 class="c{i}">Views that {escape(run.name)} trained with</h3><ul class="pairs">{drawn}</ul>')
    return "".join(parts)


def tab(client, trail: gr.State, collection: gr.Dropdown, tabs: gr.Tabs) -> None:
    """Build the tab. It asks for runs while it is in sight: once, and every POLL_S while one of them is training."""
    listed = gr.HTML(js_on_load=LIST_JS, apply_default_css=False, elem_id="run-list")
    curves = gr.HTML(js_on_load=chart.CHART_JS, apply_default_css=False, elem_id="run-curves")
    with gr.Row(elem_id="runs-bar"):
        draw = gr.Button("Draw its views", size="sm", elem_id="draw-views", visible=False)
    drawn = gr.HTML(apply_default_css=False, elem_id="run-views")
    settings = gr.HTML(apply_default_css=False, elem_id="run-settings")
    chosen, known, in_sight = gr.State(()), gr.State(None), gr.State(False)
    timer = gr.Timer(POLL_S, active=False)
    shown = [chosen, known, listed, curves, settings, draw, timer]

    async def show(names: tuple[str, ...], before: tuple | None, in_sight: bool):
        """Nothing where nothing has changed: the page would lose what is pointed at."""
        if not in_sight:
            return {timer: gr.Timer(active=False)}
        try:
            runs = await client.runs()
            names = there(runs, names)
            now = (runs, names, int(time.time()) // 60)
            live = gr.Timer(active=any(run.state == "training" for run in runs))
            if now == before:
                return {timer: live}
            compared = await details(client, names)
        except ServiceError as error:
            return {listed: notice(str(error)), timer: gr.Timer(active=False), known: None}
        if not runs:
            return {listed: notice(EMPTY), curves: "", settings: "", draw: gr.update(visible=False), timer: live}
        button = gr.update(visible=True, value="Draw its views" if len(names) == 1 else "Draw their views")
        parts = list_html(runs, names, time.time()), curves_html(compared), settings_html(compared)
        return dict(zip(shown, (names, now, *parts, button, live), strict=True))

    def look(event: gr.SelectData) -> bool:
        return event.value == TITLE

    def toggle(chosen: tuple[str, ...], event: gr.EventData):
        name = str((event._data or {}).get("run", ""))
        if name in chosen:
            return tuple(one for one in chosen if one != name) or chosen, ""
        if len(chosen) >= MOST:
            gr.Warning(FULL)
            return gr.skip(), gr.skip()
        return (*chosen, name), ""

    async def draw_views(chosen: tuple[str, ...], trail: tuple[Query, ...], collection: str):
        try:
            compared = await details(client, chosen)
            return await views_html(client, compared, trail[-1].picture if trail else None, collection)
        except (ServiceError, UploadFailed) as error:
            warn(error)
            return gr.skip()

    silent = {"show_progress": "hidden", "api_visibility": "private"}
    showing = {"fn": show, "inputs": [chosen, known, in_sight], "outputs": shown, **silent}
    tabs.select(look, None, in_sight, **silent).then(**showing)
    timer.tick(**showing)
    listed.click(toggle, chosen, [chosen, drawn], **silent).then(**showing)
    draw.click(draw_views, [chosen, trail, collection], drawn, show_progress_on=drawn, api_visibility="private")

    async def runs_(limit: int = 100) -> list[dict]:
        """The training runs, the newest first."""
        return [asdict(run) for run in await client.runs(int(limit))]

    async def run_(name: str) -> dict:
        """One run with its settings and curves."""
        return asdict(await client.run(name))

    publish(runs_, "runs")
    publish(run_, "run")
