"use strict";
/* The map that `rayemb index map` made: drawn here, computed there. */
const PALETTE = ["#4f8ef7", "#f2803c", "#2fae66", "#d94f8f", "#a678f0", "#c9a227", "#2bb3c0", "#e0524d"];
const OTHERS = "#8a8a99";
const RAMP = [[84, 84, 214], [43, 159, 199], [63, 191, 127], [227, 194, 46]];
const REACH = 12;  // pixels from a point that still mean it
let points = null;           // the answer of /v1/map
let colours = [];            // of each point
let view = { zoom: 1, x: 0.5, y: 0.5 };  // the middle of what is seen
let chosen = -1;             // the point that is told

async function openMap() {
  $("map-note").textContent = "Loading…";
  try {
    points = await send("v1/map");
  } catch (problem) {
    points = null;
    $("map-body").hidden = true;
    $("map-note").textContent = problem.message;
    return;
  }
  const kept = points.neighbours_kept === null ? "" : " " + Math.round(points.neighbours_kept * 100) + " % of nearest neighbours are neighbours here.";
  $("map-note").textContent = points.ids.length.toLocaleString("en") + " of " + points.rows.toLocaleString("en")
    + " items of index " + points.index_version + ", by " + points.method.toUpperCase() + "." + kept
    + (about && about.live ? " What was written since it was built is not on it." : "");
  $("map-body").hidden = false;
  const columns = Object.keys(points.columns), before = $("colour").value;
  choices($("colour"), ["", ...columns], ["nothing", ...columns]);
  $("colour").value = columns.includes(before) ? before : columns.find((name) => groups(name).length > 1 && groups(name).length <= PALETTE.length) || "";
  choose(-1);
  paint();
}

/* The values of a column, the most frequent first. */
function groups(column) {
  const counts = new Map();
  for (const value of points.columns[column]) if (value !== null) counts.set(value, (counts.get(value) || 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]);
}

function paint() {
  const column = $("colour").value, values = column ? points.columns[column] : [], found = column ? groups(column) : [];
  const kind = types[column], numbers = kind === "timestamp" ? values.map((value) => value === null ? null : Date.parse(value)) : values;
  let legend;
  if (["integer", "number", "timestamp"].includes(kind) && found.length > PALETTE.length) {
    const there = numbers.filter((value) => value !== null);
    const low = there.reduce((a, b) => Math.min(a, b)), high = there.reduce((a, b) => Math.max(a, b));
    const ends = [low, high].map((value) => values[numbers.indexOf(value)]);
    colours = numbers.map((value) => value === null ? OTHERS : ramp(high > low ? (value - low) / (high - low) : 0));
    legend = [[ramp(0), shown(ends[0])], [ramp(0.5), "to"], [ramp(1), shown(ends[1])]];
  } else {
    const own = new Map(found.slice(0, PALETTE.length).map(([value], i) => [value, PALETTE[i]]));
    colours = points.ids.map((_, i) => column ? own.get(values[i]) || OTHERS : PALETTE[0]);
    legend = [...own].map(([value, colour]) => [colour, shown(value)]);
    if (found.length > own.size) legend.push([OTHERS, (found.length - own.size) + " others"]);
  }
  if (column && values.includes(null)) legend.push([OTHERS, "missing"]);
  $("legend").replaceChildren(...legend.map(([colour, text]) => {
    const entry = make("li"), dot = make("i");
    dot.style.background = colour;
    entry.append(dot, text);
    return entry;
  }));
  drawMap();
}

function ramp(share) {
  const at = share * (RAMP.length - 1), i = Math.min(Math.floor(at), RAMP.length - 2);
  return "rgb(" + RAMP[i].map((value, part) => Math.round(value + (RAMP[i + 1][part] - value) * (at - i))).join(" ") + ")";
}

function place(i) {
  const canvas = $("map"), width = canvas.clientWidth, height = canvas.clientHeight;
  const unit = (Math.min(width, height) - 32) * view.zoom;
  return [width / 2 + (points.x[i] - view.x) * unit, height / 2 - (points.y[i] - view.y) * unit, unit];
}

function drawMap() {
  const canvas = $("map"), width = canvas.parentElement.clientWidth;
  if (!points || !$("mapping").open || !width) return;
  const height = Math.round(Math.min(560, Math.max(300, width * 0.6))), ratio = window.devicePixelRatio || 1;
  canvas.style.height = height + "px";
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d"), ink = getComputedStyle(document.body).color, radius = points.ids.length > 1500 ? 3 : 4.5;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const byColour = new Map(), ringed = [];
  for (let i = 0; i < points.ids.length; i++) {
    if (!byColour.has(colours[i])) byColour.set(colours[i], []);
    byColour.get(colours[i]).push(i);
    if (i === chosen || shownIds.has(points.ids[i])) ringed.push(i);
  }
  pen.globalAlpha = 0.82;
  for (const [colour, members] of byColour) {
    pen.fillStyle = colour;
    pen.beginPath();
    for (const i of members) {
      const [x, y] = place(i);
      pen.moveTo(x + radius, y);
      pen.arc(x, y, radius, 0, 2 * Math.PI);
    }
    pen.fill();
  }
  pen.globalAlpha = 1;
  pen.strokeStyle = ink;
  for (const i of ringed) {
    const [x, y] = place(i);
    pen.lineWidth = i === chosen ? 2.5 : 1.5;
    pen.beginPath();
    pen.arc(x, y, radius + (i === chosen ? 4 : 2), 0, 2 * Math.PI);
    pen.stroke();
  }
}

