// A scatter plot of many points. They are drawn into the canvas's pixels, one small stamp each: 100,000 points take
// about one frame, without WebGL, which many virtual machines do not have. Coordinates: x, y on the map; p, q on screen.

const RETRY_MS = 2000; // until the places are asked for again after an error
const SIDE = 58; // px that a thumbnail over a point takes, with the gap to the next one
const REACH = 12; // px from the pointer within which a point counts as pointed at
const COLOURS = // of the largest labels or groups
  "#0f8a80 #d2662f #5b6bd6 #bf9a10 #c43f7c #5f8f1f #2e8fd0 #8f6140 #9350b8 #df8ea2 #3fb58a #76808c".split(" ");
const NO_LABEL = "#9b958d";
const $ = (query) => element.querySelector(query);
const [root, stage, canvas] = [".map", ".map-stage", "canvas"].map($);
const [overlay, tip, legend] = [".map-pictures", ".map-tip", ".map-legend"].map($);
const context = canvas.getContext("2d", { alpha: false });

let map = null; // the columns of the map shown, and its collection
let by = "label"; // or "group": what the colours mean
let picked = new Set(); // numbers of the labels or groups that are highlighted; empty: all are
let mode = "move"; // or lasso, box
let view = { x: 0, y: 0, scale: 1 }; // the middle of the screen, and px per unit
let whole = view; // the view that shows the whole map
let path = []; // corners [x, y] of the lasso
let hovered = -1; // the point under the pointer
let image = null; // the points as last drawn
let requests = 0;

// Loading --------------------------------------------------------------------------------------------------------------

const column = (base64, Kind) => new Kind(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);

async function show() {
  const shown = props.value;
  const request = ++requests;
  root.hidden = !shown;
  if (!shown) {
    map = null;
    return;
  }
  const columns = await server.places(shown.collection);
  if (request !== requests) return;
  if (!columns) {
    setTimeout(() => request === requests && show(), RETRY_MS);
    return;
  }
  const isOther = map?.collection !== shown.collection || map?.made !== shown.made;
  const n = columns.ids.length;
  map = {
    ...columns,
    ...shown,
    n,
    x: column(columns.x, Float32Array),
    y: column(columns.y, Float32Array),
    group: column(columns.group, Int32Array),
    label: column(columns.label, Int32Array),
    order: shuffled(n), // in random order: in the table's order, the last pictures would cover the others
  };
  path = [];
  hovered = -1;
  tip.hidden = true;
  const labelled = map.labels.length > 0;
  $(".map-by").hidden = !labelled || !map.group.some((number) => number > 0);
  colourBy(labelled ? (isOther ? "label" : by) : "group");
  canvas.setAttribute("aria-label", `Map of ${n.toLocaleString("en")} pictures. ${canvas.dataset.keys}`);
  if (isOther) fit();
  else redraw();
}

