// Draws every chart of the page. Expressions are interpreted (ast): the page's policy allows no code made of text.
// Pages reach the charts by `charts`: {frames, figures, ready}, where a figure is {element, spec, frames, view}.
const ERRORS = 1; // the level of Vega's log: it warns of every layer that is empty
const DIGITS = 7; // that a float32 has
const floatsOf = text => Array.from(
  new Float32Array(Uint8Array.from(atob(text), byte => byte.charCodeAt(0)).buffer), value => Number.isNaN(value) ? null : value);
const columnOf = ({ floats, words, codes, ...values }) =>
  floats !== undefined ? floatsOf(floats) : codes.map(code => code === null ? null : words[code]);
const rowsOf = ({ names, values }) => {
  const columns = values.map(column => Array.isArray(column) ? column : columnOf(column));
  return columns[0].map((_, row) => Object.fromEntries(names.map((name, n) => [name, columns[n][row]])));
};
const framesOf = frames => Object.fromEntries(Object.entries(frames).map(([name, columns]) => [name, rowsOf(columns)]));

// the value of a CSS variable as a colour that also a canvas knows
const probe = document.body.appendChild(document.createElement("i"));
probe.hidden = true;
const colourOf = name => {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
};
const withColours = text => text.replace(/var\((--[\w-]+)\)/g, (_, name) => colourOf(name));

async function draw(figure) {
  const { element, spec, frames } = figure;
  const renderer = element.dataset.renderer;
  const [place, bind] = [".view", ".controls"].map(name => element.querySelector(name));
  const drawn = renderer === "canvas" ? JSON.parse(withColours(JSON.stringify(spec))) : { ...spec };
  drawn.datasets = frames;
  const groups = figure.part && Map.groupBy(frames.rows, row => row[figure.part]);
  const valueOf = name => figure.view?.signal(name) ?? spec.params.find(param => param.name === name).value;
  if (groups) drawn.datasets = { ...frames, rows: groups.get(valueOf(figure.part)) ?? [] };
  if (figure.view) {
    drawn.params = drawn.params?.map(param => "value" in param ? { ...param, value: figure.view.signal(param.name) } : param);
    figure.view.finalize();
    bind.replaceChildren();
  }
  try {
    const tooltip = { theme: "page", ...(figure.tips ? { formatTooltip: row => tipOf(row, figure.tips) } : {}) };
    const options = { ast: true, renderer, actions: false, tooltip, bind, logLevel: ERRORS };
    figure.view = (await vegaEmbed(place, drawn, options)).view;
    const { view } = figure;
    // a listener runs within a run, after which the next can begin
    if (groups) view.addSignalListener(figure.part, (_, value) => queueMicrotask(() => view.data("rows", groups.get(value) ?? []).runAsync()));
    figure.drawn?.();
    element.classList.add("drawn");
  } catch (error) {
    place.textContent = `This chart can't be drawn: ${error.message}`;
  }
}

// what a tip shows of a row: its fields by their titles; made when it is wanted, because a chart may have tens of thousands of marks
const numberOf = value => String(Number(value.toPrecision(4))).replaceAll("-", "−");
function tipOf(row, tips) {
  const table = document.createElement("table");
  for (const [field, title] of Object.entries(tips)) {
    const [line, value] = [table.insertRow(), row[field]];
    Object.assign(line.insertCell(), { className: "key", textContent: title });
    line.insertCell().textContent = value === null || value === undefined ? "–" : typeof value === "number" ? numberOf(value) : value;
  }
  return table.outerHTML;
}

// rows that are of all pairs of other rows, the second running fastest, get the fields of both: `name`, and `other_name`
const crossed = (rows, of) => rows.map((row, n) => {
  const other = Object.entries(of[n % of.length]).map(([name, value]) => [`other_${name}`, value]);
  return { ...row, ...of[Math.floor(n / of.length)], ...Object.fromEntries(other) };
});

const shared = framesOf(JSON.parse(document.querySelector("#data")?.textContent ?? "{}"));
const figures = [...document.querySelectorAll(".chart")].map(element => {
  const { spec, data, shared: names, tips, cross, part } = JSON.parse(element.querySelector("script").textContent);
  const frames = { ...framesOf(data), ...Object.fromEntries(names.map(name => [name, shared[name]])) };
  if (cross) frames.rows = crossed(frames.rows, frames[cross]);
  return { element, spec, frames, tips, part };
});
// only a canvas keeps the colours that it was drawn with
const redraw = () => figures.filter(({ element, view }) => view && element.dataset.renderer === "canvas").forEach(draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

// one after the other, from the top, while the page can be used
const pause = () => new Promise(done => setTimeout(done));
async function drawAll() {
  for (const figure of figures) {
    await pause();
    await draw(figure);
  }
}

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href));
}
const cell = value => {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(Number(value.toPrecision(Number.isInteger(value) ? 15 : DIGITS)));
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value); // a spreadsheet would run it as a formula
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
const csvOf = rows => [Object.keys(rows[0] ?? {}), ...rows.map(row => Object.values(row))].map(row => row.map(cell).join(",")).join("\r\n") + "\r\n";
async function pictureOf({ element }) {
  let source = element.querySelector("canvas");
  if (!source) {
    const svg = element.querySelector(".view svg");
    const text = withColours(new XMLSerializer().serializeToString(svg));
    source = new Image(Number(svg.getAttribute("width")), Number(svg.getAttribute("height")));
    source.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
    await source.decode();
  }
  const scale = source instanceof Image ? 2 : 1;
  const picture = Object.assign(document.createElement("canvas"), { width: source.width * scale, height: source.height * scale });
  const context = picture.getContext("2d");
  context.fillStyle = colourOf("--paper");
  context.fillRect(0, 0, picture.width, picture.height);
  context.drawImage(source, 0, 0, picture.width, picture.height);
  return new Promise(done => picture.toBlob(done));
}
document.addEventListener("click", async ({ target }) => {
  const format = target.closest?.("[data-save]")?.dataset.save;
  const figure = format && figures.find(({ element }) => element.contains(target));
  if (!figure) return;
  const blob = format === "png" ? await pictureOf(figure) : new Blob([csvOf(Object.values(figure.frames)[0])], { type: "text/csv" });
  save(`${figure.element.dataset.name}.${format}`, blob);
});

globalThis.charts = { frames: shared, figures, redraw, save, csvOf, ready: drawAll().then(() => document.body.classList.add("drawn")) };
