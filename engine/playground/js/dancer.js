// The dancing skeleton on the empty stage: drawn from the shipped dance, once through, then still.

import { BONES, DANCE, FRAMES_PER_SECOND } from "./dance.js";

const STILL = 31; // the frame that stays

/** Draws the dancer on a canvas; returns `dance`, which lets it dance once through. */
export function placeDancer(canvas) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let began = null;

  function dance() {
    if (calm.matches || began !== null) return;
    began = performance.now();
    requestAnimationFrame(step);
  }

  function step(now) {
    const at = (Math.max(0, now - began) / 1000) * FRAMES_PER_SECOND;
    const end = DANCE.length - 1 + STILL;
    if (at >= end || calm.matches || canvas.offsetParent === null) {
      began = null;
      draw(canvas, STILL);
      return;
    }
    draw(canvas, at % (DANCE.length - 1));
    requestAnimationFrame(step);
  }

  new ResizeObserver(() => began === null && draw(canvas, STILL)).observe(canvas);
  draw(canvas, STILL);
  return dance;
}

/** Draws the dance at a place between two frames. */
function draw(canvas, at) {
  const ratio = Math.min(devicePixelRatio || 1, 2);
  const width = Math.round(canvas.clientWidth * ratio);
  const height = Math.round(canvas.clientHeight * ratio);
  if (!width || !height) return;
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const pen = canvas.getContext("2d");
  const scale = Math.min(width / 190, height / 236);
  const points = between(at).map((value, place) =>
    place % 2 ? height / 2 + value * scale - 6 * scale : width / 2 + value * scale,
  );
  pen.clearRect(0, 0, width, height);
  shadow(pen, points, scale, height);
  pen.lineCap = "round";
  pen.lineWidth = 6.5 * scale;
  for (const [from, to, colour] of BONES) {
    pen.strokeStyle = colour;
    pen.beginPath();
    pen.moveTo(points[2 * from], points[2 * from + 1]);
    pen.lineTo(points[2 * to], points[2 * to + 1]);
    pen.stroke();
  }
}

function between(at) {
  const first = Math.floor(at) % DANCE.length;
  const next = DANCE[(first + 1) % DANCE.length];
  const share = at - Math.floor(at);
  return DANCE[first].map((value, place) => value * (1 - share) + next[place] * share);
}

function shadow(pen, points, scale, height) {
  const x = (points[8] + points[10]) / 2; // between the ankles
  const y = Math.min(height / 2 + 100 * scale, height - 12 * scale);
  const glow = pen.createRadialGradient(0, 0, 0, 0, 0, 62 * scale);
  glow.addColorStop(0, "rgb(255 158 105 / 26%)");
  glow.addColorStop(1, "rgb(255 158 105 / 0%)");
  pen.save();
  pen.translate(x, y);
  pen.scale(1, 0.2);
  pen.fillStyle = glow;
  pen.fillRect(-64 * scale, -64 * scale, 128 * scale, 128 * scale);
  pen.restore();
}
