// Who becomes whom, of a model that takes masks: for each person of the picture, one of the dance.

// The colours of persons in masks, in their order (docs/deploy.md, "Fields of a request").
export const PERSONS = [
  ["blue", "#2f6bff"],
  ["red", "#e5372c"],
  ["green", "#1f9d3a"],
  ["magenta", "#c734c0"],
  ["cyan", "#0d9fb0"],
  ["yellow", "#d9a400"],
];

/** The dancers of persons 1, 2, …, as they are chosen. */
export function whoOf(state) {
  const count = Math.min(state.persons, PERSONS.length);
  const usual = Array.from({ length: count }, (_, place) => place + 1);
  const isWhole = state.who.length === count && usual.every((person) => state.who.includes(person));
  return isWhole ? state.who : usual;
}

/** The field `who` of a job: nothing where everybody keeps the colour. */
export function whoText(state) {
  const who = whoOf(state);
  return who.every((person, place) => person === place + 1) ? null : who.join(",");
}

/** Reads the field back. */
export function readWho(value) {
  const parts = Array.isArray(value) ? value : String(value ?? "").split(/[\s,;]+/);
  const numbers = parts.map((part) => {
    const named = PERSONS.findIndex(([name]) => name === String(part).toLowerCase());
    return named >= 0 ? named + 1 : Number(part);
  });
  return numbers.every((number) => Number.isInteger(number) && number >= 1) ? numbers : [];
}
