// Reports which run of the list was clicked.

element.addEventListener("click", (event) => {
  const row = event.target.closest("button[data-run]");
  if (row) trigger("click", { ...row.dataset });
});
