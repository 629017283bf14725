// The queue and the earlier clips of this browser, as cards; one opens on the stage.

import * as api from "./api.js";
import { el, fill, find, say } from "./dom.js";
import { isOver } from "./follow.js";
import { token } from "./identity.js";
import * as words from "./words.js";

const BUSY_MS = 2000;
const CALM_MS = 15000;

/** Keeps `jobs` in the store true to the service, and draws them. Returns `refresh`. */
export function placeShelf(store, open) {
  let timer = 0;
  let asking = null;

  async function refresh() {
    clearTimeout(timer);
    asking ??= api.jobs().then(
      ({ jobs }) =>
        store.set({
          isAway: false,
          jobs: jobs.filter((job) => (job.action ?? "generate") === "generate"),
        }),
      () => store.set({ isAway: true }), // what is known stays
    );
    await asking;
    asking = null;
    const isBusy = store.state.jobs.some((job) => !isOver(job.status));
    if (!document.hidden) timer = setTimeout(refresh, isBusy ? BUSY_MS : CALM_MS);
  }

  document.addEventListener("visibilitychange", () => !document.hidden && refresh());

  const cards = new Map();
  store.on(["jobs", "job", "shown", "view"], (state) => {
    find("shelf").hidden = !state.jobs.length;
    const inView = { running: state.job?.id, failed: state.job?.id, finished: state.shown?.job.id }[
      state.view
    ];
    const list = state.jobs.map((job) => {
      const known = cards.get(job.id) ?? makeCard(job.id, store, open, refresh);
      cards.set(job.id, known);
      known.update(job, job.id === inView);
      return known.element;
    });
    const there = [...find("cards").children];
    if (list.length !== there.length || list.some((card, place) => card !== there[place]))
      arrange(find("cards"), list);
  });
  store.on(["info"], ({ info }) => {
    if (info)
      find("keeps").textContent =
        `kept ${Math.round(info.keeps.result_s / 86400)} days, at most ${words.bytes(info.keeps.result_bytes)}`;
  });
  return refresh;
}

/** Puts cards in order without moving those that are in place, so that the focus stays. */
function arrange(parent, list) {
  for (const child of [...parent.children]) if (!list.includes(child)) child.remove();
  list.forEach((card, place) => {
    if (parent.children[place] !== card) parent.insertBefore(card, parent.children[place] ?? null);
  });
}

function makeCard(id, store, open, refresh) {
  const picture = el("span", { class: "picture" });
  const title = el("b");
  const more = el("span");
  const bar = el("span", { class: "progress", hidden: true }, el("i"));
  const button = el(
    "button",
    { type: "button", class: "open" },
    picture,
    el("span", { class: "words" }, title, more),
    bar,
  );
  const remove = el("button", { type: "button", class: "remove", text: "×" });
  const element = el("li", { class: "card" }, button, remove);
  let latest = null;
  let seen = "";

  button.addEventListener("click", () => open(latest));
  remove.addEventListener("click", async () => {
    try {
      if (isOver(latest.status)) await api.forget(id);
      else await api.cancel(id);
      await refresh();
    } catch (error) {
      say(error.message, "wrong");
    }
  });

  async function show(job) {
    // A finished clip shows itself; with a token it would have to be fetched whole for that.
    const isShown = job.status === "COMPLETED" && !(token() && job.preview_url);
    const path = isShown ? `/results/${id}.mp4` : (job.preview_url ?? "");
    if (seen === path) return;
    seen = path;
    if (!path) return;
    try {
      const url = await api.showable(path);
      const isFilm = path.endsWith(".mp4");
      const shown = isFilm
        ? el("video", {
            src: url,
            preload: "metadata",
            playsinline: true,
            "aria-hidden": "true",
            tabindex: -1,
          })
        : el("img", { src: url, alt: "" });
      if (isFilm) {
        shown.muted = true;
        shown.addEventListener("loadedmetadata", () => (shown.currentTime = shown.duration / 3));
      }
      fill(picture, shown);
    } catch {
      seen = ""; // gone; the words stay
    }
  }

  function update(job, isShown) {
    latest = job;
    element.classList.toggle("failed", job.status === "FAILED");
    if (job.status === "FAILED") fill(picture, el("span", { text: job.error }));
    else if (job.status === "CANCELLED" && !seen) fill(picture, el("span", { text: "called off" }));
    else if (job.status === "IN_QUEUE") fill(picture, el("span", { text: "waits" }));
    if (job.status === "IN_PROGRESS" || job.status === "COMPLETED") show(job);
    title.textContent = titleOf(job);
    more.textContent = moreOf(job);
    const percent = job.status === "IN_PROGRESS" ? (job.output?.percent ?? 0) : null;
    bar.hidden = percent === null;
    if (percent !== null) bar.firstChild.style.clipPath = `inset(0 ${100 - percent}% 0 0)`;
    button.toggleAttribute("aria-current", isShown);
    if (isShown) button.setAttribute("aria-current", "true");
    remove.setAttribute(
      "aria-label",
      `${isOver(job.status) ? "Remove" : "Cancel"}: ${titleOf(job)}, ${moreOf(job)}`,
    );
    remove.title = isOver(job.status) ? "Remove" : "Cancel";
  }

  return { element, update };
}

function titleOf(job) {
  switch (job.status) {
    case "IN_QUEUE":
      return job.queue ? `In the queue, place ${job.queue.position}` : "In the queue";
    case "IN_PROGRESS":
      return job.output?.percent === undefined ? "Begins" : `${job.output.percent} %`;
    case "COMPLETED":
      return job.output?.num_frames ? `${job.output.num_frames} frames` : "Clip";
    case "CANCELLED":
      return "Called off";
    default:
      return "Failed";
  }
}

function moreOf(job) {
  if (job.status === "IN_PROGRESS" && job.output?.eta_s)
    return `${words.duration(job.output.eta_s)} left`;
  const seed = job.output?.seed ?? job.input?.seed;
  return `${words.ago(job.created_at)}${seed === undefined ? "" : ` · seed ${String(seed).slice(0, 6)}${String(seed).length > 6 ? "…" : ""}`}`;
}
