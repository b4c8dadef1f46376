// The chosen head, the query and key in focus, and the keyboard.
const NOTHING = { query: null, key: null };
const state = {
  head: heads[0], window: 0, codes: null, scale: "root", side: "picture", edges: 15,
  hovered: { ...NOTHING }, // where the pointer is
  kept: { ...NOTHING }, // what was clicked, or moved to by the keyboard
};

/** The codes of the chosen head in the chosen window. */
function windowCodes() {
  const { queries, keys } = state.head.layer, size = queries.size * keys.size;
  return state.codes.subarray(state.window * size, (state.window + 1) * size);
}

const codeAt = (query, key) => windowCodes()[query * state.head.layer.keys.size + key];

/** A row quantity of the chosen window. */
function rowsOf(values, axis) {
  return values.subarray(state.window * axis.size, (state.window + 1) * axis.size);
}

/** The query and key in focus: those under the pointer, or else those kept. */
function focus() {
  const hovers = state.hovered.query !== null || state.hovered.key !== null;
  if (!hovers) return state.kept;
  return { query: state.hovered.query ?? (state.hovered.key === null ? null : state.kept.query), key: state.hovered.key };
}

// each view is drawn at most once in a frame
const waiting = new Set();
function drawSoon(...draws) {
  if (!waiting.size) requestAnimationFrame(() => {
    const now = [...waiting];
    waiting.clear();
    for (const draw of now) draw();
  });
  for (const draw of draws) waiting.add(draw);
}

function drawFocus() {
  if (state.codes) drawSoon(drawMatrixFocus, drawLines, drawPicture, showDetail);
}

function hover({ query = null, key = null }) {
  if (state.hovered.query === query && state.hovered.key === key) return;
  state.hovered = { query, key };
  drawFocus();
}

/** Keep a query, a key or both in focus; the same again lets them go. */
function keep({ query = null, key = null }) {
  const same = state.kept.query === query && state.kept.key === key;
  state.kept = same ? { ...NOTHING } : { query, key };
  if (!same) {
    announceFocus();
    scrollToToken(query ?? key);
  }
  drawFocus();
}

let choice = 0;
let wanted = heads[0]; // the head chosen last, which may not be decoded yet
/** Choose a head: its pattern is decoded, then everything that shows it is drawn. */
async function choose(head) {
  const mine = ++choice;
  wanted = head;
  const codes = await patternOf(head);
  if (mine !== choice) return; // another was chosen meanwhile
  const before = state.head.layer;
  const { layer } = head;
  if (layer.queries !== before.queries || layer.keys !== before.keys) state.kept = { ...NOTHING };
  Object.assign(state, { head, codes, window: Math.min(state.window, layer.windows - 1), hovered: { ...NOTHING } });
  markGrids();
  drawHead();
  showChoice();
  document.body.dataset.shown = titleOf(head);
  setTimeout(decodeNeighbours, 60, head);
}

function decodeNeighbours(head) {
  if (head !== state.head) return;
  for (const [down, across] of [[0, 1], [1, 0], [0, -1], [-1, 0]]) {
    const other = neighbour(head, down, across);
    if (other !== head) patternOf(other);
  }
}

function drawHead() {
  layOutSide();
  drawMatrix();
  layOutLines();
  drawLines();
  drawPicture();
  placeDetail();
  showDetail();
}

const EDGE_HEIGHT = 27, DETAIL_HEIGHT = 190, EDGES_BELOW = 15;
/** Put the list of edges under the heads or under the pattern, in columns, where the columns of the page end more evenly. */
function placeDetail() {
  const [ofHeads, ofHead] = [".heads", ".head"].map((name) => document.querySelector(`${name} > :last-child`).getBoundingClientRect());
  const free = ofHead.bottom - ofHeads.bottom - DETAIL_HEIGHT;
  const edges = Math.max(8, Math.min(20, Math.floor(free / EDGE_HEIGHT)));
  const beside = Math.abs(free - edges * EDGE_HEIGHT);
  const below = Math.abs(ofHead.bottom + DETAIL_HEIGHT + (EDGES_BELOW / 3) * EDGE_HEIGHT - ofHeads.bottom);
  const isBeside = ofHeads.right < ofHead.left && beside < below;
  document.querySelector("main").classList.toggle("beside", isBeside);
  state.edges = isBeside ? edges : EDGES_BELOW;
}

