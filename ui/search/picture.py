"""The picture that is looked at: one that was dropped, pasted, taken or chosen from disk, or one of the collection."""

import asyncio
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import gradio as gr

from serving.client import COLLECTION
from ui.search.crop import Box, cut


@dataclass(frozen=True)
class Chosen:
    """A picture to look at: of the collection (`id`), or from the user (`file`)."""

    name: str
    label: str | None = None
    id: str | None = None
    file: Path | None = None
    collection: str = COLLECTION
    box: Box | None = None
    """The part of it that is meant."""

    @property
    def url(self) -> str:
        """Of the whole, relative to the page."""
        return f"gradio_api/file={quote(str(self.file))}" if self.file else thumbnail_url(self.id, self.collection)


class UploadFailed(ValueError):
    """A picture that did not reach this page. The message is a sentence for the user."""


def uploaded(event: gr.EventData) -> tuple[Chosen, ...]:
    """The files behind the paths that a browser names, one at least. raises UploadFailed."""
    told = event._data or {}
    if "failure" in told:
        raise UploadFailed(str(told["failure"]))
    return tuple(from_path(path) for path in told.get("paths") or [None])


def from_path(path: object) -> Chosen:
    """Only what was uploaded here is ever read. raises UploadFailed."""
    file, folder = Path(str(path)).resolve(), Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    if not (file.is_relative_to(folder) and file.is_file()):
        raise UploadFailed("That picture was not uploaded here; drop it again.")
    return Chosen(name=file.name, file=file)


def clicked(event: gr.EventData) -> Chosen:
    """The tile that was clicked, from its data attributes."""
    told = event._data or {}
    name, id, of = (str(told.get(key, "")) for key in ("name", "id", "collection"))
    return Chosen(name=name, label=told.get("label"), id=id, collection=of or COLLECTION)


async def read(client, chosen: Chosen) -> Path | bytes:
    """What the client sends as the picture; of the collection's, the thumbnail. raises UploadFailed, ServiceError."""
    if chosen.id is not None:
        picture = await client.thumbnail(chosen.id, collection=chosen.collection)
    elif chosen.file.is_file():
        picture = chosen.file
    else:
        raise UploadFailed(f"{chosen.name} is no longer held here; drop it again.")
    if chosen.box is None:
        return picture
    try:
        return await asyncio.to_thread(cut, picture, chosen.box)
    except OSError as error:
        raise UploadFailed(f"No part can be cut from {chosen.name}: it is not an image this page can read.") from error


def thumbnail_url(id: str, collection: str = COLLECTION) -> str:
    """Relative to the page, which lies at /ui/ beside the service's /collections."""
    return f"../collections/{quote(collection, safe='')}/items/{quote(id, safe='')}/thumbnail"


def described(name: str, label: str | None) -> str:
    """For those who hear the page."""
    return f"{name}, {label}" if label else name


def facts_html(name: str, label: str | None) -> str:
    """The file's own name, its whole path on hovering, and its label where there is one."""
    tag = f'<span class="label">{escape(label)}</span>' if label else ""
    return f'{tag}<span class="name" title="{escape(name)}">{escape(PurePosixPath(name).name)}</span>'


def notice(sentence: str) -> str:
    """A sentence in the place where pictures would be; `code` between backticks."""
    parts = [f"<code>{escape(p)}</code>" if i % 2 else escape(p) for i, p in enumerate(sentence.split("`"))]
    return f'<p class="notice" role="status">{"".join(parts)}</p>'


def warn(error: Exception) -> None:
    """Say in passing what went wrong; the page stays as it was."""
    gr.Warning(escape(str(error)))
