// The first view: where the run stands, both sides over time, who does what, actors, events, learning.

import { get } from "./api.js";
import { Chart } from "./charts.js";
import { byId, el, say } from "./dom.js";
import { NONE, bytes, clock, day, duration, percent, plural, seconds, short } from "./format.js";
import { LanesView } from "./lanes.js";
import { Scale } from "./scale.js";

const WINDOWS = [["5 min", -300], ["30 min", -1800], ["3 h", -10800], ["all", 0]];
const POINTS = 240;
const OF_ACTORS = ["rollout_tokens_per_s", "actors_memory"];
const LANE_MS = 100;
const MOST_STEPS = 300; // more are drawn as means of several

const TIME_CHARTS = [
  { id: "throughput", title: "Throughput", unit: "tokens/s", wide: true, series: [{ key: "rollout_tokens_per_s", label: "rollout", color: "rollout" }, { key: "learner_tokens_per_s", label: "learner", color: "learner" }], hint: "Tokens that the actors draw, and tokens that go through forward and backward. A step's tokens are spread over the time since the step before." },
  { id: "busy", title: "Who waits", format: percent, ceiling: 1, series: [{ key: "waiting_share", label: "learner waits", color: "learner" }, { key: "busy_share", label: "actors busy", color: "rollout", spanGaps: true }], hint: "Share of the learner's time spent waiting for groups; share of the actors' time with requests in the engine." },
];
const SYNC_CHARTS = [
  { id: "queue", title: "Queue", unit: "tickets", series: [{ key: "leased", label: "leased", color: "rollout" }, { key: "queued", label: "queued", color: "learner" }, { key: "backlog", label: "backlog", color: "other-line", dash: [4, 3] }], hint: "Leased: in the actors' hands. Queued: groups that wait to be trained on. Backlog: tickets that no actor has room for." },
  { id: "traffic", title: "Weight traffic", unit: "per second", format: bytes, series: [{ key: "weights_bytes_per_s", label: "sent", color: "weights", fill: true }], hint: "Bytes of weights given to the sockets." },
  { id: "pauses", title: "Weight sync of actors", format: seconds, series: [{ key: "fetch_s", label: "fetch", color: "rollout" }, { key: "pause_s", label: "pause", color: "weights" }], hint: "Of the last update, mean over actors: fetch, check and staging; how long generation stood still." },
  { id: "memory", title: "Memory", format: bytes, series: [{ key: "memory", label: "learner", color: "learner" }, { key: "actors_memory", label: "actors", color: "rollout" }], hint: "Resident memory of the learner's first process, and of all actors' processes." },
];
const STEP_CHARTS = [
  { id: "reward", title: "Reward", loose: true, series: [{ key: "reward_mean", label: "batch", color: "learner" }, { key: "evaluation", label: "evaluation", color: "eval", points: true }], hint: "Mean reward of each step's batch, and of the held-out problems." },
  { id: "loss", title: "Loss", loose: true, only: ["sft", "dpo", "expert_iteration"], series: [{ key: "loss", label: "loss", color: "learner" }, { key: "nll", label: "nats a token", color: "eval", dash: [4, 3] }] },
  { id: "preference", title: "Preference", series: [{ key: "dpo_accuracy", label: "preferred", color: "learner" }, { key: "dpo_margin", label: "margin", color: "eval" }] },
  { id: "entropy", title: "Entropy", unit: "nats a token", series: [{ key: "entropy", label: "entropy", color: "rollout" }], hint: "Of the policy, over trained tokens." },
  { id: "kl", title: "KL and mismatch", unit: "nats a token", series: [{ key: "kl_k3", label: "KL to engine", color: "learner" }, { key: "engine_gap", label: "mismatch", color: "weights" }, { key: "kl_reference", label: "KL to reference", color: "eval", dash: [4, 3], optional: true }], hint: "KL (k3) of the learner to what drew the tokens; mean absolute difference of both sides' logprobs." },
  { id: "clip", title: "Clipped tokens", format: percent, series: [{ key: "clipped_share", label: "ratio clipped", color: "learner" }, { key: "importance_truncated_share", label: "weight truncated", color: "weights", optional: true }] },
  { id: "length", title: "Completion length", unit: "tokens", series: [{ key: "completion_tokens_mean", label: "mean", color: "rollout" }] },
  { id: "groups", title: "Completions and groups", format: percent, series: [{ key: "truncated_completions_share", label: "truncated", color: "rollout" }, { key: "zero_variance_share", label: "zero variance", color: "weights" }], hint: "Completions that ended at the limit of tokens; groups whose rewards are all the same, which teach nothing." },
  { id: "lag", place: "sync-charts", title: "Lag", unit: "steps", series: [{ key: "lag_mean", label: "mean", color: "rollout" }, { key: "lag_max", label: "largest", color: "other-line", dash: [4, 3], stepped: true }], hint: "Steps between the weights that drew a token and the update that it is trained in." },
  { id: "gradient", title: "Gradient norm", series: [{ key: "grad_norm", label: "before clipping", color: "learner" }] },
  { id: "lr", title: "Learning rate", series: [{ key: "lr", label: "lr", color: "other-line" }] },
  { id: "step", place: "sync-charts", title: "Time of a step", format: seconds, series: [{ key: "train_s", label: "training", color: "learner" }, { key: "wait_s", label: "waiting", color: "other-line", dash: [4, 3] }, { key: "publish_s", label: "publishing", color: "weights", optional: true }] },
];
const SIDES = { rollout: "rollout", learner: "learner", weights: "weights", lag: "lag", balanced: "balanced", unknown: "advice" };