function shuffled(n) {
  const order = Uint32Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1, seed = 1; i > 0; i--) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    const j = seed % (i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

// Colours and legend ---------------------------------------------------------------------------------------------------

const nameOf = (number) => (by === "group" ? `Group ${number + 1}` : (map.labels[number] ?? "no label"));
const isPicked = (i) => !picked.size || picked.has(map[by][i]);

function colourBy(which) {
  by = which;
  picked = new Set();
  const counts = new Map();
  for (const number of map[by]) counts.set(number, (counts.get(number) ?? 0) + 1);
  const entries = [...counts].sort(([a, m], [b, n]) => (a < 0) - (b < 0) || n - m || a - b);
  map.colour = new Map(entries.map(([number], rank) => [number, number < 0 ? NO_LABEL : colour(rank)]));
  legend.replaceChildren(...entries.map(([number, count]) => legendButton(number, count)));
  for (const button of element.querySelectorAll("[data-by]")) {
    button.setAttribute("aria-pressed", String(button.dataset.by === by));
  }
  showPicked();
}

function legendButton(number, count) {
  const [button, dot, name, total] = ["button", "i", "span", "b"].map((tag) => document.createElement(tag));
  button.type = "button";
  button.dataset.number = number;
  dot.style.background = map.colour.get(number);
  name.textContent = nameOf(number);
  total.textContent = count.toLocaleString("en");
  if (by === "group") name.prepend(Object.assign(new Image(), { src: thumbnailOf(sampleOf(number)), alt: "" }));
  button.append(dot, name, total);
  return button;
}

/** The picture of this group that is nearest to its middle on the map. */
function sampleOf(number) {
  const members = [];
  for (let i = 0; i < map.n; i++) if (map.group[i] === number) members.push(i);
  const mean = (values) => members.reduce((sum, i) => sum + values[i], 0) / members.length;
  const [x, y] = [mean(map.x), mean(map.y)];
  const distance = (i) => (map.x[i] - x) ** 2 + (map.y[i] - y) ** 2;
  return members.reduce((nearest, i) => (distance(i) < distance(nearest) ? i : nearest));
}

/** A colour for the label of this rank by size: after the listed ones, hues by the golden angle. */
function colour(rank) {
  if (rank < COLOURS.length) return COLOURS[rank];
  const hue = (rank * 137.508 + 20) % 360;
  const light = [0.45, 0.58, 0.68][rank % 3];
  const channel = (shift) => {
    const k = (shift + hue / 30) % 12;
    const value = light - 0.55 * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 3, 9 - k, 1));
    return Math.round(value * 255)
      .toString(16)
      .padStart(2, "0");
  };
  return `#${channel(0)}${channel(8)}${channel(4)}`;
}

function showPicked() {
  for (const button of legend.children) {
    const highlighted = picked.has(Number(button.dataset.number));
    button.setAttribute("aria-pressed", String(highlighted));
    button.classList.toggle("faint", picked.size > 0 && !highlighted);
  }
  for (const action of ["picked", "all"]) $(`[data-do=${action}]`).hidden = !picked.size;
  redraw();
}

// Drawing --------------------------------------------------------------------------------------------------------------

const isDark = () => document.body.classList.contains("dark");
const packed = (hex) => {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
};

function drawPoints() {
  const { width, height } = canvas;
  if (image?.width !== width || image?.height !== height) image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  pixels.fill(packed(isDark() ? "#1c1917" : "#ffffff"));
  const zoomed = view.scale / whole.scale;
  const area = stage.clientWidth * stage.clientHeight;
  const radius = Math.min(6, Math.max(1.3, 0.3 * Math.sqrt((area / map.n) * zoomed))) * devicePixelRatio;
  const colours = new Map([...map.colour].map(([number, hex]) => [number, packed(hex)]));
  const none = Math.max(...colours.keys()) + 1; // the palette's index for points without a label
  const palette = new Uint32Array(none + 1);
  for (const [number, rgb] of colours) palette[number < 0 ? none : number] = rgb;
  const faint = packed(isDark() ? "#57534e" : "#cfcac4");
  const isFaint = (i) => !isPicked(i);
  if (picked.size) stamp(pixels, radius * 0.8, 70, isFaint, () => faint);
  const numbers = map[by];
  stamp(pixels, radius, 225, isPicked, (i) => palette[numbers[i] < 0 ? none : numbers[i]]);
}

