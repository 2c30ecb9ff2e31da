// Which pictures are marked for removal is kept here, across all pages of groups, until another collection is shown.

const marks = new Set(); // ids
let collection = null;
let message = "";
const $ = (query) => element.querySelector(query);
const copies = (within = element) => [...within.querySelectorAll(".copy")];
const isMarked = (copy) => marks.has(copy.dataset.id);
const counted = (n) => `${n.toLocaleString("en")} ${n === 1 ? "picture" : "pictures"}`;

function mark(copy, marked) {
  if (marked) marks.add(copy.dataset.id);
  else marks.delete(copy.dataset.id);
}

function paint() {
  for (const copy of copies()) {
    copy.setAttribute("aria-pressed", String(isMarked(copy)));
    const suggestion = copy.dataset.first ? "keep (suggested)" : "";
    copy.querySelector(".verdict").textContent = isMarked(copy) ? "remove" : suggestion;
  }
  for (const group of element.querySelectorAll(".copies")) {
    group.classList.toggle("none-stays", copies(group).every(isMarked));
  }
  $(".marked").textContent = marks.size ? `${counted(marks.size)} marked` : "Nothing is marked";
  $(".mark-bar").classList.toggle("some", marks.size > 0);
  $(".mark-bar").hidden = !copies().length && !marks.size;
  $(".message").textContent = message;
}

function showNewGroups() {
  const now = $(".copies-all")?.dataset.collection;
  if (now && now !== collection) {
    collection = now;
    marks.clear();
    message = "";
  }
  paint();
}

/** Do this work while the button is disabled, and show what went wrong. */
async function run(button, work) {
  button.disabled = true;
  try {
    await work();
  } catch (error) {
    message = `This did not work: ${error.message}`;
  }
  button.disabled = false;
  paint();
}

const saveList = (button, format, name) =>
  run(button, async () => {
    const { text, problem } = await server.export_text({ collection, ids: [...marks], format });
    message = problem ?? "";
    if (text) save(text, name);
  });

/** Mark the pictures that are suggested to go. near: near-duplicates too, not only exact copies. */
const suggest = (button, near) =>
  run(button, async () => {
    const { threshold } = $(".copies-all").dataset;
    const { ids, problem } = await server.suggested({ collection, threshold: Number(threshold), near });
    message = problem ?? "";
    for (const id of ids) marks.add(id);
  });

const ACTIONS = {
  suggested: (button) => suggest(button, true),
  exact: (button) => suggest(button, false),
  clear: () => {
    marks.clear();
    paint();
  },
  csv: (button) => saveList(button, "csv", "remove.csv"),
  paths: (button) => saveList(button, "paths", "remove.txt"),
  ask: () => {
    const detail = { kind: "remove", count: marks.size, collection, chosen: { ids: [...marks] } };
    document.dispatchEvent(new CustomEvent("act", { detail }));
  },
};

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || !element.contains(button)) return;
  if (button.dataset.do) ACTIONS[button.dataset.do](button);
  else if (button.matches(".search")) trigger("search", { ...button.dataset });
  else if (button.matches(".copy")) mark(button, !isMarked(button));
  else if (button.matches(".others")) {
    const [first, ...others] = copies(button.closest(".copies"));
    const marked = !others.every(isMarked);
    mark(first, false);
    for (const copy of others) mark(copy, marked);
  }
  paint();
});

element.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const at = copies().indexOf(event.target);
  if (!step || at < 0) return;
  event.preventDefault();
  copies()[at + step]?.focus();
});

document.addEventListener("acted", ({ detail: { kind, ids } }) => {
  if (kind !== "remove") return;
  for (const id of ids) marks.delete(id);
  paint();
});

watch("value", showNewGroups);
showNewGroups();
