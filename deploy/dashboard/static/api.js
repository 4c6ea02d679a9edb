// Calls of the server. The cookie goes along by itself; the token of the address is exchanged for it once.

export class Refused extends Error {}

async function call(path, options = {}) {
  const response = await fetch(path, { cache: "no-store", credentials: "same-origin", signal: AbortSignal.timeout(15000), ...options });
  const found = await response.json().catch(() => ({}));
  if (response.status === 401) throw new Refused(found.error || "the token is missing");
  if (!response.ok) {
    const error = new Error(found.error || `${path}: status ${response.status}`);
    error.status = response.status;
    throw error;
  }
  return found;
}

export const get = (path, query = {}) => {
  const search = new URLSearchParams(query).toString();
  return call(search ? `${path}?${search}` : path);
};

export const post = (path, body) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json", "X-Tandem": "1" }, body: JSON.stringify(body) });

/** Exchange the token behind "#" for the cookie, and take it out of the address and the history. */
export async function login() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token === null) return;
  history.replaceState(null, "", location.pathname);
  await post("api/login", { token });
}
