// The pattern of the chosen head: queries are rows, keys are columns.
const matrix = {};

function layOutMatrix() {
  const { queries, keys } = state.head.layer;
  const [surface, canvas] = [$("matrix"), $("matrix").firstElementChild];
  const context = canvas.getContext("2d");
  context.font = theme.font;
  const width = $("matrix-figure").clientWidth, height = Math.max(300, Math.min(600, window.innerHeight - 220));
  const labelled = Math.min((width - 70) / keys.size, (height - 60) / queries.size) >= 9;
  const left = labelled ? marginFor(context, queries, Math.min(110, width * 0.3)) : 34;
  const top = labelled ? marginFor(context, keys, 90) : 18;
  const scale = ratio();
  let cell = Math.min((width - left - (labelled ? 2 : 13)) / keys.size, (height - top) / queries.size, 72) * scale;
  if (cell >= 4) cell = Math.floor(cell); // smaller ones may be unequal by a pixel, and use all of the room
  Object.assign(matrix, { surface, left, top, labelled, cell: cell / scale, queries, keys });
  matrix.width = left + matrix.cell * keys.size + (labelled ? 1 : 12);
  matrix.height = top + matrix.cell * queries.size + 1;
}

function marginFor(context, axis, most) {
  let widest = 20;
  for (let token = 0; token < axis.size; token++) widest = Math.max(widest, context.measureText(labelOf(axis, token)).width);
  return Math.ceil(Math.min(most, widest)) + 8;
}

function drawMatrix() {
  layOutMatrix();
  const { left, top, queries, keys, cell } = matrix;
  const context = sized($("matrix").firstElementChild, matrix.width, matrix.height);
  const scale = ratio();
  const columns = Math.max(1, Math.min(keys.size, Math.round(keys.size * cell * scale)));
  const rows = Math.max(1, Math.min(queries.size, Math.round(queries.size * cell * scale)));
  const image = matrixImage(rows, columns);
  context.imageSmoothingEnabled = false;
  context.drawImage(image, left, top, cell * keys.size, cell * queries.size);
  context.strokeStyle = theme.line;
  context.lineWidth = 1;
  context.strokeRect(left - 0.5, top - 0.5, cell * keys.size + 1, cell * queries.size + 1);
  drawMatrixLabels(context);
  drawMatrixFocus();
}

/** The pattern in so many pixels. Where several weights share one, it shows the largest. */
function matrixImage(rows, columns) {
  const { queries, keys } = matrix;
  const canvas = (matrix.image ??= document.createElement("canvas"));
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer), codes = windowCodes();
  if (rows === queries.size && columns === keys.size) {
    for (let i = 0; i < pixels.length; i++) pixels[i] = pixelOf[codes[i]];
  } else {
    const largest = new Uint16Array(rows * columns);
    for (let query = 0, i = 0; query < queries.size; query++) {
      const row = Math.floor((query * rows) / queries.size) * columns;
      for (let key = 0; key < keys.size; key++, i++) {
        const at = row + Math.floor((key * columns) / keys.size);
        if (codes[i] > largest[at]) largest[at] = codes[i];
      }
    }
    for (let i = 0; i < pixels.length; i++) pixels[i] = pixelOf[largest[i]];
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function drawMatrixLabels(context) {
  const { left, top, queries, keys, cell, labelled } = matrix;
  if (!labelled) {
    context.font = theme.font.replace("12px", "10px");
    context.fillStyle = theme.soft;
    context.textAlign = "right";
    const down = tickStep(queries.size, (cell * queries.size) / 40), across = tickStep(keys.size, (cell * keys.size) / 40);
    for (let token = 0; token < queries.size; token += down) context.fillText(token, left - 5, top + (token + 0.5) * cell);
    context.textAlign = "center";
    for (let token = 0; token < keys.size; token += across) context.fillText(token, left + (token + 0.5) * cell, top / 2);
    return;
  }
  context.font = theme.font.replace("12px", `${Math.min(12, Math.max(9, cell - 1))}px`);
  for (let token = 0; token < queries.size; token++) {
    context.fillStyle = queries.special.has(token) ? theme.soft : theme.ink;
    context.textAlign = "right";
    context.fillText(fitted(context, labelOf(queries, token), left - 8), left - 6, top + (token + 0.5) * cell);
  }
  for (let token = 0; token < keys.size; token++) {
    context.fillStyle = keys.special.has(token) ? theme.soft : theme.ink;
    context.textAlign = "left";
    context.save();
    context.translate(left + (token + 0.5) * cell, top - 6);
    context.rotate(-Math.PI / 2);
    context.fillText(fitted(context, labelOf(keys, token), top - 8), 0, 0);
    context.restore();
  }
}

/** Cross-hairs on the query and key in focus. */
function drawMatrixFocus() {
  const { left, top, queries, keys, cell } = matrix;
  const context = sized($("matrix").lastElementChild, matrix.width, matrix.height);
  const { query, key } = focus();
  const thin = cell < 3;
  context.lineWidth = thin ? 1 : 1.5;
  if (query !== null) {
    context.strokeStyle = theme.accent;
    context.strokeRect(left - 0.5, top + query * cell - 0.5, cell * keys.size + 1, Math.max(cell, 1) + 1);
  }
  if (key !== null) {
    context.strokeStyle = theme.key;
    context.strokeRect(left + key * cell - 0.5, top - 0.5, Math.max(cell, 1) + 1, cell * queries.size + 1);
  }
}

function matrixCellAt(event) {
  const box = matrix.surface.getBoundingClientRect();
  const key = Math.floor((event.clientX - box.left - matrix.left) / matrix.cell);
  const query = Math.floor((event.clientY - box.top - matrix.top) / matrix.cell);
  if (query < 0 || query >= matrix.queries.size || key < 0 || key >= matrix.keys.size) return null;
  return { query, key };
}

function buildMatrix() {
  const surface = $("matrix");
  surface.addEventListener("pointermove", (event) => {
    const cell = matrixCellAt(event);
    hover(cell ?? {});
    if (cell) showTip(event, edgeText(cell.query, cell.key));
    else hideTip();
  });
  surface.addEventListener("pointerleave", () => { hover({}); hideTip(); });
  surface.addEventListener("click", (event) => {
    const cell = matrixCellAt(event);
    if (cell) keep(cell);
  });
}

/** The exact weight of an edge, with its two tokens. */
function edgeText(query, key) {
  const { queries, keys } = state.head.layer;
  return `${nameOf(queries, query)} → ${nameOf(keys, key)}\n${weightText(codeAt(query, key))}`;
}
