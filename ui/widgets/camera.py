"""A picture taken with the camera, in the browser."""

import gradio as gr

from ui.assets import raw_html

HTML = """<button class="small" hidden>Take a picture</button>
<dialog aria-label="Take a picture">
  <video autoplay playsinline muted></video>
  <div class="choice"><button class="small strong" data-take>Take it</button>
  <button class="small" data-cancel>Cancel</button></div>
</dialog>"""


def camera() -> gr.HTML:
    """Its `upload` event carries {paths} or {failure}."""
    return raw_html(HTML, ["widgets/upload", "widgets/camera"], elem_id="camera")