/** Show the choice in the heading, the controls, the address and to screen readers. */
function showChoice() {
  const { head } = state, { layer } = head;
  const others = layer.windows > 1 ? ` · window ${state.window} of ${layer.windows}` : "";
  $("head-name").textContent = titleOf(head);
  $("head-facts").textContent = `mean entropy ${numberText(mean(head.entropy))} nats${others}`;
  $("matrix").setAttribute("aria-label", `Pattern of ${titleOf(head)}, ${layer.queries.size} queries by ${layer.keys.size} keys. Shift and arrows read single weights.`);
  $("lines").setAttribute("aria-label", `Lines from queries to keys of ${titleOf(head)}.`);
  $("picture").setAttribute("aria-label", `The image with its patches. What a patch attends to in ${titleOf(head)} is laid over it.`);
  fillSelects();
  $("window-control").hidden = layer.windows === 1;
  $("window").max = layer.windows - 1;
  $("window").value = state.window;
  $("announcement").textContent = `${titleOf(head)}, mean entropy ${numberText(mean(head.entropy))} nats. Strongest edge: ${edgeSentence(edgeList()[0])}`;
  try {
    history.replaceState(null, "", `#${encodeURIComponent(`${layer.stack}.${head.name}`)}`);
  } catch { /* a frame without an address */ }
}

function edgeSentence(edge) {
  return edge ? edgeText(edge.query, edge.key).replace("\n", ", ") : "none";
}

function announceFocus() {
  const { query, key } = state.kept;
  if (query !== null && key !== null) $("announcement").textContent = edgeSentence({ query, key });
  else $("announcement").textContent = tokenText(state.kept).replaceAll("\n", ", ");
}

function fillSelects() {
  const { head } = state, ofStack = layers.filter((layer) => layer.stack === head.layer.stack);
  const fill = (select, values, value) => {
    if (select.dataset.values !== String(values)) {
      select.replaceChildren(...values.map((each) => new Option(each, each)));
      select.dataset.values = String(values);
    }
    select.value = value;
  };
  fill($("stack"), stacks, head.layer.stack);
  fill($("layer"), ofStack.map((layer) => layer.layer), head.layer.layer);
  fill($("head"), [...Array(head.layer.heads).keys()], head.head);
}

/** The strongest edges: of the query or key in focus, or of the whole head. */
function edgeList() {
  const { queries, keys } = state.head.layer, codes = windowCodes(), { query, key } = focus();
  const places = [], most = state.edges;
  let least = BELOW;
  const add = (i, j) => {
    const code = codes[i * keys.size + j];
    if (code <= least) return;
    let at = places.length;
    while (at > 0 && places[at - 1].code < code) at--;
    places.splice(at, 0, { query: i, key: j, code });
    if (places.length > most) least = places[(places.length = most) - 1].code;
  };
  if (query !== null) for (let j = 0; j < keys.size; j++) add(query, j);
  else if (key !== null) for (let i = 0; i < queries.size; i++) add(i, key);
  else for (let i = 0; i < queries.size; i++) for (let j = 0; j < keys.size; j++) add(i, j);
  return places;
}

/** List the facts of the query and key in focus, and the strongest edges. */
function showDetail() {
  const { head } = state, { queries, keys } = head.layer, { query, key } = focus();
  const facts = [];
  if (query !== null) {
    facts.push(["query", nameOf(queries, query)], ["entropy of its row", `${numberText(rowsOf(head.entropy, queries)[query])} nats`]);
    if (head.sink) facts.push(["learned sink", numberText(rowsOf(head.sink, queries)[query])]);
  }
  if (key !== null) facts.push(["key", nameOf(keys, key)], ["mass it receives", numberText(rowsOf(head.received, keys)[key])]);
  if (query !== null && key !== null) facts.push(["weight", weightText(codeAt(query, key))]);
  if (!facts.length) facts.push(["", "Point at a token, a weight or a patch for its numbers."]);
  $("token-facts").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  $("edges-note").textContent = query !== null ? `of ${nameOf(queries, query)}` : key !== null ? `to ${nameOf(keys, key)}` : "of the head";
  $("edges").replaceChildren(...edgeList().map(edgeItem));
}

function edgeItem({ query, key, code }) {
  const { queries, keys } = state.head.layer;
  const button = element("button");
  button.type = "button";
  button.setAttribute("aria-label", `${nameOf(queries, query)} to ${nameOf(keys, key)}: ${weightText(code)}`);
  button.setAttribute("aria-pressed", String(state.kept.query === query && state.kept.key === key));
  const token = (axis, number) => {
    const label = element("bdi", labelOf(axis, number));
    label.className = axis.special.has(number) ? "token special" : "token";
    return label;
  };
  const arrow = element("span", "→"), weight = element("span", weightText(code));
  arrow.className = "arrow";
  weight.className = "weight";
  button.append(token(queries, query), arrow, token(keys, key), weight);
  button.addEventListener("click", () => keep({ query, key }));
  const item = element("li");
  item.append(button);
  return item;
}

