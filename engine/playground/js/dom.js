// Elements made by hand: text goes in as text, so that no name and no prompt is ever read as HTML.

/** Makes an element. Attributes that are functions listen; `text` and children become its content. */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(key, value);
    else if (key === "text") element.textContent = value;
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Finds the one element of an id; a page without it is broken, and says where. */
export function find(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`The page has no element #${id}.`);
  return element;
}

/** Replaces the content of an element. */
export function fill(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

/** Shows one of several elements and hides the others. */
export function showOnly(elements, name) {
  for (const [key, element] of Object.entries(elements)) element.hidden = key !== name;
}

let clearing = 0;

/** Says a sentence to whoever looks, and to screen readers; it goes away by itself. */
export function say(sentence, tone = "plain", stays_ms = 7000) {
  const said = find("said");
  const dismiss = el("button", {
    type: "button",
    class: "quiet",
    "aria-label": "Dismiss",
    text: "×",
    click: () => fill(said),
  });
  fill(said, el("p", { class: `note ${tone}` }, el("span", { text: sentence }), dismiss));
  clearTimeout(clearing);
  clearing = setTimeout(() => fill(said), stays_ms);
}

/** Tells screen readers alone, politely. */
export function tell(sentence) {
  const told = find("told");
  if (told.textContent !== sentence) told.textContent = sentence;
}

/** Puts a text on the clipboard and says so on the button. */
export async function copy(text, button) {
  const usual = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select and copy by hand";
  }
  setTimeout(() => (button.textContent = usual), 1800);
}
