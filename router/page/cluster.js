// Header, headline figures and the tiers: what the router says about the whole cluster now.

import { byId, element, keyed, setText } from "./dom.js";
import { bytes, count, percent, rate, seconds } from "./format.js";

export function showCluster(now) {
  setText(byId("model"), now.model);
  setText(byId("version"), `pdserve ${now.version} · ${now.block_size} tokens a block`);
  const numerics = byId("numerics");
  numerics.hidden = now.numerics === "";
  setText(numerics, `numerics: ${now.numerics}`);
  const ready = byId("ready");
  ready.className = `badge ${now.ready ? "good" : "bad"}`;
  ready.title = now.reason;
  setText(ready, now.ready ? "ready" : `not ready: ${now.reason}`);
  showShortfalls(now);
  showTiles(now);
  showTiers(now);
}

// What the cluster was asked for and does not do; while it is not ready, that is the reason already.
function showShortfalls(now) {
  const found = now.ready ? now.shortfalls.map((text) => `Degraded: ${text}`) : [];
  if (now.missing.length > 0) found.push(`Not there yet, starting or without a node: ${now.missing.join(", ")}`);
  const notice = byId("shortfalls");
  notice.hidden = found.length === 0;
  setText(notice, found.join(". "));
}

// ---- headline -----------------------------------------------------------------------------------

function tiles(now) {
  const head = now.headline;
  const total = (key) => now.pools.reduce((sum, pool) => sum + pool[key], 0);
  const cached = head.device + head.host + head.redis;
  return [
    ["In flight", count(head.in_flight), `${count(total("waiting"))} waiting`],
    ["Writing", `${rate(head.generated)}`, "tokens a second", "decode"],
    ["Time to first token", seconds(head.first_token.p50), `95 %: ${seconds(head.first_token.p95)}`, "prefill"],
    ["Between tokens", seconds(head.inter_token.p50), `95 %: ${seconds(head.inter_token.p95)}`, "decode"],
    ["Prompts from cache", percent(cached, cached + head.computed), "of the tokens read", "cached"],
    ["KV handed over", `${bytes(head.kv_bytes)}/s`, "prefill to decode", "kv"],
  ];
}

function showTiles(now) {
  const box = byId("tiles");
  box.title = `Over the last ${now.headline_s} seconds`;
  const make = ([name, , , tone]) =>
    element(
      "div",
      { class: `tile ${tone ?? ""}` },
      element("dt", {}, name),
      element("dd", { class: "figure" }),
      element("dd", { class: "quiet" }),
    );
  keyed(box, tiles(now), (tile) => tile[0], make, (node, [, figure, more]) => {
    setText(node.children[1], figure);
    setText(node.children[2], more);
  });
}

// ---- tiers --------------------------------------------------------------------------------------

function sum(items, value) {
  return items.reduce((total, item) => total + value(item), 0);
}

function tierRows(now) {
  const live = now.workers.filter((worker) => worker.state !== "dead");
  const head = now.headline;
  const used = sum(live, (worker) => worker.blocks.used);
  const cached = sum(live, (worker) => worker.blocks.cached);
  const total = sum(live, (worker) => worker.blocks.total);
  const host = sum(live, (worker) => worker.tiers.host);
  const hostTotal = sum(live, (worker) => worker.tiers.host_total);
  const written = sum(live, (worker) => worker.tiers.redis_written);
  return [
    {
      name: "Device",
      text: `${count(used)} in use, ${count(cached)} kept, of ${count(total)}`,
      parts: [["used", used], ["cached", cached]],
      total,
      found: head.device,
    },
    {
      name: "Host",
      text: hostTotal ? `${count(host)} kept, of ${count(hostTotal)}` : "off",
      parts: [["cached", host]],
      total: hostTotal,
      found: head.host,
    },
    {
      name: "Redis",
      text: `${count(written)} written by the workers that live`,
      parts: [],
      total: 0,
      found: head.redis,
    },
  ];
}

export function bar() {
  return element("div", { class: "bar", "aria-hidden": "true" });
}

export function showBar(node, parts, total) {
  const make = ([kind]) => element("i", { class: kind });
  keyed(node, parts, (part) => part[0], make, (child, [, value]) => {
    child.style.width = total ? `${Math.min(100, (100 * value) / total)}%` : "0";
  });
}

function showTiers(now) {
  const make = (row) =>
    element(
      "div",
      { class: "tier" },
      element("h3", {}, row.name),
      bar(),
      element("p", { class: "quiet" }),
      element("p", { class: "quiet found" }),
    );
  keyed(byId("tiers"), tierRows(now), (row) => row.name, make, (node, row) => {
    showBar(node.children[1], row.parts, row.total);
    node.children[1].classList.toggle("open", row.total === 0);
    setText(node.children[2], row.text);
    setText(node.children[3], `${rate(row.found)} tokens a second found here`);
  });
}