export class Overview {
  constructor() {
    this.window = WINDOWS[1][1];
    this.have = { timeline: 0, lanes: 0 };
    this.steps = { generation: -1, step: [], columns: {} };
    this.timeline = null;
    this.lanes = new LanesView();
    this.scale = new Scale();
    this.charts = [...make("time-charts", TIME_CHARTS, "time"), ...make("sync-charts", SYNC_CHARTS, "time"), ...make("step-charts", STEP_CHARTS, "step")];
    byId("windows").append(
      ...WINDOWS.map(([name, since]) => el("button", { type: "button", "aria-pressed": String(since === this.window), onclick: (event) => this.look(since, event.currentTarget) }, name)),
    );
  }

  /** Show another stretch of time. */
  look(since, button) {
    this.window = since;
    for (const other of byId("windows").children) other.setAttribute("aria-pressed", String(other === button));
    this.have = { timeline: 0, lanes: 0 };
    if (this.run) this.overTime(this.run, this.now).catch(() => {});
  }

  async update(run, now) {
    [this.run, this.now] = [run, now];
    document.body.classList.toggle("no-rollouts", !run.draws);
    await Promise.all([this.overTime(run, now), this.bySteps(run, now)]);
    this.tiles(run, now);
    this.actors(run, now);
    this.events(now.events);
    this.scale.show(now);
  }

  header(run, now) {
    const { status } = now;
    say("run-name", run.name);
    say("method", run.method.replaceAll("_", " "));
    say("model", run.model.split("/").filter(Boolean).slice(-1)[0] || "");
    byId("model").title = run.model;
    const step = status.step ?? this.steps.step.at(-1) ?? 0;
    const steps = status.steps || run.steps;
    byId("steps-bar").max = Math.max(steps, 1);
    byId("steps-bar").value = step;
    say("steps-text", steps ? `step ${step} of ${steps}` : "");
    say("phase", phaseOf(now));
    say("left", now.alive && status.left_s > 0 ? `about ${duration(status.left_s)} left` : endOf(now));
    const waited = status.waiting_for && (status.phase !== "training" || status.waited_s > 5);
    say("waiting", now.alive && waited ? `waiting ${duration(status.waited_s)} for ${status.waiting_for}` : "");
    say("error", status.error ? `${status.error}` : "");
    say("guard", status.guard ? `guard: ${status.guard}` : "");
    byId("advice").hidden = !now.advice;
    if (now.advice) {
      say("advice-side", now.alive ? SIDES[now.advice.side] || now.advice.side : "last advice");
      byId("advice-side").dataset.side = now.advice.side;
      say("advice-text", now.advice.text);
    }
  }

