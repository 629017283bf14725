// The page: puts its parts together, and carries one order from the form to the clip.

import * as api from "./api.js";
import { placeDancer } from "./dancer.js";
import { el, fill, find, say, showOnly, tell } from "./dom.js";
import { placeDropping } from "./dropping.js";
import { danceOf, placeFinishedView } from "./finished.js";
import { follow } from "./follow.js";
import { isReady } from "./media.js";
import { modelOf, orderOf } from "./order.js";
import { placePlanning, placePlanView, planWords } from "./plan.js";
import { restoreFrom, reuse, takeExample } from "./restore.js";
import { placeRunningView } from "./running.js";
import { drawSeed, placeSettings } from "./settings.js";
import { placeShelf } from "./shelf.js";
import { createStore } from "./store.js";
import { askToken } from "./token.js";
import { placeZone } from "./zones.js";

const PRICE = "scail-price";

const store = createStore({
  info: null, model: null, preset: null, kept: {}, size: null, mode: null, segments: null, framing: null, who: [],
  picture: null, motion: null, pictureMask: null, motionMask: null, pictureShape: null, example: null,
  frames: null, mostFrames: null, dancePerSecond: null, seed: drawSeed(), prompt: "", persons: 1, fps: null,
  fit: "crop", audio: true, isSkeleton: false, price: Number(localStorage.getItem(PRICE)) || null,
  plan: null, overlay: null, view: "empty", job: null, progress: null, previewUrl: null, shown: null,
  failure: null, jobs: [], isAway: false,
});

const sent = new Map(); // the media that this page sent, by their names at the service
const dance = placeDancer(find("dancer"));
const refresh = placeShelf(store, open);

for (const slot of ["picture", "motion"]) {
  placeZone(find(`zone-${slot}`), slot, store);
}
placeMasks();
placeSettings(store);
const callOffPlan = placePlanning(store);
placePlanView(find("view-plan"), store);
placeRunningView(find("view-running"), store);
placeFinishedView(find("view-finished"), store, {
  another: (job) => makeOf({ ...job.input, seed: drawSeed(store.state.info.limits.max_seed) }, job.model),
  reuse: (job) => { reuse(job, store, sent); find("order").scrollIntoView({ behavior: "smooth" }); },
});
placeFailedView();
placeExamples();
placeDropping(store, dance);
placeRestore();
placeMake();
keepShapes();
store.on(["price"], ({ price }) => localStorage.setItem(PRICE, price ?? ""));
store.on(["view", "job", "progress"], ({ view, job, progress }) => {
  const percent = job?.status === "IN_QUEUE" ? "waits" : `${progress?.percent ?? 0} %`;
  document.title = `${{ running: `${percent} · `, finished: "Done · " }[view] ?? ""}SCAIL playground`;
});
store.on(["view"], ({ view }) => showOnly({
  empty: find("view-empty"), plan: find("view-plan"), running: find("view-running"),
  finished: find("view-finished"), failed: find("view-failed"),
}, view));
// New media lead back to the plan, whatever was on the stage.
store.on(["picture", "motion"], (state) => {
  const name = state.picture || state.motion ? "plan" : "empty";
  if (state.view === "empty" || name === "plan") store.set({ view: name });
});
begin();

async function begin() {
  let info;
  try {
    info = await api.info().catch((error) => {
      if (error.status !== 401) throw error;
      return askToken(api.info);
    });
  } catch (error) {
    serviceSays("broken", error.message);
    find("make-why").textContent = error.message;
    setTimeout(begin, 3000);
    return;
  }
  const usual = info.models.find((model) => model.available);
  store.set({ info, model: usual?.name ?? info.models[0]?.name ?? null });
  serviceSays(usual ? "ready" : "broken", usual ? "" : (info.models[0]?.why ?? "No model can be served."));
  dance();
  await refresh();
}

