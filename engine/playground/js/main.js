// The page: puts its parts together.

import { carrier } from "./carrier.js";
import { placeDancer } from "./dancer.js";
import { find, showOnly } from "./dom.js";
import { placeDropping } from "./dropping.js";
import { placeExamples } from "./examples.js";
import { placeFailedView } from "./failed.js";
import { placeFinishedView } from "./finished.js";
import { greet, placeService } from "./greeting.js";
import { remember } from "./identity.js";
import { initialState } from "./initial.js";
import { placeMake, placeMasks, placeRestore } from "./making.js";
import { keepShapes } from "./media.js";
import { placePlanning, placePlanView } from "./plan.js";
import { reuse } from "./restore.js";
import { placeRunningView } from "./running.js";
import { drawSeed, placeSettings } from "./settings.js";
import { placeShelf } from "./shelf.js";
import { createStore } from "./store.js";
import { placeZone } from "./zones.js";

const store = createStore(initialState());
const sent = new Map(); // the media that this page sent, by their names at the service
const views = {};
for (const name of ["empty", "plan", "running", "finished", "failed"]) {
  views[name] = find(`view-${name}`);
}

const dance = placeDancer(find("dancer"));
const refresh = placeShelf(store, (job) => orders.open(job));
const callOffPlan = placePlanning(store);
const orders = carrier(store, sent, refresh, callOffPlan);

placeZone(find("zone-picture"), "picture", store);
placeZone(find("zone-motion"), "motion", store);
placeMasks(store);
placeExamples(store);
placeSettings(store);
placeMake(store, orders.make);
placeRestore(store);
placeDropping(store, dance);
keepShapes(store);

placePlanView(views.plan, store);
placeRunningView(views.running, store);
placeFailedView(views.failed, store, orders.make);
placeFinishedView(views.finished, store, {
  another: (job) =>
    orders.make({ ...job.input, seed: drawSeed(store.state.info.limits.max_seed) }, job.model),
  reuse: (job) => {
    reuse(job, store, sent);
    find("order").scrollIntoView({ behavior: "smooth" });
  },
});

store.on(["view"], ({ view }) => showOnly(views, view));
// New media lead back to the plan, whatever was on the stage.
store.on(["picture", "motion"], (state) => {
  const name = state.picture || state.motion ? "plan" : "empty";
  if (state.view === "empty" || name === "plan") store.set({ view: name });
});
store.on(["view", "job", "progress"], ({ view, job, progress }) => {
  const percent = job?.status === "IN_QUEUE" ? "waits" : `${progress?.percent ?? 0} %`;
  document.title = `${{ running: `${percent} · `, finished: "Done · " }[view] ?? ""}SCAIL playground`;
});
store.on(["price"], ({ price }) => remember("price", price ?? ""));
placeService(store);
greet(store, () => {
  dance();
  refresh();
});
