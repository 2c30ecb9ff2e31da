// Dropping and pasting work anywhere on the page. The listeners sit on elements whose contents may be replaced.

element.addEventListener("change", (event) => {
  send([...event.target.files]);
  event.target.value = "";
});
document.addEventListener("paste", (event) => send(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  element.classList.toggle("hover", event.dataTransfer.types.includes("Files"));
});
document.addEventListener("dragleave", () => element.classList.remove("hover"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  element.classList.remove("hover");
  send(event.dataTransfer.files);
});
