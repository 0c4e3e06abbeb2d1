// The form that has an image analysed: POST /v1/vision/analyze, for servers that have it.
import { analyze } from "./api.js";
import { $, el } from "./dom.js";
import { currentLanguage, t } from "./strings.js";

const rows = (object, format) =>
  Object.entries(object ?? {}).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, format(value))]);

const asText = (value) =>
  Array.isArray(value) && value.every((item) => typeof item === "string")
    ? value.join("\n")
    : typeof value === "string" ? value : JSON.stringify(value, null, 1);

async function run() {
  $("analyze-run").disabled = true;
  $("analyze-status").textContent = t("analyzing");
  try {
    const result = await analyze({
      image: $("analyze-image").files[0],
      mode: $("analyze-mode").value,
      question: $("analyze-question").value,
      language: $("analyze-language").value,
    });
    draw(result);
    $("analyze-status").textContent = t("answerDone");
  } catch (error) {
    $("analyze-status").textContent = error.status ? error.message : t("offline");
  } finally {
    $("analyze-run").disabled = false;
  }
}

function draw({ fields, timings, slices }) {
  $("analyze-fields").replaceChildren(...rows(fields, asText));
  const times = rows(timings, (value) => t("milliseconds", { value: (1000 * value).toFixed(1) }));
  if (slices != null) times.push(el("dt", {}, t("slices")), el("dd", {}, asText(slices)));
  $("analyze-timings").replaceChildren(...times);
  $("analyze-timings-title").hidden = !times.length;
}

export function start() {
  let url = "";
  $("open-analyze").addEventListener("click", () => {
    $("analyze-language").value = currentLanguage();
    $("analyze").showModal();
  });
  $("close-analyze").addEventListener("click", () => $("analyze").close());
  $("analyze-mode").addEventListener("change", () => {
    const asks = $("analyze-mode").value === "ask";
    $("question-row").hidden = !asks;
    $("analyze-question").required = asks;
  });
  $("analyze-image").addEventListener("change", () => {
    URL.revokeObjectURL(url);
    const file = $("analyze-image").files[0];
    url = file ? URL.createObjectURL(file) : "";
    $("analyze-preview").src = url;
    $("analyze-preview").hidden = !file;
  });
  $("analyze-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
}
