/* Where an answer leaves another one's words. */

/**
 * The first word in which `text` differs from `other`, spaces aside, or null where none does.
 * `start` and `end` are its place in `text`, both at the end where `text` has run out; `word` counts from 1.
 */
export function firstDifference(text, other) {
  const mine = [...text.matchAll(/\S+/g)];
  const others = other.match(/\S+/g) ?? [];
  const index = mine.findIndex((word, at) => word[0] !== others[at]);
  if (index >= 0) {
    const start = mine[index].index;
    return { start, end: start + mine[index][0].length, word: index + 1 };
  }
  return mine.length === others.length ? null : { start: text.length, end: text.length, word: mine.length + 1 };
}
