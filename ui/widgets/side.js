// Reports which of the numbered buttons was clicked.

element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-at]");
  if (button) trigger("choose", { at: Number(button.dataset.at) });
});
