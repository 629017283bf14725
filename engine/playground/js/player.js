// Clip and dance on one time line: they play, stop and are scrubbed together.

import { el, fill } from "./dom.js";
import * as words from "./words.js";

const APART_S = 0.06; // further apart than this, the dance is set to where the clip is
const SPEEDS = [0.25, 0.5, 1, 2];

/**
 * Draws a player. `clip` is {url, fps, label}, `dance` {url, label, isPicture} or null. The clip leads, with its
 * sound; the dance follows without.
 */
export function makePlayer(clip, dance) {
  const lead = video(clip.url, clip.label);
  const beside = dance && !dance.isPicture ? video(dance.url, dance.label) : null;
  if (beside) beside.muted = true;
  lead.loop = true;
  const ledBy = [lead, beside].filter(Boolean);

  const play = el(
    "button",
    { type: "button", class: "play", "aria-label": "Play" },
    icon("M6 4.5v11l9-5.5z"),
  );
  const back = el(
    "button",
    { type: "button", "aria-label": "One frame back" },
    icon("M12.5 5v10L6 10zM4.5 5v10"),
  );
  const on = el(
    "button",
    { type: "button", "aria-label": "One frame on" },
    icon("M7.5 5v10l6.5-5zM15.5 5v10"),
  );
  const line = el("input", {
    type: "range",
    min: 0,
    max: 1000,
    value: 0,
    step: 1,
    "aria-label": "Place in the clip",
  });
  const now = el("span", { class: "now", text: "0:00.0" });
  const speed = el(
    "select",
    { "aria-label": "Speed" },
    ...SPEEDS.map((rate) => el("option", { value: rate, selected: rate === 1, text: `${rate}×` })),
  );
  const frame_s = 1 / (clip.fps || 24);

  function follow() {
    if (beside && Number.isFinite(beside.duration)) {
      const at = Math.min(lead.currentTime, Math.max(0, beside.duration - 0.001));
      if (Math.abs(beside.currentTime - at) > APART_S || (lead.paused && beside.currentTime !== at))
        beside.currentTime = at;
      if (!lead.paused && beside.paused && at < beside.duration - 0.05)
        beside.play().catch(() => {});
    }
    show();
  }

  function show() {
    const whole = lead.duration || 0;
    if (whole && document.activeElement !== line)
      line.value = Math.round((lead.currentTime / whole) * 1000);
    line.setAttribute(
      "aria-valuetext",
      `${lead.currentTime.toFixed(1)} of ${whole.toFixed(1)} seconds`,
    );
    now.textContent = `${words.clock(lead.currentTime)} / ${words.clock(whole)}`;
  }

  function tick() {
    if (!lead.isConnected) return;
    follow();
    if (!lead.paused) requestAnimationFrame(tick);
  }

  function toggle() {
    if (lead.paused) lead.play().catch(() => {});
    else lead.pause();
  }

  function step(frames) {
    lead.pause();
    const whole = lead.duration || 0;
    lead.currentTime = Math.min(
      Math.max(0, lead.currentTime + frames * frame_s),
      Math.max(0, whole - frame_s / 2),
    );
  }

  lead.addEventListener("play", () => {
    play.setAttribute("aria-label", "Pause");
    fill(play, icon("M6 5h3v10H6zM11 5h3v10h-3z"));
    tick();
  });
  lead.addEventListener("pause", () => {
    play.setAttribute("aria-label", "Play");
    fill(play, icon("M6 4.5v11l9-5.5z"));
    beside?.pause();
    follow();
  });
  for (const name of ["seeked", "seeking", "loadedmetadata", "timeupdate"])
    lead.addEventListener(name, follow);
  beside?.addEventListener("loadedmetadata", follow);
  for (const one of ledBy) one.addEventListener("click", toggle);
  play.addEventListener("click", toggle);
  back.addEventListener("click", () => step(-1));
  on.addEventListener("click", () => step(1));
  line.addEventListener("input", () => {
    lead.currentTime = (Number(line.value) / 1000) * (lead.duration || 0);
  });
  speed.addEventListener("change", () =>
    ledBy.forEach((one) => (one.playbackRate = Number(speed.value))),
  );

  const tiles = el(
    "div",
    { class: "tiles" },
    dance
      ? tile(
          dance.isPicture ? el("img", { src: dance.url, alt: dance.label }) : beside,
          dance.label,
        )
      : null,
    tile(lead, clip.label),
  );
  const element = el(
    "div",
    { class: "player" },
    tiles,
    el("div", { class: "timeline" }, back, play, on, line, now, speed),
  );
  element.addEventListener("keydown", (event) => {
    if (event.target.matches("select, input, textarea, button")) return;
    if (event.key === " ") {
      event.preventDefault();
      toggle();
    }
  });
  return { element, lead, beside, close: () => ledBy.forEach((one) => one.pause()) };
}

function tile(medium, label) {
  return el(
    "figure",
    { class: "tile" },
    el("div", { class: "frame" }, medium),
    el("figcaption", { text: label }),
  );
}

function video(url, label) {
  return el("video", {
    src: url,
    playsinline: true,
    preload: "auto",
    "aria-label": label,
    tabindex: -1,
  });
}

function icon(path) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const put = (element, values) =>
    Object.entries(values).forEach(([key, value]) => element.setAttribute(key, value));
  put(svg, { viewBox: "0 0 20 20", width: 20, height: 20, "aria-hidden": "true" });
  const line = document.createElementNS(space, "path");
  put(line, {
    d: path,
    fill: "currentColor",
    stroke: "currentColor",
    "stroke-width": 1.4,
    "stroke-linejoin": "round",
    "stroke-linecap": "round",
  });
  svg.append(line);
  return svg;
}
