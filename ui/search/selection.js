// Saves the file whose link has just been put into this element.
watch("value", () => element.querySelector("a")?.click());
