// The two pools with their workers; requests sit where they are worked on and cross from one to the
// other when their KV does.
//
//   reading   in a card of the prefill pool, or of the decode worker that reads it itself
//   writing   in a card of the decode pool
//   crossing  seen before as reading elsewhere, or ended since the last look: one run along the link

import { bar, showBar } from "./cluster.js";
import { byId, element, keyed, setText, svg } from "./dom.js";
import { bytes, count, percent, plural, shortId } from "./format.js";

const MOST_SHOWN = 12;
const MOST_LINKS = 36;
const MOST_CROSSINGS = 12;
const CROSSING_MS = 1100;
const STATES = { starting: "starting", ready: "ready", draining: "draining", suspect: "suspect", dead: "dead" };

const stage = byId("stage");
const laneRate = stage.querySelector(".lane-rate");
let crossing = 0; // runners on their way
const still = matchMedia("(prefers-reduced-motion: reduce)");

function poolOf(worker) {
  return worker.role === "prefill" ? "prefill" : "decode";
}

function where(request) {
  if (request.state !== "running") return "";
  if (request.completion_tokens > 0) return request.decode_worker;
  return request.prefill_worker || request.decode_worker;
}

// ---- cards --------------------------------------------------------------------------------------

function makeCard(worker) {
  const card = element(
    "article",
    { class: `worker ${poolOf(worker)}` },
    element("div", { class: "worker-head" }, element("h4", {}, worker.id), element("span", { class: "state" })),
    element("p", { class: "quiet load" }),
    bar(),
    element("p", { class: "quiet blocks" }),
    element("div", { class: "pills" }),
  );
  card.title = `${worker.role} worker, process ${worker.pid} on ${worker.node}`;
  return card;
}

function updateCard(card, worker, requests, open) {
  const [head, load, blocksBar, blocks, pills] = card.children;
  const state = worker.degraded ? `${STATES[worker.state]}, ${worker.degraded}` : STATES[worker.state];
  setText(head.children[1], state);
  head.children[1].className = `state ${worker.degraded ? "degraded" : worker.state}`;
  const doing = poolOf(worker) === "prefill" ? "reading" : "running";
  const pending = worker.pending_tokens ? ` · ${plural(worker.pending_tokens, "token")} to read` : "";
  setText(load, `${count(worker.running)} ${doing} · ${count(worker.waiting)} waiting${pending}`);
  const { used, cached, total } = worker.blocks;
  showBar(blocksBar, [["used", used], ["cached", cached]], total);
  setText(blocks, `${percent(used, total)} of ${count(total)} blocks in use, ${count(cached)} kept`);
  showPills(pills, requests, open);
}

function showPills(box, requests, open) {
  const shown = requests.slice(0, MOST_SHOWN);
  const more = requests.length - shown.length;
  const make = (request) => element("button", { type: "button", onclick: () => open(request.request_id) });
  const items = more > 0 ? [...shown, { request_id: "more", more }] : shown;
  keyed(box, items, (request) => request.request_id, (item) => (item.more ? element("span") : make(item)), (node, item) => {
    if (item.more) {
      setText(node, `+${count(item.more)}`);
      return;
    }
    const writing = item.completion_tokens > 0;
    const tokens = writing ? item.completion_tokens : item.prompt_tokens;
    node.className = `pill ${writing ? "writing" : "reading"}`;
    node.setAttribute("aria-label", `Request ${shortId(item.request_id)}, ${plural(tokens, "token")} ${writing ? "written" : "to read"}`);
    setText(node, count(tokens));
  });
}

function showPool(role, workers, byWorker, open) {
  const box = stage.querySelector(`[data-pool="${role}"]`);
  const ready = workers.filter((worker) => worker.state === "ready").length;
  const [head, cards] = box.children;
  const names = { prefill: "Prefill", decode: workers.some((w) => w.role === "mixed") ? "Decode and mixed" : "Decode" };
  if (!head.children.length) head.append(element("h3"), element("span", { class: "quiet" }));
  setText(head.children[0], names[role]);
  setText(head.children[1], `${ready} of ${plural(workers.length, "worker")} ready`);
  keyed(cards, workers, (worker) => worker.id, makeCard, (card, worker) =>
    updateCard(card, worker, byWorker.get(worker.id) ?? [], open),
  );
}

