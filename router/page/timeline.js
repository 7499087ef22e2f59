// One request: how its answer was made, and each span of its time.

import { Refused, getJson } from "./api.js";
import { byId, element, setText } from "./dom.js";
import { bytes, count, plural, seconds, shortId, skipped } from "./format.js";
import { workers } from "./requests.js";

const AGAIN_MS = 1000;
const NAMES = {
  prepare: "check and tokenize",
  place: "find workers",
  attempt: "on its workers",
  recover: "between attempts",
  prefill: "read the prompt",
  queue: "wait for blocks",
  tier_read: "fetch from a tier",
  chunk: "compute a chunk",
  grant: "wait for the grant",
  transfer: "move KV",
  decode: "write the answer",
  preempted: "preempted",
};

function attributes(span) {
  const { attributes: a } = span;
  const words = [];
  if (a.tokens) words.push(plural(a.tokens, "token"));
  if (a.blocks) words.push(plural(a.blocks, "block"));
  if (a.bytes) words.push(bytes(a.bytes));
  if (a.transport) words.push(`by ${a.transport}`);
  if (a.tier) words.push(`from ${a.tier}`);
  if (a.merged) words.push(`and ${count(a.merged)} more like it`);
  if (a.reason) words.push(a.reason.replaceAll("_", " "));
  return words.join(", ");
}

function spanRow(span, total) {
  const fill = element("i", { class: `span-bar ${span.name}` });
  const left = Math.min(99.5, (100 * Math.max(0, span.start_ms)) / total);
  fill.style.left = `${left}%`;
  fill.style.width = `${Math.max(0.4, Math.min(100 - left, (100 * span.duration_ms) / total))}%`;
  return element(
    "li",
    { class: "span" },
    element("div", { class: "span-name" }, element("b", {}, NAMES[span.name] ?? span.name), " ", element("span", { class: "quiet" }, span.who)),
    element("div", { class: "span-track", "aria-hidden": "true" }, fill),
    element("div", { class: "span-figures" },
      element("span", {}, seconds(span.duration_ms / 1000)), " ",
      element("span", { class: "quiet" }, `from ${seconds(span.start_ms / 1000)}`)),
    element("div", { class: "quiet span-more" }, attributes(span)),
  );
}

export function facts(usage) {
  const cached = usage.cached_tokens;
  const found = Object.entries(cached).filter(([, tokens]) => tokens > 0);
  const kv = usage.kv_transport
    ? `${bytes(usage.kv_bytes_transferred)} by ${usage.kv_transport}`
    : `none: ${skipped(usage.kv_skipped_reason || "not yet")}`;
  return [
    ["Workers", workers(usage)],
    ["Cached", found.length ? found.map(([tier, tokens]) => `${count(tokens)} from ${tier}`).join(", ") : "nothing"],
    ["KV moved", kv],
    ...(usage.resumes ? [["Resumes", count(usage.resumes)]] : []),
    ...(usage.preemptions ? [["Preemptions", count(usage.preemptions)]] : []),
  ];
}

function draw(request) {
  const usage = request.usage;
  const state = request.error ? `failed: ${request.error}` : [request.state, request.finish_reason].filter(Boolean).join(", ");
  const rows = [
    ["State", state],
    ["Tokens", `${count(usage.prompt_tokens)} read, ${count(usage.completion_tokens)} written`],
    ["Time", seconds(request.duration_ms / 1000)],
    ...facts(usage),
    ["Trace", request.trace_id],
  ];
  const total = Math.max(1e-3, request.duration_ms, ...request.spans.map((s) => s.start_ms + s.duration_ms));
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => element("span", {}, seconds((share * total) / 1000)));
  return [
    element("dl", { class: "facts" }, rows.map(([name, text]) => element("div", {}, element("dt", {}, name), element("dd", { class: text.length > 30 ? "long" : null }, text)))),
    element("div", { class: "axis", "aria-hidden": "true" }, ticks),
    element("ol", { class: "spans" }, request.spans.map((span) => spanRow(span, total))),
  ];
}

export function startTimeline() {
  const dialog = byId("timeline");
  const body = byId("timeline-body");
  let shown = ""; // the id that is open
  let timer = 0;

  async function load(id) {
    let again = false;
    try {
      const request = await getJson(`/requests/${encodeURIComponent(id)}`);
      if (id !== shown) return;
      body.replaceChildren(...draw(request));
      again = request.state === "running";
    } catch (error) {
      if (id !== shown) return;
      body.replaceChildren(element("p", { class: "error" }, error.message));
      // The router told why, and will again; without its answer, the next one may come.
      again = !(error instanceof Refused);
    }
    if (again) timer = setTimeout(() => load(id), AGAIN_MS);
  }

  // Told some time after the closing; by then another request may be shown.
  dialog.addEventListener("close", () => {
    if (dialog.open) return;
    clearTimeout(timer);
    shown = "";
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });

  return {
    open(id) {
      clearTimeout(timer);
      shown = id;
      setText(byId("timeline-title"), `Request ${shortId(id)}`);
      body.replaceChildren(element("p", { class: "quiet" }, "loading"));
      if (!dialog.open) dialog.showModal();
      load(id);
    },
  };
}
