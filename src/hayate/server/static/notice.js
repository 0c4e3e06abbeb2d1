// The line above the conversation, and what screen readers are told while an answer streams.
import { $ } from "./dom.js";

/** Show a line; "" hides it. */
export function notify(text, isError = false) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
  $("notice").classList.toggle("error", isError);
}

/** Have a screen reader say this when it has finished what it is saying. */
export function announce(text) {
  const line = document.createElement("p");
  line.textContent = text;
  $("announcer").append(line);
  while ($("announcer").childElementCount > 20) $("announcer").firstChild.remove();
}

/** Announces a growing text in whole sentences, at most one time a second: single words would be noise. */
export class Reader {
  #said = 0;
  #last = 0;

  push(text, isEnd = false) {
    const now = performance.now();
    if (!isEnd && now - this.#last < 1000) return;
    const rest = text.slice(this.#said);
    const end = isEnd ? rest.length : rest.search(/[.!?。！？\n][^.!?。！？\n]*$/) + 1;
    if (end < 1) return;
    if (rest.slice(0, end).trim()) announce(rest.slice(0, end));
    this.#said += end;
    this.#last = now;
  }
}
