// Small helpers for the document: find, make, show. Texts only ever become text nodes.
const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

/** An element; attributes that are functions become listeners, false and null are left out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** A button with a drawing, named by `label`. */
export function iconButton(label, path, act) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return el("button", { type: "button", class: "icon", "aria-label": label, title: label, click: act }, svg);
}

export const button = (text, act, attributes = {}) =>
  el("button", { type: "button", class: "plain", click: act, ...attributes }, text);

export function download(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Copies, also where the clipboard API is missing (plain http on another machine). */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { class: "unseen" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A button that copies what `text()` gives and says so for a moment. */
export function copyButton(name, done, text) {
  const made = button(name, async () => {
    await copy(text());
    made.textContent = done;
    setTimeout(() => (made.textContent = name), 1500);
  });
  return made;
}
