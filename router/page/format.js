// Numbers as people read them.

const NONE = "–";

export function count(value) {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (size >= 1e5) return `${Math.round(value / 1e3)} k`;
  return Math.round(value).toLocaleString("en-US");
}

export function rate(value) {
  if (value === null || value === undefined) return NONE;
  return value > 0 && value < 10 ? value.toFixed(1) : count(value);
}

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0 s";
  if (value < 0.001) return `${Math.round(value * 1e6)} µs`;
  if (value < 0.0995) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1e3)} ms`;
  return value < 100 ? `${value.toFixed(2)} s` : `${Math.round(value)} s`;
}

// For axes, whose values are round.
export function shortSeconds(value) {
  return value < 1 ? `${Number((value * 1e3).toPrecision(3))} ms` : `${Number(value.toPrecision(3))} s`;
}

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  let left = value;
  while (left >= 999.5 && at < units.length - 1) {
    left /= 1000;
    at += 1;
  }
  return `${left >= 100 || at === 0 ? Math.round(left) : left.toFixed(1)} ${units[at]}`;
}

export function percent(part, whole) {
  if (!whole) return NONE;
  const share = (100 * part) / whole;
  return `${share > 0 && share < 10 ? share.toFixed(1) : Math.round(share)} %`;
}

export function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}

export function ago(unixSeconds) {
  const passed = Math.max(0, Date.now() / 1000 - unixSeconds);
  if (passed < 2) return "now";
  if (passed < 90) return `${Math.round(passed)} s ago`;
  if (passed < 5400) return `${Math.round(passed / 60)} min ago`;
  return `${Math.round(passed / 3600)} h ago`;
}

export function shortId(id) {
  return id.length > 12 ? id.slice(0, 8) : id;
}

const SKIPPED = {
  little_uncached: "little was uncached",
  no_prefill_worker: "no prefill worker lives",
  prefill_pool_too_small: "the prompt fits no prefill pool",
  prefill_failed: "the prefill workers failed",
  mixed_worker: "the worker does both",
  finished_at_first_token: "the first token ended it",
};

// Reasons are words of the protocol; one that is new is shown as it is.
export function skipped(reason) {
  return SKIPPED[reason] ?? reason.replaceAll("_", " ");
}
