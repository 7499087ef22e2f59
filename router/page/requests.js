// The requests that run and the last that ended, the newest first.

import { byId, element, keyed, setText } from "./dom.js";
import { ago, count, seconds, shortId } from "./format.js";

const MOST_SHOWN = 14;

function state(request) {
  if (request.state === "running") return request.completion_tokens ? "writing" : "reading";
  if (request.state === "failed") return `failed: ${request.error}`;
  return request.finish_reason ? `ended: ${request.finish_reason}` : request.state;
}

function tone(request) {
  if (request.state === "running") return request.completion_tokens ? "writing" : "reading";
  return request.state;
}

export function workers(request) {
  if (!request.decode_worker) return "nobody yet";
  if (!request.prefill_worker) return `${request.decode_worker} alone`;
  return `${request.prefill_worker} → ${request.decode_worker}`;
}

function make(request, open) {
  return element(
    "button",
    { type: "button", class: "request", onclick: () => open(request.request_id) },
    element("code", { class: "id", title: request.request_id }, shortId(request.request_id)),
    element("span", { class: "state" }),
    element("span", { class: "path" }),
    element("span", { class: "tokens" }),
    element("span", { class: "time" }),
    element("span", { class: "quiet when" }),
  );
}

function update(node, request) {
  const [, shown, path, tokens, time, when] = node.children;
  shown.className = `state ${tone(request)}`;
  setText(shown, state(request));
  setText(path, workers(request));
  setText(tokens, `${count(request.prompt_tokens)} read, ${count(request.completion_tokens)} written`);
  setText(time, seconds(request.duration_ms / 1000));
  setText(when, ago(request.started_at));
}

export function startRequests(open) {
  const box = byId("requests");
  const nothing = element("p", { class: "quiet empty" }, "No request yet. Ask the model something.");
  return {
    show(requests) {
      if (!requests.length) {
        box.replaceChildren(nothing);
        return;
      }
      nothing.remove();
      keyed(box, requests.slice(0, MOST_SHOWN), (r) => `${r.request_id} ${r.started_at}`, (r) => make(r, open), update);
    },
  };
}