function nearest(x, y) {
  let best = -1, least = REACH * REACH;
  for (let i = 0; i < points.ids.length; i++) {
    const [px, py] = place(i), far = (px - x) ** 2 + (py - y) ** 2;
    if (far < least) { best = i; least = far; }
  }
  return best;
}

function captionAt(i) {
  const payload = Object.fromEntries(Object.entries(points.columns).map(([name, values]) => [name, values[i]]));
  return captionOf({ id: points.ids[i], payload })[1];
}

/* Tells a point: its picture, its caption, the column that it is coloured by. */
function choose(i) {
  if (i === chosen && i >= 0) return;
  chosen = i;
  const tip = $("map-tip"), canvas = $("map");
  canvas.classList.toggle("on", i >= 0);
  tip.hidden = i < 0;
  tip.replaceChildren();
  drawMap();
  if (i < 0) return;
  const column = $("colour").value, value = column ? points.columns[column][i] : null;
  if (about && about.has_images) {
    const image = make("img");
    image.alt = "";
    image.addEventListener("error", () => image.remove());
    image.src = "v1/items/" + encodeURIComponent(points.ids[i]) + "/image?v=" + encodeURIComponent(points.index_version);
    tip.append(image);
  }
  tip.append(make("div", "", captionAt(i)));
  if (value !== null) tip.append(make("small", "", column + ": " + shown(value)));
  const [x, y] = place(i);
  tip.style.left = Math.max(0, x > canvas.clientWidth / 2 ? x - 148 - 14 : x + 14) + "px";
  tip.style.top = Math.max(0, Math.min(y - 20, canvas.clientHeight - 180)) + "px";
}

function searchPoint(i) {
  if (i >= 0) searchLike({ id: points.ids[i], caption: captionAt(i) });
}

/* The next point that way: near, and not far off the line. The one in the middle if none is told. */
function step(right, up) {
  let best = -1, least = Infinity;
  for (let i = 0; i < points.ids.length; i++) {
    if (i === chosen) continue;
    const dx = points.x[i] - (chosen < 0 ? view.x : points.x[chosen]), dy = points.y[i] - (chosen < 0 ? view.y : points.y[chosen]);
    const ahead = dx * right + dy * up, aside = Math.abs(dx * up) + Math.abs(dy * right);
    const far = chosen < 0 ? dx * dx + dy * dy : ahead > 0 ? ahead + 2 * aside : Infinity;
    if (far < least) { best = i; least = far; }
  }
  if (best < 0) return;
  const [x, y] = place(best);
  if (x < 0 || y < 0 || x > $("map").clientWidth || y > $("map").clientHeight) { view.x = points.x[best]; view.y = points.y[best]; }
  choose(best);
}

function zoom(factor) {
  if (chosen >= 0) { view.x = points.x[chosen]; view.y = points.y[chosen]; }
  view.zoom = Math.max(1, Math.min(64, view.zoom * factor));
  if (view.zoom === 1) view = { zoom: 1, x: 0.5, y: 0.5 };
  choose(-1);
}

const KEYS = {
  ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, 1), ArrowDown: () => step(0, -1),
  Enter: () => searchPoint(chosen), "+": () => zoom(1.6), "-": () => zoom(1 / 1.6), Escape: () => choose(-1),
};
let drag = null;  // where a press began, and whether it became a drag
$("map").addEventListener("pointerdown", (event) => {
  drag = { x: event.offsetX, y: event.offsetY, moved: false };
  $("map").setPointerCapture(event.pointerId);
});
$("map").addEventListener("pointermove", (event) => {
  if (!points) return;
  if (!drag) { choose(nearest(event.offsetX, event.offsetY)); return; }
  const dx = event.offsetX - drag.x, dy = event.offsetY - drag.y;
  if (!drag.moved && dx * dx + dy * dy < 16) return;
  const unit = place(0)[2];
  view.x -= dx / unit;
  view.y += dy / unit;
  drag = { x: event.offsetX, y: event.offsetY, moved: true };
  choose(-1);
});
$("map").addEventListener("pointerup", (event) => {
  const press = drag;
  drag = null;
  if (points && press && !press.moved) searchPoint(nearest(event.offsetX, event.offsetY));
});
$("map").addEventListener("pointercancel", () => { drag = null; });
$("map").addEventListener("pointerleave", () => { if (points && !drag) choose(-1); });
$("map").addEventListener("keydown", (event) => {
  if (!points || !KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  KEYS[event.key]();
});
$("colour").addEventListener("change", paint);
$("zoom-in").addEventListener("click", () => zoom(1.6));
$("zoom-out").addEventListener("click", () => zoom(1 / 1.6));
$("zoom-whole").addEventListener("click", () => { view = { zoom: 1, x: 0.5, y: 0.5 }; choose(-1); });
$("mapping").addEventListener("toggle", () => { if ($("mapping").open) openMap(); });
new ResizeObserver(drawMap).observe($("map-frame"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
