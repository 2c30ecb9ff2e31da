// A scatter plot of many points. They are drawn into the canvas's pixels, one small stamp each: 100,000 take about
// as long as a frame, without WebGL, which many a virtual machine has not. Coordinates: x, y of the map; p, q on screen.

const CELL = 68; // px between the pictures that are laid over the points
const REACH = 12; // px from a point at which a pointer means it
const COLOURS = [
    "#0f8a80", "#d2662f", "#5b6bd6", "#bf9a10", "#c43f7c", "#5f8f1f", "#2e8fd0", "#8f6140", "#9350b8", "#df8ea2",
    "#3fb58a", "#76808c",
];
const NONE = "#9b958d"; // of what has no label
const $ = (query) => element.querySelector(query);
const root = $(".map"), stage = $(".map-stage"), canvas = $("canvas"), overlay = $(".map-pictures");
const tip = $(".map-tip"), legend = $(".map-legend"), context = canvas.getContext("2d", { alpha: false });

let map = null; // columns of the map shown, and its collection
let by = "label"; // or "group": what colours
let picked = new Set(); // numbers of labels or groups that stand out; all where it is empty
let mode = "move"; // or lasso, box
let view = { x: 0, y: 0, scale: 1 }; // its middle; px per unit
let whole = view;
let path = []; // [x, y] of the lasso
let hovered = -1;
let image = null; // the points as drawn last
let asked = 0;

// What is shown --------------------------------------------------------------------------------------------------------

const column = (base64, Kind) => new Kind(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);

async function show() {
    const wanted = props.value, mine = ++asked;
    root.hidden = !wanted;
    if (!wanted) return (map = null);
    const got = await server.places(wanted.collection);
    if (mine !== asked || !got) return;
    const other = map?.collection !== wanted.collection || map?.made !== wanted.made;
    map = {
        ...got, ...wanted, n: got.ids.length,
        x: column(got.x, Float32Array), y: column(got.y, Float32Array),
        group: column(got.group, Int32Array), label: column(got.label, Int32Array),
    };
    map.order = shuffled(map.n); // or what is last in the table would lie on top
    path = [];
    hovered = -1;
    tip.hidden = true;
    const labelled = map.labels.length > 0;
    $(".map-by").hidden = !labelled || !map.group.some((number) => number > 0);
    colourBy(labelled ? (other ? "label" : by) : "group");
    canvas.setAttribute("aria-label", `Map of ${map.n.toLocaleString("en")} pictures. ${canvas.dataset.keys}`);
    if (other) fit();
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

function colourBy(which) {
    by = which;
    picked = new Set();
    const counts = new Map();
    for (const number of map[by]) counts.set(number, (counts.get(number) ?? 0) + 1);
    const entries = [...counts].sort(([a, m], [b, n]) => (a < 0) - (b < 0) || n - m || a - b);
    map.colour = new Map(entries.map(([number], rank) => [number, number < 0 ? NONE : colour(rank)]));
    const named = (number) => (by === "group" ? `Group ${number + 1}` : (map.labels[number] ?? "no label"));
    map.named = named;
    legend.replaceChildren(...entries.map(([number, count]) => {
        const button = document.createElement("button");
        const dot = document.createElement("i"), name = document.createElement("span"), many = document.createElement("b");
        button.type = "button";
        button.dataset.number = number;
        button.setAttribute("aria-pressed", "false");
        dot.style.background = map.colour.get(number);
        name.textContent = named(number);
        many.textContent = count.toLocaleString("en");
        button.append(dot, name, many);
        return button;
    }));
    for (const button of element.querySelectorAll("[data-by]")) {
        button.setAttribute("aria-pressed", String(button.dataset.by === by));
    }
    pick();
}

function colour(rank) {
    if (rank < COLOURS.length) return COLOURS[rank];
    const [hue, light] = [(rank * 137.508 + 20) % 360, [0.45, 0.58, 0.68][rank % 3]];
    const part = (shift) => {
        const k = (shift + hue / 30) % 12;
        const value = light - 0.55 * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 3, 9 - k, 1));
        return Math.round(value * 255).toString(16).padStart(2, "0");
    };
    return `#${part(0)}${part(8)}${part(4)}`;
}

function pick() {
    for (const button of legend.children) {
        const stands = picked.has(Number(button.dataset.number));
        button.setAttribute("aria-pressed", String(stands));
        button.classList.toggle("faint", picked.size > 0 && !stands);
    }
    $("[data-do=picked]").hidden = $("[data-do=all]").hidden = !picked.size;
    redraw();
}

const visible = (i) => !picked.size || picked.has(map[by][i]);

// Drawing --------------------------------------------------------------------------------------------------------------

const packed = (hex) => {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
};

