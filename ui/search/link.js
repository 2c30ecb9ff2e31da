// The page's address follows the search, so that reloading the page keeps it.

const address = () => {
  const query = new URLSearchParams(element.querySelector("button").dataset.query ?? "");
  for (const [name, value] of new URLSearchParams(location.search)) {
    if (name.startsWith("__")) query.append(name, value); // Gradio's own
  }
  const text = query.toString().replaceAll("%2C", ",").replaceAll("%3D", "=").replaceAll("%40", "@");
  return location.pathname + (text && `?${text}`);
};

watch("value", () => history.replaceState(history.state, "", address()));

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
