// The list of conversations: open, rename, delete, export.
import * as chat from "./chat.js";
import { $, button, download, el, iconButton } from "./dom.js";
import * as store from "./store.js";
import { t } from "./strings.js";

const PENCIL = "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3";
const BIN = "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12";
const DOWN = "M12 5v10M8 11l4 4 4-4M5 19h14";

export function draw() {
  $("conversations").replaceChildren(...store.list().map(entry));
}

function entry(conversation) {
  const isCurrent = conversation.id === chat.current().id;
  const title = conversation.title || t("untitled");
  const open = () => {
    if (conversation.id !== chat.current().id) chat.open(conversation);
    show(false);
    draw();
  };
  // The one on screen is the copy that changes.
  const own = isCurrent ? chat.current() : conversation;
  return el(
    "li",
    { "data-current": isCurrent },
    button(title, open, { class: "title", "aria-current": isCurrent && "true" }),
    iconButton(`${t("rename")}: ${title}`, PENCIL, () => rename(own)),
    iconButton(`${t("export")}: ${title}`, DOWN, () => download(`hayate-${own.id}.json`, JSON.stringify(own, null, 1))),
    iconButton(`${t("delete")}: ${title}`, BIN, () => remove(own)),
  );
}

function rename(conversation) {
  const title = prompt(t("renamePrompt"), conversation.title);
  if (title === null) return;
  conversation.title = title.trim();
  store.save(conversation);
  draw();
}

function remove(conversation) {
  if (!confirm(t("deleteConfirm"))) return;
  if (conversation.id === chat.current().id) chat.open(store.create());
  store.remove(conversation);
  draw();
  $("new").focus();
}

/** On a phone: the list over the page. */
function show(is) {
  $("sidebar").classList.toggle("open", is);
  $("open-list").setAttribute("aria-expanded", is);
}

export function start() {
  $("new").addEventListener("click", () => {
    chat.open(store.create());
    show(false);
    draw();
  });
  $("export-all").addEventListener("click", () =>
    download("hayate-conversations.json", JSON.stringify(store.list(), null, 1)),
  );
  $("open-list").addEventListener("click", () => show(!$("sidebar").classList.contains("open")));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !$("sidebar").classList.contains("open")) return;
    show(false);
    $("open-list").focus();
  });
  document.querySelector("main").addEventListener("pointerdown", () => show(false));
  draw();
}