function points() {
    const { width, height } = canvas, ratio = devicePixelRatio;
    if (image?.width !== width || image?.height !== height) image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const dark = document.body.classList.contains("dark");
    pixels.fill(packed(dark ? "#1c1917" : "#ffffff"));
    const zoom = view.scale / whole.scale;
    const radius = Math.min(6, Math.max(1.3, 0.3 * Math.sqrt((stage.clientWidth * stage.clientHeight) / map.n * zoom)));
    const colours = new Map([...map.colour].map(([number, hex]) => [number, packed(hex)]));
    const top = Math.max(...colours.keys()) + 1, palette = new Uint32Array(top + 1);
    for (const [number, rgb] of colours) palette[number < 0 ? top : number] = rgb;
    if (picked.size) stamp(pixels, radius * ratio * 0.8, 70, (i) => !visible(i), () => packed(dark ? "#57534e" : "#cfcac4"));
    const numbers = map[by];
    stamp(pixels, radius * ratio, 225, visible, (i) => palette[numbers[i] < 0 ? top : numbers[i]]);
}

function stamp(pixels, radius, strength, which, colourOf) {
    const { width, height } = canvas, reach = Math.ceil(radius), offsets = [], alphas = [];
    for (let v = -reach; v <= reach; v++) {
        for (let u = -reach; u <= reach; u++) {
            const alpha = Math.round(Math.max(0, Math.min(1, radius + 0.5 - Math.hypot(u, v))) * strength);
            if (alpha) offsets.push(v * width + u), alphas.push(alpha);
        }
    }
    const scale = view.scale * devicePixelRatio, left = width / 2 - view.x * scale, up = height / 2 + view.y * scale;
    const { x, y, order, n } = map, m = offsets.length;
    for (let k = 0; k < n; k++) {
        const i = order[k], p = Math.round(left + x[i] * scale), q = Math.round(up - y[i] * scale);
        if (p < reach || q < reach || p >= width - reach || q >= height - reach || !which(i)) continue;
        const rgb = colourOf(i), redBlue = rgb & 0xff00ff, green = rgb & 0xff00, at = q * width + p;
        for (let s = 0; s < m; s++) { // two channels in one product
            const under = pixels[at + offsets[s]], a = alphas[s], b = 256 - a;
            pixels[at + offsets[s]] = (((redBlue * a + (under & 0xff00ff) * b) >>> 8) & 0xff00ff)
                | (((green * a + (under & 0xff00) * b) >>> 8) & 0xff00) | 0xff000000;
        }
    }
}

let due = null; // of the next frame: all anew, or only what lies over the points
function redraw(anew = true) {
    if (due === null) requestAnimationFrame(frame);
    due = due || anew;
    if (anew) lay();
}

function frame() {
    const anew = due;
    due = null;
    if (!map || !canvas.width) return;
    if (anew || !image) points();
    context.putImageData(image, 0, 0);
    context.save();
    context.scale(devicePixelRatio, devicePixelRatio);
    context.lineWidth = 1.5;
    context.strokeStyle = document.body.classList.contains("dark") ? "#5eead4" : "#0f766e";
    context.fillStyle = "rgb(20 184 166 / 0.12)";
    if (path.length > 1) {
        context.beginPath();
        for (const at of path) context.lineTo(...onScreen(...at));
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
    stage.clientWidth / 2 + (x - view.x) * view.scale, stage.clientHeight / 2 - (y - view.y) * view.scale,
];
const onMap = (p, q) => [
    view.x + (p - stage.clientWidth / 2) / view.scale, view.y - (q - stage.clientHeight / 2) / view.scale,
];

// Pictures over the points: of each square of the screen, the one nearest to its middle.
let laying = null;
function lay() {
    overlay.replaceChildren();
    clearTimeout(laying);
    if ($("[data-do=pictures]").getAttribute("aria-pressed") === "true") laying = setTimeout(layNow, 150);
}

function layNow() {
    const [w, h] = [stage.clientWidth, stage.clientHeight], across = Math.ceil(w / CELL), best = new Map();
    for (let i = 0; i < (map?.n ?? 0); i++) {
        const [p, q] = onScreen(map.x[i], map.y[i]);
        if (p < 0 || q < 0 || p >= w || q >= h || !visible(i)) continue;
        const cell = Math.floor(q / CELL) * across + Math.floor(p / CELL);
        const far = Math.hypot((p % CELL) - CELL / 2, (q % CELL) - CELL / 2);
        if (far < (best.get(cell)?.far ?? Infinity)) best.set(cell, { i, far, p, q });
    }
    overlay.replaceChildren(...[...best.values()].map(({ i, p, q }) => {
        const picture = new Image();
        picture.src = thumbnail(i);
        picture.alt = "";
        picture.style.translate = `calc(${p}px - 50%) calc(${q}px - 50%)`;
        picture.style.borderColor = map.colour.get(map[by][i]);
        return picture;
    }));
}

const thumbnail = (i) =>
    `../collections/${encodeURIComponent(map.collection)}/items/${encodeURIComponent(map.ids[i])}/thumbnail`;

// Moving about ---------------------------------------------------------------------------------------------------------

function fit() {
    const bounds = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [1, -1]);
    const [[left, right], [down, up]] = [bounds(map.x), bounds(map.y)];
    const scale = Math.min(stage.clientWidth / (right - left || 1), stage.clientHeight / (up - down || 1)) * 0.94;
    whole = { x: (left + right) / 2, y: (down + up) / 2, scale: Math.max(scale, 1) };
    view = { ...whole };
    redraw();
}

