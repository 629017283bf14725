// Carries an order from the form to the clip: sends it, follows it on the stage, shows its end.

import * as api from "./api.js";
import { find, say, tell } from "./dom.js";
import { danceOf } from "./finished.js";
import { follow } from "./follow.js";

/**
 * Makes what carries orders. `sent` are the media that this page sent, by their names at the
 * service; `refresh` reads the list of jobs anew; `callOffPlan` ends a plan that is being counted.
 */
export function carrier(store, sent, refresh, callOffPlan) {
  let watching = null;

  /** Sends an order and shows it on the stage. */
  async function makeOf(input, model) {
    const order = { input, model };
    const names = {};
    for (const medium of [
      store.state.picture,
      store.state.motion,
      store.state.pictureMask,
      store.state.motionMask,
    ]) {
      if (!medium?.medium) continue;
      sent.set(medium.medium, medium);
    }
    for (const [field, name] of Object.entries(input))
      if (sent.has(name)) names[field] = sent.get(name).name;
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
      else
        say(
          ended.status === "COMPLETED"
            ? "A clip is done; it is among the earlier ones."
            : (ended.error ?? "A clip was called off."),
        );
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

  /** Opens a job of the shelf on the stage. */
  async function open(job) {
    const names = {};
    for (const [field, name] of Object.entries(job.input ?? {}))
      if (sent.has(name)) names[field] = sent.get(name).name;
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

  return { make: makeOf, open };
}
