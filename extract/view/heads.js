// Thumbnails of all heads, one canvas for each stack: layers run down, heads across.
const grids = [];
const GRID_LEFT = 30, GRID_TOP = 16;

function buildGrids() {
  for (const stack of stacks) {
    const ofStack = layers.filter((layer) => layer.stack === stack);
    if (stacks.length > 1) {
      const title = document.createElement("h3");
      title.className = "stack-title";
      title.textContent = stack;
      $("grids").append(title);
    }
    const surface = document.createElement("div");
    surface.className = "surface";
    surface.tabIndex = 0;
    surface.setAttribute("role", "img");
    surface.setAttribute("aria-describedby", "keys");
    const most = Math.max(...ofStack.map((layer) => layer.heads));
    surface.setAttribute("aria-label", `Thumbnails of the patterns of the ${stack}: ${ofStack.length} layers, ${most} heads. Arrow keys choose a head.`);
    const canvas = document.createElement("canvas"), over = document.createElement("canvas");
    over.className = "over";
    surface.append(canvas, over);
    $("grids").append(surface);
    const grid = { stack, layers: ofStack, most, surface, canvas, over };
    surface.addEventListener("click", (event) => {
      const head = headAt(grid, event);
      if (head) choose(head);
    });
    surface.addEventListener("pointermove", (event) => {
      const head = headAt(grid, event);
      if (head) showTip(event, `${titleOf(head)}\nmean entropy ${numberText(mean(head.entropy))} nats`);
      else hideTip();
    });
    surface.addEventListener("pointerleave", hideTip);
    grids.push(grid);
  }
}

function headAt(grid, event) {
  const box = grid.surface.getBoundingClientRect();
  const head = Math.floor((event.clientX - box.left - GRID_LEFT) / grid.step);
  const layer = grid.layers[Math.floor((event.clientY - box.top - GRID_TOP) / grid.step)];
  return layer && head >= 0 && head < layer.heads ? heads[layer.first + head] : null;
}

function drawGrids() {
  const room = $("grids").clientWidth - GRID_LEFT;
  for (const grid of grids) {
    const step = Math.max(8, Math.min(58, Math.floor(room / grid.most)));
    const gap = step > 24 ? 3 : step > 13 ? 2 : 1;
    Object.assign(grid, { step, gap });
    const context = sized(grid.canvas, GRID_LEFT + grid.most * step, GRID_TOP + grid.layers.length * step);
    drawGridTicks(context, grid);
    const side = Math.max(1, Math.round((step - gap) * ratio()));
    for (const [row, layer] of grid.layers.entries()) {
      const image = new ImageData(side, side), pixels = new Uint32Array(image.data.buffer);
      for (let head = 0; head < layer.heads; head++) {
        paintThumbnail(pixels, side, heads[layer.first + head].thumbnail, layer.cells);
        context.putImageData(image, Math.round((GRID_LEFT + head * step) * ratio()), Math.round((GRID_TOP + row * step) * ratio()));
      }
    }
  }
  markGrids();
}

function drawGridTicks(context, grid) {
  context.fillStyle = theme.soft;
  context.font = theme.font.replace("12px", "10px");
  context.textAlign = "center";
  const every = tickStep(grid.most, (grid.most * grid.step) / 18);
  for (let head = 0; head < grid.most; head += every)
    context.fillText(head, GRID_LEFT + (head + 0.5) * grid.step - grid.gap / 2, GRID_TOP / 2);
  context.textAlign = "right";
  const rows = tickStep(grid.layers.length, (grid.layers.length * grid.step) / 12);
  for (const [row, layer] of grid.layers.entries())
    if (row % rows === 0) context.fillText(`L${layer.layer}`, GRID_LEFT - 6, GRID_TOP + (row + 0.5) * grid.step - grid.gap / 2);
}

/** Enlarge the cells of a thumbnail, or take the largest of those that share a pixel. */
function paintThumbnail(pixels, side, cells, [rows, columns]) {
  for (let y = 0; y < side; y++) {
    const top = Math.floor((y * rows) / side), bottom = Math.max(top + 1, Math.floor(((y + 1) * rows) / side));
    for (let x = 0; x < side; x++) {
      const left = Math.floor((x * columns) / side), right = Math.max(left + 1, Math.floor(((x + 1) * columns) / side));
      let most = 0;
      for (let r = top; r < bottom; r++)
        for (let c = left; c < right; c++) most = Math.max(most, cells[r * columns + c]);
      pixels[y * side + x] = thumbnailPixel[most];
    }
  }
}

/** Frame the chosen head. */
function markGrids() {
  for (const grid of grids) {
    const context = sized(grid.over, GRID_LEFT + grid.most * grid.step, GRID_TOP + grid.layers.length * grid.step);
    const row = grid.layers.indexOf(state.head.layer);
    if (row < 0) continue;
    context.strokeStyle = theme.accent;
    context.lineWidth = grid.step > 24 ? 2.5 : 2;
    const side = grid.step - grid.gap + 2;
    context.strokeRect(GRID_LEFT + state.head.head * grid.step - 1, GRID_TOP + row * grid.step - 1, side, side);
  }
}
