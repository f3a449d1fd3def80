/* One answer on the page. What a model wrote goes in as text, never as markup. */

import { firstDifference } from "./difference.js";
import { ExpertUse } from "./experts.js";
import { nextFrame } from "./frames.js";
import { heatMap } from "./heatmap.js";
import * as words from "./words.js";

const LOOKS = { waiting: "", answering: "busy", finished: "good", stopped: "", failed: "bad" };

export class Column {
  #parts;
  #text = new Text();
  #draw = () => this.#drawNow();

  /** `answer` is shown as it is whenever `changed` is called; `onStop` is called by the Stop button. */
  constructor(answer, { isBase, onStop }) {
    this.answer = answer;
    this.isBase = isBase;
    this.root = document.getElementById("column-template").content.firstElementChild.cloneNode(true);
    this.#parts = Object.fromEntries([...this.root.querySelectorAll("[class]")].map((part) => [part.classList[0], part]));
    this.root.setAttribute("aria-label", `Answer of ${answer.model}`);
    this.#parts.name.textContent = answer.model;
    this.#parts.answer.append(this.#text);
    this.#parts.stop.addEventListener("click", onStop);
    this.#parts.copy.addEventListener("click", () => this.#copy());
    this.#parts.tag.hidden = !isBase;
    this.changed();
  }

  /** The answer has changed: draw it in the next frame. */
  changed() {
    nextFrame(this.#draw);
  }

  /** Mark where this answer differs from the base's; both are over. */
  compare(baseText) {
    const found = firstDifference(this.answer.text, baseText);
    if (found === null) {
      this.#parts.difference.textContent = "same as the base";
      return;
    }
    const { start, end, word } = found;
    const isShorter = start === end;
    this.#parts.difference.textContent = isShorter ? "the base goes on" : `differs from the base at word ${word}`;
    const mark = document.createElement("mark");
    mark.textContent = this.answer.text.slice(start, end);
    this.#parts.answer.replaceChildren(this.answer.text.slice(0, start), mark, this.answer.text.slice(end));
  }

  #drawNow() {
    const { answer } = this;
    const { state, rate, first, tokens, "prompt-tokens": prompt, stop, error, experts } = this.#parts;
    const written = this.#text.length;
    if (answer.text.length > written) this.#text.appendData(answer.text.slice(written));
    state.textContent = answer.state === "finished" ? words.finish(answer.finishReason) : answer.state;
    state.className = `state dot ${LOOKS[answer.state]}`;
    rate.textContent = words.rate(answer.tokensPerSecond);
    first.textContent = words.duration(answer.firstAfterMs);
    tokens.textContent = answer.numTokens || "–";
    prompt.textContent = answer.usage?.prompt_tokens ?? "–";
    stop.disabled = answer.isOver;
    if (answer.isOver && answer.experts?.layers.length > 0 && !experts.hasChildNodes()) {
      experts.append(heatMap(new ExpertUse(answer.experts)));
    }
    error.hidden = answer.error === "";
    error.textContent = answer.error;
  }

  async #copy() {
    const { copy, answer } = this.#parts;
    try {
      await navigator.clipboard.writeText(this.answer.text);
      copy.textContent = "Copied";
    } catch {
      // a page that is neither local nor on HTTPS has no clipboard
      getSelection().selectAllChildren(answer);
      copy.textContent = "Selected";
    }
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  }
}
