// Talks to the router that served this page. The key, where one is asked for, stays in this tab.

const KEY = "pdserve-api-key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function dropKey() {
  sessionStorage.removeItem(KEY);
}

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key === null ? more : { ...more, Authorization: `Bearer ${key}` };
}

async function refusal(response) {
  let message = `the router answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not one of our bodies; the status has to do.
  }
  return new Refused(response.status, message);
}

export async function getJson(path) {
  const options = { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(10000) };
  const response = await fetch(path, options);
  if (!response.ok) throw await refusal(response);
  return response.json();
}

// Streams a chat; gives each event's object. Throws Refused for an error within the stream, too.
export async function* chat(messages, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify({ messages, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const value = JSON.parse(data);
    if (value.error) throw new Refused(0, value.error.message);
    yield value;
  }
  throw new Refused(0, "the answer was cut off");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith("data: ")) yield block.slice(6);
    }
  }
}
