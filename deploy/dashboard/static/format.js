// Numbers, times and sizes for people. Pure; what is not known is an en dash.

export const NONE = "–";

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** Three significant digits, thousands as k and M: 0.0123, 4.5, 128, 1.25k. */
export function short(value) {
  if (!known(value)) return NONE;
  if (value < 0) return `−${short(-value)}`;
  const size = value;
  if (size === 0) return "0";
  if (size >= 999.5e6) return trimmed(value / 1e9) + "G";
  if (size >= 999.5e3) return trimmed(value / 1e6) + "M";
  if (size >= 9995) return trimmed(value / 1e3) + "k";
  if (size >= 100) return String(Math.round(value));
  if (size < 0.001) return value.toExponential(1).replace(".0e", "e").replace("e-", "e−");
  return trimmed(value);
}

function trimmed(value) {
  const text = value.toPrecision(3);
  return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : String(Number(text));
}

export const percent = (value) => (known(value) ? `${value < 0.0995 ? Number((value * 100).toFixed(value < 0.00995 ? 2 : 1)) : Math.round(value * 100)} %` : NONE);

export function bytes(value) {
  if (!known(value)) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit ? trimmed(value) : Math.round(value)} ${units[unit]}`;
}

export function seconds(value) {
  if (!known(value)) return NONE;
  if (value === 0) return "0 s";
  return Math.abs(value) < 0.9995 ? `${trimmed(value * 1000)} ms` : `${trimmed(value)} s`;
}

/** 45 s, 7:20 min, 3 h 05. */
export function duration(value) {
  if (!known(value)) return NONE;
  const whole = Math.max(0, Math.round(value));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}:${two(whole % 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))}`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

const two = (value) => String(value).padStart(2, "0");

/** Unix seconds as local 14:03:12. */
export function clock(time, withSeconds = true) {
  const date = new Date(time * 1000);
  return `${two(date.getHours())}:${two(date.getMinutes())}${withSeconds ? `:${two(date.getSeconds())}` : ""}`;
}

export function day(time) {
  const date = new Date(time * 1000);
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
}

/** Labels of a time axis whose marks are `step` seconds apart. */
export function timeLabels(marks, step) {
  return marks.map((mark) => (step >= 86400 ? day(mark).slice(5) : clock(mark, step < 60)));
}

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
