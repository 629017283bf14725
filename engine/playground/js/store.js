// The one state of the page: read by everybody, changed by `set`, heard by whoever asked for a key.

/** Makes a store. `on(keys, hear)` calls `hear(state)` once now and after each change of a key. */
export function createStore(initial) {
  const state = { ...initial };
  const hearers = [];

  function set(changes) {
    const changed = Object.keys(changes).filter((key) => state[key] !== changes[key]);
    if (!changed.length) return;
    Object.assign(state, changes);
    for (const { keys, hear } of [...hearers]) {
      if (keys.some((key) => changed.includes(key))) hear(state);
    }
  }

  function on(keys, hear) {
    hearers.push({ keys, hear });
    hear(state);
  }

  return { state, set, on };
}
