// What will be danced, seen on the first frames: who becomes whom, or the skeleton over the dance.
//
// A model that takes masks has the action `masks` (feature "masks"); others have `POST /overlay`
// (feature "overlay"). A service with neither says so in a sentence.

import * as api from "./api.js";
import { el, fill } from "./dom.js";
import { follow, isOver } from "./follow.js";
import { modelOf, orderOf } from "./order.js";

// Changes of these ask for other pictures.
const ASKED_BY = [
  ...["plan", "model", "picture", "motion", "pictureMask", "motionMask", "mode", "persons", "who"],
  ...["framing", "isSkeleton", "size", "fit"],
];

/** Keeps `overlay` in the store true: null, {waiting}, {wrong} or {pictures, warnings}. */
export function placeOverlay(store) {
  let asked = null;
  let before = "";

  store.on(ASKED_BY, async (state) => {
    const way = wayOf(state);
    if (!state.plan) store.set({ overlay: null });
    if (!way || !state.plan?.counted) return;
    const order = orderOf(state, way === "masks" ? "masks" : "generate");
    const { seed: _, prompt: __, frames: ___, ...rest } = order.input;
    const now = JSON.stringify([rest, order.model]);
    if (now === before) return;
    before = now;
    asked?.abort();
    const mine = (asked = new AbortController());
    store.set({ overlay: { waiting: true } });
    try {
      const overlay = await seen(way, order, mine.signal);
      if (!mine.signal.aborted) store.set({ overlay });
    } catch (error) {
      if (error.name !== "AbortError") store.set({ overlay: { wrong: error.message } });
    }
  });

  return () => {
    if (!store.state.overlay?.waiting) return;
    asked?.abort();
    before = "";
    store.set({ overlay: null });
  };
}

function wayOf(state) {
  const features = state.info?.features ?? [];
  if (features.includes("masks") && modelOf(state)?.takes_masks) return "masks";
  return features.includes("overlay") ? "overlay" : null;
}

/** Has pictures made, or learns why there are none. */
async function seen(way, order, signal) {
  let ended = await (way === "masks" ? api.run(order) : api.overlay(order));
  signal.addEventListener("abort", () => api.cancel(ended.id).catch(() => {}));
  if (!isOver(ended.status)) ended = await follow(ended.id, {}, signal);
  if (ended.status !== "COMPLETED") return { wrong: ended.error ?? "It was called off." };
  const { output } = ended;
  const warnings = output.warnings ?? [];
  if (way === "masks") {
    const pictures = output.stills.map((still) => `data:image/jpeg;base64,${still}`);
    return { pictures, warnings };
  }
  return { pictures: [await api.showable(output.picture_url)], warnings };
}

/** Draws what is seen, or a sentence about why nothing is. */
export function drawOverlay(element, state) {
  const { overlay, info, plan } = state;
  const sentence = (text) => fill(element, el("p", { class: "soft", text }));
  const warned = (list) =>
    el("ul", { class: "warnings" }, ...list.map((text) => el("li", {}, el("span", { text }))));
  if (!info || !plan?.counted) return fill(element);
  if (!wayOf(state)) {
    return sentence("This service draws no first frames beforehand; the plan holds all the same.");
  }
  if (!overlay || overlay.waiting) return sentence("Looking at the first frames…");
  if (overlay.wrong) return fill(element, warned([overlay.wrong]));
  return fill(
    element,
    el("h3", { text: "What will be danced: the first frames" }),
    el(
      "div",
      { class: "stills", tabindex: 0, role: "group", "aria-label": "First frames" },
      ...overlay.pictures.map((src, place) =>
        el("img", { src, alt: `What will be danced, drawn over the media: picture ${place + 1}` }),
      ),
    ),
    warned(overlay.warnings.filter((text) => !plan.counted.warnings.includes(text))),
  );
}
