// A chart: a card with title, legend that shows the values under the cursor (else the last ones), and a uPlot.

import uPlot from "./vendor/uPlot.esm.js";
import { el, style } from "./dom.js";
import { clock, short, timeLabels } from "./format.js";

const HEIGHT = 170;
const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800];
const WHOLE_STEPS = [1, 2, 5].flatMap((digit) => [...Array(9).keys()].map((power) => digit * 10 ** power)).sort((a, b) => a - b);

export class Chart {
  /**
   * options: title, unit, hint (text under the cursor of the title), x "time" or "step",
   * series [{key, label, color: name of a CSS variable, points: only marks, dash, stepped}], format, floor, ceiling, wide.
   */
  constructor(parent, options) {
    this.options = options;
    this.data = null;
    this.values = options.series.map(() => el("b", {}, ""));
    const legend = options.series.map((series, index) =>
      el("li", {}, el("i", { class: series.points ? "swatch dot" : series.dash ? "swatch dashed" : "swatch", data: { color: series.color } }), el("span", {}, series.label), this.values[index]),
    );
    this.plotPlace = el("div", { class: "plot", role: "img", "aria-label": `${options.title}: no data yet` });
    this.empty = el("p", { class: "empty" }, "no data yet");
    this.at = el("span", { class: "muted small at" });
    this.card = el(
      "article",
      { class: `card chart${options.wide ? " wide" : ""}`, title: "" },
      el("div", { class: "card-head" }, el("h3", { title: options.hint || "" }, options.title, options.unit ? el("span", { class: "unit" }, options.unit) : null), this.at),
      el("ul", { class: "legend" }, ...legend),
      this.plotPlace,
      this.empty,
    );
    this.card.id = `chart-${options.id}`;
    parent.append(this.card);
    this.observer = new ResizeObserver(() => this.fit());
    this.observer.observe(this.plotPlace);
  }

  /** xs, and for each series its values; `why`: what is said where there is nothing to draw. */
  show(xs, columns, why = "no data yet") {
    const drawn = columns.some((column) => column.some((value) => value !== null && value !== undefined));
    const enough = drawn && xs.length > 0;
    this.card.classList.toggle("is-empty", !enough);
    this.empty.textContent = why;
    if (!enough) {
      this.forget();
      return;
    }
    this.data = [xs, ...columns];
    columns.forEach((column, index) => {
      this.values[index].parentElement.hidden = lastKnown(column) === null;
    });
    if (this.plot) this.plot.setData(this.data);
    else this.build();
    this.sayValues(null);
    this.plotPlace.dataset.points = String(xs.length);
    this.plotPlace.setAttribute("aria-label", `${this.options.title}: ${this.options.series.map((series, index) => `${series.label} ${this.format(lastKnown(columns[index]))}`).join(", ")}`);
  }

  forget() {
    this.plot?.destroy();
    this.plot = null;
    this.data = null;
    for (const value of this.values) value.textContent = "";
    delete this.plotPlace.dataset.points;
  }

  format(value) {
    return (this.options.format || short)(value);
  }

  /** Values at an index under the cursor, or the last ones. */
  sayValues(index) {
    if (!this.data) return;
    const [xs, ...columns] = this.data;
    columns.forEach((column, number) => {
      this.values[number].textContent = this.format(index === null ? lastKnown(column) : column[index]);
    });
    if (index === null) this.at.textContent = "";
    else this.at.textContent = this.options.x === "time" ? clock(xs[index]) : `step ${xs[index]}`;
  }

  build() {
    const { options } = this;
    const axis = { stroke: style("--muted"), font: FONT, grid: { stroke: style("--line"), width: 1 }, ticks: { show: false } };
    const time = options.x === "time";
    this.plot = new uPlot(
      {
        width: Math.max(120, this.plotPlace.clientWidth),
        height: HEIGHT,
        padding: [6, 10, 0, 0],
        legend: { show: false },
        cursor: { sync: { key: options.x, setSeries: false }, drag: { x: false, y: false, setScale: false }, points: { size: 6 }, y: false },
        scales: { x: { time: false, range: widened }, y: { range: (_, low, high) => range(low, high, options) } },
        axes: [
          { ...axis, size: 26, gap: 7, space: time ? 72 : 38, incrs: time ? TIME_STEPS : WHOLE_STEPS, grid: { show: false }, values: (_, marks, __, ___, step) => (time ? timeLabels(marks, step) : marks.map(short)) },
          { ...axis, size: (_, labels) => 14 + 6.2 * Math.max(3, ...(labels || []).map((label) => label.length)), gap: 6, space: 32, values: (_, marks) => marks.map((mark) => this.format(mark)) },
        ],
        series: [{}, ...options.series.map((series) => look(series, time))],
        hooks: { setCursor: [(plot) => this.sayValues(plot.cursor.idx ?? null)] },
      },
      this.data,
      this.plotPlace,
    );
  }

  fit() {
    const width = this.plotPlace.clientWidth;
    if (this.plot && width > 0 && Math.abs(width - this.plot.width) > 1) this.plot.setSize({ width, height: HEIGHT });
  }

  /** Draw anew, with the colours of another theme. */
  repaint() {
    if (!this.plot) return;
    this.plot.destroy();
    this.build();
  }
}

function look(series, time) {
  const color = style(`--${series.color}`);
  if (series.points) return { label: series.label, stroke: color, width: 0, paths: () => null, points: { show: true, size: 8, width: 2, stroke: color, fill: style("--card") } };
  return {
    label: series.label,
    stroke: color,
    width: 1.75,
    dash: series.dash,
    spanGaps: Boolean(series.spanGaps) || !time,
    fill: series.fill ? `${color}1f` : undefined,
    paths: series.stepped ? uPlot.paths.stepped({ align: -1 }) : undefined,
    points: { show: (plot) => plot.data[0].length < 3, size: 5, fill: color },
  };
}

/** A single step still has some room around it. */
const widened = (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]);

/** From 0 where nothing is below; a flat line lies in the middle. */
function range(low, high, { floor = 0, ceiling = null, loose = false }) {
  if (low === null || low === undefined) return [0, 1];
  if (ceiling !== null && high <= ceiling) high = ceiling;
  if (!loose) low = Math.min(low, floor);
  const span = high - low || Math.abs(high) || 1;
  return [low < floor || loose ? low - 0.06 * span : low, ceiling !== null && high === ceiling ? high : high + 0.08 * span];
}

function lastKnown(column) {
  for (let index = column.length - 1; index >= 0; index -= 1) if (column[index] !== null && column[index] !== undefined) return column[index];
  return null;
}
