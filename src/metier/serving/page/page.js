/* The page at `/`: ties the list of models, the question and the answers to the server. */

import { Asking } from "./asking.js";
import { Choice } from "./choice.js";
import { ramp } from "./heatmap.js";
import { readQuestion, watchQuestion } from "./question.js";
import { readHealth, readModels, Refused, useKey } from "./server.js";
import { number } from "./words.js";

const HEALTH_EVERY_MS = 5000;

const byId = (id) => document.getElementById(id);
const choice = new Choice();
let base = null;
let asking = null;

async function showModels() {
  try {
    const models = await readModels();
    base = models.base;
    byId("base").textContent = base;
    byId("num-deltas").textContent = number(models.deltas.length, "delta");
    choice.show(models);
    byId("key").hidden = true;
    byId("trouble").hidden = true;
    if (!byId("question").hidden) return;
    byId("question").hidden = false;
    byId("prompt").focus();
  } catch (error) {
    if (askForKey(error) || base !== null) return;
    byId("trouble").textContent = error instanceof Refused ? error.message : "The server cannot be reached.";
    byId("trouble").hidden = false;
  }
}

/** Show the field for the API key if it was that which the server missed; says whether it was. */
function askForKey(error) {
  if (error.status !== 401) return false;
  byId("key-said").textContent = byId("key-text").value === "" ? "This server asks for one." : "The server does not take this one.";
  byId("key").hidden = false;
  byId("key-text").focus();
  return true;
}

async function showHealth() {
  const shown = byId("health");
  let [words, look] = ["not reachable", "bad"];
  try {
    const { isReady, reason } = await readHealth();
    [words, look] = isReady ? ["ready", "good"] : [`not ready: ${reason}`, "bad"];
    if (isReady && base === null && byId("key").hidden) await showModels();
  } catch {
    // no answer at all: the words above say so
  }
  if (shown.textContent !== words) shown.textContent = words;
  shown.className = `dot ${look}`;
}

async function submit() {
  const models = choice.chosen;
  if (models.length === 0) {
    byId("progress").textContent = "Choose at least one model.";
    return;
  }
  asking?.stopAll();
  const mine = new Asking(models, base, () => mine === asking && showProgress());
  asking = mine;
  byId("columns").replaceChildren(...[...mine.columns.values()].map((column) => column.root));
  byId("answers").hidden = false;
  byId("legend").hidden = true;
  showProgress();
  await mine.run(readQuestion()).catch(askForKey);
}

function showProgress() {
  const { answers } = asking;
  const numOver = answers.filter((answer) => answer.isOver).length;
  const numFailed = answers.filter((answer) => answer.state === "failed").length;
  const failed = numFailed > 0 ? `, ${numFailed} failed` : "";
  byId("progress").textContent = `${numOver} of ${number(answers.length, "answer")} done${failed}`;
  byId("stop-all").disabled = asking.isOver;
  byId("legend").hidden = !answers.some((answer) => answer.experts);
  if (answers.some((answer) => answer.wasRefusedForKey)) askForKey({ status: 401 });
}

byId("legend").querySelector(".ramp").append(ramp());
watchQuestion();
byId("question").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("stop-all").addEventListener("click", () => asking?.stopAll());
byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key-text").value);
  showModels();
});
// deltas come and go; a page that is looked at again shows what is served now
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  showModels();
  showHealth();
});
setInterval(() => document.hidden || showHealth(), HEALTH_EVERY_MS);
showModels().then(showHealth);