/** Blend a disc into `pixels` for each point i for which shown(i). strength: its opacity, of 256. */
function stamp(pixels, radius, strength, shown, colourOf) {
  const { width, height } = canvas;
  const reach = Math.ceil(radius);
  const offsets = [];
  const alphas = [];
  for (let v = -reach; v <= reach; v++) {
    for (let u = -reach; u <= reach; u++) {
      const alpha = Math.round(Math.max(0, Math.min(1, radius + 0.5 - Math.hypot(u, v))) * strength);
      if (!alpha) continue;
      offsets.push(v * width + u);
      alphas.push(alpha);
    }
  }
  const scale = view.scale * devicePixelRatio;
  const left = width / 2 - view.x * scale;
  const up = height / 2 + view.y * scale;
  const { x, y, order, n } = map;
  const m = offsets.length;
  for (let k = 0; k < n; k++) {
    const i = order[k];
    const p = Math.round(left + x[i] * scale);
    const q = Math.round(up - y[i] * scale);
    if (p < reach || q < reach || p >= width - reach || q >= height - reach || !shown(i)) continue;
    const rgb = colourOf(i);
    const redBlue = rgb & 0xff00ff;
    const green = rgb & 0xff00;
    const at = q * width + p;
    for (let s = 0; s < m; s++) {
      // two channels in one product
      const under = pixels[at + offsets[s]];
      const a = alphas[s];
      const b = 256 - a;
      pixels[at + offsets[s]] =
        (((redBlue * a + (under & 0xff00ff) * b) >>> 8) & 0xff00ff) |
        (((green * a + (under & 0xff00) * b) >>> 8) & 0xff00) |
        0xff000000;
    }
  }
}

let due = null; // the next frame: true draws everything again, false only what lies over the points

function redraw(everything = true) {
  if (due === null) requestAnimationFrame(drawFrame);
  due = due || everything;
  if (everything) layThumbnailsSoon();
}

function drawFrame() {
  const everything = due;
  due = null;
  if (!map || !canvas.width) return;
  if (everything || !image) drawPoints();
  context.putImageData(image, 0, 0);
  context.save();
  context.scale(devicePixelRatio, devicePixelRatio);
  context.lineWidth = 1.5;
  context.strokeStyle = isDark() ? "#5eead4" : "#0f766e";
  context.fillStyle = "rgb(20 184 166 / 0.12)";
  if (path.length > 1) {
    context.beginPath();
    for (const corner of path) context.lineTo(...onScreen(...corner));
    context.closePath();
    context.fill();
    context.stroke();
  }
  if (hovered >= 0) {
    context.beginPath();
    context.arc(...onScreen(map.x[hovered], map.y[hovered]), 8, 0, 2 * Math.PI);
    context.stroke();
  }
  context.restore();
}

const onScreen = (x, y) => [
  stage.clientWidth / 2 + (x - view.x) * view.scale,
  stage.clientHeight / 2 - (y - view.y) * view.scale,
];
const onMap = (p, q) => [
  view.x + (p - stage.clientWidth / 2) / view.scale,
  view.y - (q - stage.clientHeight / 2) / view.scale,
];

// Thumbnails over the points: of as many as have room. The points become pictures by themselves where most have room.

let timer = null;

function layThumbnailsSoon() {
  overlay.replaceChildren();
  clearTimeout(timer);
  timer = setTimeout(layThumbnails, 150);
}

function layThumbnails() {
  const [w, h] = [stage.clientWidth, stage.clientHeight];
  const seen = [];
  for (let k = 0; k < (map?.n ?? 0); k++) {
    const i = map.order[k];
    const [p, q] = onScreen(map.x[i], map.y[i]);
    if (p >= 0 && q >= 0 && p < w && q < h && isPicked(i)) seen.push({ i, p, q });
  }
  const asked = $("[data-do=pictures]").getAttribute("aria-pressed") === "true";
  const zoomed = view.scale > whole.scale && seen.length * SIDE * SIDE <= w * h;
  if (asked || zoomed) overlay.replaceChildren(...apart(seen).map(thumbnail));
}

/** Those of the places whose squares of SIDE px overlap none of those before them. */
function apart(places) {
  const kept = new Map(); // by square of the screen; each holds at most one place
  const key = (column, row) => `${column} ${row}`;
  for (const place of places) {
    const [column, row] = [Math.floor(place.p / SIDE), Math.floor(place.q / SIDE)];
    let free = true;
    for (let u = -1; u <= 1; u++) {
      for (let v = -1; v <= 1; v++) {
        const other = kept.get(key(column + u, row + v));
        if (other && Math.abs(other.p - place.p) < SIDE && Math.abs(other.q - place.q) < SIDE) free = false;
      }
    }
    if (free) kept.set(key(column, row), place);
  }
  return [...kept.values()];
}

