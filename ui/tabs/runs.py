"""The tab Runs: the training runs, their curves, and the settings in which they differ."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import gradio as gr

from export.suggest import program
from serving.client import AsyncClient, Run, RunDetails, ServiceError
from ui.api import EACH, PRIVATE, QUIET, publish
from ui.assets import raw_html
from ui.search.picture import Picture, UploadFailed, notice, read, warn
from ui.search.quality import run_of
from ui.search.query import Trail
from ui.tabs.tab import Tab
from ui.widgets.chart import MOST_COLOURS, Line, chart

POLL_S = 2.0
MOST = MOST_COLOURS  # runs that are compared
MOST_POINTS = 300  # of a line; the chart has no more pixels
PAIRS = 3
EMPTY = (
    f"No run has been trained here yet. `{program('training/pretrain.py')} --data ~/Pictures` starts one, and its "
    "curves grow here."
)
FULL = f"{MOST} runs can be compared at a time; remove one first."
NO_PICTURE = "The collection is empty; drop a picture to draw views of it."
STATES = {"training": "training now", "finished": "finished", "stopped": "stopped"}
FIGURES = {"accuracy": "accuracy", "held_out": "held out", "knn": "kNN", "views_matched": "views matched"}  # best first
NOT_DRAWN = ("epoch", "step", "chance", "k", "bank", "queries", "pictures")
TITLES = {
    "loss": "Loss",
    "knn": "kNN accuracy",
    "views_matched": "Views matched",
    "held_out": "Held-out accuracy",
    "held_out_loss": "Held-out loss",
    "lr": "Learning rate",
    "images_per_s": "Images per second",
    "wait_share": "Time spent waiting for data",
}
LOSSES = ("loss", "held_out_loss")
SHARES = ("knn", "views_matched", "held_out", "wait_share")  # shown as percentages


def still_listed(runs: Sequence[Run], chosen: Sequence[str], served: str | None = None) -> tuple[str, ...]:
    """Names of the chosen runs that still exist; if none exists, of the run that is served, else of the newest."""
    names = [run.name for run in runs]
    return tuple([name for name in chosen if name in names] or [name for name in names if name == served] or names[:1])


async def details(client: AsyncClient, names: Sequence[str]) -> list[RunDetails]:
    """Raises ServiceError."""
    return list(await asyncio.gather(*(client.run(name) for name in names)))


def list_html(runs: Sequence[Run], chosen: Sequence[str], now: float, served: str | None = None) -> str:
    """served: name of the run whose encoder answers searches"""
    rows = "".join(f"<li>{_row(run, chosen, now, run.name == served)}</li>" for run in runs)
    return f'<ul class="runs">{rows}</ul>'


def _row(run: Run, chosen: Sequence[str], now: float, served: bool) -> str:
    pressed = run.name in chosen
    colour = f" c{chosen.index(run.name)}" if pressed else ""
    encoder = run.encoder or f"from {run.init}"
    figure = next((f"{words} {run.figures[name]:.1%}" for name, words in FIGURES.items() if name in run.figures), "")
    cells = {
        "name": f"<b>{escape(run.name)}</b>" + " <i>served</i>" * served,
        "data": escape(f"{encoder}, {run.data}"),
        f"state {run.state}": STATES[run.state],
        "epochs": f"{run.epoch:,} of {run.epochs:,}",
        "judged": escape(figure),
        "when": _ago(now - run.changed),
    }
    attributes = f'aria-pressed="{str(pressed).lower()}" title="{escape(f"{run.name}: {run.kind}")}"'
    spans = '<span class="swatch"></span>'
    spans += "".join(f'<span class="{name}">{text}</span>' for name, text in cells.items())
    return f'<button type="button" class="run{colour}" data-run="{escape(run.name)}" {attributes}>{spans}</button>'


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def curves_html(runs: Sequence[RunDetails]) -> str:
    """A chart for each column that any of the runs has, and the runs' names with their colours."""
    known = {name for run in runs for name, column in run.metrics.items() if any(v is not None for v in column)}
    columns = [name for name in dict.fromkeys([*TITLES, *sorted(known)]) if name in known and name not in NOT_DRAWN]
    kinds = list(dict.fromkeys(run.kind for run in runs))
    if not columns:
        return notice("The first epoch is not finished yet; the curves start after it.")
    charts = "".join(
        _chart(name, [(i, run) for i, run in enumerate(runs) if run.kind == kind or name not in LOSSES], kind)
        for name in columns
        for kind in (kinds if name in LOSSES else [""])  # losses of different kinds cannot be compared
    )
    names = "".join(f'<span class="c{i}">{escape(run.name)}</span>' for i, run in enumerate(runs))
    key = f'<p class="key">{names}</p>' if len(runs) > 1 else ""
    return f'{key}<div class="charts">{charts}</div>'


