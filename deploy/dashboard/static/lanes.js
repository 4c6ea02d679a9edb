// One lane for the learner and one for each actor: what it did when, drawn on a canvas, told in a table as well.
// Every state has a colour and a height of its own, so that it can be read without colours.

import { byId, el, hideTip, showTip, style } from "./dom.js";
import { clock, duration, percent, timeLabels } from "./format.js";

const STATES = {
  generating: { color: "rollout", height: 1 },
  training: { color: "learner", height: 1 },
  updating: { color: "weights", height: 1 },
  publishing: { color: "weights", height: 1 },
  evaluating: { color: "eval", height: 0.8 },
  saving: { color: "saving", height: 0.8 },
  waiting: { color: "idle", height: 0.3 },
  starting: { color: "starting", height: 0.5 },
  draining: { color: "draining", height: 0.6 },
  other: { color: "other", height: 0.5 },
  gone: { color: "gone", height: 0.08 },
  finished: { color: "gone", height: 0.08 },
};
const WORDS = { updating: "updating weights", publishing: "publishing weights", gone: "dead or gone" };
const AXIS = 22;
const FIRST = 22; // height of the learner's lane

export class LanesView {
  constructor() {
    this.canvas = el("canvas", { role: "img", "aria-label": "What the learner and each actor did over time" });
    this.empty = el("p", { class: "empty" }, "no data yet");
    byId("lanes").append(this.canvas, this.empty);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", hideTip);
    new ResizeObserver(() => this.draw()).observe(byId("lanes"));
    this.found = null;
  }

  show(found, why) {
    const any = found.lanes.some((lane) => lane.segments.length);
    this.empty.textContent = why;
    byId("lanes-card").classList.toggle("is-empty", !any);
    this.found = any ? found : null;
    if (!any) return;
    this.canvas.dataset.lanes = String(found.lanes.length);
    this.legend();
    this.table();
    this.draw();
  }

  names() {
    return this.found.states.filter((_, number) => this.found.lanes.some((lane) => lane.segments.some((segment) => segment[2] === number)));
  }

  legend() {
    const key = this.names().join();
    if (key === this.legendKey) return;
    this.legendKey = key;
    byId("lanes-legend").replaceChildren(
      ...this.names().map((name) => {
        const swatch = el("i", { class: "swatch lane-swatch", data: { color: STATES[name].color } });
        swatch.style.height = `${Math.max(2, 11 * STATES[name].height)}px`;
        return el("li", {}, swatch, el("span", {}, WORDS[name] || name));
      }),
    );
  }

  /** What the canvas shows, for those who cannot see it. */
  table() {
    if (!byId("shares").parentElement.open && this.told) return;
    this.told = true;
    const names = this.names();
    const rows = this.found.lanes.map((lane) => {
      const spent = names.map((name) => lane.segments.reduce((sum, [from, to, state]) => sum + (this.found.states[state] === name ? to - from : 0), 0));
      const whole = spent.reduce((sum, value) => sum + value, 0);
      return el("tr", {}, el("th", { scope: "row" }, lane.name), ...spent.map((value) => el("td", {}, whole ? percent(value / whole) : "–")));
    });
    const head = el("tr", {}, el("th", { scope: "col" }, "who"), ...names.map((name) => el("th", { scope: "col" }, name)));
    byId("shares").replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
  }

  get row() {
    const count = this.found.lanes.length;
    return count <= 9 ? 24 : count <= 20 ? 16 : count <= 40 ? 10 : 7;
  }

  /** Where a lane begins: the learner's stands a little apart. */
  top(number) {
    return number ? FIRST + 4 + (number - 1) * this.row : 0;
  }

  get gutter() {
    return Math.min(110, 12 + 6.6 * Math.max(...this.found.lanes.map((lane) => lane.name.length)));
  }

  draw() {
    const width = byId("lanes").clientWidth;
    if (!this.found || width <= 0) return;
    const { lanes, since, until } = this.found;
    const height = this.top(lanes.length) + AXIS;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = '11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
    pen.textBaseline = "middle";
    const left = this.gutter;
    this.scale = (width - left - 10) / Math.max(until - since, 1);
    this.axis(pen, left, width, this.top(lanes.length));
    const colors = this.found.states.map((name) => style(`--${STATES[name].color}`));
    const every = Math.ceil(13 / this.row);
    lanes.forEach((lane, number) => {
      const row = number ? this.row : FIRST;
      const middle = this.top(number) + row / 2;
      if (number === 0 || (number - 1) % every === 0) {
        pen.fillStyle = style(number ? "--muted" : "--text");
        pen.fillText(lane.name, 0, middle, left - 8);
      }
      const full = row - (row > 12 ? 6 : 2);
      for (const [from, to, state] of lane.segments) {
        const bar = Math.max(1, full * STATES[this.found.states[state]].height);
        pen.fillStyle = colors[state];
        pen.fillRect(left + from * this.scale, middle - bar / 2, Math.max(0.75, (to - from) * this.scale), bar);
      }
    });
  }

  axis(pen, left, width, bottom) {
    const { since, until } = this.found;
    const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800];
    const most = Math.max(2, Math.floor((width - left) / 80));
    const step = steps.find((found) => (until - since) / found <= most) || steps.at(-1);
    const offset = new Date(since * 1000).getTimezoneOffset() * 60;
    const marks = [];
    for (let mark = Math.ceil((since - offset) / step) * step + offset; mark <= until; mark += step) marks.push(mark);
    pen.strokeStyle = style("--line");
    pen.fillStyle = style("--muted");
    pen.textAlign = "center";
    timeLabels(marks, step).forEach((label, number) => {
      const x = Math.round(left + (marks[number] - since) * this.scale) + 0.5;
      pen.beginPath();
      pen.moveTo(x, 0);
      pen.lineTo(x, bottom);
      pen.stroke();
      const half = pen.measureText(label).width / 2;
      if (x - half >= left - 10 && x + half <= width) pen.fillText(label, x, bottom + 12);
    });
    pen.textAlign = "left";
  }

  point(event) {
    if (!this.found || !this.scale) return;
    const box = this.canvas.getBoundingClientRect();
    const lane = this.found.lanes.findLast((_, number) => this.top(number) <= event.clientY - box.top);
    const at = (event.clientX - box.left - this.gutter) / this.scale;
    const segment = lane?.segments.find(([from, to]) => from <= at && at < to);
    if (!segment) {
      hideTip();
      return;
    }
    const name = this.found.states[segment[2]];
    const from = this.found.since + segment[0];
    showTip([`${lane.name}: ${WORDS[name] || name}`, `${clock(from)}, for ${duration(segment[1] - segment[0])}`], event.clientX, event.clientY);
  }
}