function thumbnail({ i, p, q }) {
  const picture = Object.assign(new Image(), { src: thumbnailOf(i), alt: "" });
  picture.style.translate = `calc(${p}px - 50%) calc(${q}px - 50%)`;
  picture.style.borderColor = map.colour.get(map[by][i]);
  return picture;
}

const thumbnailOf = (i) =>
  `../collections/${encodeURIComponent(map.collection)}/items/${encodeURIComponent(map.ids[i])}/thumbnail`;

// Moving about ---------------------------------------------------------------------------------------------------------

function fit() {
  const bounds = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [1, -1]);
  const [left, right] = bounds(map.x);
  const [down, up] = bounds(map.y);
  const scale = Math.min(stage.clientWidth / (right - left || 1), stage.clientHeight / (up - down || 1)) * 0.94;
  whole = { x: (left + right) / 2, y: (down + up) / 2, scale: Math.max(scale, 1) };
  view = { ...whole };
  redraw();
}

/** Zoom in by `factor`, keeping the point at p, q on screen in its place. Returns whether the view has changed. */
function zoom(factor, p = stage.clientWidth / 2, q = stage.clientHeight / 2) {
  const scale = Math.min(whole.scale * 400, Math.max(whole.scale * 0.8, view.scale * factor));
  if (scale === view.scale) return false;
  const [x, y] = onMap(p, q);
  view.scale = scale;
  const [nowX, nowY] = onMap(p, q);
  view = { scale, x: view.x + x - nowX, y: view.y + y - nowY };
  redraw();
  return true;
}

function pan(p, q) {
  view = { ...view, x: view.x - p / view.scale, y: view.y + q / view.scale };
  redraw();
}

/** The point within reach of p, q on screen; -1 if there is none. */
function nearest(p, q) {
  const [x, y] = onMap(p, q);
  let index = -1;
  let least = (REACH / view.scale) ** 2;
  for (let i = 0; i < map.n; i++) {
    const distance = (map.x[i] - x) ** 2 + (map.y[i] - y) ** 2;
    if (distance < least && isPicked(i)) [index, least] = [i, distance];
  }
  return index;
}

const modeCursor = () => (mode === "move" ? "grab" : "crosshair");

function hover(i, p, q) {
  canvas.style.cursor = i >= 0 ? "pointer" : modeCursor();
  if (i !== hovered) {
    hovered = i;
    tip.hidden = i < 0;
    redraw(false);
    if (i >= 0) {
      tip.querySelector("img").src = thumbnailOf(i);
      tip.querySelector("span").textContent = nameOf(map[by][i]);
    }
  }
  if (i >= 0) {
    const across = p > stage.clientWidth / 2 ? "- 100% - 16px" : "+ 16px";
    const down = q < stage.clientHeight / 2 ? "+ 12px" : "- 100% - 12px";
    tip.style.translate = `calc(${p}px ${across}) calc(${q}px ${down})`;
  }
}

// Choosing -------------------------------------------------------------------------------------------------------------

function choose(polygon) {
  trigger("choose", { polygon, by, numbers: [...picked], collection: map.collection });
}

function gatherView() {
  clearPath();
  const [left, up] = onMap(0, 0);
  const [right, down] = onMap(stage.clientWidth, stage.clientHeight);
  choose([
    [left, up],
    [right, up],
    [right, down],
    [left, down],
  ]);
}

function clearPath() {
  path = [];
  redraw(false);
}

const pointers = new Map(); // pointers that are down: id -> [p, q]
let drawing = false;
let travelled = 0; // px since the pointer went down
const place = (event) => [event.offsetX, event.offsetY];

canvas.addEventListener("pointerdown", (event) => {
  if (!map || event.button) return;
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, place(event));
  travelled = 0;
  if (pointers.size === 1 && (mode !== "move" || event.shiftKey)) path = [onMap(...place(event))];
  else if (pointers.size > 1) path = []; // two fingers move and zoom
  drawing = path.length === 1 && pointers.size === 1;
});

