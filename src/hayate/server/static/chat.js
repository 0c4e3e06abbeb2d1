// The conversation on screen: sending, streaming, stopping, regenerating, editing.
import { Answer } from "./answer.js";
import { $, button, copyButton, el } from "./dom.js";
import * as images from "./images.js";
import { announce, notify, Reader } from "./notice.js";
import { show } from "./render.js";
import { askForKey, sampling, systemPrompt } from "./settings.js";
import * as store from "./store.js";
import { t } from "./strings.js";

let conversation = store.create();
let answer = null; // the one that is streaming
let contextSize = 0;
let onSaved = () => {};

export const isTouch = () => matchMedia("(pointer: coarse)").matches;

export const current = () => conversation;

/** Show another conversation; what streams is stopped and kept. */
export function open(next) {
  answer?.stop();
  conversation = next;
  $("context").value = 0;
  $("context-text").textContent = $("speed").textContent = "";
  draw();
  $("prompt").focus();
}

export function setContextSize(tokens) {
  contextSize = tokens;
  $("context").max = tokens;
}

/** saved: called whenever a conversation has been written. */
export function start(saved) {
  onSaved = saved;
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => {
    // While an input method composes, Enter chooses a word; keyboards on a screen have no Shift+Enter.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch()) return;
    event.preventDefault();
    send();
  });
  if (!CSS.supports("field-sizing", "content"))
    $("prompt").addEventListener("input", ({ target }) => (target.rows = Math.min(target.value.split("\n").length, 10)));
  $("stop").addEventListener("click", () => answer?.stop());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) answer?.stop();
  });
  draw();
}

function send() {
  const text = $("prompt").value.trim();
  if (answer || (!text && !images.any())) return;
  const message = { role: "user", text };
  const attached = images.take();
  if (attached.length) message.images = attached;
  $("prompt").value = "";
  conversation.messages.push(message);
  conversation.title ||= text.split("\n")[0].slice(0, 60);
  draw();
  generate();
}

/** Answer the conversation as it stands. */
async function generate() {
  const own = conversation;
  const messages = requestMessages(own.messages);
  const made = { role: "assistant", text: "" };
  own.messages.push(made);
  save(own);
  notify("");
  announce(t("answering"));
  draw();
  answer = new Answer();
  const mine = answer;
  busy(true);
  try {
    await follow(mine, { messages, ...sampling() }, own);
    made.note = ending(mine);
  } catch (error) {
    made.failure = error.status ? error.message : t("offline");
    announce(made.failure);
    if (error.status === 401) askForKey();
  }
  made.text = mine.text;
  if (!made.text && !made.failure && mine.finish === "stopped") own.messages.pop();
  save(own);
  answer = null;
  busy(false);
  if (own === conversation) {
    draw();
    showFigures(mine);
  }
}

/** Run the answer and show it as it grows, once a frame, while its conversation is the one on screen. */
async function follow(mine, body, own) {
  const reader = new Reader();
  let pending = false;
  const frame = () => {
    pending = false;
    if (own !== conversation || mine !== answer) return;
    const item = $("messages").lastElementChild;
    item.classList.add("writing");
    const scroller = $("scroller");
    const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
    show(item.querySelector(".body"), mine.text);
    if (atEnd) scroller.scrollTop = scroller.scrollHeight;
    if (mine.rate) $("speed").textContent = t("speedNow", { rate: mine.rate });
    reader.push(mine.text);
  };
  frame();
  await mine.run(body, () => {
    if (!pending) requestAnimationFrame(frame);
    pending = true;
  });
  reader.push(mine.text, true);
  announce(t(mine.finish === "stopped" ? "stopped" : "answerDone"));
}

function requestMessages(messages) {
  const system = systemPrompt();
  const sent = messages
    .filter((message) => !(message.role === "assistant" && message.failure && !message.text))
    .map(({ role, text, images: urls }) => {
      if (!urls?.length) return { role, content: text };
      const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
      return { role, content: text ? [...parts, { type: "text", text }] : parts };
    });
  return system ? [{ role: "system", content: system }, ...sent] : sent;
}

function ending(done) {
  const values = { tokens: done.usage?.completion_tokens, rate: done.rate, first: done.first };
  const figures = done.usage && done.rate ? t("figures", values) : done.first ? t("figuresStopped", values) : "";
  const why = { stopped: t("stopped"), length: t("lengthReached") }[done.finish] ?? "";
  return [why, figures].filter(Boolean).join(" ");
}

function showFigures({ usage, rate }) {
  $("speed").textContent = rate ? t(usage ? "speed" : "speedNow", { rate }) : "";
  if (!usage) return;
  $("context").value = usage.total_tokens;
  const values = { used: usage.total_tokens.toLocaleString(), all: contextSize.toLocaleString() };
  $("context-text").textContent = t("contextOf", values);
}

function busy(is) {
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("messages").setAttribute("aria-busy", is);
  // A button that vanishes must not take the focus with it.
  if (hadFocus) (is ? $("stop") : $("prompt")).focus();
}

function save(own) {
  if (!store.save(own)) notify(t("storageFull"));
  onSaved();
}

/** Write the conversation anew. */
export function draw() {
  $("welcome").hidden = conversation.messages.length > 0;
  $("messages").replaceChildren(...conversation.messages.map(drawMessage));
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

function drawMessage(message, index) {
  const body = el("div", { class: "body" });
  if (message.role === "assistant") show(body, message.text);
  else body.append(...(message.images ?? []).map((url) => el("img", { src: url, alt: t("attachedImage") })), message.text);
  const item = el("li", { class: message.role });
  item.append(el("span", { class: "role" }, t(message.role === "user" ? "you" : "model")), body);
  if (message.failure) item.append(el("p", { class: "failure" }, message.failure));
  item.append(actions(message, index, item));
  return item;
}

function actions(message, index, item) {
  const row = el("div", { class: "actions" });
  row.append(copyButton(t("copy"), t("copied"), () => message.text));
  row.append(button(t("edit"), () => answer || edit(message, index, item)));
  if (message.role === "assistant") row.append(button(t("regenerate"), () => answer || restart(index)));
  if (message.note) row.append(el("span", { class: "figures" }, message.note));
  return row;
}

/** Forget the messages from `index` on and answer again. */
function restart(index) {
  conversation.messages.length = index;
  generate();
  $("stop").focus();
}

/** A form in place of the message. A changed question is answered anew; a changed answer only stays changed. */
function edit(message, index, item) {
  const isUser = message.role === "user";
  const area = el("textarea", { "aria-label": t("edit"), rows: Math.min(message.text.split("\n").length + 1, 16) });
  area.value = message.text;
  const close = () => {
    draw();
    $("messages").children[index]?.querySelector("button").focus();
  };
  const keep = () => {
    message.text = area.value.trim();
    if (isUser) return restart(index + 1);
    delete message.note;
    save(conversation);
    close();
  };
  const row = el("div", { class: "actions" }, button(t(isUser ? "saveSend" : "save"), keep), button(t("cancel"), close));
  item.classList.add("editing");
  item.replaceChildren(area, row);
  item.addEventListener("keydown", (event) => event.key === "Escape" && close());
  area.focus();
}
