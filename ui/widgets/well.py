"""Where a picture is dropped, pasted or chosen, shown, and where a part of it is marked."""

from html import escape

import gradio as gr

from ui.search.picture import Chosen, described, facts_html

# Dropping and pasting work anywhere on the page; the listeners sit on elements that outlive their contents.
UPLOAD_JS = """
const send = async (files) => {
    if (!files.length) return;
    element.classList.add("busy");
    try {
        const paths = await Promise.all(Array.from(files, async (file) => (await upload(file)).path));
        trigger("upload", { paths });
    } catch (error) {
        trigger("upload", { failure: `The picture could not be uploaded: ${error.message}` });
    }
    element.classList.remove("busy");
};
element.addEventListener("change", (event) => {
    send([...event.target.files]);
    event.target.value = "";
});
document.addEventListener("paste", (event) => send(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
    event.preventDefault();
    element.classList.toggle("hover", event.dataTransfer.types.includes("Files"));
});
document.addEventListener("dragleave", () => element.classList.remove("hover"));
document.addEventListener("drop", (event) => {
    event.preventDefault();
    element.classList.remove("hover");
    send(event.dataTransfer.files);
});
"""

# The box is drawn by dragging, or by keys: arrows move it, with Shift they move its right and lower edge.
BOX_JS = """
const LEAST_PX = 64;  // of a side; an encoder makes little of fewer
let box = null;  // left, top, right, bottom, as shares of the picture
const parts = () => ["img", ".box", ".extent"].map((name) => element.querySelector(name));
const place = () => {  // where the picture lies inside of its frame
    const [image] = parts(), { width, height } = image.getBoundingClientRect();
    const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight);
    const [w, h] = [image.naturalWidth * scale, image.naturalHeight * scale];
    return { x: (width - w) / 2, y: (height - h) / 2, w, h };
};
const paint = () => {
    const [image, mark, extent] = parts();
    if (!mark || !image.naturalWidth) return;
    mark.hidden = !box;
    if (!box) return void (extent.textContent = "");
    const { x, y, w, h } = place(), [left, top, right, bottom] = box;
    Object.assign(mark.style, {
        left: `${x + left * w}px`, top: `${y + top * h}px`,
        width: `${(right - left) * w}px`, height: `${(bottom - top) * h}px`,
    });
    const px = [(right - left) * image.naturalWidth, (bottom - top) * image.naturalHeight].map(Math.round);
    const of = image.dataset.thumbnail === undefined ? "" : " of the thumbnail";
    const few = Math.min(...px) < LEAST_PX ? "; so small a part says little" : "";
    extent.textContent = `${px[0]} × ${px[1]} pixels${of}${few}`;
};
const restore = () => {
    const mark = element.querySelector(".box");
    box = mark?.dataset.box ? mark.dataset.box.split(",").map(Number) : null;
    const image = element.querySelector("img");
    image?.complete ? paint() : image?.addEventListener("load", paint);
};
const choose = () => {
    if (box && box[2] - box[0] > 0.01 && box[3] - box[1] > 0.01) trigger("part", { box });
};
watch("value", restore);
new ResizeObserver(paint).observe(element);
element.addEventListener("pointerdown", (event) => {
    const [image] = parts();
    if (event.target !== image || event.button) return;
    event.preventDefault();
    const { left, top } = image.getBoundingClientRect(), { x, y, w, h } = place(), before = box;
    const clip = (value) => Math.min(1, Math.max(0, value));
    const at = (moved) => [clip((moved.clientX - left - x) / w), clip((moved.clientY - top - y) / h)];
    const from = at(event);
    const drag = (moved) => {
        const to = at(moved);
        box = [0, 1].map((i) => Math.min(from[i], to[i])).concat([0, 1].map((i) => Math.max(from[i], to[i])));
        paint();
    };
    image.setPointerCapture(event.pointerId);
    image.addEventListener("pointermove", drag);
    image.addEventListener("lostpointercapture", (end) => {
        image.removeEventListener("pointermove", drag);
        const drawn = Math.hypot(end.clientX - event.clientX, end.clientY - event.clientY) > 8;
        drawn ? choose() : (box = before);
        paint();
    }, { once: true });
});
element.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.target !== element.querySelector("img")) return;
    if (step) {
        box ??= [0.25, 0.25, 0.75, 0.75];
        const moved = box.map((edge, i) => edge + ((event.shiftKey && i < 2) ? 0 : step[i % 2] * 0.02));
        if (moved.every((edge) => edge >= 0 && edge <= 1) && moved[2] > moved[0] && moved[3] > moved[1]) box = moved;
        paint();
    } else if (event.key === "Enter") choose();
    else return;
    event.preventDefault();
});
element.addEventListener("click", (event) => {
    if (event.target.closest("[data-whole]")) trigger("whole");
});
"""

