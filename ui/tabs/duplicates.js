// Which pictures are marked to be removed is kept here, over all pages, until the collection is another.

let collection = null, said = "";
const marks = new Set();
const $ = (query) => element.querySelector(query);
const copies = () => [...element.querySelectorAll(".copy")];
const counted = (n) => `${n.toLocaleString("en")} ${n === 1 ? "picture" : "pictures"}`;
const put = (id, marked) => void (marked ? marks.add(id) : marks.delete(id));

function paint() {
    for (const copy of copies()) {
        const marked = marks.has(copy.dataset.id);
        copy.setAttribute("aria-pressed", String(marked));
        copy.querySelector(".verdict").textContent = marked ? "remove" : copy.dataset.first ? "suggested to stay" : "";
    }
    for (const group of element.querySelectorAll(".copies")) {
        const all = [...group.querySelectorAll(".copy")].every((copy) => marks.has(copy.dataset.id));
        group.classList.toggle("none-stays", all);
    }
    $(".marked").textContent = marks.size ? `${counted(marks.size)} marked` : "Nothing is marked";
    $(".mark-bar").classList.toggle("some", marks.size > 0);
    $(".said").textContent = said;
    $(".mark-bar").hidden = !copies().length && !marks.size;
}

function renew() {
    const now = $(".copies-all")?.dataset.collection;
    if (now && now !== collection) {
        collection = now;
        marks.clear();
        said = "";
    }
    paint();
}

function save(text, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
}

async function busily(button, work) {
    button.disabled = true;
    try {
        await work();
    } catch (error) {
        said = `This did not work: ${error.message}`;
    }
    button.disabled = false;
    paint();
}

const list = (button, format, name) => busily(button, async () => {
    const { text, problem } = await server.listed({ collection, ids: [...marks], format });
    said = problem ?? "";
    if (text) save(text, name);
});

const DOES = {
    suggested: (button) => busily(button, async () => {
        const { threshold } = $(".copies-all").dataset;
        const { ids, problem } = await server.suggested({ collection, threshold: Number(threshold) });
        said = problem ?? "";
        for (const id of ids) marks.add(id);
    }),
    clear: () => { marks.clear(); paint(); },
    csv: (button) => list(button, "csv", "remove.csv"),
    paths: (button) => list(button, "paths", "remove.txt"),
    ask: () => {
        for (const place of element.querySelectorAll(".number")) place.textContent = marks.size;
        for (const place of element.querySelectorAll(".of")) place.textContent = collection;
        $("dialog .pictures").textContent = counted(marks.size);
        $("dialog input").value = "";
        $("[data-do=remove]").disabled = true;
        $("dialog").showModal();
    },
    keep: () => $("dialog").close(),
    remove: (button) => busily(button, async () => {
        const ids = [...marks];
        $("dialog").close();
        const answer = await server.remove({ collection, ids });
        for (const id of answer.deleted) marks.delete(id);
        said = answer.said;
        trigger("removed", {});
    }),
};

element.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button || !element.contains(button)) return;
    if (button.dataset.do) return void DOES[button.dataset.do](button);
    if (button.matches(".seek")) return void trigger("seek", { ...button.dataset });
    if (button.matches(".copy")) put(button.dataset.id, !marks.has(button.dataset.id));
    if (button.matches(".others")) {
        const group = [...button.closest(".copies").querySelectorAll(".copy")];
        const done = group.slice(1).every((copy) => marks.has(copy.dataset.id));
        for (const copy of group) put(copy.dataset.id, !copy.dataset.first && !done);
    }
    paint();
});
element.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], all = copies(), at = all.indexOf(event.target);
    if (!step || at < 0) return;
    event.preventDefault();
    all[at + step]?.focus();
});
element.addEventListener("input", (event) => {
    if (event.target.matches("dialog input")) {
        $("[data-do=remove]").disabled = event.target.value.trim() !== String(marks.size);
    }
});
watch("value", renew);
renew();
