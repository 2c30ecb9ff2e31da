// Gradio takes over a slider's value when the pointer lets go of it. Arrow keys and Enter should have the same effect.

document.addEventListener("keyup", ({ target, key }) => {
  if (target.type === "range") target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  if (target.type === "number" && key === "Enter") target.blur();
});