function serviceSays(state, sentence) {
  const model = modelOf(store.state);
  find("service").className = `service ${state}`;
  const whose = [model?.title, store.state.info?.gpu].filter(Boolean).join(" · ");
  find("service-text").textContent = sentence || `${whose}${model?.demo ? " · demo weights" : ""}`;
  find("service").title = model?.demo ?? "";
}
store.on(["model", "jobs", "isAway"], (state) => {
  if (!state.info) return;
  if (state.isAway) return serviceSays("broken", "The service does not answer.");
  const isBusy = state.jobs.some((job) => job.status === "IN_PROGRESS");
  if (modelOf(state)?.available) serviceSays(isBusy ? "busy" : "ready", "");
});

function placeMake() {
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
    makeOf(input, model);
  });
}

function hindrance(state) {
  const { picture, motion, plan } = state;
  if (!state.info) return "Asking the service…";
  if (!picture && !motion) return "Add a picture and a dance.";
  if (!picture) return "Add a picture.";
  if (!motion) return "Add a dance.";
  const wrong = [picture, motion, state.pictureMask, state.motionMask].find((medium) => medium?.error);
  if (wrong) return wrong.error;
  if (!isReady(state)) return "The files are on their way.";
  if (plan?.wrong) return plan.wrong;
  if (plan?.counted) return planWords(plan.counted);
  return plan?.waiting ? "Counting what it takes…" : "";
}

/** Sends an order and shows it on the stage. */
async function makeOf(input, model) {
  const order = { input, model };
  const names = {};
  for (const medium of [store.state.picture, store.state.motion, store.state.pictureMask, store.state.motionMask]) {
    if (!medium?.medium) continue;
    sent.set(medium.medium, medium);
  }
  for (const [field, name] of Object.entries(input)) if (sent.has(name)) names[field] = sent.get(name).name;
  callOffPlan();
  try {
    const { id, status } = await api.run(order);
    const shown = sent.get(input.image_path)?.shown ?? null;
    find("stage").scrollIntoView({ behavior: "smooth", block: "nearest" });
    watch({ id, status, model, input, names, shown });
    refresh();
  } catch (error) {
    say(error.message, "wrong");
  }
}

let watching = null;

/** Follows a job on the stage until it has ended, or another one is shown. */
async function watch(job) {
  watching?.abort();
  const mine = (watching = new AbortController());
  store.set({ job, progress: null, previewUrl: null, view: "running" });
  const update = (changes) => !mine.signal.aborted && store.set(changes);
  const preview = async ({ url }) => {
    const shown = await api.showable(url).catch(() => null);
    if (!shown) return;
    api.letGo(store.state.previewUrl);
    update({ previewUrl: shown });
  };
  const hear = {
    status: (now) => {
      update({ job: { ...job, ...now, input: job.input } });
      if (now.preview_url) preview({ url: now.preview_url });
      if (now.status === "IN_PROGRESS" && now.output?.stage) update({ progress: now.output });
    },
    progress: (progress) => update({ progress }),
    preview,
  };
  try {
    const ended = await follow(job.id, hear, mine.signal);
    if (mine.signal.aborted) return;
    await refresh();
    // Whoever prepares another clip meanwhile is not taken away from it.
    if (store.state.view === "running") await end({ ...job, ...ended, input: job.input });
    else say(ended.status === "COMPLETED" ? "A clip is done; it is among the earlier ones." : (ended.error ?? "A clip was called off."));
  } catch (error) {
    if (error.name !== "AbortError") fail({ ...job, error: error.message, status: "FAILED" });
  }
}

async function end(job) {
  if (job.status === "COMPLETED") {
    const url = await api.showable(job.output.video_url ?? `/results/${job.id}.mp4`);
    const dance = await danceOf(job, store, sent);
    store.set({ shown: { job, url, dance, names: job.names }, view: "finished" });
    tell("The clip is done.");
  } else fail(job);
}

