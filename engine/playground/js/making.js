// The lower end of the form: the button, why it waits, and the masks and files beside it.

import { el, fill, find } from "./dom.js";
import { isReady } from "./media.js";
import { modelOf, orderOf } from "./order.js";
import { planWords } from "./plan.js";
import { restoreFrom } from "./restore.js";
import { placeZone } from "./zones.js";

/** Connects the button: it sends the order, and says what it waits for. */
export function placeMake(store, make) {
  const button = find("make");
  const why = find("make-why");
  store.on(["picture", "motion", "pictureMask", "motionMask", "plan", "info"], (state) => {
    button.disabled = !state.info || !isReady(state);
    why.textContent = hindrance(state);
  });
  find("order").addEventListener("submit", (event) => {
    event.preventDefault();
    if (button.disabled) return;
    const { input, model } = orderOf(store.state);
    make(input, model);
  });
}

function hindrance(state) {
  const { picture, motion, plan } = state;
  if (!state.info) return "Asking the service…";
  if (!picture && !motion) return "Add a picture and a dance.";
  if (!picture) return "Add a picture.";
  if (!motion) return "Add a dance.";
  const wrong = [picture, motion, state.pictureMask, state.motionMask].find(
    (medium) => medium?.error,
  );
  if (wrong) return wrong.error;
  if (!isReady(state)) return "The files are on their way.";
  if (plan?.wrong) return plan.wrong;
  if (plan?.counted) return planWords(plan.counted);
  return plan?.waiting ? "Counting what it takes…" : "";
}

/** Places the zones of masks, for a model that takes some. */
export function placeMasks(store) {
  const [picture, motion] = ["pictureMask", "motionMask"].map((slot) => {
    const element = el("div", { class: "zone" });
    placeZone(element, slot, store);
    return element;
  });
  const hint = el("p", {
    class: "soft hint",
    text: "Who becomes whom: each person has a colour, the same in both masks.",
  });
  fill(find("masks"), picture, motion, hint);
  store.on(
    ["info", "model", "mode"],
    (state) => (find("masks").hidden = !modelOf(state)?.takes_masks),
  );
}

/** Connects the way in for an earlier clip whose settings are taken. */
export function placeRestore(store) {
  const file = find("restore-file");
  find("restore").addEventListener("click", () => file.click());
  file.addEventListener("change", () => {
    if (file.files.length) restoreFrom(file.files[0], store, true);
    file.value = "";
  });
}
