// Before a GPU second is spent: the service counts what a clip takes, and shows what it will see.

import * as api from "./api.js";
import { el, fill, tell } from "./dom.js";
import { follow } from "./follow.js";
import { framedPicture, framingWarnings, windowOf } from "./framing.js";
import { isReady } from "./media.js";
import { modelOf, orderOf, sizeOf } from "./order.js";
import { drawOverlay, placeOverlay } from "./overlay.js";
import * as words from "./words.js";

const PATIENCE_MS = 450; // after the last change

// Changes of these ask for another plan.
export const ASKED_BY = [
  "info",
  "model",
  "preset",
  "kept",
  "picture",
  "motion",
  "pictureMask",
  "motionMask",
  "size",
  "pictureShape",
  "frames",
  "fps",
  "fit",
  "mode",
  "persons",
  "segments",
  "framing",
  "who",
  "isSkeleton",
  "audio",
];

/**
 * Keeps `plan` in the store true to what is chosen: null, {waiting}, {counted} or {wrong}. Returns a
 * function that calls a plan off which is not counted yet, so that no clip waits behind it.
 */
export function placePlanning(store) {
  let timer = 0;
  let asked = null;
  let before = "";

  async function ask() {
    if (!isReady(store.state)) {
      asked?.abort();
      before = "";
      store.set({ plan: null, overlay: null });
      return;
    }
    const order = orderOf(store.state, "validate");
    const { seed: _, prompt: __, ...rest } = order.input;
    const now = JSON.stringify([rest, order.model]);
    if (now === before) return; // the one that is asked for, or known
    before = now;
    asked?.abort();
    const mine = (asked = new AbortController());
    store.set({ plan: { waiting: true } });
    try {
      const ended = await counted(order, mine.signal, (behind) =>
        store.set({ plan: { waiting: true, behind } }),
      );
      if (mine.signal.aborted) return;
      if (ended.status === "COMPLETED") learn(store, ended.output);
      else
        store.set({
          plan: { wrong: ended.error ?? "The plan was called off.", code: ended.output?.code },
        });
    } catch (error) {
      if (error.name === "AbortError") return;
      before = "";
      store.set({ plan: { wrong: error.message } });
    }
  }

  store.on(ASKED_BY, () => {
    clearTimeout(timer);
    timer = setTimeout(ask, PATIENCE_MS);
  });
  const callOffOverlay = placeOverlay(store);

  return () => {
    clearTimeout(timer);
    callOffOverlay();
    if (!store.state.plan?.waiting) return;
    asked?.abort();
    before = "";
    store.set({ plan: null });
  };
}

/** Has an order counted. A plan that nobody waits for any more is called off at the service. */
async function counted(order, signal, onBehind) {
  const { id } = await api.run(order);
  signal.addEventListener("abort", () => api.cancel(id).catch(() => {}));
  if (signal.aborted) api.cancel(id).catch(() => {});
  const status = (now) => onBehind(now.status === "IN_QUEUE" ? (now.queue?.position ?? 1) : 0);
  return follow(id, { status }, signal);
}

function learn(store, plan) {
  const known = { plan: { counted: plan }, dancePerSecond: plan.fps };
  if (!store.state.frames) known.mostFrames = plan.num_frames;
  store.set(known);
  tell(`The plan: ${planWords(plan)}`);
}

/** A plan in one line. */
export function planWords(plan) {
  const time = plan.estimate_s === null ? "" : `, about ${words.duration(plan.estimate_s)}`;
  return `${plan.num_frames} frames, ${words.counted(plan.segments, "segment")}, ${words.counted(plan.forwards, "forward")}${time}`;
}

