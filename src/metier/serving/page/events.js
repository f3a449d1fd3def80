/* Server-sent events, cut out of text that comes in pieces of any size. */

export class Events {
  #rest = "";

  /** Take the next piece; returns the data of the events that it completes. */
  read(text) {
    // a lone "\r" at the end may be half of a line's end
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    const found = [];
    let data = [];
    let begin = 0;
    lines.slice(0, -1).forEach((line, index) => {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      if (line !== "") return;
      if (data.length > 0) found.push(data.join("\n"));
      data = [];
      begin = index + 1;
    });
    this.#rest = lines.slice(begin).join("\n");
    return found;
  }
}
