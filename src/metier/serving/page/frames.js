/* Draws at most once a frame, however many pieces arrive in between: streaming never lays the page out twice. */

const due = new Set();

/** Have `draw` called in the next frame, once. */
export function nextFrame(draw) {
  if (due.size === 0) requestAnimationFrame(drawAll);
  due.add(draw);
}

function drawAll() {
  const draws = [...due];
  due.clear();
  for (const draw of draws) {
    try {
      draw();
    } catch (error) {
      // one column that cannot be drawn keeps no other from it
      reportError(error);
    }
  }
}
