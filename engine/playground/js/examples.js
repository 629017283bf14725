// The examples that the service ships: pictures, dances and masks that go into the form at once.

import * as api from "./api.js";
import { el, fill, find } from "./dom.js";
import { ofName } from "./media.js";

/** The fields of a job that hold media, and the slots of the form that they are. */
export const FIELDS = {
  image_path: "picture",
  video_path: "motion",
  joints_path: "motion",
  pose_video_path: "motion",
  reference_mask_path: "pictureMask",
  mask_path: "motionMask",
};

/** Lists the examples; one that is pressed fills the form. */
export function placeExamples(store) {
  store.on(["info", "example"], (state) => {
    const { info } = state;
    const examples = info?.examples ?? [];
    find("examples").hidden = !examples.length;
    find("try-example").hidden = !examples.length;
    const list = find("example-list");
    const had = list.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    fill(
      list,
      ...examples.map((example) => {
        const model = info.models.find((one) => one.name === example.model);
        const image = el("img", { alt: "" });
        api.showable(example.picture).then(
          (url) => (image.src = url),
          () => {},
        );
        return el(
          "li",
          {},
          el(
            "button",
            {
              type: "button",
              class: "example",
              "data-name": example.name,
              "aria-pressed": String(example.name === state.example),
              disabled: !model?.available,
              title: model?.available ? null : model?.why,
              click: () => takeExample(example, store),
            },
            image,
            el(
              "div",
              {},
              el("b", { text: example.title }),
              el("span", { text: model?.title ?? "" }),
            ),
          ),
        );
      }),
    );
    if (had) list.querySelector(`[data-name="${CSS.escape(had)}"]`)?.focus();
  });
  find("try-example").addEventListener("click", () => {
    const { info, model } = store.state;
    takeExample(info.examples.find((one) => one.model === model) ?? info.examples[0], store);
  });
}

/** Takes the media of an example, shown as the service shows them. */
export async function takeExample(example, store) {
  const [picture, motion] = await Promise.all([
    api.showable(example.picture),
    api.showable(example.motion),
  ]);
  const shown = { picture, motion };
  const media = { pictureMask: null, motionMask: null };
  for (const [field, slot] of Object.entries(FIELDS)) {
    const name = example.input[field];
    if (name) media[slot] = ofExample(field, slot, name, shown[slot] ?? null);
  }
  const model = store.state.model === example.model ? {} : { model: example.model, size: null };
  store.set({
    ...model,
    ...media,
    example: example.name,
    frames: null,
    mostFrames: null,
    isSkeleton: false,
  });
}

/** Makes the medium of a name of an example. */
export function ofExample(field, slot, medium, shown) {
  const kind =
    field === "joints_path"
      ? "joints"
      : slot === "picture" || slot === "pictureMask"
        ? "image"
        : "video";
  const name = medium.slice(medium.lastIndexOf("/") + 1);
  return ofName(slot, field, medium, name, shown, kind);
}
