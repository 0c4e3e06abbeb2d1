// What the server does, read from /metrics while the dialog is open.
import { metrics } from "./api.js";
import { $, el } from "./dom.js";
import { t } from "./strings.js";

const EVERY = 2000; // milliseconds
const KEPT = 31; // readings: the last minute
let readings = []; // {time, ...metrics}

const percent = (value) => `${(100 * value).toFixed(1)} %`;

/** Growth of `over` for each unit of growth of `under` since the first reading kept; null where nothing grew. */
function ratio(over, under) {
  const [first, last] = [readings[0], readings.at(-1)];
  const grown = last[under] - first[under];
  return grown > 0 ? (last[over] - first[over]) / grown : null;
}

const rateBetween = (a, b) =>
  (1000 * (b.hayate_generated_tokens_total - a.hayate_generated_tokens_total)) / (b.time - a.time);

/** What the dialog shows, from the readings kept: names of texts and values. */
function figures() {
  const now = readings.at(-1);
  const name = "hayate_time_to_first_token_seconds";
  const first = ratio(`${name}_sum`, `${name}_count`);
  const hits = ratio("hayate_prefix_cache_hits_total", "hayate_prefix_cache_queries_total");
  return {
    running: now.hayate_requests_running,
    waiting: now.hayate_requests_waiting,
    kv: percent(now.hayate_kv_cache_usage_ratio),
    rate: readings.length > 1 ? rateBetween(readings.at(-2), now).toFixed(1) : "–",
    firstToken: first === null ? "–" : t("milliseconds", { value: (1000 * first).toFixed(0) }),
    prefixHits: hits === null ? "–" : percent(hits),
    generated: now.hayate_generated_tokens_total.toLocaleString(),
  };
}

function draw() {
  const rows = Object.entries(figures());
  $("figures").replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, t(name)), el("dd", {}, `${value}`)]));
  const rates = readings.slice(1).map((reading, i) => rateBetween(readings[i], reading));
  const top = Math.max(...rates, 1);
  const points = rates.map((rate, i) => `${(300 * i) / (KEPT - 2)},${58 - (54 * rate) / top}`);
  $("spark-line").setAttribute("points", points.join(" "));
}

async function read() {
  try {
    const found = await metrics();
    if (!found.hayate_ready) throw new Error(t("loadingSoon"));
    readings = [...readings, { time: performance.now(), ...found }].slice(-KEPT);
    draw();
    $("dashboard-note").textContent = t("dashboardNote");
  } catch (error) {
    $("dashboard-note").textContent = error.status ? error.message : t("offline");
  }
}

export function start() {
  let timer = 0;
  $("open-dashboard").addEventListener("click", () => {
    readings = [];
    read();
    timer = setInterval(read, EVERY);
    $("dashboard").showModal();
  });
  $("dashboard").addEventListener("close", () => clearInterval(timer));
}
