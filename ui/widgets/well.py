"""The area where a picture is dropped, pasted or chosen. It shows the picture, and a box can be drawn on it."""

from html import escape

import gradio as gr

from ui.assets import raw_html
from ui.search.picture import Picture, facts_html


def well() -> gr.HTML:
    """Events: `upload` carries {paths} or {failure}; `part` carries the drawn {box}; `whole` removes the box."""
    return raw_html(well_html(None), ["widgets/upload", "widgets/drop", "widgets/box"], elem_id="well")


def well_html(picture: Picture | None) -> str:
    file_input = '<input type="file" accept="image/*" multiple aria-label="Choose a picture">'
    if picture is None:
        invitation = '<span class="invitation"><b>Drop a picture</b>or paste one, or click to choose</span>'
        return f'<div class="well"><label class="another">{file_input}{invitation}</label></div>'
    alt = f"The current picture: {picture.description}"
    thumbnail = "" if picture.id is None else " data-thumbnail"
    image = (
        f'<img src="{escape(picture.url)}" alt="{escape(alt)}" draggable="false" tabindex="0"{thumbnail} '
        'title="Drag a box to search by a part. Keys: arrows, with Shift to resize, then Enter.">'
    )
    box = f'<div class="box" hidden data-box="{picture.box or ""}"></div>'
    whole = '<button class="small" data-whole>Whole picture</button>' if picture.box else ""
    hint = '<span class="hint">Drag a box on the picture to search by that part.</span>' if not picture.box else ""
    return (
        f'<div class="well">{image}{box}</div><div class="facts">{facts_html(picture.name, picture.label)}</div>'
        f'<div class="taking"><span class="hint extent"></span>{hint}{whole}'
        f'<label class="another small">Choose another{file_input}</label></div>'
    )
