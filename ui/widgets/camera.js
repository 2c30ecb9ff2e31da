// The button is shown only where the browser has a camera.

const [open, dialog, video] = ["button", "dialog", "video"].map((name) => element.querySelector(name));
const FAILURES = {
  NotAllowedError: "The browser may not use the camera. Allow it next to the page's address, then try again.",
  NotFoundError: "The camera is gone; connect it, then try again.",
  NotReadableError: "The camera is in use by another program; close that, then try again.",
};

async function showButton() {
  const devices = (await navigator.mediaDevices?.enumerateDevices?.()) ?? [];
  open.hidden = !devices.some((device) => device.kind === "videoinput");
}

showButton();
navigator.mediaDevices?.addEventListener?.("devicechange", showButton);

open.addEventListener("click", async () => {
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    dialog.showModal();
  } catch (error) {
    trigger("upload", { failure: FAILURES[error.name] ?? `The camera does not work: ${error.message}` });
  }
});
dialog.addEventListener("close", () => {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
});
dialog.querySelector("[data-cancel]").addEventListener("click", () => dialog.close());
dialog.querySelector("[data-take]").addEventListener("click", () => {
  const { videoWidth: width, videoHeight: height } = video;
  if (!width) return; // no image has come yet
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  canvas.getContext("2d").drawImage(video, 0, 0);
  dialog.close();
  const taken = (blob) => send([new File([blob], "from the camera.jpg", { type: "image/jpeg" })]);
  canvas.toBlob(taken, "image/jpeg", 0.95);
});
