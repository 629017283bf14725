// Settings come back: out of an MP4 of this engine, which the service reads, or from an earlier job.

import * as api from "./api.js";
import { say } from "./dom.js";
import { FIELDS, ofExample } from "./examples.js";
import { modelOf, stateOf } from "./order.js";

/**
 * Takes the settings that a clip carries. Resolves with whether there were some; `isMeant` says that
 * the visitor asked for that, so that a clip without settings is told.
 */
export async function restoreFrom(file, store, isMeant) {
  if (!store.state.info?.features.includes("settings")) {
    if (isMeant) say("This service cannot read the settings of a clip.", "wrong");
    return false;
  }
  try {
    const found = await api.upload(file, () => {}, "/settings");
    take(found.input, found.model, store);
    const told = (found.warnings ?? []).join(" ");
    say(
      `The settings of ${file.name} are back. ${told || "Add the picture and the dance."}`,
      "plain",
      10000,
    );
    return true;
  } catch (error) {
    if (isMeant) say(error.message, "wrong", 10000);
    return false;
  }
}

/** Takes the settings of an earlier job, and its media where the service still has them. */
export function reuse(job, store, sent) {
  take(job.input, job.model, store);
  const media = {};
  for (const [field, slot] of Object.entries(FIELDS)) {
    const name = job.input[field];
    if (typeof name !== "string") continue;
    media[slot] = sent.get(name) ?? fromExample(field, slot, name, store.state);
  }
  if (media.picture || media.motion) store.set({ ...media, mostFrames: null });
  say("Its settings are in the form again.");
}

function fromExample(field, slot, medium, state) {
  const example = (state.info?.examples ?? []).find((one) =>
    Object.values(one.input).includes(medium),
  );
  return ofExample(field, slot, medium, example?.[slot] ?? null);
}

function take(input, name, store) {
  const models = store.state.info?.models ?? [];
  const there = models.find((model) => model.name === name && model.available);
  const model = there ?? modelOf(store.state);
  store.set({ model: model?.name ?? null, ...stateOf(input ?? {}, model) });
}
