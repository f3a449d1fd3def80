/* Which models are asked: a list to search and tick, remembered in the address and in the browser. */

import { keep, recall } from "./storage.js";

const STORED = "metier.models";
const SEARCH_FROM = 10;
const NUM_FIRST_DELTAS = 2;

export class Choice {
  #served = [];
  #chosen = remembered();
  #list = document.getElementById("models");
  #search = document.getElementById("search");

  constructor() {
    this.#list.addEventListener("change", ({ target }) => this.#choose([target], target.checked));
    this.#list.addEventListener("keydown", (event) => this.#move(event));
    this.#search.addEventListener("input", () => this.#filter());
    this.#search.addEventListener("keydown", (event) => this.#fromSearch(event));
    document.getElementById("choose-all").addEventListener("click", () => this.#choose(this.#shown(), true));
    document.getElementById("choose-none").addEventListener("click", () => this.#choose(this.#boxes(), false));
    addEventListener("hashchange", () => this.#reread());
  }

  /** The chosen models that are served, the base first. */
  get chosen() {
    return this.#served.filter((name) => this.#chosen.has(name));
  }

  /** Show what is served now. A chosen model that is not stays chosen, should it come back. */
  show({ base, deltas }) {
    const served = [base, ...deltas];
    // a list that is the same is left as it is, and the focus with it
    if (served.join("\n") === this.#served.join("\n")) return;
    this.#served = served;
    this.#chosen ??= new Set(this.#served.slice(0, 1 + NUM_FIRST_DELTAS));
    const template = document.getElementById("model-template").content;
    const labels = this.#served.map((name) => {
      const label = template.firstElementChild.cloneNode(true);
      label.querySelector(".name").textContent = name;
      label.querySelector(".tag").hidden = name !== base;
      const box = label.querySelector("input");
      box.value = name;
      box.checked = this.#chosen.has(name);
      return label;
    });
    this.#list.replaceChildren(...labels);
    this.#search.hidden = this.#served.length < SEARCH_FROM;
    this.#filter();
    this.#count();
  }

  #choose(boxes, isChosen) {
    for (const box of boxes) {
      box.checked = isChosen;
      if (isChosen) this.#chosen.add(box.value);
      else this.#chosen.delete(box.value);
    }
    // whoever takes all away starts anew, with models that are not served any more gone too
    if (!isChosen && this.chosen.length === 0) this.#chosen.clear();
    this.#count();
    remember(this.#chosen);
  }

  #reread() {
    this.#chosen = inAddress() ?? this.#chosen;
    for (const box of this.#boxes()) box.checked = this.#chosen.has(box.value);
    this.#count();
  }

  #filter() {
    const sought = this.#search.value.trim().toLowerCase();
    for (const box of this.#boxes()) box.parentElement.hidden = !box.value.toLowerCase().includes(sought);
  }

  #move(event) {
    const shown = this.#shown();
    const at = shown.indexOf(event.target);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    if (to < 0 && !this.#search.hidden) this.#search.focus();
    else shown[to]?.focus();
  }

  #fromSearch(event) {
    const [first] = this.#shown();
    if (event.key === "ArrowDown") first?.focus();
    else if (event.key === "Enter" && !event.ctrlKey && !event.metaKey && first) this.#choose([first], !first.checked);
    else return;
    event.preventDefault();
  }

  #count() {
    document.getElementById("num-chosen").textContent = `${this.chosen.length} of ${this.#served.length} chosen`;
  }

  #boxes() {
    return [...this.#list.querySelectorAll("input")];
  }

  #shown() {
    return this.#boxes().filter((box) => !box.parentElement.hidden);
  }
}

/** The names in the address, or else those kept by the browser, or null where neither has any. */
function remembered() {
  const stored = recall("localStorage", STORED);
  return inAddress() ?? (Array.isArray(stored) ? new Set(stored) : null);
}

function inAddress() {
  const names = new URLSearchParams(location.hash.slice(1)).getAll("m");
  return names.length > 0 ? new Set(names) : null;
}

function remember(chosen) {
  const names = [...chosen];
  history.replaceState(null, "", `#${new URLSearchParams(names.map((name) => ["m", name]))}`);
  keep("localStorage", STORED, names);
}
