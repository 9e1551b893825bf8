"use strict";
const $ = (id) => document.getElementById(id);
const CAPTIONS = ["caption", "text", "title", "name", "label"];
let about = null;            // what /v1/index tells
let types = {};              // payload column -> type
let picture = null;          // File or Blob to search by
let previewUrl = null;
let example = null;          // {id, caption} of an item to search by
let seen = null;             // version of the updates with what was written here
let running = null;          // AbortController of the search under way
let shownIds = new Set();    // what the last search found

/* Everything that comes from data goes through textContent or an attribute: never through innerHTML. */
function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function show(id, message) {
  $(id).textContent = message || "";
  $(id).hidden = !message;
}

/* The answer to a request; an Error with the service's own words if it is none. */
async function send(path, body, signal) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { signal, ...(body === undefined ? {} : post) });
  } catch (problem) {
    throw new Error("The server does not answer. Is it still running?");
  }
  let answer = null;
  try { answer = await response.json(); } catch (problem) { /* a proxy's page: told below */ }
  if (response.ok && answer) return answer;
  const told = answer && answer.error;
  const error = new Error(told ? (told.field ? told.field + ": " : "") + told.message : "The server answered with HTTP " + response.status + ".");
  error.field = told && told.field;
  throw error;
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("That picture cannot be read."));
    reader.readAsDataURL(file);
  });
}

function setPicture(file) {
  if (file && file.type && !file.type.startsWith("image/")) {
    show("error", "That file is not a picture.");
    return false;
  }
  if (previewUrl) URL.revokeObjectURL(previewUrl);
  picture = file || null;
  previewUrl = picture ? URL.createObjectURL(picture) : null;
  $("preview").hidden = !picture;
  if (picture) {
    setExample(null);
    $("thumb").src = previewUrl;
    $("filename").textContent = picture.name || "picture";
  } else {
    $("thumb").removeAttribute("src");
    $("file").value = "";
  }
  return true;
}

function setExample(item) {
  example = item;
  $("example").hidden = !item;
  $("example-name").textContent = item ? item.caption : "";
}

async function search(remember) {
  const text = $("text").value.trim();
  show("error"); show("warning");
  if (!text && !picture && !example) {
    $("results").replaceChildren();
    $("status").textContent = "";
    show("error", "Type some words or choose a picture first.");
    $("text").focus();
    return;
  }
  if (remember) saveState();
  if (running) running.abort();
  const own = running = new AbortController();
  $("results").classList.add("busy");
  $("status").textContent = "Searching…";
  try {
    const answer = await ask(text, own.signal);
    if (running === own) render(answer);
  } catch (problem) {
    if (running !== own) return;
    $("results").replaceChildren();
    $("status").textContent = "";
    show("error", problem.message);
  } finally {
    if (running === own) { running = null; $("results").classList.remove("busy"); }
  }
}

async function ask(text, signal) {
  const body = { k: Number($("k").value) }, filter = filterNow();
  if (text) body.text = text;
  if (picture) body.image = await base64(picture);
  if (example) body.positive = [example.id];
  if (filter) body.filter = filter;
  if (seen === null) return send("v1/search", body, signal);
  try {
    return await send("v1/search", { ...body, at_least: seen }, signal);
  } catch (problem) {
    if (problem.field !== "at_least") throw problem;
    seen = null;  // another version answers, with updates of its own
    return send("v1/search", body, signal);
  }
}

function shown(value) {
  // A float32 column has more digits in JSON than it has meaning.
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(6))) : String(value);
}

function captionOf(hit) {
  for (const name of CAPTIONS) {
    if (typeof hit.payload[name] === "string" && hit.payload[name]) return [name, hit.payload[name]];
  }
  const other = Object.entries(hit.payload).find(([name, value]) => types[name] === "string" && value);
  return other || ["id", hit.id];
}

function tile(hit) {
  const item = make("li", "tile"), frame = make("div", "picture");
  const [used, caption] = captionOf(hit);
  if (hit.image_url) {
    const image = make("img");
    image.alt = caption;
    image.loading = "lazy";
    image.addEventListener("error", () => { frame.textContent = "no picture"; });
    image.src = hit.image_url;
    frame.append(image);
  } else {
    frame.textContent = "no picture";
  }
  const bar = make("div", "bar"), fill = make("i");
  fill.style.width = Math.max(0, Math.min(1, hit.score)) * 100 + "%";
  bar.append(fill);
  const body = make("div", "body");
  const title = make("div", "caption", caption);
  title.title = caption;
  body.append(title);
  const facts = Object.entries(hit.payload)
    .filter(([name, value]) => name !== used && value !== null && value !== "" && typeof value !== "object")
    .map(([name, value]) => name + ": " + shown(value));
  if (facts.length) {
    const line = make("div", "facts", facts.join(" · "));
    line.title = hit.id;
    body.append(line);
  }
  const foot = make("div", "foot");
  const score = make("span", "score", hit.score.toFixed(3));
  score.title = "inner product of unit vectors";
  const like = make("button", "like", "Similar");
  like.type = "button";
  like.setAttribute("aria-label", "Similar to " + caption);
  like.addEventListener("click", () => similar(hit, caption));
  foot.append(score, like);
  if (about && about.live) foot.append(deleteButton(hit, caption, item));
  body.append(foot);
  item.append(frame, bar, body);
  return item;
}

