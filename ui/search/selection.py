"""The pictures that were selected, as a file to be kept: a CSV of all that is known, or a list of their paths."""

import csv
import io
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from html import escape
from pathlib import Path

import gradio as gr

from serving.client import Item
from ui.search.conditions import parsed
from ui.search.query import Settings

PAGE = 1000  # items of one request
IDS = 200  # of one condition: it stands in an address
FACTS = ("id", "name", "label", "similarity", "path")
NAMES = {"csv": "twinview.csv", "paths": "twinview-paths.txt"}
JS = """watch("value", () => element.querySelector("a")?.click());"""  # saves what has come


def download() -> gr.HTML:
    """Saves the file of a `download_html` that is put into it."""
    return gr.HTML(js_on_load=JS, apply_default_css=False, elem_id="download", elem_classes="unseen")


def download_html(path: Path) -> str:
    return f'<a href="gradio_api/file={escape(str(path))}" download="{escape(path.name)}" tabindex="-1"></a>'


async def selected(client, told: dict, settings: Settings, report: Callable[[int, int], None]) -> list[tuple]:
    """Rows (item, similarity or None). told: what the grid's `export` carries. raises ServiceError, ConditionProblem"""
    chosen = {str(id): cosine and float(cosine) for id, cosine in told.get("chosen") or []}
    if told.get("all"):
        return [(item, None) async for item in _every(client, settings, report) if item.id not in chosen]
    rows, ids = {}, list(chosen)
    for at in range(0, len(ids), IDS):
        some = {"id": {"in": ids[at : at + IDS]}}
        answer = await client.items(IDS, 0, some, collection=settings.collection, model=settings.encoder)
        rows |= {item.id: (item, chosen[item.id]) for item in answer.items}
        report(min(at + IDS, len(ids)), len(ids))
    return [rows[id] for id in ids if id in rows]


async def _every(client, settings: Settings, report: Callable[[int, int], None]) -> AsyncIterator[Item]:
    offset, where = 0, parsed(settings.where)
    while True:
        answer = await client.items(PAGE, offset, where, collection=settings.collection, model=settings.encoder)
        for item in answer.items:
            yield item
        offset += len(answer.items)
        report(offset, answer.count)
        if not answer.items or offset >= answer.count:
            return


def written(rows: list[tuple], format: str) -> Path:
    """The file, where Gradio serves it from."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"], prefix="selection-"))
    path = folder / NAMES[format]
    path.write_text(as_csv(rows) if format == "csv" else as_paths(rows), encoding="utf-8")
    return path


def as_csv(rows: list[tuple]) -> str:
    """A column for each key of metadata; one that is named like ours has `metadata.` before it."""
    keys = sorted({key for item, _ in rows for key in item.metadata})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*FACTS, *(f"metadata.{key}" if key in FACTS else key for key in keys)])
    for item, similarity in rows:
        facts = (item.id, item.name, item.label, similarity, item.path, *(item.metadata.get(key) for key in keys))
        writer.writerow([_harmless(fact) for fact in facts])
    return buffer.getvalue()


def as_paths(rows: list[tuple]) -> str:
    """One a line; the name of a picture whose path is not known."""
    return "".join(f"{' '.join((item.path or item.name).splitlines())}\n" for item, _ in rows)


def _harmless(fact):
    """A text that a spreadsheet would run as a formula is given a mark that shows it as a text."""
    return f"'{fact}" if isinstance(fact, str) and fact[:1] in ("=", "+", "-", "@", "\t", "\r") else fact
