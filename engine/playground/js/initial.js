// The state that the page begins with.

import { remembered } from "./identity.js";
import { drawSeed } from "./settings.js";

/** Makes the first state: nothing chosen, nothing known of the service yet. */
export function initialState() {
  return {
    info: null,
    model: null,
    preset: null,
    kept: {},
    size: null,
    mode: null,
    segments: null,
    framing: null,
    who: [],
    picture: null,
    motion: null,
    pictureMask: null,
    motionMask: null,
    pictureShape: null,
    example: null,
    frames: null,
    mostFrames: null,
    dancePerSecond: null,
    seed: drawSeed(),
    prompt: "",
    persons: 1,
    fps: null,
    fit: "crop",
    audio: true,
    isSkeleton: false,
    price: Number(remembered("price")) || null,
    plan: null,
    overlay: null,
    view: "empty",
    job: null,
    progress: null,
    previewUrl: null,
    shown: null,
    failure: null,
    jobs: [],
    isAway: false,
  };
}
