"""A picture taken with the camera, in the browser. The button is shown only where the browser has cameras."""

import gradio as gr

HTML = """<button class="small" hidden>Take a picture</button>
<dialog aria-label="Take a picture">
  <video autoplay playsinline muted></video>
  <div class="choice"><button class="small strong" data-take>Take it</button>
  <button class="small" data-cancel>Cancel</button></div>
</dialog>"""

JS = """
const [open, dialog, video] = ["button", "dialog", "video"].map((name) => element.querySelector(name));
const WORDS = {
    NotAllowedError: "The browser may not use the camera. Allow it beside the page's address, then try again.",
    NotFoundError: "The camera is gone; connect it, then try again.",
    NotReadableError: "The camera is in use by another program; close that, then try again.",
};
const cameras = async () => {
    const devices = (await navigator.mediaDevices?.enumerateDevices?.()) ?? [];
    open.hidden = !devices.some((device) => device.kind === "videoinput");
};
cameras();
navigator.mediaDevices?.addEventListener?.("devicechange", cameras);
open.addEventListener("click", async () => {
    try {
        video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
        dialog.showModal();
    } catch (error) {
        trigger("upload", { failure: WORDS[error.name] ?? `The camera does not work: ${error.message}` });
    }
});
dialog.addEventListener("close", () => {
    video.srcObject?.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
});
dialog.querySelector("[data-cancel]").addEventListener("click", () => dialog.close());
dialog.querySelector("[data-take]").addEventListener("click", async () => {
    const canvas = Object.assign(document.createElement("canvas"), {
        width: video.videoWidth, height: video.videoHeight,
    });
    if (!canvas.width) return;  // it has not begun yet
    canvas.getContext("2d").drawImage(video, 0, 0);
    dialog.close();
    canvas.toBlob(async (blob) => {
        try {
            const { path } = await upload(new File([blob], "from the camera.jpg", { type: "image/jpeg" }));
            trigger("upload", { paths: [path] });
        } catch (error) {
            trigger("upload", { failure: `The picture could not be uploaded: ${error.message}` });
        }
    }, "image/jpeg", 0.95);
});
"""

CSS = """
#camera dialog {
  margin: auto; padding: 14px; border: 0; border-radius: 14px; max-width: min(92vw, 760px);
  background: var(--background-fill-primary); color: var(--body-text-color);
}
#camera dialog::backdrop { background: rgb(0 0 0 / 0.6); }
#camera video { display: block; width: 100%; min-width: 240px; aspect-ratio: 4 / 3; border-radius: 8px; }
#camera .choice { display: flex; justify-content: center; gap: 10px; margin-top: 12px; }
"""


def camera() -> gr.HTML:
    """Its `upload` event carries {paths} or {failure}."""
    return gr.HTML(HTML, js_on_load=JS, apply_default_css=False, elem_id="camera")
