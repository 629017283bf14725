// The rows in which one says who becomes whom.

import { el, fill, find } from "./dom.js";
import { modelOf } from "./order.js";
import { PERSONS, whoOf } from "./who.js";

/** Keeps a row for each person: "Person 1 of the picture dances as …". */
export function placeWho(store) {
  const element = find("who");
  store.on(["info", "model", "persons", "who"], (state) => {
    const model = modelOf(state);
    const count = Math.min(state.persons, PERSONS.length);
    find("who-field").hidden = !model?.takes_who || count < 2;
    if (find("who-field").hidden) return;
    const chosen = whoOf(state);
    const had = element.contains(document.activeElement) ? document.activeElement.name : null;
    fill(
      element,
      ...chosen.map((person, place) =>
        row(place, person, count, (next) => {
          const who = [...chosen];
          const other = who.indexOf(next); // two persons of the picture never have one dancer
          if (other >= 0) who[other] = who[place];
          who[place] = next;
          store.set({ who });
        }),
      ),
    );
    if (had) element.querySelector(`[name="${had}"]`)?.focus();
  });
}

function row(place, person, count, chosen) {
  const dot = el("i", { class: "swatch", "aria-hidden": "true" });
  dot.style.background = PERSONS[place][1];
  const options = PERSONS.slice(0, count).map(([name], other) =>
    el("option", {
      value: other + 1,
      selected: other + 1 === person,
      text: `as ${name}, dancer ${other + 1}`,
    }),
  );
  const select = el(
    "select",
    {
      name: `who-${place}`,
      "aria-label": `Person ${place + 1} of the picture dances`,
      change: (event) => chosen(Number(event.target.value)),
    },
    ...options,
  );
  return el("li", {}, dot, el("span", { text: `Person ${place + 1}` }), select);
}