def _chart(column: str, runs: Sequence[tuple[int, RunDetails]], kind: str) -> str:
    """runs: with their colours, all of the `kind` unless it is empty. Empty if none of them has the column."""
    say: Callable[[float], str] = (lambda v: f"{100 * v:.3g}%") if column in SHARES else (lambda v: f"{v:.4g}")
    levels = {run.chance for _, run in runs}
    chance = levels.pop() if column == "loss" and len(levels) == 1 else None
    lines = [Line(run.name, i, _points(run, column)) for i, run in runs]
    if not any(line.points for line in lines):
        return ""
    last = max(run.epochs if run.state == "training" else run.epoch for _, run in runs)
    title = TITLES.get(column, column.replace("_", " ")) + (f" of {kind}" if kind not in ("", "pretraining") else "")
    return chart(title, lines, last, say, chance, (0, 1) if column in SHARES else None)


def _points(run: RunDetails, column: str) -> list[tuple[float, float]]:
    pairs = zip(run.metrics.get("epoch", []), run.metrics.get(column, []), strict=False)
    points = [(epoch, value) for epoch, value in pairs if epoch is not None and value is not None]
    every = -(-len(points) // MOST_POINTS) or 1
    return points[::-1][::every][::-1]  # including the last


def settings_html(runs: Sequence[RunDetails]) -> str:
    """All settings of one run, or a table of several runs' settings with those that differ first."""
    flat = [dict(_flat(run.settings)) for run in runs]
    names = [name for name in dict.fromkeys(name for run in flat for name in run) if name not in ("name", "resume")]
    texts = {name: [_text(run.get(name)) for run in flat] for name in names}
    if len(runs) == 1:
        rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(texts[name][0])}</dd></div>" for name in names)
        return f"<h3>Settings of {escape(runs[0].name)}</h3><dl>{rows}</dl>"
    head = f"<thead><tr><th></th>{''.join(f'<th scope=col>{escape(run.name)}</th>' for run in runs)}</tr></thead>"

    def table(names: list[str], kind: str) -> str:
        cells = {name: "".join(f"<td>{escape(text)}</td>" for text in texts[name]) for name in names}
        rows = (f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{cells[name]}</tr>' for name in names)
        return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'

    differing = [name for name in names if len(set(texts[name])) > 1]
    same = [name for name in names if name not in differing]
    first = table(differing, "differs") if differing else "<p>All settings are the same.</p>"
    rest = f"<details><summary>{len(same)} settings that are the same</summary>{table(same, 'same')}</details>"
    return f"<h3>Settings that differ</h3>{first}{rest}"


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _text(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


async def views_html(client: AsyncClient, runs: Sequence[RunDetails], picture: Picture | None, collection: str) -> str:
    """Pairs of views of a picture as each run draws them; without a picture, of the collection's first one. Raises
    ServiceError, UploadFailed."""
    if picture is None:
        items = (await client.items(limit=1, collection=collection)).items
        if not items:
            return notice(NO_PICTURE)
        picture = Picture(items[0].name, id=items[0].id, collection=collection)
    image = await read(client, picture)
    parts = []
    for i, run in enumerate(runs):
        alt = f"A view as {escape(run.name)} draws it"
        drawn = await client.views(image, pairs=PAIRS, seed=0, **(run.settings.get("augment") or {}))
        images = ["".join(f'<img src="{escape(view)}" alt="{alt}">' for view in pair.views) for pair in drawn]
        pairs = "".join(f'<li class="pair">{pair}</li>' for pair in images)
        parts.append(f'<h3 class="c{i}">Views that {escape(run.name)} trained with</h3>')
        parts.append(f'<ul class="pairs" style="--pairs:{PAIRS}">{pairs}</ul>')
    return "".join(parts)


class RunsTab(Tab):
    """Loads the runs when it is selected, and every POLL_S seconds while one of them is training."""

    title = "Runs"

    def build(self) -> None:
        self.list = raw_html(scripts=["tabs/runs"], elem_id="run-list")
        self.curves = raw_html(scripts=["widgets/chart"], elem_id="run-curves")
        with gr.Row(elem_id="runs-bar"):
            self.draw = gr.Button("Draw its views", size="sm", elem_id="draw-views", visible=False)
        self.drawn = raw_html(elem_id="run-views")
        self.settings = raw_html(elem_id="run-settings")
        self.chosen, self.shown = gr.State(()), gr.State(None)
        self.timer = gr.Timer(POLL_S, active=False)
        self.outputs = [self.chosen, self.shown, self.list, self.curves, self.settings, self.draw, self.timer]

    def connect(self) -> None:
        inputs = [self.chosen, self.shown, self.selected]
        showing: dict[str, Any] = {"fn": self.show, "inputs": inputs, "outputs": self.outputs, **QUIET}
        self.selected.change(**showing)
        self.timer.tick(**showing)
        self.list.click(self.toggle, self.chosen, [self.chosen, self.drawn], **EACH).then(**showing)
        inputs = [self.chosen, self.trail, self.collection]
        self.draw.click(self.draw_views, inputs, self.drawn, show_progress_on=self.drawn, **PRIVATE)
        publish(self.runs, "runs")
        publish(self.run, "run")

    async def show(self, names: tuple[str, ...], before: tuple | None, selected: str) -> dict[Any, Any]:
        """Skips the update if nothing has changed since `before`: it would hide the values shown at the pointer."""
        if selected != self.title:
            return {self.timer: gr.Timer(active=False)}
        try:
            runs = await self.client.runs()
            cards = await self.client.models()
            served = run_of(cards[0]) if cards else None
            names = still_listed(runs, names, served)
            now = (runs, names, served, int(time.time()) // 60)  # the rows say how many minutes ago
            timer = gr.Timer(active=any(run.state == "training" for run in runs))
            if now == before:
                return {self.timer: timer}
            compared = await details(self.client, names)
        except ServiceError as error:
            return {self.list: notice(str(error)), self.timer: gr.Timer(active=False), self.shown: None}
        if not runs:
            hidden = gr.update(visible=False)
            return {self.list: notice(EMPTY), self.curves: "", self.settings: "", self.draw: hidden, self.timer: timer}
        button = gr.update(visible=True, value="Draw its views" if len(names) == 1 else "Draw their views")
        parts = list_html(runs, names, time.time(), served), curves_html(compared), settings_html(compared)
        return dict(zip(self.outputs, (names, now, *parts, button, timer), strict=True))

    def toggle(self, chosen: tuple[str, ...], event: gr.EventData) -> tuple[Any, Any]:
        """Add the run to those compared, or take it out unless it is the only one."""
        name = str((event._data or {}).get("run", ""))
        if name in chosen:
            return tuple(other for other in chosen if other != name) or chosen, ""
        if len(chosen) >= MOST:
            gr.Warning(FULL)
            return gr.skip(), gr.skip()
        return (*chosen, name), ""

    async def draw_views(self, chosen: tuple[str, ...], trail: Trail, collection: str) -> Any:
        try:
            compared = await details(self.client, chosen)
            return await views_html(self.client, compared, trail[-1].picture if trail else None, collection)
        except (ServiceError, UploadFailed) as error:
            warn(error)
            return gr.skip()

    # For programs

    async def runs(self, limit: int = 100) -> list[dict[str, Any]]:
        """The training runs, the newest first."""
        return [asdict(run) for run in await self.client.runs(int(limit))]

    async def run(self, name: str) -> dict[str, Any]:
        """One run with its settings and curves."""
        return asdict(await self.client.run(name))
