// Changes of the collection that a tab has asked for by an event of the document:
//   act      {kind: "remove" | "label" | "copy", count, collection, chosen}   asks, then does it
//   act      {kind: "confirm", count, collection, chosen, labels: {id: label}}
//   add      {collection, files}                                             asks, then adds the files, as it goes on
// and the events that are sent when it is done:
//   acted    {kind, collection, ids}

const $ = (query) => element.querySelector(query);
const [ask, adding, did] = ["dialog:not(.adding)", ".adding", ".did"].map($);
const counted = (n) => `${n.toLocaleString("en")} ${n === 1 ? "picture" : "pictures"}`;
const BATCH = 16; // files in one request

const ASK = {
  remove: {
    title: ({ count, collection }) => `Remove ${counted(count)} from the collection ${collection}?`,
    words: "Searches will not find them any more. The files on disk are not touched. It can be undone within an hour.",
    field: ({ count }) => `Type ${count} to confirm`,
    button: "Remove them",
    ready: (text, { count }) => text.trim() === String(count),
  },
  label: {
    title: ({ count }) => `Label ${counted(count)}`,
    words: "The label replaces the one that a picture has. Without a text, labels are removed.",
    field: () => "Label",
    button: "Label them",
    ready: () => true,
  },
  confirm: {
    title: ({ count }) => `Label ${counted(count)} as suggested?`,
    words: "Each gets the label that is shown with a question mark.",
    button: "Label them",
    ready: () => true,
  },
  copy: {
    title: ({ count }) => `Put ${counted(count)} into another collection`,
    words: "They stay in this one too. A collection that does not exist yet is made.",
    field: () => "Name of the collection",
    button: "Put them there",
    ready: (text) => text.trim() !== "",
  },
};

let asked = null; // the act that the dialog is about
let undo = null; // what the service needs to take the last change back

document.addEventListener("act", ({ detail }) => {
  asked = detail;
  const { title, words, field, button } = ASK[asked.kind];
  ask.querySelector("h3").textContent = title(asked);
  ask.querySelector(".ask-words").textContent = words;
  ask.querySelector(".ask-field").hidden = !field;
  ask.querySelector(".ask-field span").textContent = field?.(asked) ?? "";
  ask.querySelector("input").value = "";
  ask.querySelector("[data-ask=do]").textContent = button;
  ask.querySelector("[data-ask=do]").classList.toggle("danger", asked.kind === "remove");
  checkText();
  ask.showModal();
  ask.querySelector(field ? "input" : "[data-ask=do]").focus();
});

const text = () => ask.querySelector("input").value;

function checkText() {
  ask.querySelector("[data-ask=do]").disabled = !ASK[asked.kind].ready(text(), asked);
}

ask.addEventListener("input", checkText);
ask.querySelector("[data-ask=cancel]").addEventListener("click", () => ask.close());
ask.querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  ask.close();
  say("…", null);
  const { kind, collection, chosen, labels } = asked;
  const answer = await server.act({ kind, collection, chosen, labels, text: text() }).catch(failure);
  done(kind, collection, answer);
});

const failure = (error) => ({ message: `This did not work: ${error.message}`, ids: [], undo: null });

/** Say what happened, with a button to take it back, and let the tabs show it. */
function done(kind, collection, answer) {
  say(answer.message, answer.undo);
  document.dispatchEvent(new CustomEvent("acted", { detail: { kind, collection, ids: answer.ids } }));
  trigger("changed", {});
}

function say(message, undoing) {
  undo = undoing;
  did.hidden = !message;
  did.querySelector("span").textContent = message;
  did.querySelector("[data-did=undo]").hidden = !undo;
}

did.addEventListener("click", async (event) => {
  const what = event.target.closest("button")?.dataset.did;
  if (what === "close") say("", null);
  if (what !== "undo") return;
  const taken = undo;
  say("…", null);
  const answer = await server.undo(taken).catch(failure);
  done("undo", taken.collection, answer);
});

// Adding pictures ----------------------------------------------------------------------------------------------------

let files = []; // {file, name, label} to be added
let collection = null;
let going = false; // whether they are being added
let stopped = false;