function fail(job) {
  store.set({ job, failure: job, view: "failed" });
  tell(job.status === "CANCELLED" ? "The clip was called off." : `It failed: ${job.error}`);
}

function placeFailedView() {
  store.on(["failure"], ({ failure }) => {
    if (!failure) return;
    const isOff = failure.status === "CANCELLED";
    fill(find("view-failed"), el("div", { class: "failure" },
      el("h2", { text: isOff ? "Called off" : "No clip came of it" }),
      el("p", { class: "sentence", text: isOff ? "Nothing of it is kept. Your settings are still in the form." : failure.error }),
      el("div", { class: "actions" },
        el("button", { type: "button", class: "plain", text: "Back to the plan", click: () => store.set({ view: store.state.picture || store.state.motion ? "plan" : "empty" }) }),
        failure.input ? el("button", { type: "button", class: "plain", text: "Try it again", click: () => makeOf(failure.input, failure.model) }) : null),
    ));
  });
}

/** Opens a job of the shelf on the stage. */
async function open(job) {
  const names = {};
  for (const [field, name] of Object.entries(job.input ?? {})) if (sent.has(name)) names[field] = sent.get(name).name;
  const known = { ...job, names, shown: sent.get(job.input?.image_path)?.shown ?? null };
  find("stage").scrollIntoView({ behavior: "smooth", block: "nearest" });
  try {
    if (job.status === "IN_QUEUE" || job.status === "IN_PROGRESS") await watch(known);
    else {
      watching?.abort();
      await end(known);
    }
  } catch (error) {
    say(error.message, "wrong");
  }
  find("stage").focus({ preventScroll: true });
}

function placeExamples() {
  store.on(["info", "example"], (state) => {
    const { info } = state;
    const examples = info?.examples ?? [];
    find("examples").hidden = !examples.length;
    find("try-example").hidden = !examples.length;
    const list = find("example-list");
    const had = list.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    fill(list, ...examples.map((example) => {
      const model = info.models.find((one) => one.name === example.model);
      const image = el("img", { alt: "" });
      api.showable(example.picture).then((url) => (image.src = url), () => {});
      return el("li", {}, el("button", {
        type: "button", class: "example", "data-name": example.name, "aria-pressed": String(example.name === state.example),
        disabled: !model?.available, title: model?.available ? null : model?.why, click: () => takeExample(example, store),
      }, image, el("div", {}, el("b", { text: example.title }), el("span", { text: model?.title ?? "" }))));
    }));
    if (had) list.querySelector(`[data-name="${CSS.escape(had)}"]`)?.focus();
  });
  find("try-example").addEventListener("click", () => {
    const { info, model } = store.state;
    takeExample(info.examples.find((one) => one.model === model) ?? info.examples[0], store);
  });
}

function placeMasks() {
  const [picture, motion] = ["pictureMask", "motionMask"].map((slot) => {
    const element = el("div", { class: "zone" });
    placeZone(element, slot, store);
    return element;
  });
  const hint = el("p", { class: "soft hint", text: "Who becomes whom: each person has a colour, the same in both masks." });
  fill(find("masks"), picture, motion, hint);
  store.on(["info", "model", "mode"], (state) => (find("masks").hidden = !modelOf(state)?.takes_masks));
}

function placeRestore() {
  const file = find("restore-file");
  find("restore").addEventListener("click", () => file.click());
  file.addEventListener("change", () => {
    if (file.files.length) restoreFrom(file.files[0], store, true);
    file.value = "";
  });
}

/** Keeps the shape of the picture in the store, for its framing. */
function keepShapes() {
  store.on(["picture"], ({ picture }) => {
    store.set({ pictureShape: null });
    if (!picture?.shown) return;
    const image = new Image();
    image.onload = () => {
      if (store.state.picture?.shown === picture.shown) {
        store.set({ pictureShape: { width: image.naturalWidth, height: image.naturalHeight } });
      }
    };
    image.src = picture.shown;
  });
}
