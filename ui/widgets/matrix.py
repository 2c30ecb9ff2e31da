r"""A little batch as NT-Xent sees it: the cosines of all its views with all, and what the softmax makes of them.

Each row is an anchor i; its share of the view k is exp(sim_ik / tau) over the sum of all but itself, and its loss is
-log of the positive's share. The browser computes the shares anew for each temperature, as Matrix.log_weights does.
"""

import json
from html import escape

import numpy as np

from serving.client import Matrix

TEMPERATURE = 0.2  # where the encoder's card tells none
JS = """
let kept = null, space = null;
const draw = (box) => {
    const tau = Number(box.querySelector(".tau").value);
    const cosines = JSON.parse(box.dataset[box.querySelector(".space:checked").value]);
    const rows = [...box.querySelectorAll(".shares tbody tr")], plain = [...box.querySelectorAll(".cosines tbody tr")];
    let loss = 0;
    cosines.forEach((row, i) => {
        const top = Math.max(...row.filter((_, k) => k !== i));
        const parts = row.map((cosine, k) => k === i ? 0 : Math.exp((cosine - top) / tau));
        const sum = parts.reduce((a, b) => a + b, 0);
        loss -= ((row[i ^ 1] - top) / tau - Math.log(sum)) / cosines.length;
        rows[i].querySelectorAll("td").forEach((cell, k) => {
            if (k === i) return;
            const share = parts[k] / sum;
            cell.style.setProperty("--v", share.toFixed(4));
            cell.textContent = share.toFixed(2).replace(/^0/, "");
            cell.classList.toggle("strong", share > 0.5);
            const other = plain[i].children[k + 1];
            other.style.setProperty("--v", Math.abs(row[k]).toFixed(4));
            other.textContent = row[k].toFixed(2).replace(/^(-?)0/, "$1");
            other.classList.toggle("minus", row[k] < 0);
            other.classList.toggle("strong", Math.abs(row[k]) > 0.5);
        });
    });
    box.querySelector(".tau-value").textContent = tau.toFixed(2);
    box.querySelector(".loss").textContent = loss.toFixed(3);
    kept = tau; space = box.querySelector(".space:checked").value;
};
element.addEventListener("input", ({ target }) => {
    if (target.matches(".tau, .space")) draw(target.closest(".batch"));
});
element.addEventListener("mouseover", ({ target }) => {
    const cell = target.closest("tbody td"), box = cell && cell.closest(".batch");
    if (!box || cell.classList.contains("self")) return;
    const views = JSON.parse(box.dataset.views), k = cell.cellIndex - 1, i = cell.parentNode.rowIndex - 1;
    const at = (table) => box.querySelector(table).rows[i + 1].cells[k + 1].textContent;
    const kind = k === (i ^ 1) ? "the positive" : "a negative";
    box.querySelector(".readout").textContent =
        `${views[i]} with ${views[k]}, ${kind}: cosine ${at(".cosines")}, share ${at(".shares")}`;
});
watch("value", () => {
    const box = element.querySelector(".batch");
    if (!box || kept === null) return;
    box.querySelector(".tau").value = kept;
    const chosen = box.querySelector(`.space[value="${space}"]`);
    if (chosen) chosen.checked = true;
    draw(box);
});
"""
CSS = """
#batch-bar { display: grid; grid-template-columns: minmax(0, 1fr) 240px; gap: 12px 40px; align-items: end; }
#batch-bar { margin-top: 30px; padding-top: 22px; border-top: 1px solid var(--border-color-primary); }
.batch .tuning { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 28px; margin: 0 0 14px; }
.batch .tuning label { display: flex; align-items: center; gap: 8px; }
.batch .tuning fieldset { display: flex; gap: 14px; border: 0; margin: 0; padding: 0; }
.batch .tau { width: 190px; accent-color: var(--primary-700); }
.batch .tau-value, .batch .loss { font-variant-numeric: tabular-nums; font-weight: 650; color: var(--primary-700); }
.dark .batch .tau-value { color: var(--primary-400); }
.dark .batch .loss { color: var(--primary-400); }
.dark .batch input { color-scheme: dark; }
.batch input[type="radio"] { appearance: auto; accent-color: var(--primary-700); margin: 0; }
.batch p { margin: 0; }
.batch .readout { min-height: 1.6em; margin-top: 8px; color: var(--body-text-color-subdued); font-size: 13px; }
.batch .sides { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px 34px; }
.batch table { width: 100%; border-collapse: separate; border-spacing: 1px; table-layout: fixed; }
.batch caption { text-align: left; padding: 0 0 8px; font-size: 13px; color: var(--body-text-color-subdued); }
.batch caption b { color: var(--body-text-color); font-weight: 600; }
.batch th, .batch td { padding: 0; border: 0; line-height: 1; }
.batch th span { display: block; aspect-ratio: 1; background-size: cover; border-radius: 3px; }
.batch td {
  aspect-ratio: 1; text-align: center; vertical-align: middle; border-radius: 3px; font-size: 10.5px;
  font-variant-numeric: tabular-nums; cursor: default; color: var(--body-text-color);
  background: color-mix(in oklab, #0f766e calc(var(--v) * 100%), var(--background-fill-primary));
}
.batch td.minus { background: color-mix(in oklab, #b45309 calc(var(--v) * 100%), var(--background-fill-primary)); }
.batch td.strong { color: white; }
.batch td.positive { box-shadow: 0 0 0 2px #f59e0b; position: relative; }
.batch td.self { background: repeating-linear-gradient(
  135deg, transparent 0 3px, var(--border-color-primary) 3px 4px); }
.batch td:hover { outline: 2px solid var(--body-text-color); position: relative; }
.batch.many td { font-size: 0; }
@media (max-width: 1100px) { .batch .sides { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 760px) {
  #batch-bar { grid-template-columns: minmax(0, 1fr); }
  .batch td { font-size: 0; }
}
"""
MANY = 16  # views, from which on there is no room for numbers in the cells