document.addEventListener("add", ({ detail }) => {
  collection = detail.collection;
  prepare(detail.files ?? [], detail.searchable);
  if (!adding.open) adding.showModal();
});

/** Show what would be added. chosen: {file, path}, the path within the folder that was dropped or chosen */
function prepare(chosen, searchable = false) {
  files = chosen.map(({ file, path }) => ({ file, name: path, label: labelOf(path) }));
  going = false;
  const none = !files.length;
  adding.querySelector("h3").textContent = none
    ? `Add pictures to the collection ${collection}`
    : `Add ${counted(files.length)} to the collection ${collection}?`;
  const labels = new Set(files.map(({ label }) => label).filter(Boolean));
  const some = [...labels].slice(0, 5).join(", ") + (labels.size > 5 ? ", …" : "");
  adding.querySelector(".adding-words").textContent = none
    ? "Or drop a folder or several pictures anywhere on the page."
    : labels.size
      ? `The names of their folders become labels: ${some}.`
      : "";
  adding.querySelector(".adding-choose").hidden = !none;
  adding.querySelector("progress").hidden = true;
  adding.querySelector(".adding-failed").replaceChildren();
  adding.querySelector("[data-adding=add]").hidden = none;
  adding.querySelector("[data-adding=search]").hidden = !searchable;
  adding.querySelector("[data-adding=close]").textContent = "Cancel";
}

/** As for `twinview index add`, the folder of a picture is its label; what was dropped is the folder of all. */
const labelOf = (path) => path.split("/").slice(1, -1)[0] ?? "";

async function addAll() {
  going = true;
  stopped = false;
  const failed = [];
  let undoing = null;
  let problem = "";
  const bar = adding.querySelector("progress");
  bar.hidden = false;
  bar.max = files.length;
  bar.value = 0;
  for (const button of ["add", "search"]) adding.querySelector(`[data-adding=${button}]`).hidden = true;
  adding.querySelector("[data-adding=close]").textContent = "Stop";
  for (let at = 0; at < files.length && !stopped && !problem; at += BATCH) {
    const batch = files.slice(at, at + BATCH);
    const sent = [];
    for (const { file, name, label } of batch) {
      try {
        sent.push({ path: (await upload(file)).path, name: name.split("/").slice(1).join("/") || name, label });
      } catch (error) {
        failed.push(`${name}: could not be uploaded: ${error.message}`);
      }
    }
    if (sent.length) {
      const answer = await server.add({ files: sent, collection }).catch(failure);
      failed.push(...(answer.failed ?? []));
      problem = answer.message;
      if (answer.undo) undoing = { collection, changes: [...answer.undo.changes, ...(undoing?.changes ?? [])] };
    }
    bar.value = at + batch.length;
    adding.querySelector(".adding-words").textContent = `${bar.value.toLocaleString("en")} of ${counted(files.length)}`;
  }
  going = false;
  const added = bar.value - failed.length;
  const words = problem || (stopped ? `Stopped: ${counted(added)} added.` : `${counted(added)} added.`);
  adding.querySelector(".adding-words").textContent = failed.length
    ? `${words} ${counted(failed.length)} could not be read:`
    : words;
  adding
    .querySelector(".adding-failed")
    .replaceChildren(...failed.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
  adding.querySelector("[data-adding=close]").textContent = "Close";
  if (!failed.length && !problem) adding.close();
  done("add", collection, { message: words, ids: [], undo: undoing });
}

adding.addEventListener("change", (event) => {
  const chosen = [...event.target.files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
  event.target.value = "";
  const pictures = chosen.filter(({ file }) => !file.name.startsWith("."));
  if (pictures.length) prepare(pictures);
});

adding.addEventListener("click", (event) => {
  const what = event.target.closest("button")?.dataset.adding;
  if (what === "add") addAll();
  else if (what === "close") {
    stopped = true;
    if (!going) adding.close();
  } else if (what === "search") {
    adding.close();
    document.dispatchEvent(new CustomEvent("searchby", { detail: files.map(({ file }) => file) }));
  }
});
adding.addEventListener("cancel", (event) => {
  stopped = true;
  if (going) event.preventDefault();
});