function element(name, text = "") {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function scrollToToken(token) {
  const { panel, row, height } = lines;
  const y = token * row;
  if (y < panel.scrollTop || y > panel.scrollTop + height - row) panel.scrollTop = y - height / 2;
}

function showTip(event, text) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const x = event.clientX + 16 + width > window.innerWidth ? event.clientX - width - 12 : event.clientX + 16;
  const y = event.clientY + 18 + height > window.innerHeight ? event.clientY - height - 10 : event.clientY + 18;
  tip.style.left = `${Math.max(4, x)}px`;
  tip.style.top = `${Math.max(4, y)}px`;
}

function hideTip() {
  $("tip").hidden = true;
}

/** The head so many layers and heads away, within the stacks. */
function neighbour(head, down, across) {
  const at = layers.indexOf(head.layer) + down;
  const layer = layers[Math.max(0, Math.min(layers.length - 1, at))];
  return heads[layer.first + Math.max(0, Math.min(layer.heads - 1, head.head + across))];
}

const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e6], End: [0, 1e6] };
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("select, input")) return;
  const move = MOVES[event.key];
  if (move && !(event.shiftKey && Math.abs(move[1]) > 1)) {
    event.preventDefault();
    if (event.shiftKey) moveFocus(...move);
    else choose(neighbour(wanted, ...move));
  } else if (event.key === "Escape") {
    state.kept = { ...NOTHING };
    state.hovered = { ...NOTHING };
    hideTip();
    drawFocus();
  } else if (event.key.toLowerCase() === "s" && !event.shiftKey) {
    const scales = [...$("scale").options].map((option) => option.value);
    setScale(scales[(scales.indexOf(state.scale) + 1) % scales.length]);
  } else if (event.key === "Enter" && event.target.closest?.(".surface, #lines") && focus().query !== null) {
    keep({ query: focus().query });
  }
}

function moveFocus(down, across) {
  const { queries, keys } = state.head.layer, { query, key } = state.kept;
  const inside = (value, size) => Math.max(0, Math.min(size - 1, value));
  const begins = query === null && key === null;
  state.kept = begins ? { query: 0, key: 0 } : { query: inside((query ?? 0) + down, queries.size), key: inside((key ?? 0) + across, keys.size) };
  scrollToToken(state.kept.query);
  announceFocus();
  drawFocus();
}

function setScale(scale) {
  state.scale = scale;
  $("scale").value = scale;
  drawEverything();
}

function drawEverything() {
  makePixels();
  drawRamp($("ramp"));
  drawGrids();
  if (state.codes) drawHead();
  drawStream();
}

function headFromAddress() {
  let address = "";
  try { address = decodeURIComponent(location.hash.slice(1)); } catch { /* not one of a head */ }
  return heads.find((head) => `${head.layer.stack}.${head.name}` === address) ?? heads[0];
}

async function begin() {
  readTheme();
  await readRows();
  buildGrids();
  buildMatrix();
  buildLines();
  buildStream();
  await buildPicture();
  document.querySelector("main").classList.toggle("many", layers.some((layer) => layer.heads > 16));
  $("stack-control").hidden = stacks.length < 2;
  const ofControls = (stack, layer, head) => {
    const ofStack = layers.filter((each) => each.stack === stack);
    const whole = ofStack.find((each) => each.layer === Number(layer)) ?? ofStack[0];
    return heads[whole.first + Math.min(Number(head), whole.heads - 1)];
  };
  for (const name of ["stack", "layer", "head"])
    $(name).addEventListener("change", () => choose(ofControls($("stack").value, $("layer").value, $("head").value)));
  $("window").addEventListener("change", () => {
    state.window = Math.max(0, Math.min(state.head.layer.windows - 1, Math.floor(Number($("window").value) || 0)));
    drawHead();
    showChoice();
  });
  $("scale").addEventListener("change", () => setScale($("scale").value));
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => choose(headFromAddress()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readTheme(); drawEverything(); });
  new ResizeObserver(() => drawSoon(redrawIfResized)).observe(document.querySelector("main"));
  $("notes").hidden = !meta.notes.length;
  $("notes").append(...meta.notes.map((note) => element("li", note)));
  drawEverything();
  await choose(headFromAddress());
  document.body.dataset.ready = "";
}

let width = window.innerWidth, screenRatio = ratio();
function redrawIfResized() {
  if (window.innerWidth === width && ratio() === screenRatio) return;
  [width, screenRatio] = [window.innerWidth, ratio()];
  drawEverything();
}

begin().catch((error) => {
  $("failure").hidden = false;
  $("failure").textContent = typeof DecompressionStream === "undefined"
    ? "This page needs a browser of 2023 or later: it decompresses its data with DecompressionStream."
    : `The page could not be drawn: ${error.message}`;
  console.error(error);
});
