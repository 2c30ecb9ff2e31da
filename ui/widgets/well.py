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
    # On a phone the first input offers the camera and the photos; this one opens the camera at once.
    camera = '<input type="file" accept="image/*" capture="environment" aria-label="Take a photo">'
    photo = f'<label class="another small photo">Take a photo{camera}</label>'
    if picture is None:
        words = '<span class="at-desk"><b>Drop a picture</b>or paste one, or click to choose</span>'
        words += '<b class="on-phone">Take or choose a photo</b>'
        label = f'<label class="another">{file_input}<span class="invitation">{words}</span></label>'
        return f'<div class="well">{label}</div><div class="taking">{photo}</div>'
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
        f'<div class="current"><div class="well">{image}{box}</div>'
        f'<div class="facts">{facts_html(picture.name, picture.label)}</div>'
        f'<div class="taking"><span class="hint extent"></span>{hint}{whole}'
        f'<label class="another small">Choose another{file_input}</label>{photo}</div></div>'
    )
