// The pictures chosen on the map: a click searches by one; a button saves the list of all of them.

element.addEventListener("click", async (event) => {
  const tile = event.target.closest("button[data-id]");
  if (tile) trigger("click", { ...tile.dataset });
  const button = event.target.closest("button[data-choice]");
  if (!button) return;
  button.disabled = true;
  const text = await server.export_text(JSON.parse(button.dataset.choice)).catch(() => null);
  button.disabled = false;
  if (text === null) button.textContent = "The list could not be loaded; try again";
  else save(text, "chosen.csv");
});
