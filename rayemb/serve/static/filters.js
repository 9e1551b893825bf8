"use strict";
/* A row for each condition: column, what is asked of it, value. All of them hold. */
const ASKED = {
  is: "is", not: "is not", in: "is one of", prefix: "begins with", gt: "is over", gte: "is at least", lt: "is under",
  lte: "is at most", within: "is within", exists: "has a value", missing: "is missing",
};
const RANGE = ["gt", "gte", "lt", "lte"];
const OF_TYPE = {
  string: ["is", "not", "in", "prefix"], integer: ["is", "not", "in", ...RANGE], number: ["is", "not", "in", ...RANGE],
  boolean: ["is"], timestamp: ["is", "not", "in", ...RANGE], point: ["within"], other: [],
};
const HINTS = { in: "value, value, …", within: "latitude, longitude, km", timestamp: "2026-01-31", integer: "number", number: "number" };

function kindOf(column) {
  return (types[column] || "other").replace("list of ", "");
}

/* What was typed as the column's type has it; what cannot be one goes as it is, for the service to say so. */
function typed(kind, raw) {
  if (kind === "boolean" && /^(true|false)$/i.test(raw)) return raw.toLowerCase() === "true";
  const number = Number(raw);
  // Beyond 2^53 a number would come out as another one.
  const exact = Number.isFinite(number) && (!Number.isInteger(number) || Number.isSafeInteger(number));
  return (kind === "integer" || kind === "number") && raw !== "" && exact ? number : raw;
}

function addFilter(column, asked, value) {
  const row = make("div", "where"), columns = make("select", "column"), operators = make("select", "operator");
  columns.setAttribute("aria-label", "Filter column");
  operators.setAttribute("aria-label", "What is asked of the column");
  choices(columns, Object.keys(types));
  columns.value = column || columns.options[0].value;
  const remove = make("button", "remove", "×");
  remove.type = "button";
  remove.setAttribute("aria-label", "Remove this filter");
  row.append(columns, operators, make("input", "value"), remove);
  const offer = () => {
    const kept = operators.value, offered = [...OF_TYPE[kindOf(columns.value)], "exists", "missing"];
    choices(operators, offered, offered.map((name) => ASKED[name]));
    if (offered.includes(kept)) operators.value = kept;
    offerValue(row);
  };
  columns.addEventListener("change", offer);
  operators.addEventListener("change", () => offerValue(row));
  remove.addEventListener("click", () => {
    row.remove();
    $("wheres").hidden = !$("wheres").children.length;
    $("add-filter").focus();
  });
  offer();
  if (asked) { operators.value = asked; offerValue(row); }
  if (value !== undefined) row.querySelector(".value").value = value;
  $("wheres").append(row);
  $("wheres").hidden = false;
  return row;
}

/* The field for the value: a choice for booleans, none where nothing is to be said. */
function offerValue(row) {
  const kind = kindOf(row.querySelector(".column").value), asked = row.querySelector(".operator").value;
  const old = row.querySelector(".value"), field = valueField(kind);
  field.classList.add("value");
  field.setAttribute("aria-label", "Filter value");
  if (field.tagName === "INPUT") {
    field.placeholder = HINTS[asked] || HINTS[kind] || "value";
    if (old.tagName === "INPUT") field.value = old.value;
  }
  field.hidden = asked === "exists" || asked === "missing";
  old.replaceWith(field);
}

function valueField(kind, none) {
  if (kind !== "boolean") return make("input");
  const field = make("select");
  choices(field, none ? ["", "true", "false"] : ["true", "false"]);
  return field;
}

function condition(column, asked, raw) {
  const kind = kindOf(column), value = typed(kind, raw);
  if (asked === "missing") return { [column]: null };
  if (asked === "exists") return { [column]: { exists: true } };
  if (!raw) return null;  // nothing is asked yet
  const parts = raw.split(",").map((part) => part.trim());
  if (asked === "is") return { [column]: value };
  if (asked === "not") return { not: { [column]: value } };
  if (asked === "in") return { [column]: { in: parts.filter(Boolean).map((part) => typed(kind, part)) } };
  if (asked === "within") {
    const [lat, lon, km] = parts.map((part) => typed("number", part));
    return { [column]: { within: { lat, lon, km } } };
  }
  return { [column]: { [asked]: value } };
}

/* The filter as the service takes it; null if nothing is asked. */
function filterNow() {
  const found = [...$("wheres").children]
    .map((row) => condition(...[".column", ".operator", ".value"].map((part) => row.querySelector(part).value.trim())))
    .filter(Boolean);
  return found.length > 1 ? { and: found } : found[0] || null;
}

/* The rows of a filter such as filterNow gives; false if it is of another kind. */
function setFilters(text) {
  $("wheres").replaceChildren();
  $("wheres").hidden = true;
  if (!text) return true;
  let rows;
  try {
    const filter = JSON.parse(text);
    if (filter === null) return false;
    rows = (filter.and || [filter]).flatMap(rowsOf);
  } catch (problem) {
    return false;
  }
  if (!rows.every(([column, asked]) => column in types && [...OF_TYPE[kindOf(column)], "exists", "missing"].includes(asked))) return false;
  for (const row of rows) addFilter(...row);
  if (JSON.stringify(filterNow()) === JSON.stringify(JSON.parse(text))) return true;
  return setFilters("null");
}

function rowsOf(part) {
  return Object.entries(part.not || part).map(([column, test]) => {
    if (part.not) return [column, "not", String(test)];
    if (test === null) return [column, "missing"];
    if (typeof test !== "object") return [column, "is", String(test)];
    const [asked, value] = Object.entries(test)[0];
    if (asked === "within") return [column, asked, [value.lat, value.lon, value.km].join(", ")];
    return [column, asked, Array.isArray(value) ? value.join(", ") : String(value)];
  });
}

$("add-filter").addEventListener("click", () => addFilter().querySelector(".column").focus());
