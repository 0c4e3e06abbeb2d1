// Starts the page: waits for the server, asks what it offers, and joins the parts.
import * as analyze from "./analyze.js";
import { getJson, health } from "./api.js";
import * as chat from "./chat.js";
import * as dashboard from "./dashboard.js";
import { $ } from "./dom.js";
import * as images from "./images.js";
import * as list from "./list.js";
import { notify } from "./notice.js";
import * as settings from "./settings.js";
import { t } from "./strings.js";

const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Returns when the model is loaded; says how far it is until then. */
async function untilReady() {
  for (;;) {
    try {
      const state = await health();
      if (state.status === "ok") return;
      const percent = Math.floor((100 * state.bytes_loaded) / state.bytes_total);
      if (state.status !== "loading") notify(t("failed"), true);
      else notify(percent >= 0 ? t("loading", { percent }) : t("loadingSoon"));
    } catch {
      notify(t("offline"), true);
    }
    await wait(1000);
  }
}

async function connect() {
  await untilReady();
  try {
    const info = await getJson("/v1/server-info");
    $("model").textContent = info.model;
    document.title = `${info.model} – hayate`;
    $("open-analyze").hidden = !info.analyze;
    images.allow(info.images);
    chat.setContextSize(info.max_model_len);
    notify(info.chat ? "" : t("noChat"), !info.chat);
  } catch (error) {
    notify(error.status === 401 ? t("needsKey") : error.message, true);
    if (error.status === 401) settings.askForKey();
  }
}

if (chat.isTouch()) $("prompt").dataset.tHint = "prompt"; // the other hint is about keys
settings.start(() => {
  chat.draw();
  list.draw();
}, connect);
chat.start(list.draw);
images.start();
list.start();
dashboard.start();
analyze.start();
connect();
