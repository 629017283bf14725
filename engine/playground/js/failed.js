// When no clip came of it: the sentence of the service, and the ways on.

import { el, fill } from "./dom.js";

/** Draws why there is no clip, and the ways on. */
export function placeFailedView(element, store, make) {
  store.on(["failure"], ({ failure }) => {
    if (!failure) return;
    const isOff = failure.status === "CANCELLED";
    fill(
      element,
      el(
        "div",
        { class: "failure" },
        el("h2", { text: isOff ? "Called off" : "No clip came of it" }),
        el("p", {
          class: "sentence",
          text: isOff
            ? "Nothing of it is kept. Your settings are still in the form."
            : failure.error,
        }),
        el(
          "div",
          { class: "actions" },
          el("button", {
            type: "button",
            class: "plain",
            text: "Back to the plan",
            click: () =>
              store.set({ view: store.state.picture || store.state.motion ? "plan" : "empty" }),
          }),
          failure.input
            ? el("button", {
                type: "button",
                class: "plain",
                text: "Try it again",
                click: () => make(failure.input, failure.model),
              })
            : null,
        ),
      ),
    );
  });
}
