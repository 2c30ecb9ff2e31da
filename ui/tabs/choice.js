// The pictures chosen on the map: a click searches by one; the buttons do something with all of them.

element.addEventListener("click", async (event) => {
  const tile = event.target.closest("button[data-id]");
  if (tile) trigger("click", { ...tile.dataset });
  const button = event.target.closest(".selection button");
  if (!button) return;
  const bar = button.closest(".selection");
  const choice = JSON.parse(bar.dataset.choice);
  const { act: kind, export: format } = button.dataset;
  if (kind) {
    const detail = { kind, count: Number(bar.dataset.count), collection: choice.collection, chosen: { choice } };
    document.dispatchEvent(new CustomEvent("act", { detail }));
    return;
  }
  button.disabled = true;
  const text = await server.export_text({ choice, format }).catch(() => null);
  button.disabled = false;
  if (text === null) button.textContent = "The list could not be loaded; try again";
  else save(text, format === "csv" ? "chosen.csv" : "chosen.txt");
});

document.addEventListener("acted", ({ detail: { kind, ids } }) => {
  if (kind !== "remove") return;
  for (const id of ids)
    element
      .querySelector(`[data-id="${CSS.escape(id)}"]`)
      ?.closest("li")
      .remove();
  if (!element.querySelector(".tile")) element.querySelector(".selection")?.remove();
});
