// While a clip is made: where it is, how long yet, what it looks like so far, and a way to stop it.

import * as api from "./api.js";
import { el, fill, say, tell } from "./dom.js";
import { duration } from "./words.js";

const STAGES = [
  ["load", "Model"],
  ["fetch", "Files"],
  ["media", "Dance"],
  ["conditioning", "Prompt"],
  ["denoise", "Denoising"],
  ["decode", "Frames"],
];

/** Draws the view of a job that waits or runs. `job` in the store is its latest status. */
export function placeRunningView(element, store) {
  const title = el("h2", { text: "" });
  const percent = el("p", { class: "percent numbers", "aria-hidden": "true" });
  const left = el("p", { class: "soft numbers" });
  const stop = el("button", { type: "button", class: "plain", id: "cancel", text: "Cancel" });
  const picture = el("img", { alt: "The clip as it is so far", class: "veiled" });
  picture.addEventListener("load", () => {
    // as large as the stage has room for, whatever its shape: one frame, or several side by side
    const ratio = picture.naturalWidth / picture.naturalHeight;
    picture.style.aspectRatio = String(ratio);
    picture.style.width = `calc(min(54vh, 520px) * ${ratio})`;
  });
  const veil = el("p", { class: "veil-words" });
  const live = el("div", { class: "live" }, el("div", { class: "pane" }, picture, veil));
  const fillBar = el("i");
  const bar = el(
    "div",
    {
      class: "progress",
      role: "progressbar",
      "aria-label": "Progress of the clip",
      "aria-valuemin": 0,
      "aria-valuemax": 100,
    },
    fillBar,
  );
  const steps = el("ol", { class: "steps", "aria-label": "Stages" });
  fill(
    element,
    el("div", { class: "head whole" }, el("div", {}, title, left), percent),
    live,
    bar,
    el("div", { class: "head" }, steps, stop),
  );

  stop.addEventListener("click", async () => {
    stop.disabled = true;
    stop.textContent = "Stopping…";
    try {
      await api.cancel(store.state.job.id);
    } catch (error) {
      say(error.message, "wrong");
      stop.disabled = false;
      stop.textContent = "Cancel";
    }
  });

  let shown = null;
  let toldAt = -1;
  store.on(["job", "progress", "previewUrl", "picture"], (state) => {
    const { job, progress } = state;
    if (!job) return;
    if (shown !== job.id) {
      shown = job.id;
      toldAt = -1;
      stop.disabled = false;
      stop.textContent = "Cancel";
      delete picture.dataset.preview;
    }
    const waits = job.status === "IN_QUEUE";
    title.textContent = waits ? "Waiting" : (said(progress?.stage) ?? "Beginning");
    left.textContent = waits ? place(job.queue) : eta(progress);
    const done = waits ? 0 : (progress?.percent ?? 0);
    percent.textContent = waits ? "" : `${done} %`;
    veil.textContent = waits ? "" : "The first picture comes with the first step.";
    bar.classList.toggle("waiting", waits || !progress);
    bar.setAttribute("aria-valuenow", done);
    bar.setAttribute(
      "aria-valuetext",
      waits ? place(job.queue) : `${done} %, ${title.textContent}`,
    );
    fillBar.style.clipPath = waits || !progress ? "" : `inset(0 ${100 - done}% 0 0)`;
    drawSteps(steps, progress?.stage);
    if (state.previewUrl) {
      if (picture.dataset.preview !== state.previewUrl)
        picture.src = picture.dataset.preview = state.previewUrl;
      picture.classList.remove("veiled");
    } else {
      picture.classList.add("veiled");
      picture.hidden = !state.job.shown;
      if (state.job.shown && picture.getAttribute("src") !== state.job.shown)
        picture.src = state.job.shown;
    }
    if (state.previewUrl) picture.hidden = false;
    const tens = waits ? -1 : Math.floor(done / 10);
    if (tens !== toldAt) {
      toldAt = tens;
      tell(`${title.textContent}. ${waits ? place(job.queue) : `${done} %. ${eta(progress)}`}`);
    }
  });
}

function said(stage) {
  return {
    load: "Loading the model",
    fetch: "Fetching the files",
    media: "Watching the dance",
    conditioning: "Reading prompt and picture",
    denoise: "Denoising",
    decode: "Making frames",
  }[stage];
}

function place(queue) {
  if (!queue) return "It waits for its turn.";
  if (queue.position === 1) return "It is next, when the clip before it is done.";
  return `Place ${queue.position} of ${queue.waiting} in the queue.`;
}

function eta(progress) {
  if (!progress) return "The first news comes soon.";
  return progress.eta_s === null || progress.eta_s === undefined
    ? ""
    : `About ${duration(progress.eta_s)} left`;
}

function drawSteps(element, stage) {
  const at = STAGES.findIndex(([name]) => name === stage);
  if (element.dataset.at === String(at)) return;
  element.dataset.at = String(at);
  fill(
    element,
    ...STAGES.slice(stage === "load" ? 0 : 1).map(([name, title]) => {
      const here = STAGES.findIndex(([other]) => other === name);
      return el("li", {
        class: here < at ? "done" : "",
        "aria-current": here === at ? "step" : null,
        text: title,
      });
    }),
  );
}
