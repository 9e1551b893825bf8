"use strict";
/* Items are put in and taken out where the service takes updates; it says itself who may. */
let itemPicture = null;
let itemUrl = null;

function offerItems() {
  $("put").hidden = !about.live;
  const columns = Object.keys(types).filter((column) => types[column] !== "other");
  $("item-columns").hidden = !columns.length;
  $("item-payload").replaceChildren(...columns.map((column) => {
    const label = make("label", "", column), many = types[column].startsWith("list of ");
    const field = valueField(many ? "string" : kindOf(column), true);
    field.dataset.column = column;
    field.setAttribute("aria-label", column);
    if (field.tagName === "INPUT") field.placeholder = many ? HINTS.in : kindOf(column) === "point" ? "latitude, longitude" : HINTS[kindOf(column)] || "";
    label.append(field);
    return label;
  }));
}

function setItemPicture(file) {
  if (itemUrl) URL.revokeObjectURL(itemUrl);
  itemPicture = file;
  itemUrl = file ? URL.createObjectURL(file) : null;
  $("item-preview").hidden = !file;
  if (!file) {
    $("item-thumb").removeAttribute("src");
    $("item-file").value = "";
    return;
  }
  $("put").open = true;
  $("item-thumb").src = itemUrl;
  $("item-filename").textContent = file.name;
  if (!$("item-id").value) $("item-id").value = file.name;
}

function payloadValue(column, raw) {
  const kind = kindOf(column), parts = () => raw.split(",").map((part) => part.trim()).filter(Boolean);
  if (types[column].startsWith("list of ")) return parts().map((part) => typed(kind, part));
  if (kind !== "point") return typed(kind, raw);
  const [lat, lon] = parts().map((part) => typed("number", part));
  return { lat, lon };
}

async function store() {
  const item = { id: $("item-id").value, payload: {} }, text = $("item-text").value.trim();
  show("item-error");
  $("item-status").textContent = "Storing…";
  try {
    for (const field of $("item-payload").querySelectorAll("[data-column]")) {
      const raw = field.value.trim();
      if (raw) item.payload[field.dataset.column] = payloadValue(field.dataset.column, raw);
    }
    if (text) item.text = text;
    if (itemPicture) item.image = await base64(itemPicture);
    const answer = await send("v1/items", { items: [item] });
    wrote(answer.version);
    $("item").reset();
    setItemPicture(null);
    $("item-status").textContent = item.id + " is stored: searches find it from now on.";
  } catch (problem) {
    $("item-status").textContent = "";
    show("item-error", problem.message);
  }
}

function wrote(version) {
  seen = Math.max(seen === null ? 0 : seen, version);
  lookAtIndex().catch(() => { /* the figures stay what they were */ });
}

/* Asked for twice: the first press turns it into the question. */
function deleteButton(hit, caption, item) {
  const button = make("button", "like", "Delete");
  button.type = "button";
  const ask = (sure) => {
    button.classList.toggle("sure", sure);
    button.textContent = sure ? "Really?" : "Delete";
    button.setAttribute("aria-label", (sure ? "Really delete " : "Delete ") + caption);
  };
  ask(false);
  button.addEventListener("blur", () => ask(false));
  button.addEventListener("click", async () => {
    if (!button.classList.contains("sure")) { ask(true); return; }
    show("error");
    try {
      const answer = await send("v1/items/delete", { ids: [hit.id] });
      wrote(answer.version);
      item.remove();
      shownIds.delete(hit.id);
      $("status").textContent = answer.deleted ? hit.id + " is deleted." : hit.id + " was not there any more.";
    } catch (problem) {
      ask(false);
      show("error", problem.message);
    }
  });
  return button;
}

$("item").addEventListener("submit", (event) => { event.preventDefault(); store(); });
$("item-file").addEventListener("change", () => setItemPicture($("item-file").files[0] || null));
$("item-drop").addEventListener("click", () => setItemPicture(null));
