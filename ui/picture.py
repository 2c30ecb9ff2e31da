"""The picture that is looked at: one that was dropped, pasted or chosen from disk, or one of the collection."""

import os
from dataclasses import dataclass
from html import escape
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import gradio as gr

from serving.calls import COLLECTION

# Dropping and pasting work anywhere on the page; the listeners sit on elements that outlive their contents.
WELL_JS = """
const send = async (file) => {
    if (!file) return;
    element.classList.add("busy");
    try {
        const { path } = await upload(file);
        trigger("upload", { path });
    } catch (error) {
        trigger("upload", { failure: error.message });
    }
    element.classList.remove("busy");
};
element.addEventListener("change", (event) => {
    send(event.target.files[0]);
    event.target.value = "";
});
document.addEventListener("paste", (event) => send(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => {
    event.preventDefault();
    element.classList.toggle("hover", event.dataTransfer.types.includes("Files"));
});
document.addEventListener("dragleave", () => element.classList.remove("hover"));
document.addEventListener("drop", (event) => {
    event.preventDefault();
    element.classList.remove("hover");
    send(event.dataTransfer.files[0]);
});
"""


@dataclass(frozen=True)
class Chosen:
    """A picture to look at: of the collection (`id`), or from the user (`file`)."""

    name: str
    label: str | None = None
    id: str | None = None
    file: Path | None = None

    @property
    def url(self) -> str:
        """Relative to the page."""
        return f"gradio_api/file={quote(str(self.file))}" if self.file else thumbnail_url(self.id)


class UploadFailed(ValueError):
    """A picture that did not reach this page. The message is a sentence for the user."""


def uploaded(event: gr.EventData) -> Chosen:
    """The file behind the path that a browser names; only what was uploaded here is ever read. raises UploadFailed."""
    told = event._data or {}
    if "failure" in told:
        raise UploadFailed(f"The picture could not be uploaded: {told['failure']}")
    file, folder = Path(str(told.get("path"))).resolve(), Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    if not (file.is_relative_to(folder) and file.is_file()):
        raise UploadFailed("That picture was not uploaded here; drop it again.")
    return Chosen(name=file.name, file=file)


def clicked(event: gr.EventData) -> Chosen:
    """The tile that was clicked, from its data attributes."""
    told = event._data or {}
    return Chosen(name=str(told.get("name", "")), label=told.get("label"), id=str(told.get("id", "")))


async def read(client, chosen: Chosen) -> Path | bytes:
    """What the client sends as the picture; of the collection's, the thumbnail. raises UploadFailed, ServiceError."""
    if chosen.id is not None:
        return await client.thumbnail(chosen.id)
    if not chosen.file.is_file():
        raise UploadFailed(f"{chosen.name} is no longer held here; drop it again.")
    return chosen.file


def well() -> gr.HTML:
    """Shows the picture and takes another. Its `upload` event carries {path} or {failure}."""
    return gr.HTML(well_html(None), js_on_load=WELL_JS, apply_default_css=False, elem_id="well")


def well_html(chosen: Chosen | None) -> str:
    if chosen is None:
        inside = '<span class="invitation"><b>Drop a picture</b>or paste one, or click to choose</span>'
        facts = ""
    else:
        alt = f"The picture looked at: {described(chosen.name, chosen.label)}"
        inside = (
            f'<img src="{escape(chosen.url)}" alt="{escape(alt)}">'
            '<span class="again">Drop, paste or choose another</span>'
        )
        facts = facts_html(chosen.name, chosen.label)
    file_input = '<input type="file" accept="image/*" aria-label="Choose a picture">'
    return f'<label class="well">{file_input}{inside}</label><div class="facts">{facts}</div>'


def thumbnail_url(id: str) -> str:
    """Relative to the page, which lies at /ui/ beside the service's /collections."""
    return f"../collections/{COLLECTION}/items/{quote(id, safe='')}/thumbnail"


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
