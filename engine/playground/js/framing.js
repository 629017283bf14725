// What of the picture the clip shows: a window of the clip's shape, in the middle.

import { el } from "./dom.js";

/**
 * The share of a picture that a size keeps, and a sentence about it. The picture is resized to cover
 * the size and cropped at the centre, as `engine/media/framing.py` does.
 */
export function windowOf(picture, size, fit) {
  if (!picture || !size) return null;
  if (fit === "resize")
    return { wide: 1, tall: 1, sentence: "The clip takes the shape of the picture." };
  const ratio = picture.width / picture.height / (size.width / size.height);
  const wide = Math.min(1, 1 / ratio);
  const tall = Math.min(1, ratio);
  if (Math.min(wide, tall) > 0.985)
    return { wide, tall, sentence: "All of the picture is in the clip." };
  const [share, side] = wide < tall ? [wide, "width"] : [tall, "height"];
  const sentence = `The middle ${Math.round(share * 100)} % of the picture's ${side} are in the clip.`;
  return { wide, tall, sentence };
}

/** Says what is wrong with how a picture is framed, or nothing. */
export function framingWarnings(picture, size, fit) {
  const found = windowOf(picture, size, fit);
  if (!found) return [];
  const warnings = [];
  if (Math.min(found.wide, found.tall) < 0.6) {
    warnings.push(
      "Much of the picture is cut off. Choose a size that is turned the same way, or crop it to the person.",
    );
  }
  const side = Math.min(picture.width, picture.height);
  if (side < Math.min(size.width, size.height) * 0.75) {
    warnings.push(
      `The picture has ${picture.width}x${picture.height} pixels, fewer than the clip: it will look soft.`,
    );
  }
  return warnings;
}

/** Draws the picture with the window of the clip upon it. */
export function framedPicture(source, picture, size, fit) {
  const image = el("img", { src: source, alt: "The picture, with what the clip shows of it" });
  const found = windowOf(picture, size, fit);
  const frame = el("div", { class: "frame" }, image);
  if (found && Math.min(found.wide, found.tall) < 0.985) {
    const pane = el("div", { class: "window", "aria-hidden": "true" });
    pane.style.width = `${found.wide * 100}%`;
    pane.style.height = `${found.tall * 100}%`;
    pane.style.left = `${(1 - found.wide) * 50}%`;
    pane.style.top = `${(1 - found.tall) * 50}%`;
    frame.append(pane);
  }
  return frame;
}
