/* Which experts an answer used, in figures and words. Knows nothing of how they are shown. */

import { number, share } from "./words.js";

// Upper ends of the shades in multiples of even use: a fixed scale, so that maps can be compared with each other.
export const SHADE_ENDS = [0, 0.5, 1, 1.5, 2, 3, 4, 6, Infinity];

export class ExpertUse {
  /** From the server's `{layers, counts, replaced}`. */
  constructor({ layers, counts, replaced }) {
    this.layers = layers;
    this.counts = counts;
    this.numExperts = Math.max(...counts.map((row) => row.length));
    this.totals = counts.map((row) => row.reduce((sum, count) => sum + count, 0));
    this.own = counts.map((_, row) => new Set(replaced?.[row] ?? []));
    this.numOwn = this.own.reduce((sum, experts) => sum + experts.size, 0);
  }

  /** Share of a layer's uses that went to one expert. */
  share(row, expert) {
    return this.counts[row][expert] / (this.totals[row] || 1);
  }

  shade(row, expert) {
    const multiple = this.share(row, expert) * this.counts[row].length;
    // less a rounding error's width, so that exactly even use is on the same side everywhere
    return SHADE_ENDS.findIndex((end) => multiple - 1e-9 <= end);
  }

  cellWords(row, expert) {
    const own = this.own[row].has(expert) ? ", the delta’s own" : "";
    const uses = `${this.counts[row][expert]} of ${number(this.totals[row], "use")}`;
    return `layer ${this.layers[row]}, expert ${expert}${own}: ${share(this.share(row, expert))} (${uses})`;
  }

  /** The map in a sentence: how much the delta's own experts were used, or which expert was used most. */
  summary() {
    if (this.numOwn === 0) return `Used most: ${this.cellWords(...this.#busiest())}`;
    const uses = this.counts.flatMap((counts, row) => counts.filter((_, expert) => this.own[row].has(expert)));
    const used = uses.reduce((sum, count) => sum + count, 0);
    const all = this.totals.reduce((sum, count) => sum + count, 0) || 1;
    return `The delta’s own ${number(this.numOwn, "expert")} took ${share(used / all)} of all uses.`;
  }

  #busiest() {
    let best = [0, 0];
    this.counts.forEach((counts, row) =>
      counts.forEach((_, expert) => {
        if (this.share(row, expert) > this.share(...best)) best = [row, expert];
      }),
    );
    return best;
  }
}
