// The fields of the form, filled from `/info` and kept true to the store in both directions.

import { el, fill, find } from "./dom.js";
import { modelOf, modeOf, presetOf, sizeOf } from "./order.js";
import { placeWho } from "./who_rows.js";

const MODES = {
  animation: "Picture dances",
  replacement: "Replaces the dancer",
};
const SEGMENTS = {
  even: "Of even length",
  cover: "Covering, overlapping at the end",
  official: "As the official program",
  sat: "As the SAT program",
  windows: "Windows that overlap",
};

/** Connects all fields. */
export function placeSettings(store) {
  store.on(["info", "model"], (state) => models(state, store));
  store.on(["info", "model", "preset", "kept"], (state) => presets(state, store));
  store.on(["info", "model", "size", "pictureShape"], (state) => sizes(state, store));
  store.on(["info", "model", "mode"], (state) => modes(state, store));
  store.on(["info", "model", "segments", "framing"], (state) => segments(state, store));
  placeWho(store);
  length(store);
  seed(store);
  simple(store);
}

function radio(group, value, checked, chosen, disabled = false) {
  return el("input", { type: "radio", name: group, value, checked, disabled, change: chosen });
}

/** Redraws a group of radio buttons and gives the focus back to the one that had it. */
function redraw(element, ...children) {
  const had = element.contains(document.activeElement) ? document.activeElement.value : null;
  fill(element, ...children);
  if (had !== null) element.querySelector(`input[value="${CSS.escape(had)}"]`)?.focus();
}

function models(state, store) {
  const all = (state.info?.models ?? []).filter((model) => model.available);
  find("model-field").hidden = all.length < 2;
  redraw(
    find("models"),
    ...all.map((model) =>
      el(
        "label",
        { class: "choice" },
        radio("model", model.name, model.name === state.model, () =>
          store.set({ model: model.name, size: null }),
        ),
        el("span", { text: model.title }),
      ),
    ),
  );
}

function presets(state, store) {
  const chosen = presetOf(state);
  const all = modelOf(state)?.presets ?? [];
  redraw(
    find("presets"),
    ...all.map((preset) =>
      el(
        "label",
        { class: "preset choice" },
        radio(
          "preset",
          preset.name,
          preset === chosen,
          () => store.set({ preset: preset.name, kept: {} }),
          !preset.available,
        ),
        el("strong", { text: preset.title }),
        el("span", { class: "soft numbers", text: figures(preset) }),
        preset.available ? null : el("span", { class: "soft why", text: preset.why }),
      ),
    ),
    keptNote(state.kept),
  );
}

/** Names the settings of an earlier clip that the page has no field for; a preset lets go of them. */
function keptNote(kept) {
  const said = Object.entries(kept).filter(([, value]) => value !== "" && value !== null);
  if (!said.length) return null;
  const text = said.map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(", ");
  return el("p", { class: "soft kept", text: `As in the earlier clip: ${text}` });
}

function figures(preset) {
  if (!preset.steps) return "";
  return `${preset.steps} steps${preset.cfg > 1 ? `, guidance ${preset.cfg}` : ""}`;
}

const OWN = "own";

function sizes(state, store) {
  const all = modelOf(state)?.sizes ?? [];
  const chosen = sizeOf(state);
  const listed = all.find((size) => size.width === chosen?.width && size.height === chosen?.height);
  redraw(
    find("sizes"),
    ...all.map((size) =>
      el(
        "label",
        { class: "size choice" },
        radio("size", `${size.width}x${size.height}`, size === listed, () => store.set({ size })),
        shape(size),
        el("span", { class: "numbers", text: size.title.replace(/\s*x\s*/, " × ") }),
      ),
    ),
    el(
      "label",
      { class: "size choice" },
      radio("size", OWN, !listed && Boolean(chosen), () =>
        store.set({ size: { ...chosen, own: true, width: chosen.width, height: chosen.height } }),
      ),
      el("span", { text: "Other…" }),
    ),
  );
  const isOwn = Boolean(state.size?.own) || (!listed && Boolean(chosen));
  find("own-size").hidden = !isOwn;
  if (isOwn) find("sizes").querySelector(`input[value="${OWN}"]`).checked = true;
  for (const name of ["width", "height"]) {
    const field = find(name);
    if (document.activeElement !== field) field.value = chosen?.[name] ?? "";
  }
}

function shape(size) {
  const space = "http://www.w3.org/2000/svg";
  const scale = 15 / Math.max(size.width, size.height);
  const [width, height] = [size.width * scale, size.height * scale];
  const svg = document.createElementNS(space, "svg");
  const rect = document.createElementNS(space, "rect");
  const put = (element, values) =>
    Object.entries(values).forEach(([key, value]) => element.setAttribute(key, value));
  put(svg, { viewBox: "0 0 18 18", width: 18, height: 18, "aria-hidden": "true" });
  put(rect, {
    x: 9 - width / 2,
    y: 9 - height / 2,
    width,
    height,
    rx: 2,
    fill: "none",
    stroke: "currentColor",
    "stroke-width": 1.5,
  });
  svg.append(rect);
  return svg;
}

