"""Pictures of a collection as tiles: to be searched from, to be added to the search, to be selected."""

from collections.abc import Iterable, Sequence
from html import escape

from serving.client import Item, Match
from ui.search.picture import described, facts_html, thumbnail_url

# A selection outlives the tiles: it holds what was chosen under other searches, and with `all` everything that the
# collection shows but what was taken out again, in sight or not.
JS = """
let all = false, chosen = new Map(), last = null, view = null;  // chosen: id -> similarity; with `all` what is left out
const tiles = () => [...element.querySelectorAll(".tile")];
const isIn = (id) => all !== chosen.has(id);
const put = (tile, wanted) => {
    if (isIn(tile.dataset.id) === wanted) return;
    wanted !== all ? chosen.set(tile.dataset.id, tile.dataset.similarity ?? null) : chosen.delete(tile.dataset.id);
};
const paint = () => {
    for (const tile of tiles()) {
        const wanted = isIn(tile.dataset.id);
        tile.closest("li").classList.toggle("picked", wanted);
        tile.closest("li").querySelector(".pick").checked = wanted;
    }
    const bar = element.querySelector(".selection");
    if (!bar) return;
    const count = all ? bar.dataset.total - chosen.size : chosen.size;
    bar.classList.toggle("some", count > 0);
    bar.querySelector(".count").textContent = count ? `${count.toLocaleString("en")} selected` : "";
};
const renew = () => {
    const now = element.querySelector(".selection")?.dataset;
    if (!now || now.view === view) return void paint();
    const [of, before] = [now.view, view ?? ""].map((one) => one.split("\\n")[0]);  // the collections
    if (all || of !== before) all = false, chosen.clear();
    view = now.view;
    last = null;
    window.scrollTo({ top: 0, behavior: "smooth" });
    paint();
};
watch("value", renew);
element.addEventListener("click", (event) => {
    const has = (what) => event.target.closest(what);
    const tile = has("li")?.querySelector(".tile"), bar = element.querySelector(".selection");
    if (has("[data-select]")) {
        chosen.clear();
        all = has("[data-select]").dataset.select === "all" && Number(bar.dataset.total) > tiles().length;
        if (has("[data-select]").dataset.select === "all" && !all) tiles().forEach((one) => put(one, true));
    } else if (has("[data-export]")) {
        return void trigger("export", { format: has("[data-export]").dataset.export, all, chosen: [...chosen] });
    } else if (tile && has(".sign")) {
        return void trigger(has(".sign").value === "like" ? "like" : "unlike", { ...tile.dataset });
    } else if (tile && (has(".pick") || event.shiftKey)) {
        const wanted = !isIn(tile.dataset.id), every = tiles(), ends = [every.indexOf(last), every.indexOf(tile)];
        const from = event.shiftKey && ends[0] >= 0 ? Math.min(...ends) : ends[1];
        every.slice(from, Math.max(...ends) + 1).forEach((one) => put(one, wanted));
        last = tile;
    } else if (has(".tile")) {
        return void trigger("click", { ...tile.dataset });
    } else return;
    paint();
});
element.addEventListener("keydown", (event) => {  // of a tile that has the focus
    const item = event.target.matches(".tile") && event.target.closest("li");
    const what = { "+": ".sign[value=like]", "-": ".sign[value=unlike]", x: ".pick" }[event.key];
    if (!item || !what || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    item.querySelector(what).click();
});
"""

