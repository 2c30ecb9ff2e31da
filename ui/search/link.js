// The page's address follows the search, so that reloading the page keeps it. Each search is a step of the browser's
// history; a change of its settings is not.

const address = () => {
  const query = new URLSearchParams(element.querySelector("button").dataset.query ?? "");
  for (const [name, value] of new URLSearchParams(location.search)) {
    if (name.startsWith("__")) query.append(name, value); // Gradio's own
  }
  const text = query.toString().replaceAll("%2C", ",").replaceAll("%3D", "=").replaceAll("%40", "@");
  return location.pathname + (text && `?${text}`);
};

const given = new URLSearchParams(location.search);
let loaded = !given.has("like") && !given.has("text"); // else the first search is the one of the address
let awaited = null; // number of searches where the browser went back or forward to, until the page shows them
history.replaceState({ ...history.state, steps: 0 }, "");

watch("value", () => {
  const steps = Number(element.querySelector("button").dataset.steps);
  if (awaited !== null && steps !== awaited) return; // shown on the way there
  awaited = null;
  const isNew = loaded && steps !== history.state?.steps;
  loaded = true;
  history[isNew ? "pushState" : "replaceState"]({ ...history.state, steps }, "", address());
});

window.addEventListener("popstate", (event) => {
  if (event.state?.steps === undefined) return;
  awaited = event.state.steps;
  trigger("navigate", { steps: awaited, query: location.search });
});

// Whatever the user does next is a new step, even if the browser's last one could not be shown.
for (const act of ["pointerdown", "keydown"]) {
  document.addEventListener(
    act,
    () => {
      awaited = null;
    },
    true,
  );
}

element.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.query === undefined) return void trigger("refuse");
  const status = element.querySelector("[role=status]");
  const link = new URL(address(), location.href).href;
  try {
    await navigator.clipboard.writeText(link); // works over HTTPS and on localhost only
    status.textContent = "Copied";
  } catch {
    prompt("The browser does not let this page copy. The link is:", link);
  }
  setTimeout(() => status.replaceChildren(), 2000);
});
