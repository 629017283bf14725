// The calls of the service (docs/serve.md), and its errors as sentences.

import { headers, token } from "./identity.js";

/** What the service refused, in its own sentence. */
export class Refused extends Error {
  constructor(sentence, status = 0, code = "unknown") {
    super(sentence);
    this.status = status;
    this.code = code;
  }
}

const SILENT = "The service does not answer. Is it still running?";

async function call(method, path, body = undefined, signal = undefined) {
  const sent = { method, headers: headers(), signal, cache: "no-store" };
  if (body !== undefined) {
    sent.headers["Content-Type"] = "application/json";
    sent.body = JSON.stringify(body);
  }
  let reply;
  try {
    reply = await fetch(path, sent);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(SILENT);
  }
  if (!reply.ok) throw await refusal(reply);
  return reply;
}

async function refusal(reply) {
  const text = await reply.text().catch(() => "");
  return refusalOf(reply.status, text);
}

function refusalOf(status, text) {
  try {
    const { error, code } = JSON.parse(text);
    if (error) return new Refused(String(error), status, code);
  } catch {
    // not JSON: something between the page and the service answered
  }
  return new Refused(`The service answered with status ${status}.`, status);
}

const json = async (...asked) => (await call(...asked)).json();

export const info = () => json("GET", "/info");
export const jobs = () => json("GET", "/jobs");
export const status = (id, signal) => json("GET", `/status/${id}`, undefined, signal);
export const run = (order) => json("POST", "/run", order);
export const cancel = (id) => json("POST", `/cancel/${id}`, {});
export const forget = (id) => call("DELETE", `/jobs/${id}`);
export const overlay = (order) => json("POST", "/overlay", order);
export const stream = (id, signal) => eventReply(`/stream/${id}`, signal);

async function eventReply(path, signal) {
  const asked = { ...headers(), Accept: "text/event-stream" };
  let reply;
  try {
    reply = await fetch(path, { headers: asked, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(SILENT);
  }
  if (!reply.ok) throw await refusal(reply);
  return reply;
}

/** Sends a file, telling the share that has gone. Resolves with the reply of the service. */
export function upload(file, onShare, path = "/uploads") {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("file", file, file.name);
    const request = new XMLHttpRequest();
    request.open("POST", path);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) =>
      event.lengthComputable && onShare(event.loaded / event.total);
    request.onerror = () => reject(new Refused(SILENT));
    request.onload = () => {
      if (request.status >= 200 && request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(refusalOf(request.status, request.responseText));
    };
    request.send(form);
  });
}

/** Finds an address that `<img>` and `<video>` can show: they cannot send a token, so the bytes do. */
export async function showable(path) {
  if (!token()) return path;
  const reply = await call("GET", path);
  return URL.createObjectURL(await reply.blob());
}

/** Frees what `showable` made, where it made something. */
export function letGo(url) {
  if (url?.startsWith("blob:")) URL.revokeObjectURL(url);
}

/** Finds an address of a file that the service may have under this path, or null. */
export async function fileAt(path) {
  try {
    const reply = await call("GET", path);
    return URL.createObjectURL(await reply.blob());
  } catch {
    return null;
  }
}