CSS = """
.grid { list-style: none; padding: 0; margin: 0; display: grid; }
.grid { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 22px 16px; }
.grid li { min-width: 0; margin: 0; position: relative; }
.tile { display: block; width: 100%; padding: 0; border: 0; background: none; text-align: left; cursor: pointer; }
.tile img {
  width: 100%; aspect-ratio: 1; object-fit: cover; display: block; border-radius: 10px;
  background: var(--neutral-200); transition: transform 0.15s, box-shadow 0.15s;
}
.dark .tile img { background: var(--neutral-800); }
.tile:hover img { box-shadow: 0 6px 18px rgb(0 0 0 / 0.18); }
.tile:focus-visible { outline: none; }
.tile:focus-visible img, .picked .tile img { outline: 3px solid var(--primary-500); outline-offset: 2px; }
.caption { margin-top: 7px; }
.both .score::after {
  content: ""; display: inline-block; width: 7px; height: 7px; margin-left: 5px; border-radius: 50%;
  background: var(--primary-500); vertical-align: 0.1em;
}
.pick, .signs { position: absolute; top: 7px; opacity: 0; transition: opacity 0.12s; }
.grid .pick {
  left: 7px; width: 22px; height: 22px; margin: 0; padding: 0; cursor: pointer; appearance: none; border: 0;
  border-radius: 6px; background: rgb(255 255 255 / 0.92); box-shadow: 0 1px 3px rgb(0 0 0 / 0.4);
}
.grid .pick:checked { background: var(--primary-700); }
.grid .pick:checked::after {
  content: ""; position: absolute; left: 8px; top: 3px; width: 5px; height: 11px; rotate: 42deg;
  border: solid white; border-width: 0 2.5px 2.5px 0;
}
.grid .pick:focus-visible { outline: 3px solid var(--primary-500); outline-offset: 1px; }
.signs { right: 7px; display: flex; gap: 4px; }
.sign {
  width: 24px; height: 24px; padding: 0; border: 0; border-radius: 6px; cursor: pointer; font: 600 15px/1 var(--font);
  color: #292524; background: rgb(255 255 255 / 0.92); box-shadow: 0 1px 3px rgb(0 0 0 / 0.3);
}
.sign:hover, .sign:focus-visible { background: var(--primary-700); color: white; outline: none; }
li:hover > .pick, li:hover > .signs, li:focus-within > .pick, li:focus-within > .signs, .picked > .pick { opacity: 1; }
@media (hover: none) { .grid .pick, .grid .signs { opacity: 1; } }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 28px; }
.columns h3 { margin: 0 0 12px; font-size: 13px; font-weight: 600; overflow-wrap: anywhere; }
.columns .grid { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); }
.selection { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; min-height: 30px; margin: 0 0 14px; }
.selection .count { font-weight: 600; font-size: 13px; font-variant-numeric: tabular-nums; margin-left: auto; }
.selection:not(.some) .of-some { display: none; }
@media (max-width: 760px) {
  .grid { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 14px 10px; }
  .grid .label + .name { display: none; }
  .grid .caption { flex-wrap: nowrap; }
  .grid .label { overflow: hidden; text-overflow: ellipsis; }
  .columns { gap: 12px; }
  .columns .grid { grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)); }
}
"""


def grid_html(items: Sequence[Item], collection: str, both: Iterable[str] = ()) -> str:
    """Tiles of a picture with its name and label, and its similarity where it has one. both: ids to be marked.

    Made here, with everything escaped: Gradio's own template language would run a `${...}` in a file name.
    """
    both = set(both)
    return f'<ul class="grid">{"".join(_tile(item, collection, item.id in both) for item in items)}</ul>'


def selection_html(total: int, collection: str, view: str) -> str:
    """What stands above the tiles. total: how many pictures there are, shown or not; `view` names what is shown."""
    return (
        f'<div class="selection" data-total="{total}" data-view="{escape(collection)}\n{escape(view)}">'
        '<button class="small" data-select="all">Select all</button>'
        '<button class="small of-some" data-select="none">Clear</button><span class="count" role="status"></span>'
        '<button class="small of-some" data-export="csv" title="Ids, names, labels, similarity, paths, metadata">'
        'Save as CSV</button><button class="small of-some" data-export="paths" title="One path a line">'
        "Save paths</button></div>"
    )


def columns_html(titles: Sequence[str], grids: Sequence[str]) -> str:
    parts = (f"<section><h3>{escape(title)}</h3>{grid}</section>" for title, grid in zip(titles, grids, strict=True))
    return f'<div class="columns">{"".join(parts)}</div>'


def _tile(item: Item, collection: str, both: bool) -> str:
    data = f'data-id="{escape(item.id)}" data-name="{escape(item.name)}" data-collection="{escape(collection)}"'
    if item.label:
        data += f' data-label="{escape(item.label)}"'
    score, name = "", escape(described(item.name, item.label))
    if isinstance(item, Match):
        data += f' data-similarity="{item.similarity:.6f}"'
        score = f'<span class="score">{item.similarity:.2f}</span>'
    return (
        f'<li{" class=both" if both else ""}><button class="tile" {data}>'
        f'<img loading="lazy" src="{escape(thumbnail_url(item.id, collection))}" alt="{name}">'
        f'<span class="caption">{score}{facts_html(item.name, item.label)}</span></button>'
        f'<input type="checkbox" class="pick" aria-label="Select {name}" title="Select (x); with Shift a row of them">'
        '<span class="signs">'
        f'<button class="sign" value="like" aria-label="More like {name}" title="More like this (+)">+</button>'
        f'<button class="sign" value="unlike" aria-label="Less like {name}" title="Less like this (-)">−</button>'
        "</span></li>"
    )
