// Elements out of data. Text is only ever set as text: what a model wrote, a log line or a name never becomes markup.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; strings among the children become text. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Set an element's text; without text the element is hidden. */
export function say(id, text) {
  const element = byId(id);
  element.hidden = !text;
  if (element.textContent !== text) element.textContent = text || "";
}

/** The value of a colour or length of style.css. */
export const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const tip = byId("tip");

/** Show lines of text beside a point of the window; the first one stands out. */
export function showTip(lines, x, y) {
  tip.replaceChildren(...lines.map((line, number) => el(number ? "div" : "strong", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 12, window.innerWidth - width - 8))}px`;
  tip.style.top = `${y + 16 + height > window.innerHeight ? Math.max(4, y - height - 10) : y + 16}px`;
}

export function hideTip() {
  tip.hidden = true;
}
