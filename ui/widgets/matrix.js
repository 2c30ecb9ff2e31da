// Computes the softmax again for each temperature, as Matrix.log_weights does on the service's side.

let temperature = null; // as set by the user; kept when new tables are shown
let space = null; // "h" or "z"

function draw(batch) {
  temperature = Number(batch.querySelector(".tau").value);
  space = batch.querySelector(".space:checked").value;
  const cosines = JSON.parse(batch.dataset[space]);
  const shareRows = [...batch.querySelectorAll(".shares tbody tr")];
  const cosineRows = [...batch.querySelectorAll(".cosines tbody tr")];
  let loss = 0;
  cosines.forEach((row, i) => {
    const greatest = Math.max(...row.filter((_, k) => k !== i));
    const weights = row.map((cosine, k) => (k === i ? 0 : Math.exp((cosine - greatest) / temperature)));
    const sum = weights.reduce((a, b) => a + b, 0);
    loss -= ((row[i ^ 1] - greatest) / temperature - Math.log(sum)) / cosines.length;
    row.forEach((cosine, k) => {
      if (k === i) return;
      paint(shareRows[i].children[k + 1], weights[k] / sum);
      paint(cosineRows[i].children[k + 1], cosine);
    });
  });
  batch.querySelector(".tau-value").textContent = temperature.toFixed(2);
  batch.querySelector(".loss").textContent = loss.toFixed(3);
}

function paint(cell, value) {
  cell.style.setProperty("--v", Math.abs(value).toFixed(4));
  cell.textContent = value.toFixed(2).replace(/^(-?)0/, "$1");
  cell.classList.toggle("minus", value < 0);
  cell.classList.toggle("strong", Math.abs(value) > 0.5);
}

element.addEventListener("input", ({ target }) => {
  if (target.matches(".tau, .space")) draw(target.closest(".batch"));
});

element.addEventListener("mouseover", ({ target }) => {
  const cell = target.closest("tbody td");
  const batch = cell?.closest(".batch");
  if (!batch || cell.classList.contains("self")) return;
  const views = JSON.parse(batch.dataset.views);
  const k = cell.cellIndex - 1;
  const i = cell.parentNode.rowIndex - 1;
  const text = (table) => batch.querySelector(table).rows[i + 1].cells[k + 1].textContent;
  const kind = k === (i ^ 1) ? "the positive" : "a negative";
  batch.querySelector(".readout").textContent =
    `${views[i]} with ${views[k]}, ${kind}: cosine ${text(".cosines")}, share ${text(".shares")}`;
});

watch("value", () => {
  const batch = element.querySelector(".batch");
  if (!batch || temperature === null) return;
  batch.querySelector(".tau").value = temperature;
  const choice = batch.querySelector(`.space[value="${space}"]`);
  if (choice) choice.checked = true;
  draw(batch);
});
