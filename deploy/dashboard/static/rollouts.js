// The browser of rollouts: a step, its groups, and one group with its completions side by side, token by token.

import { get } from "./api.js";
import { byId, el, hideTip, showTip } from "./dom.js";
import { NONE, plural, short } from "./format.js";

const STEPS_ASKED_MS = 1000;
const SHOWN_TOKENS = 1500;
const STRONGEST = Math.log(4); // a ratio of 4, or of a quarter, has the full colour
const MODES = [["ratio", "logprob ratio"], ["version", "weight version"], ["none", "plain"]];
const VERSION_COLORS = 6;

export class Rollouts {
  constructor() {
    this.place = byId("rollouts");
    this.mode = localStorage.getItem("tandem-colours") || "ratio";
    this.steps = [];
    this.asked = 0;
    [this.step, this.index] = [null, null];
    this.follow = true;
    this.shown = "";
    this.build();
  }

  build() {
    this.message = el("p", { class: "empty", role: "status" }, "asking for the rollouts");
    this.select = el("select", { "aria-label": "Step", onchange: () => this.open(Number(this.select.value), 0) });
    this.older = el("button", { type: "button", "aria-label": "Step before", onclick: () => this.beside(-1) }, "‹");
    this.newer = el("button", { type: "button", "aria-label": "Step after", onclick: () => this.beside(1) }, "›");
    this.newest = el("button", { type: "button", class: "quiet", title: "The newest step, and each one that comes", onclick: () => this.latest() }, "newest");
    this.about = el("span", { class: "muted small", id: "step-about" });
    this.modes = el("div", { class: "segmented", role: "group", "aria-label": "Tokens coloured by" }, ...MODES.map(([name, text]) => el("button", { type: "button", "aria-pressed": String(name === this.mode), data: { mode: name }, onclick: () => this.colour(name) }, text)));
    this.legend = el("div", { class: "token-legend", id: "token-legend" });
    this.list = el("ol", { class: "groups", id: "groups" });
    this.detail = el("div", { class: "group", id: "group" });
    this.body = el("div", { class: "browser" }, el("div", { class: "card side-list" }, el("div", { class: "card-head" }, el("h3", {}, "Groups")), this.list), this.detail);
    this.head = el("div", { class: "card rollout-head" }, el("div", { class: "stepper" }, el("span", { class: "muted small" }, "Step"), this.older, this.select, this.newer, this.newest, this.about), el("div", { class: "colouring" }, el("span", { class: "muted small" }, "Tokens by"), this.modes, this.legend));
    this.place.replaceChildren(this.message, this.head, this.body);
    this.detail.addEventListener("pointerover", (event) => this.tell(event));
    this.detail.addEventListener("pointerout", hideTip);
  }

  /** What the address says: [step, index], or nothing, which means the newest, and each one that comes. */
  go([step, index]) {
    this.follow = !Number.isInteger(step);
    if (this.follow || step !== this.step) this.asked = 0; // its neighbours are not known yet
    [this.step, this.index] = this.follow ? [null, null] : [step, Number.isInteger(index) ? index : 0];
  }

  latest() {
    window.scrollTo(0, 0);
    this.go([]);
    location.hash = "rollouts";
  }

  open(step, index) {
    location.hash = `rollouts/${step}/${index}`;
  }

  beside(by) {
    const at = this.steps.findIndex(({ step }) => step === this.step);
    const found = this.steps[at + by];
    if (found) this.open(found.step, 0);
  }

  async update(run, now) {
    if (Date.now() - this.asked > STEPS_ASKED_MS) {
      this.asked = Date.now();
      this.steps = (await get("api/rollouts", this.step === null ? {} : { step: this.step })).steps;
    }
    const any = this.steps.length > 0;
    this.message.hidden = any;
    this.head.hidden = this.body.hidden = !any;
    if (!any) {
      this.message.textContent = !run.draws ? `Method ${run.method} trains on data: there are no rollouts to look at.` : now.alive ? "No step has been made yet: rollouts appear with the first one." : "This run has no rollouts: it made no step, or its journal is gone.";
      return;
    }
    const newest = this.steps.at(-1).step;
    if (this.step === null || (this.follow && this.step !== newest && !this.isRead())) [this.step, this.index] = [newest, 0];
    this.version = this.steps.find(({ step }) => step === this.step)?.version; // after a rollback the step comes again
    this.showSteps();
    const key = `${this.step}/${this.index}/${this.version}`;
    if (this.shown === key) return;
    this.shown = key;
    try {
      await this.showGroups();
    } catch (error) {
      this.shown = ""; // the next round tries again
      throw error;
    }
  }

  /** Whether somebody is busy with what is shown, so that a newer step must not take its place. */
  isRead() {
    const scrolled = window.scrollY > 0 || [this.list, ...this.detail.querySelectorAll(".text")].some((part) => part.scrollTop > 0);
    const selection = getSelection();
    return scrolled || !byId("tip").hidden || document.activeElement === this.select || (!selection.isCollapsed && this.body.contains(selection.anchorNode));
  }

