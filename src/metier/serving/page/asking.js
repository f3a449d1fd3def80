/* One question to all chosen models: their columns, how far they are, and stopping them. */

import { Answer } from "./answer.js";
import { Column } from "./column.js";
import { ask, stop } from "./server.js";

export class Asking {
  #id = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  #connection = new AbortController();
  #onChange;

  /** `onChange` is called whenever an answer begins or ends. */
  constructor(models, base, onChange) {
    const now = performance.now();
    this.#onChange = onChange;
    this.columns = new Map(
      models.map((model) => {
        const answer = new Answer(model, now);
        return [model, new Column(answer, { isBase: model === base, onStop: () => this.#stop(model) })];
      }),
    );
  }

  get answers() {
    return [...this.columns.values()].map((column) => column.answer);
  }

  get isOver() {
    return this.answers.every((answer) => answer.isOver);
  }

  /** Send the question and take the answers in until all are over. */
  async run(question) {
    try {
      const models = [...this.columns.keys()];
      for await (const piece of ask({ id: this.#id, models, ...question }, this.#connection.signal)) {
        this.#change(piece.model, (answer) => answer.take(piece, performance.now()));
      }
      this.#changeAll((answer) => answer.fail("The connection closed before the answer's end."));
    } catch (error) {
      const isServers = error.status !== undefined;
      this.#changeAll((answer) => answer.fail(isServers ? error.message : `The connection to the server broke.\n${error.message}`));
      if (isServers) throw error;
    }
  }

  stopAll() {
    this.#changeAll((answer) => answer.stop());
    this.#connection.abort();
  }

  #stop(model) {
    this.#change(model, (answer) => answer.stop());
    // the page shows it as stopped either way; should this fail, the server finds out when the connection closes
    stop(this.#id, model).catch(() => {});
  }

  #changeAll(change) {
    for (const model of this.columns.keys()) this.#change(model, change);
  }

  #change(model, change) {
    const column = this.columns.get(model);
    const { state } = column.answer;
    change(column.answer);
    column.changed();
    if (column.answer.state === state) return;
    if (column.answer.state === "finished") this.#compare(column);
    this.#onChange();
  }

  /** Mark where finished answers leave the base's, now that `column` is finished too. */
  #compare(column) {
    const columns = [...this.columns.values()];
    const base = columns.find((other) => other.isBase);
    if (base?.answer.state !== "finished") return;
    for (const other of column === base ? columns : [column]) {
      if (other !== base && other.answer.state === "finished") other.compare(base.answer.text);
    }
  }
}