canvas.addEventListener("pointermove", (event) => {
  if (!map) return;
  const [p, q] = place(event);
  const before = pointers.get(event.pointerId);
  if (!before) return hover(nearest(p, q), p, q);
  const step = Math.hypot(p - before[0], q - before[1]);
  travelled += step;
  if (drawing) {
    const [x, y] = onMap(p, q);
    const [startX, startY] = path[0];
    if (mode === "box") {
      path = [
        [startX, startY],
        [x, startY],
        [x, y],
        [startX, y],
      ];
    } else if (step < 4)
      return; // fewer corners
    else path.push([x, y]);
    redraw(false);
  } else if (pointers.size > 1) {
    const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
    const apart = (at) => Math.max(1, Math.hypot(at[0] - other[0], at[1] - other[1]));
    pan((p - before[0]) / 2, (q - before[1]) / 2);
    zoom(apart([p, q]) / apart(before), (p + other[0]) / 2, (q + other[1]) / 2);
  } else {
    hover(-1);
    canvas.style.cursor = "grabbing";
    pan(p - before[0], q - before[1]);
  }
  pointers.set(event.pointerId, [p, q]);
});

canvas.addEventListener("pointerup", (event) => {
  if (!pointers.delete(event.pointerId) || !map) return;
  if (travelled < 5 && !pointers.size) {
    clearPath();
    const i = nearest(...place(event));
    if (i >= 0) trigger("search", { id: map.ids[i] });
  } else if (drawing && path.length > 2) choose(path);
  drawing = false;
  canvas.style.cursor = modeCursor();
});
canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
canvas.addEventListener("pointerleave", () => map && hover(-1));
canvas.addEventListener(
  "wheel",
  (event) => {
    // when the whole map is shown, zooming out further scrolls the page instead
    const factor = Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016));
    if (map && zoom(factor, ...place(event))) event.preventDefault();
  },
  { passive: false },
);

const KEYS = {
  ArrowLeft: () => pan(60, 0),
  ArrowRight: () => pan(-60, 0),
  ArrowUp: () => pan(0, 60),
  ArrowDown: () => pan(0, -60),
  "+": () => zoom(1.5),
  "=": () => zoom(1.5),
  "-": () => zoom(1 / 1.5),
  0: fit,
  Enter: gatherView,
  Escape: clearPath,
};
canvas.addEventListener("keydown", (event) => {
  if (!map || !KEYS[event.key] || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  KEYS[event.key]();
});

const ACTIONS = {
  closer: () => zoom(1.6),
  farther: () => zoom(1 / 1.6),
  whole: fit,
  view: gatherView,
  picked: () => choose(null),
  all: () => {
    picked.clear();
    showPicked();
  },
  pictures: (button) => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    layThumbnailsSoon();
  },
};

function setMode(chosen) {
  mode = chosen;
  canvas.style.cursor = modeCursor();
  for (const button of element.querySelectorAll("[data-mode]")) {
    button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  }
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || !map) return;
  const { do: action, by: colouring, mode: chosen, number } = button.dataset;
  if (action) ACTIONS[action](button);
  else if (colouring) colourBy(colouring);
  else if (chosen) setMode(chosen);
  else if (number !== undefined) {
    if (!picked.delete(Number(number))) picked.add(Number(number));
    showPicked();
  }
});

new ResizeObserver(() => {
  const [w, h] = [stage.clientWidth, stage.clientHeight];
  if (!w || !h) return; // another tab is shown
  canvas.width = Math.round(w * devicePixelRatio);
  canvas.height = Math.round(h * devicePixelRatio);
  if (!map) return;
  if (view.scale === whole.scale) fit();
  else redraw();
}).observe(stage);
new MutationObserver(() => redraw()).observe(document.body, { attributeFilter: ["class"] }); // light and dark
watch("value", show);
show();
