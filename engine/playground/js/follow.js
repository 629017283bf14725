// Follows a job to its end: by its events where they come, by asking again where they break off.

import * as api from "./api.js";

const AGAIN_MS = 1000;

/**
 * Calls `hear.status`, `hear.progress` and `hear.preview` as news come, and resolves with the status
 * of the finished job. Rejects with `Refused` if the service no longer knows it.
 */
export async function follow(id, hear = {}, signal = undefined) {
  for (;;) {
    try {
      const ended = await listen(id, hear, signal);
      if (ended) return ended;
    } catch (error) {
      if (error.name === "AbortError" || error.status === 404 || error.status === 401) throw error;
    }
    await pause(AGAIN_MS, signal);
    const now = await asked(id, signal);
    if (now) {
      if (isOver(now.status)) return now;
      hear.status?.(now);
    }
  }
}

/** Says whether a job in this state will change no more. */
export function isOver(state) {
  return state === "COMPLETED" || state === "FAILED" || state === "CANCELLED";
}

async function asked(id, signal) {
  try {
    return await api.status(id, signal);
  } catch (error) {
    if (error.name === "AbortError" || error.status === 404 || error.status === 401) throw error;
    return null; // the service is away; it may come back
  }
}

async function listen(id, hear, signal) {
  const reply = await api.stream(id, signal);
  for await (const { event, data } of events(reply.body)) {
    if (event === "end") return data;
    hear[event]?.(data);
  }
  return null;
}

/** Reads server-sent events from a body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).replaceAll("\r", "").split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const found = parsed(block);
      if (found) yield found;
    }
  }
}

function parsed(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  return data.length ? { event, data: JSON.parse(data.join("\n")) } : null;
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("called off", "AbortError"));
    });
  });
}
