// Lines from queries, on the left, to keys, on the right. Only those in view are drawn.
const lines = {};
const LEVELS = 24, FAINTEST = 0.03, LINES_PER_TOKEN = 10, BAR = 34;

function layOutLines() {
  const { queries, keys } = state.head.layer;
  const panel = $("lines");
  const size = Math.max(queries.size, keys.size);
  const height = Math.max(260, Math.min(matrix.height || 420, 640));
  const row = Math.min(40, Math.max(16, Math.floor((height - 4) / size)));
  const width = $("side-figure").clientWidth - 2;
  const needed = size * row + 8;
  panel.style.height = `${Math.min(height, needed + 2)}px`;
  $("lines-rows").style.height = `${needed}px`;
  const scrolls = needed > height;
  const inner = scrolls ? panel.clientWidth || width : width;
  const label = Math.max(58, Math.min(150, inner * 0.27));
  Object.assign(lines, { panel, row, label, width: inner, height: Math.min(height, needed + 2) - 2, queries, keys });
  lines.left = label + BAR;
  lines.right = inner - label - BAR;
}

function drawLines() {
  if ($("lines").hidden) return;
  const { width, height, row, queries, keys, left, right } = lines;
  const context = sized($("lines-rows").firstElementChild, width, height);
  const offset = lines.panel.scrollTop;
  const from = Math.max(0, Math.floor((offset - 4) / row)), to = Math.ceil((offset + height) / row);
  const middle = (token) => (token + 0.5) * row + 4 - offset;
  const { query, key } = focus();
  const edges = edgesInView(from, to, query, key);
  const levels = Array.from({ length: LEVELS + 1 }, () => null);
  for (const [i, j, alpha] of edges) {
    const path = (levels[Math.max(1, Math.round(alpha * LEVELS))] ??= new Path2D());
    const [y, z] = [middle(i), middle(j)];
    path.moveTo(left, y);
    path.bezierCurveTo(left + (right - left) * 0.35, y, right - (right - left) * 0.35, z, right, z);
  }
  context.lineWidth = 1.6;
  context.strokeStyle = query !== null ? theme.accent : key !== null ? theme.key : theme.query;
  levels.forEach((path, level) => {
    if (!path) return;
    context.globalAlpha = level / LEVELS;
    context.stroke(path);
  });
  context.globalAlpha = 1;
  drawLineLabels(context, { from, to, middle, query, key });
}

/** The lines to draw, as [query, key, opacity]: of the query or key in focus, or the strongest that are in view. */
function edgesInView(from, to, query, key) {
  const { queries, keys } = lines, codes = windowCodes(), edges = [];
  const add = (i, j) => {
    const alpha = strengthOf[codes[i * keys.size + j]];
    if (alpha >= FAINTEST) edges.push([i, j, Math.min(1, alpha)]);
  };
  if (query !== null) {
    for (let j = 0; j < keys.size; j++) add(query, j);
  } else if (key !== null) {
    for (let i = 0; i < queries.size; i++) add(i, key);
  } else {
    const lastQuery = Math.min(to, queries.size), lastKey = Math.min(to, keys.size);
    for (let i = from; i < lastQuery; i++) for (let j = 0; j < keys.size; j++) add(i, j);
    for (let i = 0; i < queries.size; i++) {
      if (i >= from && i < lastQuery) continue;
      for (let j = from; j < lastKey; j++) add(i, j);
    }
  }
  return query !== null || key !== null ? edges : strongest(edges, LINES_PER_TOKEN * (to - from));
}

/** The edges of greatest opacity, about so many, without sorting them. */
function strongest(edges, most) {
  if (edges.length <= most) return edges;
  const counts = new Uint32Array(257);
  for (const edge of edges) counts[Math.round(edge[2] * 256)]++;
  let level = 256, sum = counts[256];
  while (level > 0 && sum + counts[level - 1] <= most) sum += counts[--level];
  return edges.filter((edge) => Math.round(edge[2] * 256) >= level).slice(0, most);
}

