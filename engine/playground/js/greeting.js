// The first words with the service: what it serves, whether it wants a token, whether it is there.

import * as api from "./api.js";
import { find } from "./dom.js";
import { modelOf } from "./order.js";
import { askToken } from "./token.js";

const AGAIN_MS = 3000;

/** Asks the service what it can do until it answers, then calls `begun`. */
export async function greet(store, begun) {
  let info;
  try {
    info = await api.info().catch((error) => {
      if (error.status !== 401) throw error;
      return askToken(api.info);
    });
  } catch (error) {
    serviceSays(store, "broken", error.message);
    find("make-why").textContent = error.message;
    setTimeout(() => greet(store, begun), AGAIN_MS);
    return;
  }
  const usual = info.models.find((model) => model.available);
  store.set({ info, model: usual?.name ?? info.models[0]?.name ?? null });
  serviceSays(
    store,
    usual ? "ready" : "broken",
    usual ? "" : (info.models[0]?.why ?? "No model can be served."),
  );
  begun();
}

/** Keeps the line at the top true: which model, where, and whether it is at work. */
export function placeService(store) {
  store.on(["model", "jobs", "isAway"], (state) => {
    if (!state.info) return;
    if (state.isAway) return serviceSays(store, "broken", "The service does not answer.");
    const isBusy = state.jobs.some((job) => job.status === "IN_PROGRESS");
    if (modelOf(state)?.available) serviceSays(store, isBusy ? "busy" : "ready", "");
  });
}

function serviceSays(store, state, sentence) {
  const model = modelOf(store.state);
  find("service").className = `service ${state}`;
  const whose = [model?.title, store.state.info?.gpu].filter(Boolean).join(" · ");
  find("service-text").textContent = sentence || `${whose}${model?.demo ? " · demo weights" : ""}`;
  find("service").title = model?.demo ?? "";
}
