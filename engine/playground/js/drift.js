// How far the colours of a long clip wander from where they began (docs/reference/masks.md 5).

import { el } from "./dom.js";

const FAR = 3; // delta E of a region that one sees

/**
 * Draws the drift of a clip as a table: a row for each region, a column for each segment, the
 * distance as it came and as it is in the clip. `drift` is that of the reply; null where there is none.
 */
export function driftTable(drift) {
  if (!Array.isArray(drift) || !drift.length) return null;
  const regions = [
    ...new Set(drift.flatMap((segment) => segment.regions.map((one) => one.region))),
  ];
  const head = el(
    "tr",
    {},
    el("th", { scope: "col", text: "Region" }),
    ...drift.map((segment) =>
      el("th", { scope: "col", text: String(segment.segment), title: framesOf(segment) }),
    ),
  );
  const rows = regions.map((region) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", text: region }),
      ...drift.map((segment) => cell(segment.regions.find((one) => one.region === region))),
    ),
  );
  return el(
    "details",
    { class: "drift" },
    el("summary", { text: `Drift of the colours: ${summary(drift)}` }),
    el(
      "div",
      {
        class: "wide",
        tabindex: 0,
        role: "region",
        "aria-label": "Drift of each region in each segment",
      },
      el(
        "table",
        {},
        el("caption", {
          text: "Distance from the first segment (delta E) in each segment: as it came, then as it is in the clip.",
        }),
        el("thead", {}, head),
        el("tbody", {}, ...rows),
      ),
    ),
  );
}

/** The largest distance that is left, in words; the figure for the facts. */
export function largestDrift(drift) {
  const left = (drift ?? []).flatMap((segment) =>
    segment.regions.map((one) => one.delta_e_after ?? 0),
  );
  return left.length ? Math.max(...left) : null;
}

function summary(drift) {
  const most = largestDrift(drift);
  return most > FAR ? `up to ${most.toFixed(1)}, which one sees` : `at most ${most.toFixed(1)}`;
}

function framesOf(segment) {
  return `frames ${segment.frames[0]} to ${segment.frames[1] - 1}`;
}

function cell(one) {
  if (!one || one.delta_e === null) return el("td", { text: "–", title: one?.outcome ?? null });
  const [came, is] = [one.delta_e, one.delta_e_after ?? one.delta_e];
  const text = Math.abs(came - is) < 0.05 ? is.toFixed(1) : `${came.toFixed(1)} → ${is.toFixed(1)}`;
  return el("td", { class: is > FAR ? "far" : null, text, title: one.outcome });
}
