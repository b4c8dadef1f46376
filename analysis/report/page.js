"use strict";
// One head at a time is chosen; everything that shows it carries its number in data-h.
const marks = document.querySelectorAll("[data-h]");
const byHead = new Map();
for (const mark of marks) {
  if (!byHead.has(mark.dataset.h)) byHead.set(mark.dataset.h, []);
  byHead.get(mark.dataset.h).push(mark);
}
let chosen = null;
function choose(head) {
  for (const mark of byHead.get(chosen) ?? []) mark.classList.remove("on");
  chosen = head === chosen ? null : head;
  for (const mark of byHead.get(chosen) ?? []) mark.classList.add("on");
  document.body.classList.toggle("choosing", chosen !== null);
}
document.addEventListener("click", (event) => {
  const mark = event.target.closest("[data-h]");
  if (mark) choose(mark.dataset.h);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chosen !== null) choose(chosen);
});

const table = document.querySelector("#heads");
const body = table.tBodies[0];
for (const button of table.tHead.querySelectorAll("button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th");
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[header.cellIndex].dataset.v;
    const number = (text) => (text === "" ? NaN : Number(text));
    const text = header.dataset.text !== undefined;
    const rows = [...body.rows].sort((a, b) => {
      if (text) return key(a).localeCompare(key(b)) * (up ? 1 : -1);
      const [x, y] = [number(key(a)), number(key(b))];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // unknown ones last
      return (x - y) * (up ? 1 : -1);
    });
    body.append(...rows);
  });
}
const filter = document.querySelector("#filter");
filter.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  for (const row of body.rows) row.hidden = !row.dataset.name.includes(wanted);
});
