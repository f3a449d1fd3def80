/* Figures and outcomes as a person reads them. */

export function rate(tokensPerSecond) {
  if (tokensPerSecond === null) return "–";
  return tokensPerSecond.toFixed(tokensPerSecond >= 100 ? 0 : tokensPerSecond >= 10 ? 1 : 2);
}

export function duration(milliseconds) {
  if (milliseconds === null) return "–";
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(2)} s`;
}

export function share(part) {
  const percent = 100 * part;
  return `${percent.toFixed(percent > 0 && percent < 10 ? 1 : 0)}%`;
}

export function number(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

/** Why an answer ended, from the API's finish reason. */
export function finish(reason) {
  const words = { stop: "finished", length: "cut off at max tokens", cancelled: "stopped by the server" };
  return words[reason] ?? `ended: ${reason}`;
}

/** A refused request: what happened, then what the server said of it. */
export function refusal(status, said) {
  const words = {
    401: "The server asks for an API key; enter it above and ask again.",
    404: "The server does not know this model.",
    413: "The prompt is too large.",
    429: "The server has too much to do; try again later.",
    503: "The server cannot answer now; try again later.",
  };
  const what = words[status] ?? (status >= 500 ? "The server failed." : "The server refused the request.");
  return said ? `${what}\n${said}` : `${what} (HTTP status ${status})`;
}
