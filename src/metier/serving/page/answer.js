/* One model's answer as it comes: text, times, and how it ended. Knows nothing of how it is shown. */

import { Events } from "./events.js";
import { messageOf } from "./server.js";
import { refusal } from "./words.js";

// pieces closer than this came together; their distance says nothing of the server's speed
const SHORTEST_SPAN_MS = 50;

export class Answer {
  /** "waiting", "answering", "finished", "stopped" or "failed" */
  state = "waiting";
  text = "";
  error = "";
  finishReason = null;
  usage = null;
  experts = null;
  #status = 200;
  #refusal = "";
  #events = new Events();
  #numPieces = 0;
  #firstAt = null;
  #lastAt = null;
  #measuredByServer = null;

  constructor(model, askedAt) {
    this.model = model;
    this.askedAt = askedAt;
  }

  get isOver() {
    return this.state !== "waiting" && this.state !== "answering";
  }

  get wasRefusedForKey() {
    return this.#status === 401;
  }

  get firstAfterMs() {
    return this.#firstAt === null ? null : this.#firstAt - this.askedAt;
  }

  get numTokens() {
    return this.usage?.completion_tokens ?? this.#numPieces;
  }

  /** As the browser saw it, the first token's wait aside; the server's own figure where all came at once. */
  get tokensPerSecond() {
    const spanMs = this.#lastAt - this.#firstAt;
    if (this.numTokens < 2 || spanMs < SHORTEST_SPAN_MS) return this.#measuredByServer;
    return ((this.numTokens - 1) / spanMs) * 1000;
  }

  /** Take a piece as `ask` yields them. */
  take({ status, text, end }, now) {
    if (this.isOver) return;
    if (status !== undefined) this.#status = status;
    else if (end) this.#end();
    else if (this.#status !== 200) this.#refusal += text;
    else for (const data of this.#events.read(text)) this.#takeData(data, now);
  }

  stop() {
    if (!this.isOver) this.state = "stopped";
  }

  fail(words) {
    if (this.isOver) return;
    this.state = "failed";
    this.error = words;
  }

  #takeData(data, now) {
    if (data === "[DONE]" || this.isOver) return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      this.fail("The server sent what this page cannot read.");
      return;
    }
    if (chunk.error) {
      this.fail(`The server broke off.\n${chunk.error.message ?? ""}`.trim());
      return;
    }
    const choice = chunk.choices?.[0];
    this.#takeText(choice?.delta?.content ?? choice?.text ?? "", now);
    this.finishReason = choice?.finish_reason ?? this.finishReason;
    this.usage = chunk.usage ?? this.usage;
    this.experts = chunk.metier?.experts ?? this.experts;
    this.#measuredByServer = chunk.metier?.tokens_per_second ?? this.#measuredByServer;
  }

  #takeText(text, now) {
    if (text === "") return;
    this.state = "answering";
    this.text += text;
    this.#numPieces += 1;
    this.#firstAt ??= now;
    this.#lastAt = now;
  }

  #end() {
    if (this.#status !== 200) this.fail(refusal(this.#status, messageOf(this.#refusal)));
    else if (this.finishReason === null) this.fail("The answer broke off before its end.");
    else this.state = "finished";
  }
}
