// Who asks: a random number of this browser, kept by it, and the token that a service may want.

const BROWSER = "scail-browser";
const TOKEN = "scail-token";

/** The number that says whose a job is (docs/serve.md, "What a page has to know"). */
export function browserId() {
  let known = keep(localStorage, BROWSER);
  if (!/^[0-9a-f]{32}$/.test(known ?? "")) {
    const random = crypto.getRandomValues(new Uint8Array(16));
    known = Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
    keep(localStorage, BROWSER, known);
  }
  return known;
}

/** The token of this tab, or null. */
export function token() {
  return keep(sessionStorage, TOKEN);
}

/** Keeps a token until the tab is closed. */
export function keepToken(text) {
  keep(sessionStorage, TOKEN, text);
}

/** What this browser was asked to remember, or null. */
export function remembered(name) {
  return keep(localStorage, `scail-${name}`);
}

/** Has this browser remember a word or a number; nothing that a service must not see. */
export function remember(name, value) {
  keep(localStorage, `scail-${name}`, String(value));
}

/** The headers of every call. */
export function headers() {
  const known = token();
  return { "X-Browser": browserId(), ...(known ? { Authorization: `Bearer ${known}` } : {}) };
}

const here = new Map(); // where a browser keeps nothing, for as long as the page is open

function keep(storage, key, value) {
  try {
    if (value !== undefined) storage.setItem(key, value);
    return storage.getItem(key);
  } catch {
    if (value !== undefined) here.set(key, value);
    return here.get(key) ?? null;
  }
}