// ---- links and crossings ------------------------------------------------------------------------

const links = svg("svg", { class: "links", "aria-hidden": "true" });

function cardOf(id) {
  return [...stage.querySelectorAll(".worker")].find((card) => card.dataset.key === id);
}

// A path between two cards, in the stage's pixels: sideways, or down where the pools are stacked.
function route(from, to) {
  const home = stage.getBoundingClientRect();
  const a = from.getBoundingClientRect();
  const b = to.getBoundingClientRect();
  if (a.right <= b.left) {
    const [x1, y1] = [a.right - home.left, a.top + a.height / 2 - home.top];
    const [x2, y2] = [b.left - home.left, b.top + b.height / 2 - home.top];
    const bend = (x2 - x1) / 2;
    return `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`;
  }
  const [x1, y1] = [a.left + a.width / 2 - home.left, a.bottom - home.top];
  const [x2, y2] = [b.left + b.width / 2 - home.left, b.top - home.top];
  return `M${x1} ${y1}C${x1} ${(y1 + y2) / 2} ${x2} ${(y1 + y2) / 2} ${x2} ${y2}`;
}

function showLinks(prefill, decode, busy) {
  const pairs = prefill.flatMap((p) => decode.map((d) => [p.id, d.id]));
  const box = stage.getBoundingClientRect();
  links.setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
  const drawn = pairs.slice(0, MOST_LINKS).map((pair) => ({ key: pair.join(" "), pair }));
  keyed(links, drawn, (link) => link.key, () => svg("path"), (path, { key, pair: [p, d] }) => {
    const [from, to] = [cardOf(p), cardOf(d)];
    if (from && to) path.setAttribute("d", route(from, to));
    path.setAttribute("class", busy.has(key) ? "busy" : "");
  });
}

function cross(request) {
  const from = cardOf(request.prefill_worker);
  const to = cardOf(request.decode_worker);
  if (!from || !to || still.matches || crossing >= MOST_CROSSINGS) return;
  const runner = element("i", { class: "runner" });
  runner.style.offsetPath = `path("${route(from, to)}")`;
  stage.append(runner);
  crossing += 1;
  const move = runner.animate(
    [
      { offsetDistance: "0%", opacity: 0 },
      { opacity: 1, offset: 0.12 },
      { opacity: 1, offset: 0.85 },
      { offsetDistance: "100%", opacity: 0 },
    ],
    { duration: CROSSING_MS, easing: "ease-in-out", delay: Math.random() * 350, fill: "both" },
  );
  const gone = () => {
    crossing -= 1;
    runner.remove();
  };
  move.finished.then(gone, gone);
}

export function startFlow(open) {
  stage.prepend(links);
  let places = null; // request id -> whether it had written something when last seen

  function crossings(requests) {
    const seen = new Map(requests.map((request) => [request.request_id, request.completion_tokens > 0]));
    for (const request of places === null ? [] : requests) {
      const moved = seen.get(request.request_id) && places.get(request.request_id) !== true;
      if (moved && request.prefill_worker) cross(request);
    }
    places = seen;
  }

  return {
    show({ workers, headline }, requests) {
      setText(laneRate, headline.kv_bytes ? `KV ${bytes(headline.kv_bytes)}/s` : "KV");
      const byWorker = Map.groupBy(requests.filter(where), where);
      const prefill = workers.filter((worker) => poolOf(worker) === "prefill");
      const decode = workers.filter((worker) => poolOf(worker) === "decode");
      showPool("prefill", prefill, byWorker, open);
      showPool("decode", decode, byWorker, open);
      const reading = requests.filter((r) => r.state === "running" && r.prefill_worker && !r.completion_tokens);
      showLinks(prefill, decode, new Set(reading.map((r) => `${r.prefill_worker} ${r.decode_worker}`)));
      crossings(requests);
    },
  };
}