  tiles(run, now) {
    const series = this.timeline?.series;
    const last = (key) => series?.[key]?.findLast((value) => value !== null) ?? null;
    const figure = (key) => this.steps.columns[key]?.findLast((value) => value !== null) ?? null;
    const first = (key) => this.steps.columns[key]?.find((value) => value !== null) ?? null;
    const { summary } = now;
    const live = now.alive || !summary; // without a summary the last figures are all there is
    const wanted = now.wish?.actors;
    const serving = now.actors.filter((actor) => ["generating", "updating", "waiting"].includes(actor.state)).length;
    const tiles = [];
    if (run.draws) tiles.push(["rollout", "Rollout", short(live ? last("rollout_tokens_per_s") : summary.rollout_tokens_per_s), "tokens/s", live ? `actors busy ${percent(mean(series?.busy_share))}` : "while generating"]);
    tiles.push(["learner", "Learner", short(live ? last("learner_tokens_per_s") ?? figure("learner_tokens_per_s") : summary.learner_tokens_per_s), "tokens/s", live && run.draws ? `waits ${percent(mean(series?.waiting_share))}` : "while training"]);
    if (run.draws) tiles.push(["reward", "Reward", short(figure("reward_mean")), "", first("reward_mean") === null ? "after the first step" : `first step ${short(first("reward_mean"))}`]);
    else tiles.push(["loss", "Loss", short(figure("loss")), "", first("loss") === null ? "after the first step" : `first step ${short(first("loss"))}`]);
    const evaluation = this.steps.evaluations?.at(-1);
    tiles.push(["evaluation", "Held-out", short(evaluation?.reward), evaluation?.ci95 ? `± ${short(evaluation.ci95)}` : "", evaluation ? evaluation.name.replace(/^step-0*/, "step ") : "no evaluation yet"]);
    if (run.draws) {
      tiles.push(["lag", "Lag", short(figure("lag_mean")), "steps", `largest ${short(figure("lag_max"))}, allowed ${run.recipe["rollout.max_lag"] ?? NONE}`]);
      tiles.push(["actors-tile", "Actors", live ? `${serving}` : short(summary.actors?.max), now.alive && wanted !== undefined && wanted !== serving ? `of ${wanted}` : "", plural((live ? now.restarted : summary.actors?.restarted) ?? 0, "restart")]);
      tiles.push(["version", "Weights", now.version ? `v${now.version}` : NONE, "", now.tickets.trained === undefined ? "" : `${short(now.tickets.trained)} groups trained`]);
    }
    byId("tiles").replaceChildren(
      ...tiles.map(([id, label, value, unit, note]) =>
        el("div", { class: "tile", id: `tile-${id}` }, el("span", { class: "label" }, label), el("span", { class: "value" }, value, unit ? el("small", {}, ` ${unit}`) : null), el("span", { class: "note" }, note)),
      ),
    );
  }

  async overTime(run, now) {
    const [timeline, lanes] = await Promise.all([
      get("api/timeline", { since: this.window, points: POINTS, have: this.have.timeline }),
      this.lanesDue() ? get("api/lanes", { since: this.window, cells: POINTS, have: this.have.lanes }) : { unchanged: true },
    ]);
    const why = whyNothing(run, now);
    if (!timeline.unchanged) {
      this.timeline = timeline;
      this.have.timeline = timeline.last ?? 0;
      for (const chart of this.charts.filter(({ options }) => options.x === "time")) {
        chart.card.hidden = !run.draws && chart.options.id !== "throughput" && chart.options.id !== "memory";
        chart.show(timeline.t, chart.options.series.map(({ key }) => (!run.draws && OF_ACTORS.includes(key) ? timeline.t.map(() => null) : timeline.series[key] || [])), why);
      }
    }
    if (!lanes.unchanged) {
      [this.have.lanes, this.lanesAt] = [lanes.until ?? 0, performance.now()];
      this.lanes.show(lanes, why);
    }
  }

  /** Many lanes are looked at less often: they are most of what a round costs the server. */
  lanesDue() {
    return !this.have.lanes || performance.now() - this.lanesAt > LANE_MS * (this.lanes.found?.lanes.length ?? 0);
  }

  async bySteps(run, now) {
    const { step } = this.steps;
    const found = await get("api/steps", { since: step.length ? step.at(-1) : 0 });
    if (this.steps.generation !== -1 && found.generation !== this.steps.generation) {
      this.steps = { generation: -1, step: [], columns: {} }; // a rollback or an amended row
      return this.bySteps(run, now);
    }
    const evaluated = JSON.stringify(found.evaluations) !== JSON.stringify(this.steps.evaluations);
    const first = this.steps.generation === -1;
    this.steps = joined(this.steps, found);
    if (found.step.length || evaluated || first) this.drawSteps(run, now);
  }

  drawSteps(run, now) {
    const { step, columns, evaluations } = this.steps;
    const why = now.alive ? "after the first step" : "no steps were made";
    for (const chart of this.charts.filter(({ options }) => options.x === "step")) {
      const { series, only, id } = chart.options;
      const has = series.some(({ key, optional }) => !optional && columns[key]?.some((value) => value !== null));
      chart.card.hidden = (only && !only.includes(run.method)) || (step.length > 0 && !has && !(id === "reward" && evaluations.length)) || (id === "preference" && !has);
      if (id === "reward") {
        const [xs, rewards, evals] = withEvaluations(step, columns.reward_mean || step.map(() => null), evaluations);
        chart.show(...binned(xs, [rewards, evals]), why);
      } else chart.show(...binned(step, series.map(({ key }) => columns[key] || step.map(() => null))), why);
    }
  }

