// The last minutes as lines and stacked areas, drawn anew with each sample.

import { element, setText, svg } from "./dom.js";
import { count, rate, seconds, shortSeconds } from "./format.js";

const HEIGHT = 132;
const EDGE = { top: 8, right: 2, bottom: 18, left: 46 };
// Prompts are counted when their request ends, so single seconds would be needles.
const SMOOTH = 8;
// A router that was just started has less than the last minutes to show.
const SHORTEST_S = 60;

const CHARTS = [
  {
    title: "Tokens written a second",
    unit: rate,
    tick: count,
    least: 10,
    series: [{ name: "written", tone: "decode", fill: true, value: (s) => s.generated, mean: 3 }],
  },
  {
    title: "Prompt tokens a second, by where they came from",
    unit: rate,
    tick: count,
    least: 10,
    stacked: true,
    series: [
      { name: "computed", tone: "prefill", value: (s) => s.computed, mean: SMOOTH },
      { name: "device", tone: "device", value: (s) => s.device, mean: SMOOTH },
      { name: "host", tone: "host", value: (s) => s.host, mean: SMOOTH },
      { name: "Redis", tone: "redis", value: (s) => s.redis, mean: SMOOTH },
    ],
  },
  {
    title: "Time to first token",
    unit: seconds,
    tick: shortSeconds,
    least: 0.05,
    series: [
      { name: "half within", tone: "prefill", value: (s) => s.first_token.p50 },
      { name: "95 % within", tone: "prefill faint", value: (s) => s.first_token.p95 },
    ],
  },
  {
    title: "Between tokens",
    unit: seconds,
    tick: shortSeconds,
    least: 0.02,
    series: [
      { name: "half within", tone: "decode", value: (s) => s.inter_token.p50 },
      { name: "95 % within", tone: "decode faint", value: (s) => s.inter_token.p95 },
    ],
  },
];

function smoothed(samples, series) {
  const values = samples.map(series.value);
  if (!series.mean) return values;
  let sum = 0;
  return values.map((value, at) => {
    sum += value;
    if (at >= series.mean) sum -= values[at - series.mean];
    return Math.max(0, sum / Math.min(at + 1, series.mean));
  });
}

// A round number, so is its half; at least `value`.
function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 3, 4, 6, 8, 10].find((step) => step * power >= value * 0.999);
}

// Pieces of a line: where nothing was measured, nothing is drawn.
function runs(points) {
  const found = [[]];
  for (const point of points) {
    if (point === null) found.push([]);
    else found.at(-1).push(point);
  }
  return found.filter((run) => run.length > 0);
}