  showSteps() {
    const known = `${this.steps[0].step}-${this.steps.at(-1).step}/${this.steps.length}/${this.step}`;
    if (known !== this.stepsKey) {
      this.stepsKey = known;
      const near = [...this.steps];
      if (!near.some(({ step }) => step === this.step)) near.unshift({ step: this.step });
      this.select.replaceChildren(...near.map(({ step }) => el("option", { value: String(step), selected: step === this.step }, String(step))).reverse());
    }
    const at = this.steps.findIndex(({ step }) => step === this.step);
    this.older.disabled = at <= 0;
    this.newer.disabled = at < 0 || at === this.steps.length - 1;
    this.newest.disabled = this.follow && at === this.steps.length - 1;
    const found = this.steps[at];
    this.about.textContent = found ? [plural(found.groups, "group"), `mean reward ${short(found.reward)}`, `made version ${found.version ?? NONE}`].join(" · ") : "";
  }

  async showGroups() {
    const [step, index, listed] = [this.step, this.index, `${this.step}/${this.version}`];
    try {
      if (this.listed !== listed) {
        this.listed = listed;
        this.list.replaceChildren(); // no click goes to a group of the step before
        const { groups } = await get(`api/rollouts/${step}`);
        if (this.step !== step) return;
        const own = ownParts(groups.map(({ prompt }) => prompt));
        this.list.replaceChildren(...groups.map((group, at) => this.entry(group, oneLine(own[at]))));
      }
      for (const entry of this.list.children) entry.firstChild.setAttribute("aria-current", String(Number(entry.dataset.index) === index));
      const group = await get(`api/rollouts/${step}/${index}`);
      if (this.step !== step || this.index !== index) return;
      this.group = group;
      this.showGroup();
    } catch (error) {
      this.listed = null;
      if (error.status !== 404) throw error;
      this.group = null;
      this.legend.replaceChildren();
      this.detail.replaceChildren(el("p", { class: "empty card" }, `Group ${index} of step ${step} is not there (any more).`));
    }
  }

  entry(group, prompt) {
    const rewards = group.rewards.filter((reward) => reward !== null);
    const mean = rewards.length ? rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length : null;
    const top = Math.max(1, ...rewards);
    const bars = el("span", { class: "rewards", "aria-hidden": "true" }, ...group.rewards.slice(0, 32).map((reward) => {
      const bar = el("i", {});
      bar.style.height = `${Math.round(2 + 12 * Math.max(0, (reward ?? 0) / top))}px`;
      return bar;
    }));
    return el("li", { data: { index: String(group.index) } }, el("a", { href: `#rollouts/${this.step}/${group.index}` }, el("span", { class: "prompt-line" }, prompt), el("span", { class: "under" }, el("b", {}, short(mean)), bars, el("span", { class: "muted" }, group.actor))));
  }

  showGroup() {
    const { group } = this;
    const rewards = group.completions.map(({ reward }) => reward);
    const head = el(
      "article",
      { class: "card prompt" },
      el("div", { class: "card-head" }, el("h3", {}, `Prompt ${group.id}`), el("span", { class: "muted small" }, [group.actor, `temperature ${short(group.temperature)}`, `mean reward ${short(rewards.reduce((sum, reward) => sum + (reward ?? 0), 0) / rewards.length)}`].join(" · "))),
      el("pre", { class: "text", tabIndex: 0 }, group.prompt),
    );
    this.versions = [...new Set(group.completions.flatMap(({ versions }) => versions))].sort((a, b) => a - b);
    this.detail.replaceChildren(head, el("div", { class: "completions" }, ...group.completions.map((completion, number) => this.completion(completion, number))));
    this.colour(this.mode);
    this.detail.dataset.shown = `${this.step}/${this.index}`;
  }

  completion(completion, number) {
    const scores = Object.entries(completion.scores).filter(([name]) => name !== "reward");
    const text = el("pre", { class: "text tokens", tabIndex: 0, data: { completion: String(number) } });
    const show = (count) => text.replaceChildren(...completion.tokens.slice(0, count).map((token, index) => el("span", { class: completion.trained[index] ? "" : "untrained", data: { token: String(index) } }, visible(token))));
    show(SHOWN_TOKENS);
    const rest = completion.tokens.length - SHOWN_TOKENS;
    const more = rest > 0 ? el("button", { type: "button", class: "quiet", onclick: (event) => { show(Infinity); this.colour(this.mode); event.currentTarget.remove(); } }, `show ${plural(rest, "more token")}`) : null;
    return el(
      "article",
      { class: "card completion" },
      el("div", { class: "card-head" }, el("h4", {}, el("span", { class: "reward", data: { good: String(completion.reward > 0.5) } }, short(completion.reward)), el("span", { class: "muted small" }, "reward")), el("span", { class: "muted small" }, `${plural(completion.tokens.length, "token")} · ${{ stop: "finished", length: "cut at the limit" }[completion.finish_reason] || completion.finish_reason}`)),
      scores.length || completion.grader_error || typeof completion.advantage === "number" ? el("p", { class: "scores" }, ...scores.map(([name, value]) => el("span", { class: "chip" }, `${name} ${short(value)}`)), typeof completion.advantage === "number" ? el("span", { class: "chip" }, `advantage ${short(completion.advantage)}`) : null, completion.grader_error ? el("span", { class: "chip bad" }, completion.grader_error === true ? "grader failed" : `grader: ${completion.grader_error}`) : null) : null,
      text,
      more,
    );
  }

