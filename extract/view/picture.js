// The image with its patches: what a patch attends to is laid over it.
const picture = { image: null };

function gridOf(layer) {
  return layer.queries.grid && layer.queries === layer.keys ? layer.queries.grid : null;
}

async function buildPicture() {
  if (!meta.picture) return;
  const image = new Image();
  image.src = meta.picture;
  await image.decode();
  picture.image = image;
  const surface = $("picture");
  surface.addEventListener("pointermove", (event) => {
    const token = patchAt(event);
    if (token === null) { hover({}); return hideTip(); }
    hover(state.kept.query === null ? { query: token } : { key: token });
    return showTip(event, state.kept.query === null ? tokenText({ query: token }) : edgeText(state.kept.query, token));
  });
  surface.addEventListener("pointerleave", () => { hover({}); hideTip(); });
  surface.addEventListener("click", (event) => {
    const token = patchAt(event);
    if (token !== null) keep({ query: token });
  });
  $("show-picture").addEventListener("click", () => showSide("picture"));
  $("show-lines").addEventListener("click", () => showSide("lines"));
}

function showSide(side) {
  state.side = side;
  drawHead();
}

/** Show the image where the chosen layer attends over its patches, unless lines were asked for. */
function layOutSide() {
  const grid = picture.image && gridOf(state.head.layer);
  const shown = Boolean(grid) && state.side === "picture";
  $("tabs").hidden = !grid;
  $("show-picture").setAttribute("aria-pressed", String(shown));
  $("show-lines").setAttribute("aria-pressed", String(!shown));
  $("picture-panel").hidden = !shown;
  $("lines").hidden = shown;
  $("side-title").hidden = Boolean(grid);
  $("side-note").textContent = shown ? "brightest: the patch with the largest weight" : "bars: entropy, mass received";
  if (shown) buildExtras(grid);
}

/** Buttons for the tokens that are no patches. */
function buildExtras(grid) {
  const axis = state.head.layer.queries;
  if ($("extras").childElementCount === axis.special.size) return;
  $("extras").replaceChildren(
    ...[...axis.special].map((token) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = axis.labels[token];
      button.dataset.token = token;
      button.addEventListener("click", () => keep({ query: token }));
      return button;
    }),
  );
}

function drawPicture() {
  if ($("picture-panel").hidden) return;
  const { image } = picture, grid = gridOf(state.head.layer);
  const room = Math.min($("side-figure").clientWidth, Math.max(280, (matrix.height || 480) - 40));
  const scale = Math.min(room / image.width, room / image.height);
  const [width, height] = [image.width * scale, image.height * scale];
  const context = sized($("picture").firstElementChild, width, height);
  context.imageSmoothingEnabled = scale < 2;
  context.drawImage(image, 0, 0, width, height);
  const [w, h] = [width / grid.columns, height / grid.rows];
  Object.assign(picture, { w, h, grid });
  const { query, key } = focus();
  const hovered = state.hovered.key ?? null, source = query ?? null;
  drawOverlay(context, grid, source, source === null ? key : null);
  context.lineWidth = 2.5;
  frame(context, source, theme.accent);
  frame(context, hovered, theme.key);
  for (const button of $("extras").children) button.setAttribute("aria-pressed", String(Number(button.dataset.token) === source));
}

function drawOverlay(context, grid, query, key) {
  const size = state.head.layer.keys.size, codes = windowCodes();
  if (query === null && key === null) return drawPatchLines(context, grid);
  const strengths = new Float32Array(grid.rows * grid.columns);
  for (let patch = 0; patch < strengths.length; patch++) {
    const token = grid.prefix + patch;
    strengths[patch] = strengthOf[codes[query !== null ? query * size + token : token * size + key]];
  }
  const most = largestOf(strengths);
  for (let patch = 0; patch < strengths.length; patch++) {
    const shade = strengths[patch] / most;
    const [x, y] = placeOf(patch, grid);
    // the image stays visible in dark where little goes, and under colour where much does
    context.globalAlpha = 0.72 * (1 - shade);
    context.fillStyle = "#05080c";
    context.fillRect(x, y, picture.w, picture.h);
    context.globalAlpha = 0.62 * shade;
    context.fillStyle = "#ffb000";
    context.fillRect(x, y, picture.w, picture.h);
  }
  context.globalAlpha = 1;
  return undefined;
}

function drawPatchLines(context, grid) {
  context.strokeStyle = "rgb(255 255 255 / 0.35)";
  context.lineWidth = 1;
  context.beginPath();
  for (let column = 1; column < grid.columns; column++) { context.moveTo(column * picture.w, 0); context.lineTo(column * picture.w, picture.h * grid.rows); }
  for (let row = 1; row < grid.rows; row++) { context.moveTo(0, row * picture.h); context.lineTo(picture.w * grid.columns, row * picture.h); }
  context.stroke();
}

function frame(context, token, colour) {
  const patch = token === null ? -1 : token - picture.grid.prefix;
  if (patch < 0 || patch >= picture.grid.rows * picture.grid.columns) return;
  const [x, y] = placeOf(patch, picture.grid);
  context.strokeStyle = colour;
  context.strokeRect(x + 1, y + 1, picture.w - 2, picture.h - 2);
}

function placeOf(patch, grid) {
  return [(patch % grid.columns) * picture.w, Math.floor(patch / grid.columns) * picture.h];
}

function patchAt(event) {
  const box = $("picture").getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / picture.w), row = Math.floor((event.clientY - box.top) / picture.h);
  const { grid } = picture;
  if (column < 0 || row < 0 || column >= grid.columns || row >= grid.rows) return null;
  return grid.prefix + row * grid.columns + column;
}