CSS = """
.well {
  display: grid; place-items: center; position: relative; aspect-ratio: 1; overflow: hidden;
  border-radius: 14px; border: 1.5px dashed var(--neutral-400); background: var(--background-fill-primary);
  transition: border-color 0.15s, background 0.15s;
}
.dark .well { border-color: var(--neutral-600); }
.well:has(img) { border: 1px solid var(--border-color-primary); }
.well .another { position: absolute; inset: 0; display: grid; place-items: center; }
.another { position: relative; cursor: pointer; }
.another input { position: absolute; inset: 0; opacity: 0; cursor: pointer; font-size: 0; width: 100%; }
.well img {
  position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; cursor: crosshair; touch-action: none;
}
.well img:focus-visible { outline: 3px solid var(--primary-500); outline-offset: -3px; border-radius: 13px; }
.well:hover, .well:focus-within, .hover .well { border-color: var(--primary-600); }
.hover .well { background: color-mix(in srgb, var(--primary-500) 12%, var(--background-fill-primary)); }
.busy .well { opacity: 0.6; }
.box {
  position: absolute; pointer-events: none; border: 2px solid white; border-radius: 3px;
  box-shadow: 0 0 0 1px rgb(0 0 0 / 0.5), 0 0 0 999px rgb(0 0 0 / 0.45);
}
.invitation { text-align: center; color: var(--body-text-color-subdued); padding: 20px; line-height: 1.5; }
.invitation b { display: block; color: var(--body-text-color); font-weight: 600; font-size: 16px; }
.taking { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; margin-top: 8px; }
.well + .facts { margin-top: 10px; }
.taking .hint { font-size: 12px; color: var(--body-text-color-subdued); flex-basis: 100%; }
.hint:empty { display: none; }
@media (max-width: 760px) { .well { aspect-ratio: 16 / 9; } }
"""


def well() -> gr.HTML:
    """Shows the picture and takes others. Its `upload` event carries {paths} or {failure}; `part` carries {box}, and
    `whole` clears it."""
    return gr.HTML(well_html(None), js_on_load=UPLOAD_JS + BOX_JS, apply_default_css=False, elem_id="well")


def well_html(chosen: Chosen | None) -> str:
    file_input = '<input type="file" accept="image/*" multiple aria-label="Choose a picture">'
    if chosen is None:
        invitation = '<span class="invitation"><b>Drop a picture</b>or paste one, or click to choose</span>'
        return f'<div class="well"><label class="another">{file_input}{invitation}</label></div>'
    alt = f"The picture looked at: {described(chosen.name, chosen.label)}"
    thumbnail = "" if chosen.id is None else " data-thumbnail"
    image = (
        f'<img src="{escape(chosen.url)}" alt="{escape(alt)}" draggable="false" tabindex="0"{thumbnail} '
        'title="Drag a box to search by a part. Keys: arrows, with Shift to resize, then Enter.">'
    )
    box = f'<div class="box" hidden data-box="{chosen.box or ""}"></div>'
    whole = '<button class="small" data-whole>Whole picture</button>' if chosen.box else ""
    hint = '<span class="hint">Drag a box on the picture to search by that part.</span>' if not chosen.box else ""
    return (
        f'<div class="well">{image}{box}</div><div class="facts">{facts_html(chosen.name, chosen.label)}</div>'
        f'<div class="taking"><span class="hint extent"></span>{hint}{whole}'
        f'<label class="another small">Choose another{file_input}</label></div>'
    )