function modes(state, store) {
  const all = modelOf(state)?.modes ?? [];
  find("mode-field").hidden = all.length < 2;
  redraw(
    find("modes"),
    ...all.map((mode) =>
      el(
        "label",
        { class: "choice" },
        radio("mode", mode, mode === modeOf(state), () => store.set({ mode })),
        el("span", { text: MODES[mode] ?? mode }),
      ),
    ),
  );
}

function segments(state, store) {
  const model = modelOf(state);
  const all = model?.segments ?? [];
  find("segments-field").hidden = all.length < 2;
  const chosen = all.includes(state.segments) ? state.segments : all[0];
  fill(
    find("segments"),
    ...all.map((name) =>
      el("option", { value: name, selected: name === chosen, text: SEGMENTS[name] ?? name }),
    ),
  );
  find("segments").onchange = (event) => store.set({ segments: event.target.value });
  framings(model, state, store);
  find("persons").max = model?.max_persons ?? 8;
}

const FRAMINGS = {
  auto: "As suits the mode",
  "as-is": "As they are in the picture",
  driving: "The dance comes to the picture",
};

function framings(model, state, store) {
  const all = model?.framings ?? [];
  find("framing-field").hidden = all.length < 2;
  const chosen = all.includes(state.framing) ? state.framing : all[0];
  fill(
    find("framing"),
    ...all.map((name) =>
      el("option", { value: name, selected: name === chosen, text: FRAMINGS[name] ?? name }),
    ),
  );
  find("framing").onchange = (event) => store.set({ framing: event.target.value });
}

function length(store) {
  const slider = find("frames");
  const told = find("frames-text");
  slider.addEventListener("input", () => {
    const frames = Number(slider.value);
    store.set({ frames: frames >= Number(slider.max) ? null : frames });
  });
  store.on(["mostFrames", "frames", "dancePerSecond"], (state) => {
    slider.disabled = !state.mostFrames && !state.frames;
    const most = state.mostFrames ?? Math.max(81, state.frames ?? 0);
    slider.max = most;
    slider.value = state.frames ?? most;
    const frames = state.frames ?? state.mostFrames;
    const seconds =
      frames && state.dancePerSecond ? ` · ${(frames / state.dancePerSecond).toFixed(1)} s` : "";
    const text = frames
      ? `${frames} frames${seconds}${state.frames ? "" : " · all of the dance"}`
      : "all of the dance";
    told.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  });
}

/** Draws a seed that JavaScript's numbers and the service both hold exactly. */
export function drawSeed(most = Number.MAX_SAFE_INTEGER) {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return ((high & 0x1fffff) * 2 ** 32 + low) % most;
}

function seed(store) {
  const field = find("seed");
  const most = () => store.state.info?.limits.max_seed ?? Number.MAX_SAFE_INTEGER;
  field.addEventListener("change", () => {
    const asked = Math.min(Number(field.value.replace(/\D/g, "") || 0), most());
    field.value = String(asked);
    store.set({ seed: asked });
  });
  find("dice").addEventListener("click", () => store.set({ seed: drawSeed(most()) }));
  store.on(["seed"], (state) => (field.value = String(state.seed)));
}

function simple(store) {
  const number = (text) => (text.trim() && Number.isFinite(Number(text)) ? Number(text) : null);
  const fields = [
    ["prompt", "input", (field) => field.value],
    ["persons", "input", (field) => Math.max(1, Math.round(number(field.value) ?? 1))],
    ["fps", "input", (field) => number(field.value)],
    ["fit", "change", (field) => field.value],
    ["price", "input", (field) => number(field.value)],
  ];
  for (const [name, event, read] of fields) {
    const field = find(name);
    field.addEventListener(event, () => store.set({ [name]: read(field) }));
    store.on([name], (state) => {
      if (document.activeElement !== field) field.value = state[name] ?? "";
    });
  }
  for (const [id, name] of [
    ["audio", "audio"],
    ["is-skeleton", "isSkeleton"],
  ]) {
    const box = find(id);
    box.addEventListener("change", () => store.set({ [name]: box.checked }));
    store.on([name], (state) => (box.checked = state[name]));
  }
  for (const name of ["width", "height"]) {
    find(name).addEventListener("change", () => {
      const [width, height] = ["width", "height"].map((side) => Number(find(side).value));
      if (width && height) store.set({ size: { width, height, own: true } });
    });
  }
}
