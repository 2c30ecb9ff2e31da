// Marks a part of the picture by a box. It is drawn by dragging, or by keys: arrows move it, with Shift they move its
// right and lower edges.

const LEAST_PX = 64; // smaller parts have too few pixels for an encoder
let box = null; // left, top, right, bottom, as shares of the picture
const picture = () => element.querySelector("img");

/** Where the picture lies within its frame, in px. */
function place() {
  const { width, height } = picture().getBoundingClientRect();
  const { naturalWidth, naturalHeight } = picture();
  const scale = Math.min(width / naturalWidth, height / naturalHeight);
  const [w, h] = [naturalWidth * scale, naturalHeight * scale];
  return { x: (width - w) / 2, y: (height - h) / 2, w, h };
}

function paint() {
  const image = picture();
  const outline = element.querySelector(".box");
  const extent = element.querySelector(".extent");
  if (!outline || !image.naturalWidth) return;
  outline.hidden = !box;
  if (!box) return extent.replaceChildren();
  const { x, y, w, h } = place();
  const [left, top, right, bottom] = box;
  Object.assign(outline.style, {
    left: `${x + left * w}px`,
    top: `${y + top * h}px`,
    width: `${(right - left) * w}px`,
    height: `${(bottom - top) * h}px`,
  });
  const px = [(right - left) * image.naturalWidth, (bottom - top) * image.naturalHeight].map(Math.round);
  const source = image.dataset.thumbnail === undefined ? "" : " of the thumbnail";
  const warning = Math.min(...px) < LEAST_PX ? "; too small for good results" : "";
  extent.textContent = `${px[0]} × ${px[1]} pixels${source}${warning}`;
}

function showNewPicture() {
  const edges = element.querySelector(".box")?.dataset.box;
  box = edges ? edges.split(",").map(Number) : null;
  if (picture()?.complete) paint();
  else picture()?.addEventListener("load", paint);
}

function search() {
  if (box && box[2] - box[0] > 0.01 && box[3] - box[1] > 0.01) trigger("part", { box });
}

watch("value", showNewPicture);
new ResizeObserver(paint).observe(element);

element.addEventListener("pointerdown", (event) => {
  const image = picture();
  if (event.target !== image || event.button) return;
  event.preventDefault();
  const { left, top } = image.getBoundingClientRect();
  const { x, y, w, h } = place();
  const before = box;
  const clip = (value) => Math.min(1, Math.max(0, value));
  const shares = ({ clientX, clientY }) => [clip((clientX - left - x) / w), clip((clientY - top - y) / h)];
  const start = shares(event);
  const drag = (moved) => {
    const end = shares(moved);
    box = [Math.min, Math.max].flatMap((choose) => start.map((value, i) => choose(value, end[i])));
    paint();
  };
  const finish = (end) => {
    image.removeEventListener("pointermove", drag);
    if (Math.hypot(end.clientX - event.clientX, end.clientY - event.clientY) > 8) search();
    else box = before;
    paint();
  };
  image.setPointerCapture(event.pointerId);
  image.addEventListener("pointermove", drag);
  image.addEventListener("lostpointercapture", finish, { once: true });
});

element.addEventListener("keydown", (event) => {
  if (event.target !== picture()) return;
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (step) {
    box ??= [0.25, 0.25, 0.75, 0.75];
    const moved = box.map((edge, i) => edge + (event.shiftKey && i < 2 ? 0 : step[i % 2] * 0.02));
    if (moved.every((edge) => edge >= 0 && edge <= 1) && moved[2] > moved[0] && moved[3] > moved[1]) box = moved;
    paint();
  } else if (event.key === "Enter") search();
  else return;
  event.preventDefault();
});

element.addEventListener("click", (event) => {
  if (event.target.closest("[data-whole]")) trigger("whole");
});