  actors(run, now) {
    byId("actors-card").hidden = !run.draws;
    const columns = [
      ["actor", "name", (row) => row.name],
      ["state", "doing", (row) => el("span", { class: "state", data: { state: row.state } }, row.state === "updating" ? "updating weights" : row.state)],
      ["version", "right", (row) => short(row.version)],
      ["tokens/s", "right", (row) => short(row.tokens_per_s)],
      ["held", "right", (row) => short(row.held), "Tickets in hand"],
      ["running", "right roomy", (row) => (row.room ? `${row.running} / ${row.room}` : NONE), "Completions in the engine, of those that fit"],
      ["pause", "right roomy", (row) => seconds(row.pause_s), "Pause of generation at the last update"],
      ["memory", "right roomy", (row) => bytes(row.memory)],
    ];
    if (!now.actors.length) {
      byId("actors").replaceChildren(el("p", { class: "empty" }, now.alive ? "no actor is connected" : "no actor is left"));
      return;
    }
    const head = el("tr", {}, ...columns.map(([name, kind, , hint]) => el("th", { scope: "col", class: kind, title: hint || "" }, name)));
    const rows = now.actors.map((row) =>
      el("tr", { title: [row.node, row.why].filter(Boolean).join(": "), data: { actor: row.name } }, ...columns.map(([, kind, show]) => el("td", { class: kind }, show(row)))),
    );
    byId("actors").replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
  }

  events(events) {
    const key = events.length ? `${events[0].t}/${events.length}` : "none";
    if (key === this.eventsKey) return;
    this.eventsKey = key;
    const today = day(Date.now() / 1000);
    byId("events").replaceChildren(
      ...events.map((event) =>
        el("li", {}, el("time", { title: `${day(event.t)} ${clock(event.t)}` }, day(event.t) === today ? clock(event.t) : day(event.t).slice(5)), el("span", { class: "kind", data: { kind: event.kind } }, event.kind), el("span", { class: "what" }, event.text)),
      ),
      ...(events.length ? [] : [el("li", { class: "empty" }, "nothing out of the ordinary yet")]),
    );
  }

  repaint() {
    for (const chart of this.charts) chart.repaint();
    this.lanes.draw();
  }
}

const make = (place, list, x) => list.map((options) => new Chart(byId(options.place || place), { ...options, x }));

const mean = (values) => {
  const found = (values || []).slice(-20).filter((value) => value !== null);
  return found.length ? found.reduce((sum, value) => sum + value, 0) / found.length : null;
};

const phaseOf = ({ alive, status }) => (alive ? status.doing || status.phase || "starting" : status.end);

/** When; after how long only of a run that went to its end: else the summary is of the last checkpoint. */
function endOf({ alive, status, summary }) {
  if (alive || !status.written_at) return "";
  const when = `${day(status.written_at)} ${clock(status.written_at, false)}`;
  return summary && status.phase === "finished" ? `${when}, after ${duration(summary.wall_s)}` : when;
}

function whyNothing(run, now) {
  if (now.sampled !== null) return run.draws ? "nothing in this stretch of time" : `method ${run.method} draws no rollouts`;
  return now.alive ? "waiting for the first sample: one a second" : "no timeline here: the run is of an older version of Tandem, or never began";
}

/** Rows that came behind those that are there. */
function joined(before, found) {
  const step = [...before.step, ...found.step];
  const columns = {};
  for (const key of new Set([...Object.keys(before.columns), ...Object.keys(found.columns)])) {
    columns[key] = [...(before.columns[key] || before.step.map(() => null)), ...(found.columns[key] || found.step.map(() => null))];
  }
  return { generation: found.generation, step, columns, evaluations: found.evaluations };
}

/** Means of neighbouring steps, where there are more than can be told apart. */
function binned(xs, columns) {
  const wide = Math.ceil(xs.length / MOST_STEPS);
  if (wide <= 1) return [xs, columns];
  const starts = [...Array(Math.ceil(xs.length / wide)).keys()].map((bin) => bin * wide);
  const meanOf = (column, start) => {
    const found = column.slice(start, start + wide).filter((value) => value !== null);
    return found.length ? found.reduce((sum, value) => sum + value, 0) / found.length : null;
  };
  return [starts.map((start) => xs[Math.min(start + wide, xs.length) - 1]), columns.map((column) => starts.map((start) => meanOf(column, start)))];
}

/** The rewards of steps and of evaluations on one axis. */
function withEvaluations(step, rewards, evaluations) {
  const bySteps = new Map(step.map((number, index) => [number, rewards[index]]));
  const byEvaluation = new Map(evaluations.map((found) => [found.step, found.reward]));
  const xs = [...new Set([...bySteps.keys(), ...byEvaluation.keys()])].sort((a, b) => a - b);
  return [xs, xs.map((x) => bySteps.get(x) ?? null), xs.map((x) => byEvaluation.get(x) ?? null)];
}
