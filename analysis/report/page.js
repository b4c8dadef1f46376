"use strict";
(() => { // the names of Vega are global
// The state of the page: the column of the map and the chosen head, which every chart and list shows.
const { heads, columns } = charts.frames;
const byName = new Map(columns.map(column => [column.name, column]));
const names = columns.map(({ name }) => name);
const byId = new Map(heads.map(head => [head.id, head]));
const NO_HEAD = -1, FEW = 100, MAIN = 10, STEPS = document.querySelectorAll(".scale rect").length;
const $ = selector => document.querySelector(selector);
const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};
const MISSING = "–", THIN = "\u202f";
const number = (value, digits = 3) => {
  if (value === null || value === undefined) return MISSING;
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size < 1e-3 || size >= 1e6 ? value.toExponential(digits - 1)
    : size >= 1e3 ? Math.round(value).toLocaleString("en").replaceAll(",", THIN) : String(Number(value.toPrecision(digits)));
  return text.replaceAll("-", "−");
};
// as many digits as the half-width knows
const estimate = (value, half) => {
  if (value === null || !half || Math.abs(value) >= 1e6) return number(value);
  const decimals = Math.max(0, Math.min(6, -Math.floor(Math.log10(half))));
  return value.toFixed(decimals).replace("-", "−");
};
const halfWidth = half => half === null || half === undefined ? "" : half === 0 ? "±0" : `±${estimate(half, half)}`;

let column = $("#column").value, chosen = NO_HEAD;

function signal(figure, values) {
  const known = new Set((figure.spec.params ?? []).map(({ name }) => name));
  const given = Object.entries(values).filter(([name]) => known.has(name));
  if (!given.length || !figure.view) return;
  for (const [name, value] of given) figure.view.signal(name, value);
  figure.view.runAsync();
}
const columnSignals = () => {
  const { low, high, signed } = byName.get(column);
  return { column, low, high, palette: signed ? "d" : "r" };
};
const headSignals = () => ({ chosen, ...(chosen === NO_HEAD ? {} : { layer: byId.get(chosen).layer }) });

function pick(name) {
  column = name;
  $("#column").value = name;
  const { unit, formula, meaning, reference, low, high, signed, beyond } = byName.get(name);
  for (const figure of charts.figures) signal(figure, columnSignals());
  $("#meaning").replaceChildren(`${meaning} `, make("code", formula), reference ? ` (${reference})` : "",
    beyond ? " Values beyond the scale have the colour of its end." : "");
  const isConstant = low === high;
  $("#low").textContent = isConstant ? "" : number(low);
  $("#high").textContent = isConstant ? `${number(low)} in every head` : `${number(high)}${unit ? ` ${unit}` : ""}`;
  document.querySelectorAll(".scale rect").forEach((step, n) => step.setAttribute("fill", `var(--${signed ? "d" : "r"}${n})`));
  $(".scale svg").style.display = isConstant ? "none" : "";
  for (const code of document.querySelectorAll("#map [data-code]")) code.textContent = code.dataset.code.replaceAll("{column}", name);
}

function choose(id) {
  chosen = id === chosen ? NO_HEAD : id;
  for (const figure of charts.figures) signal(figure, headSignals());
  for (const mark of document.querySelectorAll("[data-head]")) mark.classList.toggle("on", Number(mark.dataset.head) === chosen);
  showHead();
}
function showHead() {
  const panel = $("#head");
  if (chosen === NO_HEAD) return panel.replaceChildren(make("p", "Choose a head to see its numbers.", { class: "muted" }));
  const head = byId.get(chosen);
  const kind = make("p", "", { class: "muted" });
  const swatch = make("span", "", { class: `swatch k-${head.kind}` });
  const awake = head.awake && head.awake !== head.kind ? `; awake ${head.awake}` : "";
  kind.append(swatch, `${head.kind}${head.agreement === null ? "" : ` (${Math.round(100 * head.agreement)}${THIN}% of replicates agree)`}${awake}`);
  const list = make("dl", "");
  for (const name of names) {
    const value = make("dd", estimate(head[name], head[`${name}_half`]));
    value.append(make("small", ` ${halfWidth(head[`${name}_half`])} ${byName.get(name).unit}`));
    const term = make("dt", "");
    term.append(make("button", name, { type: "button", class: "link", "data-column": name, title: byName.get(name).meaning }));
    list.append(term, value);
  }
  const closing = make("button", "×", { type: "button", class: "close", "aria-label": "choose no head" });
  closing.addEventListener("click", () => choose(chosen));
  panel.replaceChildren(closing, make("h3", head.label), kind, list);
}

// the table of heads: few rows at first, because a large model has thousands
let sorting = { key: "id", up: true }, showAll = false, shownColumns = names.slice(0, MAIN);
const FACTS = { label: "head", kind: "kind", agreement: "agree", rest: "rest", awake: "awake" };
function compare(key, up) {
  const sign = up ? 1 : -1;
  return (a, b) => {
    const [x, y] = [a[key], b[key]];
    if (x === null || y === null) return (x === null) - (y === null); // unknown ones last
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y) || a.id - b.id;
  };
}
function showTable() {
  const wanted = $("#filter").value.trim().toLowerCase();
  const rows = heads.filter(head => `${head.label} ${head.kind} ${head.awake ?? ""}`.toLowerCase().includes(wanted))
    .sort(compare(sorting.key, sorting.up));
  const shown = showAll ? rows : rows.slice(0, FEW);
  const header = make("tr", "");
  for (const key of [...Object.keys(FACTS), ...shownColumns]) {
    const cell = make("th", "", { scope: "col", ...(key in FACTS ? {} : { class: "n" }) });
    const sortKey = key === "label" ? "id" : key;
    if (sorting.key === sortKey) cell.setAttribute("aria-sort", sorting.up ? "ascending" : "descending");
    cell.append(make("button", FACTS[key] ?? key.replaceAll("_", " "), { type: "button", "data-sort": sortKey, title: byName.get(key)?.meaning ?? "" }));
    if (byName.get(key)?.unit) cell.append(make("small", byName.get(key).unit));
    header.append(cell);
  }
  $("#heads thead").replaceChildren(header);
  $("#heads tbody").replaceChildren(...shown.map(rowOf));
  $("#counted").textContent = `${shown.length.toLocaleString("en").replaceAll(",", THIN)} of ${rows.length.toLocaleString("en").replaceAll(",", THIN)} heads`;
  $("#more").hidden = shown.length === rows.length;
}
const percent = value => value === null ? MISSING : `${Math.round(100 * value) || 0}${THIN}%`.replace("-", "−");
function kindCell(kind) {
  const cell = make("td", "");
  if (!kind) cell.textContent = MISSING;
  else cell.append(make("span", "", { class: `swatch k-${kind}` }), kind);
  return cell;
}
function rowOf(head) {
  const row = make("tr", "", { "data-head": head.id });
  if (head.id === chosen) row.classList.add("on");
  const name = make("th", "", { scope: "row" });
  name.append(make("button", head.label, { type: "button" }));
  row.append(name, kindCell(head.kind), make("td", percent(head.agreement)), make("td", percent(head.rest)), kindCell(head.awake));
  for (const key of shownColumns) {
    const cell = make("td", `${estimate(head[key], head[`${key}_half`])} `, { class: "n" });
    cell.append(make("small", halfWidth(head[`${key}_half`])));
    row.append(cell);
  }
  return row;
}

