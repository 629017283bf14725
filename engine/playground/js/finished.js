// After: the clip beside the dance, its figures, the way to keep it and to make it again.

import * as api from "./api.js";
import { copy, el, fill } from "./dom.js";
import { token } from "./identity.js";
import { driftTable, largestDrift } from "./drift.js";
import { makePlayer } from "./player.js";
import { curl, n8n, pythonProgram, recipeFor } from "./snippets.js";
import * as words from "./words.js";

const COLOURS = [
  "#8a6bff",
  "#2fa4ff",
  "#2fe0c0",
  "#8fe64a",
  "#ff8a3a",
  "#ffc83a",
  "#ff5a4f",
  "#b9aea3",
];
const LAPS = {
  load: "model",
  fetch: "files",
  media: "dance",
  pose: "dance",
  conditioning: "prompt",
  denoise: "denoising",
  decode: "frames",
  encode: "file",
  deliver: "delivery",
};

/**
 * Draws the view of a finished clip. `shown` in the store is {job, url, dance}: the status with its
 * `input`, the address of the clip, and what to show beside it.
 */
export function placeFinishedView(element, store, acts) {
  let player = null;
  store.on(["shown"], ({ shown }) => {
    player?.close();
    player = null;
    if (!shown) return;
    const { output, input } = shown.job;
    player = makePlayer({ url: shown.url, fps: output.fps, label: "The clip" }, shown.dance);
    const name = `scail-${shown.job.id.slice(0, 8)}.mp4`;
    const download = el("a", { class: "plain", href: shown.url, download: name, text: "Download" });
    const another = el("button", {
      type: "button",
      class: "plain",
      text: "Another take",
      title: "The same with another seed",
      click: () => acts.another(shown.job),
    });
    const again = el("button", {
      type: "button",
      class: "plain",
      text: "Use settings",
      click: () => acts.reuse(shown.job),
    });
    const warnings = output.warnings ?? [];
    fill(
      element,
      el(
        "div",
        { class: "head" },
        el("h2", { text: "Your clip" }),
        el("div", { class: "actions" }, another, again, download),
      ),
      player.element,
      shown.dance
        ? null
        : el("p", {
            class: "soft",
            text: "The dance of this clip is no longer here; the clip plays alone.",
          }),
      figures(shown.job),
      laps(output.timings_ms),
      driftTable(output.drift),
      warnings.length
        ? el(
            "ul",
            { class: "warnings", "aria-label": "What went otherwise than planned" },
            ...warnings.map((text) => el("li", {}, el("span", { text }))),
          )
        : null,
      input ? snippets(shown, store) : null,
    );
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) player.lead.play().catch(() => {});
  });
}

function figures(job) {
  const { output, input } = job;
  const rows = [
    [
      "Clip",
      `${output.width} × ${output.height}`,
      `${output.num_frames} frames, ${output.duration_s.toFixed(1)} s at ${+output.fps.toFixed(2)}/s`,
    ],
    ["Made in", words.duration((job.executionTime ?? 0) / 1000), output.gpu],
    ["Seed", String(output.seed), input?.recipe ? `recipe ${input.recipe}` : output.engine],
  ];
  const drift = largestDrift(output.drift);
  if (drift !== null)
    rows.push(["Drift", `ΔE ${drift.toFixed(1)}`, "the farthest colour of a segment"]);
  return el(
    "dl",
    { class: "facts numbers" },
    ...rows.map(([name, value, more]) =>
      el(
        "div",
        {},
        el("dt", { text: name }),
        el("dd", { text: value }, el("small", { text: more ?? "" })),
      ),
    ),
  );
}

/** Draws how the time was spent, as one line of colours with words below. */
function laps(timings) {
  const all = Object.entries(timings ?? {}).filter(([, ms]) => ms >= 50);
  const sum = all.reduce((total, [, ms]) => total + ms, 0);
  if (!sum) return null;
  const bar = el("div", { class: "laps", "aria-hidden": "true" });
  const said = el("ul", { class: "laps-words", "aria-label": "Where the time went" });
  all.forEach(([name, ms], place) => {
    const colour = COLOURS[place % COLOURS.length];
    const part = el("i");
    part.style.width = `${(100 * ms) / sum}%`;
    part.style.background = colour;
    bar.append(part);
    const dot = el("i", { "aria-hidden": "true" });
    dot.style.background = colour;
    said.append(
      el(
        "li",
        {},
        dot,
        el("span", {
          class: "numbers",
          text: `${LAPS[name] ?? name} ${words.duration(ms / 1000)}`,
        }),
      ),
    );
  });
  return el("div", {}, bar, said);
}

function snippets(shown, store) {
  const recipe = recipeFor(
    shown.job.input,
    shown.job.model,
    shown.job.output.seed,
    shown.names ?? {},
    location.origin,
  );
  const withToken = Boolean(token() || store.state.info?.needs_token);
  const programs = {
    curl: curl(recipe, withToken),
    Python: pythonProgram(recipe, withToken),
    n8n: n8n(recipe, withToken),
  };
  const text = el("pre", { tabindex: 0, id: "snippet", role: "tabpanel", "aria-label": "Program" });
  const tabs = Object.keys(programs).map((name) =>
    el("button", {
      type: "button",
      class: "quiet",
      role: "tab",
      "aria-controls": "snippet",
      text: name,
      click: () => choose(name),
    }),
  );
  let chosen = "curl";
  function choose(name) {
    chosen = name;
    text.textContent = programs[name];
    tabs.forEach((tab) => {
      const isIt = tab.textContent === name;
      tab.setAttribute("aria-selected", String(isIt));
      tab.tabIndex = isIt ? 0 : -1;
    });
  }
  const list = el("div", { role: "tablist", "aria-label": "Programs", class: "tab-list" }, ...tabs);
  list.addEventListener("keydown", (event) => {
    const turn = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!turn) return;
    const next =
      (tabs.findIndex((tab) => tab.textContent === chosen) + turn + tabs.length) % tabs.length;
    choose(tabs[next].textContent);
    tabs[next].focus();
  });
  const take = el("button", {
    type: "button",
    class: "plain",
    text: "Copy",
    click: () => copy(programs[chosen], take),
  });
  choose(chosen);
  return el(
    "details",
    { class: "snippets" },
    el("summary", { text: "Make this very clip from a program" }),
    el("div", { class: "tabs" }, list, el("div", { class: "fill" }), take),
    text,
  );
}

/** Finds what plays beside a clip: the dance that this page sent, an example's, or an upload still there. */
export async function danceOf(job, store, sent) {
  const input = job.input ?? {};
  const medium = input.video_path ?? input.joints_path ?? input.pose_video_path;
  if (!medium) return null;
  const known = sent.get(medium);
  if (known?.shown)
    return { url: known.shown, label: "The dance", isPicture: known.kind === "image" };
  const example = (store.state.info?.examples ?? []).find((one) =>
    Object.values(one.input).includes(medium),
  );
  if (example)
    return { url: await api.showable(example.motion), label: "The dance", isPicture: false };
  if (!medium.startsWith("upload:") || input.joints_path) return null;
  const url = await api.fileAt(`/uploads/${medium.slice("upload:".length)}`);
  return url ? { url, label: "The dance", isPicture: false } : null;
}
