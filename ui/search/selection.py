"""The selected pictures as a file for the user: a CSV with all their fields, or a list of their paths."""

import io
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr

from export.spreadsheet import write_rows
from serving.client import AsyncClient, Item
from serving.protocol.filters import parse_conditions
from ui.assets import raw_html
from ui.search.query import SearchSettings

PAGE = 1000  # items per request
IDS = 200  # ids per condition, because it is part of an address
FACTS = ("id", "name", "label", "similarity", "path")
NAMES = {"csv": "twinview.csv", "paths": "twinview-paths.txt"}

Row: TypeAlias = tuple[Item, float | None]  # with its similarity
Report: TypeAlias = Callable[[int, int], None]  # called with the number done and the total


def download() -> gr.HTML:
    """A hidden component that saves the file named by the `download_html` put into it."""
    return raw_html(scripts=["search/selection"], elem_id="download", elem_classes="unseen")


def download_html(path: Path) -> str:
    return f'<a href="gradio_api/file={escape(str(path))}" download="{escape(path.name)}" tabindex="-1"></a>'


async def selected_rows(
    client: AsyncClient, selection: dict[str, Any], settings: SearchSettings, report: Report
) -> list[Row]:
    """selection: as the grid's `export` event sends it. Raises ServiceError, FilterProblem."""
    chosen = {str(id): cosine and float(cosine) for id, cosine in selection.get("chosen") or []}
    if selection.get("all"):
        return [(item, None) async for item in _all_items(client, settings, report) if item.id not in chosen]
    items = {item.id: item for item in await items_of(client, list(chosen), settings, report)}
    return [(items[id], cosine) for id, cosine in chosen.items() if id in items]


async def items_of(
    client: AsyncClient, ids: Sequence[str], settings: SearchSettings, report: Report = lambda done, of: None
) -> list[Item]:
    """The items with these ids, in this order, without those that no longer exist. Raises ServiceError."""
    items: dict[str, Item] = {}
    for at in range(0, len(ids), IDS):
        condition = {"id": {"in": list(ids[at : at + IDS])}}
        answer = await client.items(IDS, 0, condition, collection=settings.collection, model=settings.encoder)
        items |= {item.id: item for item in answer.items}
        report(min(at + IDS, len(ids)), len(ids))
    return [items[id] for id in ids if id in items]


async def _all_items(client: AsyncClient, settings: SearchSettings, report: Report) -> AsyncIterator[Item]:
    offset, where = 0, parse_conditions(settings.where)
    while True:
        answer = await client.items(PAGE, offset, where, collection=settings.collection, model=settings.encoder)
        for item in answer.items:
            yield item
        offset += len(answer.items)
        report(offset, answer.count)
        if not answer.items or offset >= answer.count:
            return


def write(rows: Sequence[Row], format: str) -> Path:
    """Write the file, csv or paths, in a folder that Gradio serves files from."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"], prefix="selection-"))
    path = folder / NAMES[format]
    path.write_text(as_csv(rows) if format == "csv" else as_paths([item for item, _ in rows]), encoding="utf-8")
    return path


def as_csv(rows: Sequence[Row]) -> str:
    """Has a column for each metadata key, with the prefix `metadata.` if the key has the name of another column."""
    keys = sorted({key for item, _ in rows for key in item.metadata})
    buffer = io.StringIO()
    rows_of_cells: list[list[Any]] = [[*FACTS, *(f"metadata.{key}" if key in FACTS else key for key in keys)]]
    for item, similarity in rows:
        facts = (item.id, item.name, item.label, similarity, item.path)
        rows_of_cells.append([*facts, *(item.metadata.get(key) for key in keys)])
    write_rows(buffer, rows_of_cells)
    return buffer.getvalue()


def as_paths(items: Sequence[Item]) -> str:
    """One path per line; the name if an item has no path."""
    return "".join(f"{' '.join((item.path or item.name).splitlines())}\n" for item in items)