document.addEventListener("click", ({ target }) => {
  const head = target.closest("[data-head]"), of = target.closest("[data-column]"), sort = target.closest("[data-sort]");
  if (of) pick(of.dataset.column);
  else if (sort) {
    const key = sort.dataset.sort;
    sorting = { key, up: sorting.key === key ? !sorting.up : true };
    showTable();
    $(`[data-sort="${key}"]`).focus();
  } else if (head) choose(Number(head.dataset.head));
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && chosen !== NO_HEAD) choose(chosen);
});
$("#column").addEventListener("change", event => pick(event.target.value));
$("#filter").addEventListener("input", () => { showAll = false; showTable(); });
$("#more").addEventListener("click", () => { showAll = true; showTable(); });
$("#all-columns").addEventListener("click", () => { shownColumns = shownColumns === names ? names.slice(0, MAIN) : names; showTable(); });
$("#save-heads").addEventListener("click", () => charts.save("heads.csv", new Blob([charts.csvOf(heads)], { type: "text/csv" })));
$("#theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  charts.redraw();
});

// the neighbour of the chosen head in its stack
const STEPS_OF = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
function move([down, across]) {
  const from = byId.get(chosen);
  const next = from ? heads.find(({ stack, layer, head }) => stack === from.stack && layer === from.layer + down && head === from.head + across) : heads[0];
  if (next && next.id !== chosen) choose(next.id);
}
for (const grid of document.querySelectorAll("#map .scroll-x, #kinds .plates .scroll-x")) {
  grid.addEventListener("keydown", event => {
    if (!(event.key in STEPS_OF)) return;
    event.preventDefault();
    move(STEPS_OF[event.key]);
  });
}
for (const figure of charts.figures) {
  figure.drawn = () => {
    figure.view.addEventListener("click", (_, item) => {
      if (byId.has(item?.datum?.id)) choose(item.datum.id);
    });
    signal(figure, { ...columnSignals(), ...headSignals() });
  };
  if (figure.view) figure.drawn(); // before this script ran
}
pick(column);
showTable();
document.body.classList.add("ready");
})();
