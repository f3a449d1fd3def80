/*
 * The small heat map of expert use: rows are layers, columns experts, darker where more used, the delta's own outlined.
 * A path a shade and not an element a cell: a map of 58 layers by 256 experts then costs a dozen elements.
 */

import { SHADE_ENDS } from "./experts.js";

const NARROWEST_CELL_PX = 3.2;
const EXPERTS_WITH_GAPS = 48;

/** The map with its axes, what is under the pointer in words, and all numbers as a table. */
export function heatMap(use) {
  const figure = element("figure", "map");
  const svg = cells(use);
  const scroll = element("div", "scroll");
  scroll.append(svg, axis(["expert 0", String(use.numExperts - 1)], "axis"));
  svg.style.minWidth = `${NARROWEST_CELL_PX * use.numExperts}px`;
  scroll.lastChild.style.minWidth = svg.style.minWidth;
  figure.append(axis([use.layers[0], use.layers.at(-1)].map(String), "layers"), scroll);
  figure.firstChild.style.height = svg.style.height;

  const readout = element("p", "readout");
  readout.textContent = use.summary();
  follow(svg, use, readout);
  const parts = document.createDocumentFragment();
  parts.append(figure, readout, numbers(use));
  return parts;
}

/** The shades' key: ends in multiples of even use. */
export function ramp() {
  const parts = document.createDocumentFragment();
  SHADE_ENDS.forEach((end, shade) => {
    const step = element("i", `shade-${shade}`);
    step.textContent = end === Infinity ? "more" : end === 0 ? "none" : `${end}×`;
    parts.append(step);
  });
  return parts;
}

function cells(use) {
  const svg = svgElement("svg", use.numExperts <= EXPERTS_WITH_GAPS ? "cells" : "cells dense");
  svg.setAttribute("viewBox", `0 0 ${use.numExperts} ${use.counts.length}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("tabindex", "0");
  const size = `Expert use, ${use.counts.length} layers by ${use.numExperts} experts.`;
  svg.setAttribute("aria-label", `${size} ${use.summary()} Arrow keys read single cells; the table below has all.`);
  svg.style.height = `${Math.round(use.counts.length * Math.max(6, Math.min(13, 180 / use.counts.length)))}px`;

  const shades = SHADE_ENDS.map(() => "");
  let own = "";
  use.counts.forEach((counts, row) =>
    counts.forEach((_, expert) => {
      shades[use.shade(row, expert)] += square(row, expert);
      if (use.own[row].has(expert)) own += square(row, expert);
    }),
  );
  svg.append(svgElement("title"));
  shades.forEach((squares, shade) => svg.append(path(`shade-${shade}`, squares)));
  svg.append(path("own", own), path("cursor", ""));
  return svg;
}

/** Say in `readout` what the pointer or the arrow keys are on. */
function follow(svg, use, readout) {
  let cell = [0, 0];
  const show = (row, expert) => {
    if (use.counts[row]?.[expert] === undefined) return;
    cell = [row, expert];
    const words = use.cellWords(row, expert);
    readout.textContent = words;
    svg.querySelector("title").textContent = words;
    svg.querySelector(".cursor").setAttribute("d", square(row, expert));
  };
  const leave = () => {
    cell = [0, 0];
    readout.textContent = use.summary();
    svg.querySelector(".cursor").setAttribute("d", "");
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const along = (at, start, length, count) => Math.floor(((at - start) / length) * count);
    show(
      along(event.clientY, box.top, box.height, use.counts.length),
      along(event.clientX, box.left, box.width, use.numExperts),
    );
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("focus", () => readout.setAttribute("aria-live", "polite"));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(cell[0] + step[0], cell[1] + step[1]);
  });
}

/** A table of all numbers, made when it is first opened. */
function numbers(use) {
  const details = element("details", "numbers-table");
  const summary = element("summary");
  summary.textContent = "Numbers";
  const scroll = element("div", "scroll");
  details.append(summary, scroll);
  details.addEventListener("toggle", () => scroll.append(table(use)), { once: true });
  return details;
}

function table(use) {
  const made = element("table");
  const own = use.numOwn > 0 ? "; • is the delta’s own" : "";
  made.createCaption().textContent = `Uses of each expert; rows are layers, columns experts${own}`;
  const head = made.createTHead().insertRow();
  head.append(heading("layer", "col"));
  for (let expert = 0; expert < use.numExperts; expert++) head.append(heading(String(expert), "col"));
  const body = made.createTBody();
  use.counts.forEach((counts, row) => {
    const line = body.insertRow();
    line.append(heading(String(use.layers[row]), "row"));
    counts.forEach((count, expert) => {
      const isOwn = use.own[row].has(expert);
      const cell = line.insertCell();
      cell.textContent = isOwn ? `• ${count}` : String(count);
      cell.className = isOwn ? "own" : "";
    });
  });
  return made;
}

function axis(words, name) {
  const made = element("div", name);
  made.setAttribute("aria-hidden", "true");
  for (const word of words) made.append(Object.assign(element("span"), { textContent: word }));
  return made;
}

function heading(text, scope) {
  return Object.assign(element("th"), { textContent: text, scope });
}

function square(row, expert) {
  return `M${expert} ${row}h1v1h-1z`;
}

function path(name, d) {
  const made = svgElement("path", name);
  made.setAttribute("d", d);
  return made;
}

function svgElement(tag, name = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  if (name !== "") made.setAttribute("class", name);
  return made;
}

function element(tag, name = "") {
  const made = document.createElement(tag);
  if (name !== "") made.className = name;
  return made;
}
