// What is asked of the service: the job's JSON from the state of the page, and back.

import { readWho, whoText } from "./who.js";

const SLOT_NAMES = ["picture", "motion", "pictureMask", "motionMask"];

/** The model that is chosen, as `/info` tells it. */
export function modelOf(state) {
  const models = state.info?.models ?? [];
  return models.find((model) => model.name === state.model) ?? null;
}

/** The preset that is chosen: the visitor's, else the first that can be had. */
export function presetOf(state) {
  const presets = modelOf(state)?.presets ?? [];
  const chosen = presets.find((preset) => preset.name === state.preset && preset.available);
  return chosen ?? presets.find((preset) => preset.available) ?? null;
}

/** The size of the clip: the visitor's, else the usual one, turned as the picture is. */
export function sizeOf(state) {
  if (state.size) return state.size;
  const sizes = modelOf(state)?.sizes ?? [];
  const usual = sizes[0];
  if (!usual) return null;
  const shape = state.pictureShape;
  if (shape && shape.width < shape.height !== usual.width < usual.height) {
    return (
      sizes.find((size) => size.width === usual.height && size.height === usual.width) ?? usual
    );
  }
  return usual;
}

/** The mode of a model that has some. */
export function modeOf(state) {
  const modes = modelOf(state)?.modes ?? [];
  return modes.includes(state.mode) ? state.mode : (modes[0] ?? null);
}

/** The fields of the media. */
export function mediaOf(state) {
  const fields = {};
  for (const slot of SLOT_NAMES) {
    const medium = state[slot];
    if (!medium?.medium || (!modelOf(state)?.takes_masks && slot.endsWith("Mask"))) continue;
    const isSkeleton = slot === "motion" && state.isSkeleton && medium.field === "video_path";
    fields[isSkeleton ? "pose_video_path" : medium.field] = medium.medium;
  }
  return fields;
}

/** The settings as a job has them, without media. Nothing is said that is usual anyway. */
export function settingsOf(state) {
  const model = modelOf(state);
  const size = sizeOf(state);
  const settings = { ...presetOf(state)?.input, seed: state.seed };
  if (size) Object.assign(settings, { width: size.width, height: size.height });
  if (state.frames) settings.frames = state.frames;
  if (state.prompt.trim()) settings.prompt = state.prompt;
  if (state.persons > 1) settings.persons = state.persons;
  if (state.fps) settings.fps = state.fps;
  if (state.fit !== "crop") settings.fit = state.fit;
  if (!state.audio) settings.audio = false;
  if (modeOf(state) && modeOf(state) !== model.modes[0]) settings.mode = modeOf(state);
  if (
    state.framing &&
    model?.framings?.includes(state.framing) &&
    state.framing !== model.framings[0]
  ) {
    settings.framing = state.framing;
  }
  const who = model?.takes_who ? whoText(state) : null;
  if (who) settings.who = who;
  if (
    state.segments &&
    model?.segments.includes(state.segments) &&
    state.segments !== model.segments[0]
  ) {
    settings.segments = state.segments;
  }
  return { ...settings, ...state.kept };
}

/** The body of a job. `action` is `generate`, or one that renders nothing. */
export function orderOf(state, action = "generate") {
  const input = { ...mediaOf(state), ...settingsOf(state), output: "url" };
  if (action !== "generate") input.action = action;
  return { input, model: state.model };
}

const NUMBERS = ["seed", "frames", "fps", "persons"];
const TEXTS = ["prompt", "fit", "mode", "segments", "framing"];
// Settings that the page has no field for are kept as they came, and sent again.
const KEPT = [
  "negative_prompt",
  "context_frames",
  "context_overlap",
  "attention_mode",
  "align",
  "drift",
  "strict",
];

/** What of the state a job's input says: the way back. Media and unknown fields are left out. */
export function stateOf(input, model) {
  const changes = {
    size: null,
    frames: null,
    prompt: "",
    persons: 1,
    fps: null,
    fit: "crop",
    audio: true,
    kept: {},
    who: readWho(input.who),
  };
  for (const name of NUMBERS) {
    if (Number.isFinite(Number(input[name] ?? NaN))) changes[name] = Number(input[name]);
  }
  for (const name of TEXTS) if (typeof input[name] === "string") changes[name] = input[name];
  if (input.width && input.height)
    changes.size = { width: Number(input.width), height: Number(input.height) };
  if (input.audio === false) changes.audio = false;
  for (const name of KEPT) if (name in input) changes.kept[name] = input[name];
  const found = presetFor(input, model);
  changes.preset = found?.name ?? null;
  // Figures that are not those of the preset go along as they are.
  for (const name of ["sampler", "steps", "cfg", "shift"]) {
    if (name in input && input[name] !== found?.[name]) changes.kept[name] = input[name];
  }
  return changes;
}

/** The preset that has all figures which are said, else the one of that name, else the first. */
function presetFor(input, model) {
  const presets = model?.presets ?? [];
  const figures = ["sampler", "steps", "cfg", "shift"].filter((name) => name in input);
  const same = (preset) => figures.every((name) => preset[name] === input[name]);
  const named = presets.find((preset) => input.recipe && preset.input.recipe === input.recipe);
  if (figures.length === 0) return named ?? presets.find((one) => one.available);
  return (
    presets.find((preset) => preset.available && same(preset)) ??
    named ??
    presets.find((one) => one.available)
  );
}
