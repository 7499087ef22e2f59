// A chat with the model, and below each answer the path that it took.
//
//   idle -> answering -> idle        Send asks, Stop ends the answer

import { Refused, chat } from "./api.js";
import { byId, element, setText } from "./dom.js";
import { bytes, count, plural, seconds, skipped } from "./format.js";

const EXAMPLES = ["Why is the sky blue?", "Write a haiku about two workers.", "Explain a cache to a child."];

function step(kind, name, more) {
  return element("span", { class: `step ${kind}` }, element("b", {}, name), element("small", {}, more));
}

function hop(text, moved) {
  return element("span", { class: moved ? "hop moved" : "hop" }, element("small", {}, text));
}

// Workers and what moved between them, then where the prompt's tokens came from.
export function answerPath(usage) {
  const made = usage.pdserve;
  const read = plural(usage.prompt_tokens, "token");
  const written = plural(usage.completion_tokens, "token");
  const steps = made.prefill_worker
    ? [
        step("prefill", made.prefill_worker, `${read} read`),
        made.kv_transport
          ? hop(`${bytes(made.kv_bytes_transferred)} by ${made.kv_transport}`, true)
          : hop(skipped(made.kv_skipped_reason), false),
        step("decode", made.decode_worker, `${written} written`),
      ]
    : [
        step("decode", made.decode_worker, `${read} read, ${written} written`),
        hop(skipped(made.kv_skipped_reason), false),
      ];
  return element("div", { class: "answer-path" }, element("div", { class: "steps" }, steps), sources(usage));
}

function sources(usage) {
  const cached = usage.pdserve.cached_tokens;
  const found = ["device", "host", "redis"].map((tier) => [tier, cached[tier]]);
  const computed = usage.prompt_tokens - found.reduce((sum, [, tokens]) => sum + tokens, 0);
  const parts = [["computed", computed], ...found].filter(([, tokens]) => tokens > 0);
  const bar = element("div", { class: "bar", "aria-hidden": "true" });
  for (const [kind, tokens] of parts) {
    const part = element("i", { class: kind });
    part.style.width = `${(100 * tokens) / usage.prompt_tokens}%`;
    bar.append(part);
  }
  const words = parts.map(([kind, tokens]) => (kind === "computed" ? `${count(tokens)} computed` : `${count(tokens)} from ${kind}`));
  return element("div", { class: "sources" }, bar, element("small", { class: "quiet" }, `Prompt: ${words.join(", ")}`));
}

export function startChat(openTimeline, askForKey) {
  const log = byId("chat-log");
  const input = byId("chat-input");
  const send = byId("chat-send");
  let messages = [];
  let running = null; // the controller of the answer that is being written

  function examples() {
    const buttons = EXAMPLES.map((text) =>
      element("button", { type: "button", class: "example", onclick: () => ask(text) }, text),
    );
    log.replaceChildren(element("div", { class: "examples" }, element("p", { class: "quiet" }, "Each answer shows the way it took through the cluster."), buttons));
  }

  function follow() {
    log.scrollTop = log.scrollHeight;
  }

  function add(role, text) {
    log.querySelector(".examples")?.remove();
    const words = element("div", { class: "words" }, text);
    const message = element("article", { class: `message ${role}` }, element("h3", { class: "unseen" }, role === "user" ? "You" : "Model"), words);
    log.append(message);
    follow();
    return { message, words };
  }

  async function stream(answer, controller) {
    const started = performance.now();
    let text = "";
    let first = null;
    let id = "";
    for await (const chunk of chat(messages, controller.signal)) {
      id = chunk.id.replace(/^chatcmpl-/, "");
      const part = chunk.choices[0]?.delta?.content ?? "";
      if (part && first === null) first = performance.now() - started;
      text += part;
      if (part) setText(answer.words, text);
      if (chunk.usage) finish(answer, chunk.usage, id, first, performance.now() - started);
      follow();
    }
    return text;
  }

  function finish(answer, usage, id, first, whole) {
    const times = first === null ? seconds(whole / 1000) : `first token after ${seconds(first / 1000)}, all after ${seconds(whole / 1000)}`;
    const open = element("button", { type: "button", class: "plain", onclick: () => openTimeline(id) }, "Timeline");
    answer.message.append(answerPath(usage), element("div", { class: "answer-foot" }, element("small", { class: "quiet" }, times), open));
  }

  function fail(answer, error, question) {
    const stopped = error.name === "AbortError";
    answer.message.append(element("p", { class: stopped ? "quiet" : "error" }, stopped ? "Stopped." : error.message));
    if (error instanceof Refused && error.status === 401) {
      askForKey(error.message);
      input.value = question;
    }
  }

  async function ask(question) {
    if (running !== null) return;
    const controller = new AbortController();
    running = controller;
    setText(send, "Stop");
    messages.push({ role: "user", content: question });
    add("user", question);
    const answer = add("assistant", "");
    answer.message.setAttribute("aria-busy", "true");
    try {
      const text = await stream(answer, controller);
      messages.push({ role: "assistant", content: text });
    } catch (error) {
      fail(answer, error, question);
      messages.pop(); // an unanswered question would make the next one hard to read
    } finally {
      answer.message.removeAttribute("aria-busy");
      if (running === controller) running = null;
      setText(send, "Send");
      follow();
    }
  }

  byId("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running !== null) {
      running.abort();
      return;
    }
    const question = input.value.trim();
    if (question === "") return;
    input.value = "";
    ask(question);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (running === null) byId("chat-form").requestSubmit();
  });
  byId("chat-new").addEventListener("click", () => {
    running?.abort();
    messages = [];
    examples();
    input.focus();
  });
  examples();
}
