/* What the browser keeps between visits. One that is set to keep nothing throws; then nothing is remembered. */

/** The value kept under `key` in `area`, "localStorage" or "sessionStorage", or null. */
export function recall(area, key) {
  try {
    return JSON.parse(globalThis[area].getItem(key));
  } catch {
    return null;
  }
}

export function keep(area, key, value) {
  try {
    globalThis[area].setItem(key, JSON.stringify(value));
  } catch {
    // the page works without
  }
}