def matrix_html(found: Matrix, temperature: float) -> str:
    """Both tables at this temperature, with the slider for others."""
    n = len(found.pictures)
    names = [f"{picture.name.rpartition('/')[2]}, view {v}" for picture in found.pictures for v in (1, 2)]
    images = [view for picture in found.pictures for view in picture.views]
    data = {"h": found.h, "z": found.z}
    data = {name: json.dumps(cosines.tolist()) for name, cosines in data.items() if cosines is not None}
    data["views"] = json.dumps(names)
    attributes = " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())
    views = "".join(
        f"--view{i}:url('{view}');" for i, view in enumerate(images)
    )  # each once, however often it is shown
    shares = np.exp(found.log_weights(temperature))
    spaces = [("z", "z = g(h), as the loss does")] * (found.z is not None) + [("h", "h, which is served")]
    choice = "".join(
        f'<label><input type="radio" class="space" name="space" value="{value}"{" checked" * (i == 0)}>{words}</label>'
        for i, (value, words) in enumerate(spaces)
    )
    return (
        f'<div class="batch{" many" * (2 * n >= MANY)}" {attributes} style="{escape(views)}">'
        '<div class="tuning"><label>Temperature <input class="tau" type="range" min="0.02" max="1" step="0.01" '
        f'value="{temperature:g}" aria-label="Temperature"><span class="tau-value">{temperature:.2f}</span></label>'
        f'<fieldset aria-label="What is compared">{choice}</fieldset>'
        f'<p>NT-Xent of this batch: <b class="loss">{found.loss(temperature):.3f}</b>; '
        f"of {2 * n} views all alike {np.log(2 * n - 1):.3f}.</p></div>"
        '<div class="sides">'
        + _table("cosines", "<b>Cosine</b> of each view with each other", found.cosines, names)
        + _table("shares", "<b>Share</b> in the softmax of its row: the outlined should have all", shares, names)
        + '</div><p class="readout" aria-live="polite">Outlined: the positive, the other view of the same picture. All '
        "others of a row are negatives. Point at a cell to read it.</p></div>"
    )


def _table(kind: str, caption: str, values: np.ndarray, names: list[str]) -> str:
    head = "".join(f'<th scope="col">{_image(name, k)}</th>' for k, name in enumerate(names))
    body = "".join(
        f'<tr><th scope="row">{_image(names[i], i)}</th>'
        + "".join(_cell(value, i, k) for k, value in enumerate(row))
        + "</tr>"
        for i, row in enumerate(values)
    )
    return (
        f'<table class="{kind}"><caption>{caption}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _image(name: str, number: int) -> str:
    label = escape(name)
    return f'<span role="img" aria-label="{label}" title="{label}" style="background-image:var(--view{number})"></span>'


def _cell(value: float, i: int, k: int) -> str:
    if i == k:
        return '<td class="self" aria-label="itself"></td>'
    kinds = {"positive": k == i ^ 1, "minus": value < 0, "strong": abs(value) > 0.5}
    classes = " ".join(kind for kind, holds in kinds.items() if holds)
    text = f"{value:.2f}".replace("0.", ".", 1)
    return f'<td class="{classes}" style="--v:{abs(value):.4f}">{text}</td>'
