"use strict";
/* What GET /v1/index tells, for people. */
function showIndex() {
  if (!about || !$("statistics").open) return;
  const facts = [
    ["Collection", about.collection + ", version " + about.version],
    ["Index version", about.index_version],
    ["Model", about.model_digest],
    ["Items", about.rows.toLocaleString("en")],
    ["Dimensions", String(about.dim)],
    ["Type", about.factory + ", " + about.metric.replaceAll("_", " ")],
    ["Effort", Object.entries(about.effort).map(([name, value]) => name + " " + value).join(", ")],
    ["Served as", about.topology],
  ];
  if (about.recall.recall !== undefined) facts.push(["Recall@" + about.recall.k, about.recall.recall.toFixed(3) + " against exact search, " + about.recall.queries + " queries"]);
  if (about.words) facts.push(["Words of", about.words]);
  facts.push(["Updates waiting", about.live ? about.updates_waiting.toLocaleString("en") : "none are taken"]);
  $("index-facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
  $("shards").replaceChildren(...about.shards.map((shard) => {
    const row = make("tr");
    row.append(make("td", "", shard.name), make("td", "number", shard.rows.toLocaleString("en")));
    return row;
  }));
  $("curve-part").hidden = !about.curve.length;
  if (about.curve.length) $("curve-box").replaceChildren(curve(about.curve));
}

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

/* Round numbers from low to high, four or so. */
function ticks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((part) => part * power).find((each) => each >= rough * 0.7);
  return Array.from({ length: Math.floor((high - low) / step + 1e-9) + 1 }, (_, i) => low + i * step);
}

/* Recall against milliseconds a query. Of the effort, the parts that differ are named. */
function curve(points) {
  const width = 460, height = 230, left = 44, right = 14, top = 12, bottom = 40;
  const longest = Math.max(...points.map((point) => point.ms)) * 1.05 || 1;
  const lowest = Math.max(0, Math.floor(Math.min(...points.map((point) => point.recall), 0.9) * 10) / 10);
  const x = (ms) => left + ms / longest * (width - left - right);
  const y = (recall) => top + (1 - recall) / (1 - lowest) * (height - top - bottom);
  const varied = Object.keys(points[0].effort).filter((name) => new Set(points.map((point) => point.effort[name])).size > 1);
  const told = points.map((point) => "recall " + point.recall.toFixed(3) + " in " + point.ms.toPrecision(3) + " ms"
    + varied.map((name) => ", " + name + " " + point.effort[name]).join(""));
  const chart = svg("svg", { id: "curve", viewBox: "0 0 " + width + " " + height, role: "img", "aria-label": "Recall against milliseconds a query: " + told.join("; ") });
  for (const recall of ticks(lowest, 1)) {
    chart.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(recall), y2: y(recall) }));
    chart.append(svg("text", { x: left - 6, y: y(recall) + 4, "text-anchor": "end" }, shown(recall)));
  }
  for (const ms of ticks(0, longest)) chart.append(svg("text", { x: x(ms), y: height - bottom + 16, "text-anchor": "middle" }, shown(ms)));
  chart.append(svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, "milliseconds a query, one thread"));
  chart.append(svg("polyline", { class: "line", points: points.map((point) => x(point.ms) + "," + y(point.recall)).join(" ") }));
  points.forEach((point, i) => {
    const mark = svg("circle", { class: "mark", cx: x(point.ms), cy: y(point.recall), r: 4 });
    mark.append(svg("title", {}, told[i]));
    chart.append(mark);
  });
  return chart;
}

$("statistics").addEventListener("toggle", () => {
  if ($("statistics").open) lookAtIndex().catch((problem) => show("error", problem.message));
});
