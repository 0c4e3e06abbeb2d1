// The settings dialog: sampling, system prompt, language, theme, key. Kept in localStorage, the key elsewhere.
import { key, setKey } from "./api.js";
import { $ } from "./dom.js";
import { setLanguage, TABLES, translate } from "./strings.js";

const NAME = "hayate.settings";
const NUMBERS = [
  "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
  "max_tokens", "seed",
];
const FIELDS = [...NUMBERS, "system", "stop-texts"];

function stored() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
}

const store = (changes) => localStorage.setItem(NAME, JSON.stringify({ ...stored(), ...changes }));

export const systemPrompt = () => $("system").value.trim();

/** The fields of a request that the user has set; others are the model's own. */
export function sampling() {
  const chosen = {};
  for (const name of NUMBERS) {
    const value = $(name).valueAsNumber;
    if (Number.isFinite(value)) chosen[name] = value;
  }
  const stop = $("stop-texts").value.split("\n").filter((line) => line !== "");
  return stop.length ? { ...chosen, stop } : chosen;
}

/** onLanguage: called after the texts have changed. onKey: after another key was entered. */
export function start(onLanguage, onKey) {
  const values = stored();
  for (const name of FIELDS) {
    $(name).value = values[name] ?? "";
    $(name).addEventListener("change", () => store({ [name]: $(name).value }));
  }
  startLanguage(values.language, onLanguage);
  startTheme(values.theme);
  $("key").value = key();
  $("key").addEventListener("change", () => {
    setKey($("key").value);
    onKey();
  });
  $("open-settings").addEventListener("click", open);
  $("reset-settings").addEventListener("click", () => {
    for (const name of FIELDS) $(name).value = "";
    store(Object.fromEntries(FIELDS.map((name) => [name, ""])));
  });
}

export const open = () => $("settings").showModal();

/** Show the field for the key, and go to it. */
export function askForKey() {
  $("key-row").hidden = false;
  open();
  $("key").focus();
}

function startLanguage(chosen, onLanguage) {
  const change = (name) => {
    setLanguage(name);
    $("language").value = name;
    translate();
    onLanguage();
  };
  const known = navigator.languages.map((tag) => tag.slice(0, 2)).find((name) => name in TABLES);
  change(chosen ?? known ?? "en");
  $("language").addEventListener("change", () => {
    store({ language: $("language").value });
    change($("language").value);
  });
}

function startTheme(chosen) {
  const root = document.documentElement;
  if (chosen) root.dataset.theme = chosen;
  $("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    store({ theme: root.dataset.theme });
  });
}
