// Files dropped anywhere on the page find their place by what they are.

import { say } from "./dom.js";
import { choose, kindOf } from "./media.js";
import { restoreFrom } from "./restore.js";

/** Takes drops beside the zones: pictures, dances, and clips of this engine with their settings. */
export function placeDropping(store, dance) {
  let depth = 0;
  const body = document.body;
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const leave = () => {
    depth = 0;
    body.classList.remove("dragging");
  };
  addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    depth += 1;
    body.classList.add("dragging");
    dance();
  });
  addEventListener("dragleave", () => {
    depth -= 1;
    if (depth <= 0) leave();
  });
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    leave();
    if (event.defaultPrevented || !hasFiles(event)) return;
    event.preventDefault();
    for (const file of event.dataTransfer.files) place(file, store);
  });
}

/** Puts a file where it belongs. A clip that carries settings brings those and is no dance. */
export async function place(file, store) {
  const kind = kindOf(file);
  if (kind === "image") choose(store, "picture", file);
  else if (kind === "joints") choose(store, "motion", file);
  else if (kind === "video") {
    if (!(await restoreFrom(file, store, false))) choose(store, "motion", file);
  } else say(`${file.name} is neither a picture nor a video.`, "wrong");
}