  // --- colours ---

  colour(mode) {
    this.mode = mode;
    localStorage.setItem("tandem-colours", mode);
    for (const button of this.modes.children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    if (!this.group) return;
    for (const text of this.detail.querySelectorAll(".tokens")) {
      const completion = this.group.completions[Number(text.dataset.completion)];
      for (const span of text.children) {
        const index = Number(span.dataset.token);
        delete span.dataset.version;
        span.style.backgroundColor = mode === "ratio" ? ratioColour(difference(completion, index)) : "";
        if (mode === "version") span.dataset.version = String(this.versions.indexOf(completion.versions[index]) % VERSION_COLORS);
      }
    }
    this.legend.replaceChildren(...this.explained(mode));
  }

  explained(mode) {
    if (mode === "version") return this.versions.slice(-12).map((version) => el("span", { class: "key" }, el("i", { class: "swatch token-swatch", data: { version: String(this.versions.indexOf(version) % VERSION_COLORS) } }), `version ${version}`));
    if (mode === "none") return [el("span", { class: "key" }, "faint: not trained on")];
    if (!this.group.completions.some(({ learner_logprobs: found }) => found.some((value) => value !== null))) {
      const kept = this.group.completions.some(({ advantage }) => typeof advantage === "number");
      return [el("span", { class: "key" }, kept ? "nothing of this group was trained on" : "the learner's logprobs of this step were not kept")];
    }
    return [["¼", -STRONGEST], ["½", -Math.log(2)], ["1", 0], ["2", Math.log(2)], ["4", STRONGEST]]
      .map(([text, value]) => {
        const swatch = el("i", { class: "swatch token-swatch" });
        swatch.style.backgroundColor = ratioColour(value);
        return el("span", { class: "key" }, swatch, text);
      })
      .concat(el("span", { class: "key" }, "learner / engine; faint: not trained on"));
  }

  tell(event) {
    const span = event.target.closest?.("[data-token]");
    if (!span || !this.group) return;
    const completion = this.group.completions[Number(span.parentElement.dataset.completion)];
    const index = Number(span.dataset.token);
    const gap = difference(completion, index);
    const exact = (value) => (typeof value === "number" ? value.toFixed(3).replace("-", "−") : NONE);
    showTip(
      [JSON.stringify(completion.tokens[index]), `engine ${exact(completion.logprobs[index])} nats`, `learner ${exact(completion.learner_logprobs[index])} nats`, `ratio ${gap === null ? NONE : short(Math.exp(gap))}`, `version ${completion.versions[index]}, token ${index + 1} of ${completion.tokens.length}${completion.trained[index] ? "" : ", not trained on"}`],
      event.clientX,
      event.clientY,
    );
  }

  repaint() {
    if (this.group) this.colour(this.mode);
  }
}

/** log(learner / engine) of a token; null where the learner's is not known. */
function difference(completion, index) {
  const [learner, engine] = [completion.learner_logprobs[index], completion.logprobs[index]];
  return typeof learner === "number" && typeof engine === "number" ? learner - engine : null;
}

/** Orange: more likely now than when it was drawn; blue: less likely. */
function ratioColour(gap) {
  if (gap === null) return "";
  const strength = Math.min(1, Math.abs(gap) / STRONGEST);
  return strength < 0.02 ? "" : `rgb(var(--${gap > 0 ? "up" : "down"}) / ${(0.08 + 0.6 * strength).toFixed(2)})`;
}

const visible = (token) => token.replaceAll("\n", "↵\n") || "▫";

/** What each prompt has of its own: without the whole lines that all of them begin and end with (a chat template's). */
const ownParts = (prompts) => {
  if (prompts.length < 2) return prompts;
  const [first, ...others] = prompts;
  let [head, tail] = [0, 0];
  while (head < first.length && others.every((text) => text[head] === first[head])) head += 1;
  while (tail < first.length - head && others.every((text) => text.at(-1 - tail) === first.at(-1 - tail))) tail += 1;
  const begin = first.lastIndexOf("\n", head - 1) + 1;
  const line = tail ? first.indexOf("\n", first.length - tail) : -1;
  const behind = line < 0 ? 0 : first.length - line;
  return prompts.map((text) => text.slice(begin, text.length - behind) || text);
};

const oneLine = (text) => {
  const plain = text.replace(/<\|[^|<>]*\|>/g, " ").replace(/\s+/g, " ").trim();
  return plain.length > 160 ? `…${plain.slice(-158)}` : plain;
};
