// A medium that was chosen: a file of the visitor, sent to the service, or one of the examples.

import * as api from "./api.js";

// The fields of a job that a file goes into, by what it is (docs/deploy.md, "Fields of a request").
const SLOTS = {
  picture: { title: "Picture", fields: { image: "image_path" } },
  motion: {
    title: "Dance",
    fields: { video: "video_path", image: "video_path", joints: "joints_path" },
  },
  pictureMask: { title: "Who is who in the picture", fields: { image: "reference_mask_path" } },
  motionMask: {
    title: "Who is who in the dance",
    fields: { video: "mask_path", joints: "mask_path", archive: "mask_path", image: "mask_path" },
  },
};

/** Tells what a file seems to be, by its type and name. The service looks into it. */
export function kindOf(file) {
  const name = file.name.toLowerCase();
  if (name.endsWith(".npz")) return "joints";
  if (name.endsWith(".zip")) return "archive";
  if (file.type.startsWith("video/") || /\.(mp4|mov|mkv|webm|m4v)$/.test(name)) return "video";
  if (file.type.startsWith("image/")) return "image";
  return "unknown";
}

/** Makes a medium of a file. Where its kind does not fit, the service says so in a sentence. */
export function ofFile(slot, file) {
  const kind = kindOf(file);
  const fields = SLOTS[slot].fields;
  const shown = kind === "image" || kind === "video" ? URL.createObjectURL(file) : null;
  return {
    slot,
    kind,
    file,
    shown,
    name: file.name,
    bytes: file.size,
    medium: null,
    share: 0,
    error: null,
    field: fields[kind] ?? Object.values(fields)[0],
  };
}

/** Makes a medium of a name that the service knows: of an example, or of an upload still there. */
export function ofName(slot, field, medium, name, shown, kind) {
  return { slot, kind, file: null, shown, name, bytes: null, medium, share: 1, error: null, field };
}

/** Sends the file of a medium, and puts its name at the service into the store. */
export async function send(store, given) {
  const { slot, file } = given;
  let latest = given;
  const change = (changes) => {
    if (store.state[slot] !== latest) return; // another one was chosen meanwhile
    latest = { ...latest, ...changes };
    store.set({ [slot]: latest });
  };
  try {
    const reply = await api.upload(file, (share) => change({ share }));
    change({ medium: reply.medium, share: 1 });
  } catch (error) {
    change({ error: error.message });
  }
}

/** Chooses a file for a slot: checks what can be known here, shows it, sends it. */
export function choose(store, slot, file) {
  const limits = store.state.info?.limits;
  const most =
    slot === "picture" || slot === "pictureMask"
      ? limits?.max_image_bytes
      : limits?.max_upload_bytes;
  const medium = ofFile(slot, file);
  if (!file.size) medium.error = `${file.name} is empty; choose another file.`;
  else if (most && file.size > most) {
    medium.error = `${file.name} has ${Math.ceil(file.size / 2 ** 20)} MiB; at most ${most / 2 ** 20} are taken.`;
  }
  store.set({ [slot]: medium, ...(slot === "motion" ? { frames: null, mostFrames: null } : {}) });
  if (!medium.error) send(store, medium);
}

/** Says whether all that was chosen has arrived. */
export function isReady(state) {
  const needed = [state.picture, state.motion];
  const all = [...needed, state.pictureMask, state.motionMask];
  return needed.every(Boolean) && all.every((one) => !one || (one.medium && !one.error));
}

/** Keeps the shape of the picture in the store, for its framing. */
export function keepShapes(store) {
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
