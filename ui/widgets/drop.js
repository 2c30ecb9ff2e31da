// Dropping and pasting work anywhere on the page.
// One picture is searched by; for a folder or several pictures, acts.js asks whether to add them to the collection.

/** The element's content may be replaced while a file is being chosen: only the input itself then has the file. */
function listen() {
  for (const input of element.querySelectorAll("input[type=file]")) {
    input.onchange = () => {
      send([...input.files]);
      input.value = "";
    };
  }
}
new MutationObserver(listen).observe(element, { childList: true, subtree: true });
listen();
document.addEventListener("paste", (event) => send(event.clipboardData.files));
document.addEventListener("searchby", (event) => send(event.detail));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  element.classList.toggle("hover", event.dataTransfer.types.includes("Files"));
});
document.addEventListener("dragleave", () => element.classList.remove("hover"));
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  element.classList.remove("hover");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const plain = [...event.dataTransfer.files]; // both are gone after the first await
  const folders = entries.some((entry) => entry.isDirectory);
  if (!folders && plain.length < 2) return send(plain);
  const files = folders
    ? (await Promise.all(entries.map(filesOf))).flat()
    : plain.map((file) => ({ file, path: file.name }));
  const collection = document.querySelector(".selection[data-collection]")?.dataset.collection ?? "pictures";
  document.dispatchEvent(new CustomEvent("add", { detail: { collection, files, searchable: !folders } }));
});

/** The files below an entry, each with its path; without hidden ones. */
async function filesOf(entry) {
  if (entry.name.startsWith(".") || entry.name === "__MACOSX") return [];
  const promised = (start) => new Promise((resolve, reject) => start(resolve, reject));
  if (entry.isFile) return [{ file: await promised((...done) => entry.file(...done)), path: entry.fullPath.slice(1) }];
  const reader = entry.createReader();
  const found = [];
  while (true) {
    const some = await promised((...done) => reader.readEntries(...done)); // a hundred at a time, then none
    if (!some.length) return found;
    for (const one of some) found.push(...(await filesOf(one)));
  }
}
