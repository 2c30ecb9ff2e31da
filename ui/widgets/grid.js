// Selects pictures. A selection outlives the tiles: it keeps what was selected in other searches of the collection, and
// after "Select all" it means the whole collection except the pictures deselected since.

let all = false;
const chosen = new Map(); // id -> similarity of the selected pictures; after "Select all", of the deselected ones
let last = null; // the tile that was selected last
let view = null; // identifies the search shown; its first line is the collection
const tiles = () => [...element.querySelectorAll(".tile")];
const isSelected = (tile) => all !== chosen.has(tile.dataset.id);

function select(tile, selected) {
  if (selected === isSelected(tile)) return;
  if (selected === all) chosen.delete(tile.dataset.id);
  else chosen.set(tile.dataset.id, tile.dataset.similarity ?? null);
}

const selected = (bar) => (all ? bar.dataset.total - chosen.size : chosen.size);

/** Ask acts.js to do something with the selected pictures. */
function act(kind, bar) {
  const { collection, where, encoder } = bar.dataset;
  const selection = { all, chosen: [...chosen], where: JSON.parse(where), encoder: encoder || null };
  const detail = { kind, count: selected(bar), collection, chosen: selection };
  if (kind === "confirm") {
    const sure = tiles().filter((tile) => isSelected(tile) && tile.dataset.suggested);
    detail.labels = Object.fromEntries(sure.map(({ dataset }) => [dataset.id, dataset.suggested]));
    detail.count = sure.length;
  }
  document.dispatchEvent(new CustomEvent("act", { detail }));
}

document.addEventListener("acted", ({ detail: { kind, ids } }) => {
  if (kind !== "remove" && kind !== "confirm") return;
  if (all) {
    all = false;
    chosen.clear();
  } else for (const id of ids) chosen.delete(id);
  paint();
});

function paint() {
  for (const tile of tiles()) {
    const item = tile.closest("li");
    item.classList.toggle("picked", isSelected(tile));
    item.querySelector(".pick").checked = isSelected(tile);
  }
  const bar = element.querySelector(".selection");
  if (!bar) return;
  const count = selected(bar);
  bar.classList.toggle("some", count > 0);
  bar.querySelector(".count").textContent = count ? `${count.toLocaleString("en")} selected` : "";
}

function showNewTiles() {
  const now = element.querySelector(".selection")?.dataset.view;
  if (now === undefined || now === view) return paint();
  const collection = (name) => name?.split("\n")[0];
  if (all || collection(now) !== collection(view)) {
    all = false;
    chosen.clear();
  }
  view = now;
  last = null;
  window.scrollTo({ top: 0, behavior: "smooth" });
  paint();
}

function selectAllOrNone(which) {
  const total = Number(element.querySelector(".selection").dataset.total);
  chosen.clear();
  all = which === "all" && total > tiles().length;
  if (which === "all" && !all) for (const tile of tiles()) select(tile, true);
}

/** Select this tile or deselect it; with Shift, all from the last one to it. */
function pick(tile, shift) {
  const selected = !isSelected(tile);
  const every = tiles();
  const at = every.indexOf(tile);
  const anchor = shift && every.includes(last) ? every.indexOf(last) : at;
  for (const one of every.slice(Math.min(anchor, at), Math.max(anchor, at) + 1)) select(one, selected);
  last = tile;
}

watch("value", showNewTiles);

element.addEventListener("click", (event) => {
  const clicked = (what) => event.target.closest(what);
  const tile = clicked("li")?.querySelector(".tile");
  const format = clicked("[data-export]")?.dataset.export;
  const bar = clicked(".selection");
  if (clicked("[data-select]")) selectAllOrNone(clicked("[data-select]").dataset.select);
  else if (clicked("[data-act]")) act(clicked("[data-act]").dataset.act, bar);
  else if (clicked("[data-add]")) {
    document.dispatchEvent(new CustomEvent("add", { detail: { collection: bar.dataset.collection } }));
  } else if (clicked("[data-pick]")) trigger("pick", { show: clicked("[data-pick]").dataset.pick });
  else if (format) trigger("export", { format, all, chosen: [...chosen] });
  else if (tile && clicked(".sign[value=like]")) trigger("like", { ...tile.dataset });
  else if (tile && clicked(".sign")) trigger("unlike", { ...tile.dataset });
  else if (tile && (clicked(".pick") || event.shiftKey)) pick(tile, event.shiftKey);
  else if (clicked(".tile") && event.detail < 2) trigger("click", { ...tile.dataset }); // not by a double-click's second
  paint();
});

element.addEventListener("keydown", (event) => {
  const item = event.target.matches(".tile") && event.target.closest("li"); // of the tile that has the focus
  const button = { "+": ".sign[value=like]", "-": ".sign[value=unlike]", x: ".pick" }[event.key];
  if (!item || !button || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  item.querySelector(button).click();
});
