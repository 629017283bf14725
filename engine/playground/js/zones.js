// Drop zones: a file dropped on one or chosen by keyboard becomes the medium of its slot.

import { el, fill } from "./dom.js";
import { choose } from "./media.js";

const ICONS = {
  picture:
    "M5 4h14a1 1 0 0 1 1 1v14a1 1 0 0 1-1 1H5a1 1 0 0 1-1-1V5a1 1 0 0 1 1-1Zm7 4.2a2.3 2.3 0 1 1 0 4.6 2.3 2.3 0 0 1 0-4.6ZM7 20c.4-3.6 2.2-5.2 5-5.2s4.6 1.6 5 5.2",
  motion: "M4 5h16v14H4zM8 5v14M16 5v14M4 9.7h4M4 14.3h4M16 9.7h4M16 14.3h4",
};

const ZONES = {
  picture: {
    title: "Picture",
    kinds: "who dances: JPEG, PNG, WebP, AVIF",
    accept: "image/*",
    icon: "picture",
  },
  motion: {
    title: "Dance",
    kinds: "how: MP4, MOV, MKV, WebM, GIF, or joints as NPZ",
    accept: "video/*,image/gif,.mkv,.mov,.npz",
    icon: "motion",
  },
  pictureMask: { title: "Mask of the picture", isLine: true, accept: "image/*" },
  motionMask: {
    title: "Mask of the dance",
    isLine: true,
    accept: "video/*,image/*,.npz,.zip,.mkv",
  },
};

/** Fills an element with the zone of a slot, and keeps it true to the store. */
export function placeZone(element, slot, store) {
  const zone = ZONES[slot];
  const input = el("input", {
    type: "file",
    accept: zone.accept,
    "aria-label": `${zone.title}: choose a file`,
  });
  const drop = el("label", { class: "drop" }, input);
  const caption = el("p", { class: "caption", hidden: true });
  const wrong = el("p", { class: "bad", role: "alert" });
  fill(element, drop, caption, wrong);
  let shown = null;

  input.addEventListener("change", () => {
    if (input.files.length) choose(store, slot, input.files[0]);
    input.value = "";
  });
  drop.addEventListener("dragover", () => element.classList.add("over"));
  for (const name of ["dragleave", "drop"]) {
    drop.addEventListener(name, () => element.classList.remove("over"));
  }
  drop.addEventListener("drop", (event) => {
    const file = event.dataTransfer?.files[0];
    if (!file) return;
    event.preventDefault(); // the page sees that the file has its place
    choose(store, slot, file);
  });

  const sending = el("span", { class: "sending" }, el("i"));
  store.on([slot], (state) => {
    const medium = state[slot];
    element.classList.toggle("full", Boolean(medium));
    if (!medium) {
      fill(drop, input, hint(zone));
      shown = null;
    } else if (shown !== medium.name + medium.shown) {
      shown = medium.name + medium.shown;
      fill(
        drop,
        input,
        ...(zone.isLine ? [line(medium, zone)] : [thumb(medium, zone), tag(zone)]),
        sending,
      );
    }
    if (medium) {
      sending.hidden = medium.share >= 1 || Boolean(medium.error);
      sending.firstChild.style.transform = `scaleX(${medium.share})`;
    }
    caption.hidden = !medium;
    fill(caption, ...(medium ? named(medium, zone, slot, store) : []));
    wrong.textContent = medium?.error ?? "";
    wrong.hidden = !medium?.error;
  });
}

function tag(zone) {
  return el("span", { class: "tag", text: zone.title });
}

function line(medium, zone) {
  return el("span", { text: `${zone.title}: ${medium.name}` });
}

function hint(zone) {
  if (zone.isLine) return el("span", { text: `${zone.title}: add one` });
  return el(
    "span",
    { class: "hint-inner" },
    drawn(ICONS[zone.icon]),
    el("strong", { text: zone.title }),
    el("span", { class: "kinds", text: zone.kinds }),
  );
}

function drawn(path) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(space, "path");
  for (const [key, value] of Object.entries({
    d: path,
    fill: "none",
    stroke: "currentColor",
    "stroke-width": "1.5",
    "stroke-linejoin": "round",
    "stroke-linecap": "round",
  }))
    line.setAttribute(key, value);
  svg.append(line);
  return svg;
}

function thumb(medium, zone) {
  const unseen = () => el("span", { class: "file-mark" }, drawn(ICONS[zone.icon]));
  if (!medium.shown) return unseen();
  const isVideo = medium.kind === "video" || medium.kind === "joints";
  const seen = isVideo
    ? el("video", {
        src: medium.shown,
        muted: true,
        playsinline: true,
        preload: "auto",
        "aria-hidden": "true",
      })
    : el("img", { src: medium.shown, alt: "" });
  if (isVideo) {
    seen.muted = true;
    seen.addEventListener(
      "loadedmetadata",
      () => (seen.currentTime = Math.min(0.4, seen.duration / 4)),
    );
  }
  seen.addEventListener("error", () => seen.replaceWith(unseen()), { once: true });
  return seen;
}

function named(medium, zone, slot, store) {
  const remove = el("button", {
    type: "button",
    class: "quiet",
    "aria-label": `Remove the file: ${zone.title}`,
    text: "×",
    click: () => {
      store.set({ [slot]: null, example: null });
      document.querySelector(`[aria-label="${zone.title}: choose a file"]`)?.focus();
    },
  });
  return [el("span", { text: medium.name, title: medium.name }), remove];
}
