"""A picture on the page: dropped, pasted, photographed or chosen from disk, or an item of the collection."""

import asyncio
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import gradio as gr

from serving.client import COLLECTION, AsyncClient
from ui.search.crop import Box, cut


@dataclass(frozen=True)
class Picture:
    """From the collection (with `id`) or from the user (with `file`)."""

    name: str
    label: str | None = None
    id: str | None = None
    file: Path | None = None
    collection: str = COLLECTION
    box: Box | None = None
    """The part to search by; None for the whole picture."""

    @property
    def url(self) -> str:
        """Address of the whole picture, relative to the page."""
        if self.file:
            return f"gradio_api/file={quote(str(self.file))}"
        return thumbnail_url(self.id or "", self.collection)

    @property
    def description(self) -> str:
        """For alternative texts."""
        return f"{self.name}, {self.label}" if self.label else self.name


class UploadFailed(ValueError):
    """A picture that did not reach this page. The message is a sentence for the user."""


def uploaded(event: gr.EventData) -> tuple[Picture, ...]:
    """The uploaded files, at least one, whose paths the browser sends. Raises UploadFailed."""
    data = event._data or {}
    if "failure" in data:
        raise UploadFailed(str(data["failure"]))
    return tuple(from_path(path) for path in data.get("paths") or [None])


def from_path(path: object) -> Picture:
    """A picture in the folder of uploads; no other file is ever read. Raises UploadFailed."""
    file, folder = Path(str(path)).resolve(), Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    if not (file.is_relative_to(folder) and file.is_file()):
        raise UploadFailed("That picture was not uploaded here; drop it again.")
    return Picture(name=file.name, file=file)


def clicked(event: gr.EventData) -> Picture:
    """The tile that was clicked, from its data attributes."""
    data = event._data or {}
    name, id, collection = (str(data.get(key, "")) for key in ("name", "id", "collection"))
    return Picture(name=name, label=data.get("label"), id=id, collection=collection or COLLECTION)


async def read(client: AsyncClient, picture: Picture) -> Path | bytes:
    """The image to send to the service; for an item, its thumbnail. Raises UploadFailed, ServiceError."""
    image: Path | bytes
    if picture.id is not None:
        image = await client.thumbnail(picture.id, collection=picture.collection)
    elif picture.file and picture.file.is_file():
        image = picture.file
    else:
        raise UploadFailed(f"{picture.name} is no longer stored here; drop it again.")
    if picture.box is None:
        return image
    try:
        return await asyncio.to_thread(cut, image, picture.box)
    except OSError as error:
        raise UploadFailed(f"{picture.name} cannot be cropped: it is not an image this page can read.") from error


def thumbnail_url(id: str, collection: str = COLLECTION) -> str:
    """Relative to the page, which is at /ui/; the service's collections are at /collections."""
    return f"../collections/{quote(collection, safe='')}/items/{quote(id, safe='')}/thumbnail"


def facts_html(name: str, label: str | None) -> str:
    """The label, if there is one, and the file's name, with its whole path on hovering."""
    tag = f'<span class="label">{escape(label)}</span>' if label else ""
    return f'{tag}<span class="name" title="{escape(name)}">{escape(PurePosixPath(name).name)}</span>'


def notice(sentence: str) -> str:
    """A sentence shown instead of pictures; text between backticks is set as code."""
    return f'<p class="notice" role="status">{with_code(sentence)}</p>'


def with_code(sentence: str) -> str:
    """HTML of a sentence in which text between backticks is set as code."""
    return "".join(f"<code>{escape(p)}</code>" if i % 2 else escape(p) for i, p in enumerate(sentence.split("`")))


def warn(error: Exception) -> None:
    """Show what went wrong in a message that disappears; the page stays as it was."""
    gr.Warning(escape(str(error)))
