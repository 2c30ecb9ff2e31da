/** Upload these files and report them by an `upload` event with their paths, or with an error message. */
async function send(files) {
  if (!files.length) return;
  element.classList.add("busy");
  try {
    const paths = await Promise.all(Array.from(files, async (file) => (await upload(file)).path));
    trigger("upload", { paths });
  } catch (error) {
    trigger("upload", { failure: `The picture could not be uploaded: ${error.message}` });
  }
  element.classList.remove("busy");
}
