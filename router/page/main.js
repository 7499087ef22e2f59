// The live page: asks the router once a second and shows what it says.
//
//   poll -> cluster, charts, flow, requests     while the page can be seen
//   401  -> the key is asked for, then on
//   no answer -> said so, tried again, slower

import { Refused, dropKey, getJson, hasKey, keepKey } from "./api.js";
import { startCharts } from "./charts.js";
import { startChat } from "./chat.js";
import { showCluster } from "./cluster.js";
import { byId, setText } from "./dom.js";
import { startFlow } from "./flow.js";
import { startRequests } from "./requests.js";
import { startTimeline } from "./timeline.js";

const INTERVAL_MS = 1000;
const SLOWEST_MS = 10000;
// More than that would be drawn nowhere.
const MOST_REQUESTS = 80;

const history = { epoch: "", sequence: 0, samples: [] };
let failures = 0;
let wake = () => {};
let asking = null; // a promise while the key is asked for

const timeline = startTimeline();
const charts = startCharts();
const flow = startFlow(timeline.open);
const requests = startRequests(timeline.open);
startChat(timeline.open, askForKey);

function remember(answer) {
  if (answer.epoch !== history.epoch) history.samples = [];
  history.epoch = answer.epoch;
  history.sequence = answer.sequence;
  const known = history.samples.at(-1)?.sequence ?? 0;
  history.samples.push(...answer.history.filter((sample) => sample.sequence > known));
  history.samples.splice(0, Math.max(0, history.samples.length - answer.now.history_s));
}

async function poll() {
  const query = `since=${history.sequence}&epoch=${encodeURIComponent(history.epoch)}`;
  const [live, listed] = await Promise.all([getJson(`/live.json?${query}`), getJson(`/requests?limit=${MOST_REQUESTS}`)]);
  remember(live);
  showCluster(live.now);
  charts.show(history.samples, live.now);
  flow.show(live.now, listed.requests);
  requests.show(listed.requests);
}

function trouble(text) {
  const notice = byId("notice");
  notice.hidden = text === "";
  setText(notice, text);
  document.body.classList.toggle("stale", text !== "");
}

// Whoever asks while the key is asked for already waits for the same answer.
function askForKey(why) {
  setText(byId("key-error"), why);
  asking ??= new Promise((resolve) => {
    byId("key").showModal();
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      keepKey(byId("key-input").value.trim());
      byId("key-input").value = "";
      byId("key").close();
      asking = null;
      resolve();
    };
  });
  return asking;
}

async function turn() {
  try {
    await poll();
    failures = 0;
    trouble("");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      const why = hasKey() ? error.message : "";
      dropKey();
      await askForKey(why);
      return;
    }
    failures += 1;
    trouble(`No answer from the router: ${error.message}. Trying again.`);
  }
}

function pause() {
  const milliseconds = Math.min(SLOWEST_MS, INTERVAL_MS * 2 ** Math.min(failures, 6));
  return new Promise((resolve) => {
    wake = resolve;
    if (!document.hidden) setTimeout(resolve, milliseconds);
  });
}

byId("key").addEventListener("cancel", (event) => event.preventDefault());
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) wake();
});

for (;;) {
  await turn();
  await pause();
}