function drawLineLabels(context, { from, to, middle, query, key }) {
  const { queries, keys, row, left, right, width, label } = lines;
  const { entropy, received } = state.head;
  const codes = windowCodes();
  const highest = largestOf(rowsOf(entropy, queries)), most = largestOf(rowsOf(received, keys));
  const ofQueries = rowsOf(entropy, queries), ofKeys = rowsOf(received, keys);
  const bar = (x, token, value) => {
    if (Number.isNaN(value)) return;
    context.fillRect(x, middle(token) - row * 0.28, Math.max(value > 0 ? 1 : 0, (BAR - 8) * value), row * 0.56);
  };
  for (let i = from; i < Math.min(to, queries.size); i++) {
    const shade = key === null ? (i === query ? 1 : 0) : strengthOf[codes[i * keys.size + key]];
    tint(context, theme.accent, shade, 0, middle(i) - row / 2, left - 6, row);
    context.fillStyle = theme.query;
    context.globalAlpha = 0.45;
    bar(4, i, ofQueries[i] / highest);
    context.globalAlpha = 1;
    context.fillStyle = queries.special.has(i) ? theme.soft : theme.ink;
    context.textAlign = "right";
    context.fillText(fitted(context, labelOf(queries, i), label - 8), left - 10, middle(i));
  }
  for (let j = from; j < Math.min(to, keys.size); j++) {
    const shade = query === null ? (j === key ? 1 : 0) : strengthOf[codes[query * keys.size + j]];
    tint(context, query === null ? theme.key : theme.accent, shade, right + 6, middle(j) - row / 2, width - right - 6, row);
    context.fillStyle = theme.key;
    context.globalAlpha = 0.45;
    bar(width - BAR + 4, j, ofKeys[j] / most);
    context.globalAlpha = 1;
    context.fillStyle = keys.special.has(j) ? theme.soft : theme.ink;
    context.textAlign = "left";
    context.fillText(fitted(context, labelOf(keys, j), label - 8), right + 10, middle(j));
  }
}

function tint(context, colour, shade, x, y, width, height) {
  if (shade <= 0) return;
  context.globalAlpha = 0.35 * shade;
  context.fillStyle = colour;
  context.fillRect(x, y, width, height);
  context.globalAlpha = 1;
}

function largestOf(values) {
  let most = 0;
  for (const value of values) if (value > most) most = value;
  return most || 1;
}

function tokenAt(event) {
  const box = lines.panel.getBoundingClientRect();
  const token = Math.floor((event.clientY - box.top - 5 + lines.panel.scrollTop) / lines.row);
  const x = event.clientX - box.left - 1;
  if (token < 0 || x > lines.width) return null;
  if (x < lines.left && token < lines.queries.size) return { query: token };
  if (x > lines.right && token < lines.keys.size) return { key: token };
  return null;
}

function buildLines() {
  const panel = $("lines");
  panel.addEventListener("scroll", () => drawSoon(drawLines), { passive: true });
  panel.addEventListener("pointermove", (event) => {
    const token = tokenAt(event);
    hover(token ?? {});
    if (token) showTip(event, tokenText(token));
    else hideTip();
  });
  panel.addEventListener("pointerleave", () => { hover({}); hideTip(); });
  panel.addEventListener("click", (event) => {
    const token = tokenAt(event);
    if (token) keep(token);
  });
}

/** What is said of a token: its entropy as a query, what it receives as a key, and the weight of the edge to the one kept. */
function tokenText({ query = null, key = null }) {
  const { head } = state, { queries, keys } = head.layer;
  if (query !== null) {
    const facts = [`${nameOf(queries, query)} as query`, `entropy ${numberText(rowsOf(head.entropy, queries)[query])} nats`];
    if (head.sink) facts.push(`learned sink ${numberText(rowsOf(head.sink, queries)[query])}`);
    if (state.kept.key !== null) facts.push(edgeText(query, state.kept.key));
    return facts.join("\n");
  }
  const facts = [`${nameOf(keys, key)} as key`, `received ${numberText(rowsOf(head.received, keys)[key])}`];
  if (state.kept.query !== null) facts.push(edgeText(state.kept.query, key));
  return facts.join("\n");
}
