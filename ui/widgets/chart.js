// Shows the values of all lines at the epoch under the pointer, or at the epoch chosen with the arrow keys.

const chartOf = (event) => event.target.closest("svg[data-lines]");
const linesOf = (svg) => JSON.parse(svg.dataset.lines);
const epochsOf = (svg) => [...new Set(linesOf(svg).flatMap(({ points }) => points.map(([epoch]) => epoch)))];
const position = (svg, epoch) => Number(svg.dataset.x0) + epoch * Number(svg.dataset.scale); // on the x axis
const reading = (svg) => svg.parentElement.querySelector(".reading");

function show(svg, epoch) {
  const lines = linesOf(svg);
  const cursor = svg.querySelector(".cursor");
  for (const end of ["x1", "x2"]) cursor.setAttribute(end, position(svg, epoch));
  svg.classList.add("read");
  svg.dataset.epoch = epoch;
  const values = lines.flatMap(({ name, points }) => {
    const point = points.find(([at]) => at === epoch);
    return point ? [lines.length > 1 ? `${name} ${point[1]}` : point[1]] : [];
  });
  reading(svg).textContent = `epoch ${epoch}: ${values.join(", ")}`;
}

function clear(svg) {
  svg.classList.remove("read");
  delete svg.dataset.epoch;
  reading(svg).textContent = "";
}

element.addEventListener("pointermove", (event) => {
  const svg = chartOf(event);
  if (!svg) return;
  const { left, width } = svg.getBoundingClientRect();
  const x = ((event.clientX - left) / width) * svg.viewBox.baseVal.width;
  const distance = (epoch) => Math.abs(position(svg, epoch) - x);
  show(
    svg,
    epochsOf(svg).reduce((a, b) => (distance(b) < distance(a) ? b : a)),
  );
});
element.addEventListener("pointerout", (event) => {
  const svg = chartOf(event);
  if (svg && !svg.contains(event.relatedTarget)) clear(svg);
});
element.addEventListener("focusout", (event) => {
  if (chartOf(event)) clear(chartOf(event));
});
element.addEventListener("keydown", (event) => {
  const svg = chartOf(event);
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!svg || !step) return;
  event.preventDefault();
  const epochs = epochsOf(svg).sort((a, b) => a - b);
  const now = epochs.indexOf(Number(svg.dataset.epoch));
  const next = now < 0 ? epochs.length - 1 : Math.min(epochs.length - 1, Math.max(0, now + step));
  show(svg, epochs[next]);
});
