// Numbers as people read them.

/** Writes a time: 0.8 s, 14 s, 3 min 05 s, 1 h 12 min. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
}

/** Writes a place on the time line: 0:03.2. */
export function clock(seconds) {
  const tenths = Math.max(0, Math.round(seconds * 10));
  const whole = Math.floor(tenths / 10);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}.${tenths % 10}`;
}

/** Writes a size in bytes: 812 kB, 2.1 GB. */
export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = count;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

/** Writes a price of so many seconds at so much an hour. */
export function cost(seconds, perHour) {
  const value = (seconds * perHour) / 3600;
  if (value < 0.0005) return "< 0.001";
  return value < 1 ? value.toFixed(3) : value.toFixed(2);
}

/** Writes a count with its noun: 1 segment, 7 segments. */
export function counted(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** Writes how long ago a moment was, in seconds since 1970. */
export function ago(moment_s, now_s = Date.now() / 1000) {
  const past = Math.max(0, now_s - moment_s);
  if (past < 60) return "just now";
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 86400) return `${Math.floor(past / 3600)} h ago`;
  return new Date(moment_s * 1000).toLocaleDateString(undefined, {
    day: "numeric",
    month: "short",
  });
}