/** Draws the view of what will happen. */
export function placePlanView(element, store) {
  const tiles = el("div", { class: "tiles" });
  const seen = el("div", { class: "overlay" });
  const facts = el("dl", { class: "facts" });
  const warnings = el("ul", { class: "warnings", "aria-label": "What to look at" });
  const title = el("h2", { text: "What will happen" });
  const behind = el("p", { class: "soft" });
  const demo = el("p", { class: "soft" });
  fill(element, el("div", { class: "head" }, title, behind), tiles, seen, facts, warnings, demo);
  store.on(["info", "model"], (state) => (demo.textContent = modelOf(state)?.demo ?? ""));

  store.on(["picture", "motion", "pictureShape", "size", "model", "info", "fit"], (state) =>
    drawTiles(tiles, state),
  );
  store.on(["overlay", "info", "plan", "model"], (state) => drawOverlay(seen, state));
  store.on(["plan", "price"], (state) => drawFacts(facts, state));
  store.on(["plan", "pictureShape", "size", "fit", "picture", "motion", "info"], (state) => {
    const list = [
      ...wrongs(state),
      ...framingWarnings(state.pictureShape, sizeOf(state), state.fit),
      ...(state.plan?.counted?.warnings ?? []),
    ];
    fill(warnings, ...list.map((text) => el("li", {}, el("span", { text }))));
  });
  store.on(["plan"], ({ plan }) => {
    behind.textContent = plan?.behind ? "The plan waits for the clip that is being made." : "";
  });
}

function wrongs(state) {
  const media = [state.picture, state.motion].map((medium) => medium?.error).filter(Boolean);
  return state.plan?.wrong ? [...media, state.plan.wrong] : media;
}

function drawTiles(tiles, state) {
  const size = sizeOf(state);
  const all = [];
  if (state.picture?.shown) {
    const sentence = windowOf(state.pictureShape, size, state.fit)?.sentence ?? "";
    all.push(
      el(
        "figure",
        { class: "tile" },
        framedPicture(state.picture.shown, state.pictureShape, size, state.fit),
        el("figcaption", { text: sentence }),
      ),
    );
  }
  if (state.motion?.shown) {
    const isVideo = state.motion.kind !== "image";
    const video = isVideo
      ? el("video", {
          src: state.motion.shown,
          controls: true,
          loop: true,
          playsinline: true,
          "aria-label": "The dance",
        })
      : el("img", { src: state.motion.shown, alt: "The dance" });
    if (isVideo) {
      video.muted = true;
      video.autoplay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    }
    all.push(
      el(
        "figure",
        { class: "tile" },
        el("div", { class: "frame" }, video),
        el("figcaption", { text: "The dance" }),
      ),
    );
  }
  fill(tiles, ...all);
}

function drawFacts(element, { plan, price }) {
  element.hidden = !plan || Boolean(plan.wrong);
  if (element.hidden) return;
  const found = plan.counted;
  element.classList.toggle("waiting", !found);
  const memory = found?.memory;
  const seconds = found?.estimate_s ?? null;
  const rows = [
    [
      "Clip",
      found ? `${found.width} × ${found.height}` : "…",
      found
        ? `${found.num_frames} frames, ${found.duration_s.toFixed(1)} s at ${+found.fps.toFixed(2)}/s`
        : "…",
    ],
    [
      "Segments",
      found ? String(found.segments) : "…",
      found?.segments > 1 ? "one after the other" : "all at once",
    ],
    ["Forwards", found ? String(found.forwards) : "…", "of the transformer"],
    [
      "Time",
      seconds === null ? "–" : `≈ ${words.duration(seconds)}`,
      seconds === null ? "known after a first clip" : "from the last clip here",
    ],
  ];
  if (memory) {
    const free = `${words.bytes(memory.free_bytes)} free; ${memory.does}`;
    rows.splice(3, 0, ["Memory", words.bytes(memory.peak_bytes), free]);
  }
  if (price && seconds !== null)
    rows.push(["Cost", `≈ ${words.cost(seconds, price)}`, `at ${price} an hour`]);
  fill(
    element,
    ...rows.map(([name, value, more]) =>
      el(
        "div",
        {},
        el("dt", { text: name }),
        el("dd", { text: value }, el("small", { text: more })),
      ),
    ),
  );
}
