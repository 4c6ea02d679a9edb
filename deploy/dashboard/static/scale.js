// The buttons that change the number of actors: each click leaves a wish; what becomes of it is said below them.

import { post } from "./api.js";
import { byId, say } from "./dom.js";
import { plural } from "./format.js";

const LARGEST = 4096;

export class Scale {
  constructor() {
    this.wanted = null;
    this.said = "";
    [this.asking, this.answered, this.turn] = [0, 0, Promise.resolve()];
    this.number = byId("scale-number");
    byId("scale-less").addEventListener("click", () => this.wish(this.wanted - 1));
    byId("scale-more").addEventListener("click", () => this.wish(this.wanted + 1));
    byId("scale").addEventListener("submit", (event) => {
      event.preventDefault();
      this.wish(this.number.valueAsNumber);
    });
  }

  /** Ask for so many actors, after what was asked for before. */
  wish(count) {
    if (!Number.isInteger(count) || count < 0 || count > LARGEST) {
      this.said = `expected a whole number from 0 to ${LARGEST}`;
      say("scale-state", this.said);
      return;
    }
    this.wanted = count; // from which the next click counts on
    this.asking += 1;
    this.turn = this.turn.then(() => this.ask(count));
  }

  async ask(count) {
    try {
      const { before, actors } = await post("api/scale", { actors: count });
      this.said = `asked for: ${before} → ${plural(actors, "actor")}`;
      this.number.value = String(actors);
    } catch (error) {
      this.said = `not done: ${error.message}`;
    }
    this.asking -= 1;
    this.answered = performance.now();
    say("scale-state", this.said);
  }

  show(now) {
    byId("scale").hidden = !now.scalable;
    if (!now.scalable) {
      say("scale-state", now.alive || !now.actors.length ? "" : "as they were last seen");
      return;
    }
    if (this.asking || now.asked < this.answered) return; // it may tell of the number before the last click
    const wanted = now.wish.actors;
    if (wanted !== this.wanted && document.activeElement !== this.number) this.number.value = String(wanted);
    this.wanted = wanted;
    byId("scale-less").disabled = wanted <= 0;
    say("scale-state", [this.said, ...progress(now)].filter(Boolean).join(" · "));
    if (settled(now)) this.said = "";
  }
}

const serving = (actor) => ["generating", "updating", "waiting"].includes(actor.state);

const settled = (now) => now.actors.filter((actor) => actor.state !== "gone").every(serving) && now.actors.filter(serving).length === now.wish.actors;

/** What the wish is, and what still stands between it and the actors. */
function* progress(now) {
  const there = now.actors.filter(serving).length;
  yield there === now.wish.actors ? `${plural(there, "actor")} wanted by ${now.wish.by}, all serve` : `${plural(now.wish.actors, "actor")} wanted by ${now.wish.by}, ${there} serve`;
  for (const actor of now.actors) {
    if (["pending", "starting", "draining", "refused", "failed"].includes(actor.state)) yield `${actor.name} ${actor.state}${actor.why ? `: ${actor.why}` : ""}`;
  }
  if (now.wish.actors === 0) yield "the learner waits until there are some";
}
