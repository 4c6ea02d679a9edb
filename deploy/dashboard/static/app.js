// The page: exchanges the token, asks the server once a second or two, and hands what comes to the two views.

import { Refused, get, login } from "./api.js";
import { byId, hideTip, say } from "./dom.js";
import { clock } from "./format.js";
import { Overview } from "./overview.js";
import { Rollouts } from "./rollouts.js";

const LIVE_MS = 1500;
const ENDED_MS = 5000;
const VIEWS = ["overview", "rollouts"];

const page = { run: null, now: null, lostSince: 0, refused: false, timer: 0, asking: false, again: false };
const overview = new Overview();
const rollouts = new Rollouts();

async function poll() {
  clearTimeout(page.timer);
  if (page.asking || page.refused) return;
  if (document.hidden) return; // visibilitychange goes on
  page.asking = true;
  try {
    page.run ??= await firstCard();
    const asked = performance.now();
    page.now = { ...(await get("api/now")), asked };
    if (view() === "rollouts") await rollouts.update(page.run, page.now);
    else await overview.update(page.run, page.now);
    overview.header(page.run, page.now);
    page.lostSince = 0;
  } catch (error) {
    if (error instanceof Refused) refuse();
    else if (error instanceof TypeError || error.name === "TimeoutError") page.lostSince ||= Date.now() / 1000;
    else {
      console.error(error);
      say("notice", `the page could not show what came: ${error.message}`);
    }
  } finally {
    page.asking = false;
  }
  connection();
  const pause = page.again ? 0 : page.now?.alive === false ? ENDED_MS : LIVE_MS;
  page.again = false;
  if (!page.refused) page.timer = setTimeout(poll, pause);
}

async function firstCard() {
  const run = await get("api/run");
  document.title = `${run.name} · Tandem`;
  return run;
}

function refuse() {
  page.refused = true;
  document.body.classList.add("refused");
  say("notice", "This page opens with the whole address that `tandem` printed when it started, with “#token=…” at its end. Each start has another one.");
}

function connection() {
  const mark = byId("connection");
  const [name, text] = page.refused
    ? ["lost", "no access"]
    : page.lostSince
      ? ["lost", `connection lost, since ${clock(page.lostSince)}`]
      : !page.now
        ? ["ended", "connecting"]
        : page.now.alive
          ? ["live", "live"]
          : ["ended", "not running"];
  if (mark.textContent !== text) mark.textContent = text;
  mark.dataset.state = name;
  document.body.classList.toggle("lost", Boolean(page.lostSince));
  const gone = page.lostSince && page.now?.status.ended;
  if (gone) say("notice", `The run has ended (${page.now.status.end}), and this page's server with it. \`tandem dashboard RUN\` shows it again.`);
  else if (!page.refused && page.lostSince) say("notice", "The server does not answer: the last state is shown. The page tries again.");
  else if (!page.refused) say("notice", "");
}

// --- views and theme ---

const view = () => VIEWS.find((name) => location.hash.slice(1).split("/")[0] === name) || "overview";

function route() {
  hideTip();
  for (const name of VIEWS) {
    byId(name).hidden = view() !== name;
    byId(`tab-${name}`).setAttribute("aria-selected", String(view() === name));
  }
  rollouts.go(location.hash.slice(1).split("/").slice(1).map(Number));
  page.again = page.asking; // a click is not to wait for the next round
  poll();
}

const THEMES = ["auto", "light", "dark"];

function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  byId("theme").textContent = `Theme: ${name}`;
  byId("theme").title = `Click for ${THEMES[(THEMES.indexOf(name) + 1) % 3]}`;
  localStorage.setItem("tandem-theme", name);
  overview.repaint();
  rollouts.repaint();
}

byId("theme").addEventListener("click", () => {
  const current = localStorage.getItem("tandem-theme") || "auto";
  theme(THEMES[(THEMES.indexOf(current) + 1) % THEMES.length]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  overview.repaint();
  rollouts.repaint();
});
document.addEventListener("visibilitychange", () => !document.hidden && poll());
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

const known = localStorage.getItem("tandem-theme");
theme(THEMES.includes(known) ? known : "auto");
try {
  await login();
} catch (error) {
  if (error instanceof Refused) refuse();
  else page.lostSince = Date.now() / 1000;
}
window.addEventListener("hashchange", route);
connection();
route();
