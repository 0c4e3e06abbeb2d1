// Talks to the server: the key, errors, server-sent events, metrics.
const KEY = "hayate.key";

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (value) => sessionStorage.setItem(KEY, value.trim());

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The response; ServerError with the server's own words when it is no success. */
export async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const text = await response.text();
  let message = text.slice(0, 500) || response.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // Not this server's form: a proxy in between.
  }
  throw new ServerError(response.status, message);
}

export const getJson = async (path) => (await request(path)).json();

/** {status, bytes_loaded, bytes_total}, also while the server is not ready. */
export async function health() {
  const response = await fetch("/health");
  return response.json();
}

/** Yields the JSON of each event of a streamed chat completion. */
export async function* streamChat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ServerError(500, event.error.message);
      yield event;
    }
  }
}

/** Sum of each metric over its labels, by name. */
export async function metrics() {
  const text = await (await request("/metrics")).text();
  const sums = {};
  for (const line of text.split("\n")) {
    const match = /^(\w+)(?:\{[^}]*\})? (\S+)$/.exec(line);
    if (match) sums[match[1]] = (sums[match[1]] ?? 0) + Number(match[2]);
  }
  return sums;
}

/** POST /v1/vision/analyze: {fields, timings, slices}. */
export async function analyze({ image, mode, question, language }) {
  const form = new FormData();
  form.set("image", image);
  form.set("mode", mode);
  if (mode === "ask") form.set("question", question);
  form.set("language", language);
  return (await request("/v1/vision/analyze", { method: "POST", body: form })).json();
}