function path(points) {
  return points.map(([x, y], at) => `${at ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

class Chart {
  constructor(chart) {
    this.chart = chart;
    this.last = null;
    this.values = chart.series.map(() => element("b"));
    const legend = chart.series.map((series, at) =>
      element("li", {}, element("i", { class: `swatch ${series.tone}` }), `${series.name} `, this.values[at]),
    );
    this.when = element("span", { class: "quiet" });
    this.plot = svg("svg", { role: "img", height: HEIGHT });
    this.node = element(
      "figure",
      { class: "panel chart" },
      element("figcaption", {}, element("h3", {}, chart.title), this.when),
      this.plot,
      element("ul", { class: "legend" }, legend),
    );
    this.pointer = null;
    this.plot.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.plot.addEventListener("pointerleave", () => this.point(null));
  }

  point(x) {
    this.pointer = x;
    if (this.last !== null) this.show(...this.last);
  }

  show(samples, now) {
    this.last = [samples, now];
    const width = Math.max(120, this.plot.clientWidth);
    const end = samples.at(-1)?.at ?? 0;
    const span = Math.min(now.history_s, Math.max(SHORTEST_S, end - (samples[0]?.at ?? end)));
    const inner = { width: width - EDGE.left - EDGE.right, height: HEIGHT - EDGE.top - EDGE.bottom };
    const x = (at) => EDGE.left + inner.width * (1 - (end - at) / span);
    const tables = this.chart.series.map((series) => smoothed(samples, series));
    const tops = this.chart.stacked ? stack(tables) : tables;
    const most = Math.max(this.chart.least, ...tops.flat().filter((value) => value !== null));
    const top = niceTop(most);
    const y = (value) => EDGE.top + inner.height * (1 - value / top);
    const drawn = [this.grid(width, y, top, span), this.curves(samples, tables, tops, x, y)];
    const chosen = this.chosen(samples, x);
    if (this.pointer !== null && samples.length) {
      const at = x(samples[chosen].at);
      drawn.push(svg("line", { class: "hair", x1: at, x2: at, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }));
    }
    this.plot.replaceChildren(...drawn.flat());
    this.tell(tables, chosen, samples, end);
  }

  chosen(samples, x) {
    if (this.pointer === null) return samples.length - 1;
    const far = (sample) => Math.abs(x(sample.at) - this.pointer);
    let best = samples.length - 1;
    samples.forEach((sample, at) => {
      if (far(sample) < far(samples[best])) best = at;
    });
    return best;
  }

  grid(width, y, top, span) {
    const lines = [0, 0.5, 1].map((share) => [
      svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(share * top), y2: y(share * top) }),
      svg("text", { class: "tick", x: EDGE.left - 6, y: y(share * top) + 4, "text-anchor": "end" },
        share ? this.chart.tick(share * top) : "0"),
    ]);
    const past = span < 100 ? `${Math.round(span)} s` : `${Number((span / 60).toFixed(1))} min`;
    const base = HEIGHT - 3;
    return [
      ...lines.flat(),
      svg("text", { class: "tick", x: EDGE.left, y: base }, `−${past}`),
      svg("text", { class: "tick", x: width - EDGE.right, y: base, "text-anchor": "end" }, "now"),
    ];
  }

  // A stacked series lies between the sum of those before it and its own; one of nothing is left out.
  curves(samples, tables, tops, x, y) {
    const place = (values) => values.map((value, at) => (value === null ? null : [x(samples[at].at), y(value)]));
    const drawn = this.chart.series.map((series, at) => {
      if (this.chart.stacked && !tables[at].some((value) => value > 0)) return [];
      if (this.chart.stacked && samples.length) {
        const upper = place(tops[at]);
        const lower = place(at ? tops[at - 1] : tops[0].map(() => 0));
        const band = `${path(upper)}${path(lower.reverse()).replace("M", "L")}Z`;
        return [svg("path", { class: `area band ${series.tone}`, d: band })];
      }
      return runs(place(tops[at])).map((run) => {
        const area = `${path(run)}L${run.at(-1)[0]} ${y(0)}L${run[0][0]} ${y(0)}Z`;
        return [
          series.fill ? svg("path", { class: `area ${series.tone}`, d: area }) : null,
          svg("path", { class: `line ${series.tone}`, d: path(run) }),
        ];
      });
    });
    return drawn.flat(2).filter((node) => node !== null);
  }

  tell(tables, chosen, samples, end) {
    const words = tables.map((table, at) => {
      const text = chosen < 0 ? "–" : this.chart.unit(table[chosen]);
      setText(this.values[at], text);
      return `${this.chart.series[at].name} ${text}`;
    });
    const past = chosen < 0 ? 0 : end - samples[chosen].at;
    setText(this.when, past >= 1 ? `${count(past)} s ago` : "");
    this.plot.setAttribute("aria-label", `${this.chart.title}, now: ${words.join(", ")}`);
  }
}

// Each series on top of the ones before it.
function stack(tables) {
  const sums = tables[0].map(() => 0);
  return tables.map((table) =>
    table.map((value, at) => {
      sums[at] += value;
      return sums[at];
    }),
  );
}

export function startCharts() {
  const charts = CHARTS.map((chart) => new Chart(chart));
  document.querySelector(".charts").append(...charts.map((chart) => chart.node));
  return {
    show(samples, now) {
      for (const chart of charts) chart.show(samples, now);
    },
  };
}
