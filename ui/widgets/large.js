// Shows a result large: its thumbnail at once, then the original, unless the service cannot read that. It is opened by
// the tile's button, by Space or o, and by a double-click.

const dialog = element.querySelector("dialog");
const $ = (query) => dialog.querySelector(query);
let list = null; // the element with the results that the arrow keys go through
let results = []; // a copy of them: the list may be drawn again meanwhile
let at = 0;
let original = new Image(); // of the result that is shown, until it has loaded

function resultOf(item) {
  const { id, name, label, collection } = item.querySelector("[data-id][data-name]").dataset;
  const [score, rank] = [".score", ".rank"].map((part) => item.querySelector(part)?.textContent ?? "");
  return { id, name, label, collection, score, rank, thumbnail: item.querySelector("img").src };
}

function resultsAround(item) {
  const from = item.closest(".grid, .copies-all");
  const items = [...from.querySelectorAll("li:has([data-id][data-name])")];
  return { from, copies: items.map(resultOf), place: items.indexOf(item) };
}

function open({ from, copies, place }) {
  list = from;
  results = copies;
  dialog.showModal();
  dialog.focus();
  show(place);
}

function show(place) {
  at = place;
  const result = results[at];
  const encoder = list.dataset.encoder;
  $("img").src = result.thumbnail;
  $("img").alt = result.label ? `${result.name}, ${result.label}` : result.name;
  $(".large-note").textContent = "";
  $(".large-original").hidden = true;
  $(".large-place").textContent = `${at + 1} of ${results.length}`;
  $("h2").textContent = result.name.split("/").pop();
  $(".large-score").textContent = result.score && `${list.dataset.score ?? "Similarity"} ${result.score}`;
  $(".large-rank").textContent = result.rank;
  for (const button of dialog.querySelectorAll("[data-step]")) {
    button.disabled = !results[at + Number(button.dataset.step)];
  }
  showOriginal(result, encoder);
  showFacts(result, encoder);
}

async function showOriginal(result, encoder) {
  original.src = ""; // ends the loading of the result shown before
  const image = new Image();
  original = image;
  image.src =
    result.thumbnail.replace(/thumbnail$/, "original") + (encoder ? `?model=${encodeURIComponent(encoder)}` : "");
  const loaded = await image.decode().then(
    () => true,
    () => false,
  );
  if (image !== original) return; // another result is shown by now
  $(".large-original").hidden = !loaded;
  $(".large-original").href = image.src;
  if (loaded) $("img").src = image.src;
  else $(".large-note").textContent = "The original cannot be read here, so this is its thumbnail.";
}

async function showFacts(result, encoder) {
  const facts = await server.facts({ id: result.id, collection: result.collection, encoder }).catch(() => "");
  if (result === results[at]) $("dl").innerHTML = facts;
}

function step(by) {
  if (results[at + by]) show(at + by);
}

/** Close the dialog, and return to the tile of the result that was shown. */
function close() {
  original.src = "";
  dialog.close();
  const shown = `[data-id="${CSS.escape(results[at].id)}"]`;
  (list.isConnected ? list : document).querySelector(shown)?.focus();
}

const ACTIONS = {
  close,
  search: () => {
    const { id, name, label, collection } = results[at];
    close();
    trigger("search", { id, name, collection, ...(label && { label }) });
  },
};

dialog.addEventListener("click", (event) => {
  const { step: by, do: action } = event.target.closest("button")?.dataset ?? {};
  if (by) step(Number(by));
  else if (action) ACTIONS[action]();
});

dialog.addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  step(by);
});

dialog.addEventListener("cancel", (event) => {
  event.preventDefault();
  close();
});

// Before the tile's own listeners, for which a click with Shift would select it.
document.addEventListener(
  "click",
  (event) => {
    const button = event.target.closest?.(".open");
    if (!button) return;
    event.stopPropagation();
    open(resultsAround(button.closest("li")));
  },
  true,
);

document.addEventListener("keydown", (event) => {
  const places = { o: "li [data-id]", " ": "li .tile" }[event.key]; // Space marks a picture in Duplicates
  if (!places || event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
  if (!event.target.matches?.(places)) return;
  event.preventDefault();
  open(resultsAround(event.target.closest("li")));
});

// A double-click opens the picture of its first click, which also searches: the tiles may be others by the second.
let clicked = null;
document.addEventListener(
  "click",
  (event) => {
    const tile = event.target.closest?.("li .tile");
    if (event.detail === 1) clicked = tile && resultsAround(tile.closest("li"));
  },
  true,
);
document.addEventListener("dblclick", () => clicked && !dialog.open && open(clicked));
