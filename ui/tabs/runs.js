// Triggers an event for the clicked run of the list.

element.addEventListener("click", (event) => {
  const row = event.target.closest("button[data-run]");
  if (row) trigger("click", { ...row.dataset });
});
