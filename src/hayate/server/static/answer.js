// One answer being streamed: its text, its end and its speed.
import { streamChat } from "./api.js";

export class Answer {
  text = "";
  finish = null; // the server's reason, or "stopped"
  usage = null;
  #abort = new AbortController();
  #begin = performance.now();
  #first = 0;
  #last = 0;
  #pieces = 0;

  stop() {
    this.#abort.abort();
  }

  /** Generate; `onText` is called as the text grows. Errors of the server are thrown, a stop is none. */
  async run(body, onText) {
    try {
      for await (const event of streamChat(body, this.#abort.signal)) {
        this.usage = event.usage ?? this.usage;
        const choice = event.choices[0];
        this.finish = choice?.finish_reason ?? this.finish;
        if (!choice?.delta.content) continue;
        this.#last = performance.now();
        this.#first ||= this.#last;
        this.#pieces++;
        this.text += choice.delta.content;
        onText();
      }
      if (!this.finish) throw new TypeError("the stream was cut off");
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      this.finish = "stopped";
    }
  }

  /** Milliseconds to the first text; null before it. */
  get first() {
    return this.#first ? Math.round(this.#first - this.#begin) : null;
  }

  /** Tokens a second after the first: by the server's count or, before it comes, by pieces of text. */
  get rate() {
    const tokens = this.usage?.completion_tokens ?? this.#pieces;
    const seconds = (this.#last - this.#first) / 1000;
    return seconds > 0 && tokens > 1 ? ((tokens - 1) / seconds).toFixed(1) : null;
  }
}