/* By its picture, which can be seen then; by its id if it has none. */
async function similar(hit, caption) {
  let found = false;
  if (hit.image_url) {
    try {
      const response = await fetch(hit.image_url);
      if (response.ok) {
        const blob = await response.blob();
        found = setPicture(new File([blob], caption, { type: blob.type }));
      }
    } catch (problem) { /* its id will do */ }
  }
  if (found) startOver(); else searchLike({ id: hit.id, caption });
}

function searchLike(item) {
  setPicture(null);
  setExample(item);
  startOver();
}

function startOver() {
  $("text").value = "";
  window.scrollTo({ top: 0 });
  search(true);
}

function render(answer) {
  $("results").replaceChildren(...answer.hits.map(tile));
  const n = answer.hits.length, t = answer.timings_ms;
  $("status").textContent = n ? n + (n === 1 ? " result" : " results") + " in " + t.total.toFixed(1) + " ms"
    : "Nothing found. Other words, or no filter?";
  names(answer);
  $("timings").textContent = "embed " + t.embed.toFixed(1) + " ms · search " + t.search.toFixed(1) + " ms · total " + t.total.toFixed(1) + " ms";
  show("warning", answer.partial ? "Incomplete: " + answer.missing_shards.join(", ") + " did not answer. Their items are missing here." : "");
  shownIds = new Set(answer.hits.map((hit) => hit.id));
  drawMap();
}

function names(answer) {
  $("version").textContent = answer.index_version;
  $("digest").textContent = answer.model_digest.slice(0, 12);
  $("digest").title = answer.model_digest;
}

/* The query is in the address, so that it can be shared and the back button works; pictures cannot be. */
function saveState() {
  const state = new URLSearchParams();
  const text = $("text").value.trim(), filter = filterNow();
  if (text) state.set("q", text);
  if (example) state.set("like", example.id);
  if ($("k").value !== "10") state.set("k", $("k").value);
  if (filter) state.set("filter", JSON.stringify(filter));
  const address = location.pathname + (state.size ? "?" + state : "");
  if (address !== location.pathname + location.search) history.pushState(null, "", address);
}

function loadState(first) {
  const state = new URLSearchParams(location.search);
  // What somebody typed while the page was still loading stays.
  if (!first || !$("text").value) $("text").value = state.get("q") || "";
  const k = state.get("k") || "10", like = state.get("like");
  if ([...$("k").options].some((option) => option.value === k)) $("k").value = k;
  setExample(like ? { id: like, caption: like } : null);
  if (!setFilters(state.get("filter"))) {
    show("error", "The filter in the address is not one that this page can show, so nothing was searched.");
    return;
  }
  if (like || (state.get("q") && $("text").value === state.get("q"))) search(false);
}

function choices(select, values, labels) {
  select.replaceChildren(...values.map((value, i) => {
    const option = make("option", "", labels ? labels[i] : String(value));
    option.value = value;
    return option;
  }));
}

async function lookAtIndex() {
  about = await send("v1/index");
  types = about.payload_types;
  $("about").textContent = about.rows.toLocaleString("en") + " items. Words, a picture, or both.";
  names(about);
  showIndex();
}

async function begin() {
  choices($("k"), [10]);
  try {
    await lookAtIndex();
  } catch (problem) {
    show("error", problem.message);
    return;
  }
  const ks = [5, 10, 20, 50, 100].filter((k) => k <= about.max_k);
  choices($("k"), ks.length ? ks : [about.max_k]);
  $("k").value = ks.includes(10) ? "10" : $("k").options[$("k").options.length - 1].value;
  $("add-filter").hidden = !Object.keys(types).length;
  $("text").maxLength = about.max_text_chars;
  offerItems();
  loadState(true);
}

$("query").addEventListener("submit", (event) => { event.preventDefault(); search(true); });
$("file").addEventListener("change", () => { if ($("file").files.length && setPicture($("file").files[0])) search(true); });
$("drop").addEventListener("click", () => { setPicture(null); $("text").focus(); });
$("example-drop").addEventListener("click", () => { setExample(null); $("text").focus(); });
$("k").addEventListener("change", () => { if ($("text").value.trim() || picture || example) search(true); });
window.addEventListener("popstate", () => { setPicture(null); show("error"); show("warning"); $("status").textContent = ""; $("results").replaceChildren(); loadState(false); });
window.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (file && setPicture(file)) { event.preventDefault(); search(true); }
});
let depth = 0;  // dragenter and dragleave come for every child that is crossed
window.addEventListener("dragenter", (event) => { event.preventDefault(); depth += 1; document.body.classList.add("dragging"); });
window.addEventListener("dragleave", () => { depth = Math.max(0, depth - 1); if (!depth) document.body.classList.remove("dragging"); });
window.addEventListener("dragover", (event) => event.preventDefault());
window.addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("dragging");
  const file = event.dataTransfer.files[0];
  if (!file) return;
  if ($("put").contains(event.target)) setItemPicture(file);
  else if (setPicture(file)) search(true);
});
// The other scripts come after this one.
window.addEventListener("DOMContentLoaded", begin);