/** Closer by `factor`; what is at p, q on the screen stays there. Whether anything has changed. */
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

function nearest(p, q) {
    const [x, y] = onMap(p, q);
    let found = -1, least = (REACH / view.scale) ** 2;
    for (let i = 0; i < map.n; i++) {
        const far = (map.x[i] - x) ** 2 + (map.y[i] - y) ** 2;
        if (far < least && visible(i)) [found, least] = [i, far];
    }
    return found;
}

function hover(i, p, q) {
    canvas.style.cursor = i >= 0 ? "pointer" : mode === "move" ? "grab" : "crosshair";
    if (i !== hovered) {
        hovered = i;
        tip.hidden = i < 0;
        redraw(false);
        if (i >= 0) {
            tip.querySelector("img").src = thumbnail(i);
            tip.querySelector("span").textContent = map.named(map[by][i]);
        }
    }
    if (i >= 0) {
        const side = p > stage.clientWidth / 2, below = q < stage.clientHeight / 2;
        tip.style.translate = `calc(${p}px ${side ? "- 100% - 16px" : "+ 16px"}) calc(${q}px ${below ? "+ 12px" : "- 100% - 12px"})`;
    }
}

function gather(polygon) {
    trigger("gather", { polygon, by, numbers: [...picked], collection: map.collection });
}

function gatherView() {
    path = [];
    redraw(false);
    const [[left, up], [right, down]] = [onMap(0, 0), onMap(stage.clientWidth, stage.clientHeight)];
    gather([[left, up], [right, up], [right, down], [left, down]]);
}

const pointers = new Map(); // that are down, and where
let travelled = 0;
const place = (event) => [event.offsetX, event.offsetY];

canvas.addEventListener("pointerdown", (event) => {
    if (!map || event.button) return;
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    travelled = 0;
    if (pointers.size === 1 && (mode !== "move" || event.shiftKey)) path = [onMap(...place(event))];
    else if (pointers.size > 1) path = []; // two fingers move and zoom
    pointers.draws = path.length === 1 && pointers.size === 1;
});

canvas.addEventListener("pointermove", (event) => {
    if (!map) return;
    const [p, q] = place(event), before = pointers.get(event.pointerId);
    if (!before) return hover(nearest(p, q), p, q);
    travelled += Math.hypot(p - before[0], q - before[1]);
    if (pointers.draws) {
        const [x, y] = onMap(p, q), [startX, startY] = path[0];
        if (mode === "box") path = [[startX, startY], [x, startY], [x, y], [startX, y]];
        else if (Math.hypot(p - before[0], q - before[1]) < 4) return; // fewer corners
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
    const at = place(event);
    if (travelled < 5 && !pointers.size) {
        path = [];
        redraw(false);
        const i = nearest(...at);
        if (i >= 0) trigger("seek", { id: map.ids[i] });
    } else if (pointers.draws && path.length > 2) gather(path);
    pointers.draws = false;
    canvas.style.cursor = mode === "move" ? "grab" : "crosshair";
});
canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
canvas.addEventListener("pointerleave", () => map && hover(-1));
canvas.addEventListener("wheel", (event) => {
    // At the whole map, turning away from it scrolls the page as elsewhere.
    if (map && zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), ...place(event))) event.preventDefault();
}, { passive: false });

const KEYS = {
    ArrowLeft: () => pan(60, 0), ArrowRight: () => pan(-60, 0), ArrowUp: () => pan(0, 60), ArrowDown: () => pan(0, -60),
    "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: fit, Enter: gatherView,
    Escape: () => { path = []; redraw(false); },
};
canvas.addEventListener("keydown", (event) => {
    if (!map || !KEYS[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    KEYS[event.key]();
});

const DOES = {
    closer: () => zoom(1.6), farther: () => zoom(1 / 1.6), whole: fit, view: gatherView,
    picked: () => gather(null),
    all: () => { picked.clear(); pick(); },
    pictures: (button) => {
        button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
        lay();
    },
};
element.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button || !map) return;
    const { number, mode: chosen, by: which } = button.dataset;
    if (button.dataset.do) DOES[button.dataset.do](button);
    else if (which) colourBy(which);
    else if (chosen) {
        mode = chosen;
        canvas.style.cursor = mode === "move" ? "grab" : "crosshair";
        for (const one of element.querySelectorAll("[data-mode]")) {
            one.setAttribute("aria-pressed", String(one.dataset.mode === mode));
        }
    } else if (number !== undefined) {
        picked.has(Number(number)) ? picked.delete(Number(number)) : picked.add(Number(number));
        pick();
    }
});

new ResizeObserver(() => {
    const [w, h] = [stage.clientWidth, stage.clientHeight];
    if (!w || !h) return; // another tab is in sight
    canvas.width = Math.round(w * devicePixelRatio);
    canvas.height = Math.round(h * devicePixelRatio);
    if (map) view.scale === whole.scale ? fit() : redraw();
}).observe(stage);
new MutationObserver(() => redraw()).observe(document.body, { attributeFilter: ["class"] }); // light and dark
watch("value", show);
show();
