// The tree of markdown.js as document nodes. Only blocks that changed are replaced while an answer streams.
import { copyButton, el } from "./dom.js";
import { parse } from "./markdown.js";
import { t } from "./strings.js";

/** Show `text` in `element`. */
export function show(element, text) {
  const blocks = parse(text);
  blocks.forEach((block, i) => {
    const key = JSON.stringify(block);
    const old = element.childNodes[i];
    if (old?.key === key) return;
    const made = build(block);
    made.key = key;
    if (old) old.replaceWith(made);
    else element.append(made);
  });
  while (element.childNodes.length > blocks.length) element.lastChild.remove();
}

function build(part) {
  if (typeof part === "string") return document.createTextNode(part);
  if (part.tag === "code-block") return codeBlock(part);
  const more = { start: part.start };
  if (part.tag === "a") Object.assign(more, { href: part.href, rel: "noopener noreferrer", target: "_blank" });
  return el(part.tag, more, ...part.children.map(build));
}

function codeBlock({ children: [text], language }) {
  const copy = copyButton(t("copy"), t("copied"), () => text);
  const pre = el("pre", { tabindex: "0", "aria-label": t("code") }, el("code", {}, text));
  return el("div", { class: "code" }, el("div", {}, el("span", {}, language || t("code")), copy), pre);
}
