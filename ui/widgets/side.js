// Triggers an event with the number of the clicked button.

element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-at]");
  if (button) trigger("choose", { at: Number(button.dataset.at) });
});
