/* What the page says to the server. Every address is relative, so that it also works behind a proxy's prefix. */

import { Events } from "./events.js";
import { keep, recall } from "./storage.js";
import { refusal } from "./words.js";

const KEY = "metier.key";
let key = recall("sessionStorage", KEY);

/** The server answered, and not with what was asked for. */
export class Refused extends Error {
  constructor(status, said) {
    super(refusal(status, said));
    this.status = status;
  }
}

/** Use this API key from now on, for as long as the tab is open. */
export function useKey(text) {
  key = text;
  keep("sessionStorage", KEY, text);
}

/** The base and its deltas, as `{base, deltas}` of names. */
export async function readModels() {
  const response = await fetch("v1/models", { headers: headers(), cache: "no-store" });
  if (!response.ok) throw await refused(response);
  const { data } = await response.json();
  const names = (isDelta) => data.filter((model) => Boolean(model.parent) === isDelta).map((model) => model.id);
  return { base: names(false)[0], deltas: names(true) };
}

/** Whether the server answers questions, and why if it does not. */
export async function readHealth() {
  const response = await fetch("health", { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(5000) });
  if (response.ok) return { isReady: true };
  const { reason } = await response.json().catch(() => ({}));
  return { isReady: false, reason: reason ?? `HTTP status ${response.status}` };
}

/**
 * Ask several models the same over one connection; a browser has only six to a server.
 * Yields `{model, status}` when a model's answer begins, `{model, text}` for pieces of it and `{model, end}` at its end.
 */
export async function* ask({ id, path, models, body }, signal) {
  const response = await post("page/ask", { id, path, models, body }, signal);
  if (!response.ok) throw await refused(response);
  const events = new Events();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    for (const data of events.read(piece.value)) yield JSON.parse(data);
  }
}

/** End one model's answer of those asked together. */
export async function stop(id, model) {
  await post("page/stop", { id, model });
}

/** What the server said was wrong, from an error in OpenAI's format. */
export function messageOf(text) {
  try {
    const { error, detail } = JSON.parse(text);
    return error?.message ?? (typeof detail === "string" ? detail : "");
  } catch {
    return "";
  }
}

function post(path, body, signal) {
  const sent = { ...headers(), "Content-Type": "application/json" };
  return fetch(path, { method: "POST", headers: sent, body: JSON.stringify(body), signal });
}

async function refused(response) {
  return new Refused(response.status, messageOf(await response.text()));
}

function headers() {
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}
