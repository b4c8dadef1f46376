"use strict";
// What the page holds: axes, layers and heads, and the compressed blocks, which are decoded when they are needed.
const $ = (id) => document.getElementById(id);
const meta = JSON.parse($("data").textContent);

// Codes are decimal numbers, see weight_codes.py: a few of them have a meaning of their own, the others rise with the weight.
const HIDDEN = 0, UNMEASURED = 1, ZERO = 2, BELOW = 3;
const SMALLEST_DECADE = -35, DETAILED_DECADE = -4;
const weightOf = new Float64Array(1 << 16);
const mantissaOf = new Uint16Array(1 << 16), decadeOf = new Int8Array(1 << 16), digitsOf = new Uint8Array(1 << 16);
(function numberCodes() {
  let code = BELOW + 1;
  for (let decade = SMALLEST_DECADE; decade < 0; decade++) {
    const digits = decade >= DETAILED_DECADE ? meta.digits : 2;
    for (let m = 10 ** (digits - 1); m < 10 ** digits; m++, code++) {
      weightOf[code] = Number(`${m}e${decade - digits + 1}`);
      mantissaOf[code] = m; decadeOf[code] = decade; digitsOf[code] = digits;
    }
  }
  weightOf[code] = 1;
  digitsOf[code] = 0;
})();

/** The weight of a code as a decimal number, without rounding. */
function weightText(code) {
  if (code === HIDDEN) return "not visible";
  if (code === UNMEASURED) return "not measured";
  if (code === ZERO) return "0";
  if (code === BELOW) return "below 1e-35";
  if (digitsOf[code] === 0) return `1.${"0".repeat(meta.digits - 1)}`;
  const digits = String(mantissaOf[code]);
  if (decadeOf[code] >= DETAILED_DECADE) return `0.${"0".repeat(-decadeOf[code] - 1)}${digits}`;
  return `${digits[0]}.${digits.slice(1)}e${decadeOf[code]}`;
}

/** A number with four significant digits. */
function numberText(value) {
  return Number.isNaN(value) ? "not measured" : String(Number(value.toPrecision(4)));
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** The decompressed bytes of a block. */
async function inflate(name) {
  const stream = new Blob([bytesOf($(name).textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function inflateFloats(name) {
  const bytes = await inflate(name);
  return new Float32Array(bytes.buffer, 0, bytes.length >> 2);
}

const axes = meta.axes.map((axis) => ({
  ...axis,
  size: axis.labels.length,
  continues: new Set(axis.continues),
  special: new Set(axis.special),
}));

/** A token as it is written in a list: pieces that go on with a word begin with a hyphen. */
function labelOf(axis, token) {
  return axis.continues.has(token) ? `‑${axis.labels[token]}` : axis.labels[token];
}

/** A token with its position, as it is written where there is room. */
function nameOf(axis, token) {
  if (axis.kind === "positions") return `position ${token}`;
  const patch = axis.grid ? token - axis.grid.prefix : -1;
  if (patch >= 0 && !axis.special.has(token))
    return `row ${Math.floor(patch / axis.grid.columns)}, column ${patch % axis.grid.columns} (${token})`;
  return axis.kind === "patches" ? `${axis.labels[token]} (${token})` : `“${axis.labels[token]}” (${token})`;
}

const stacks = [...new Set(meta.layers.map((layer) => layer.stack))];
// all heads in order: of each its layer, its number in it, and its place in the blocks
const heads = [];
const layers = meta.layers.map((layer, index) => {
  const whole = { ...layer, index, keys: axes[layer.keys], queries: axes[layer.queries], first: heads.length };
  for (let head = 0; head < layer.heads; head++)
    heads.push({ number: heads.length, layer: whole, head, name: `L${layer.layer}H${head}` });
  return whole;
});
const titleOf = (head) => (stacks.length > 1 ? `${head.layer.stack} ${head.name}` : head.name);

/** Give every head its parts of the blocks of rows and thumbnails. */
async function readRows() {
  const [thumbnails, rows, norms] = await Promise.all([inflate("thumbnails"), inflateFloats("rows"), inflateFloats("norms")]);
  let cell = 0, place = 0;
  const take = (size) => rows.subarray(place, (place += size));
  for (const layer of layers) {
    const { windows, queries, keys, cells } = layer;
    const ofLayer = heads.slice(layer.first, layer.first + layer.heads);
    for (const head of ofLayer) head.thumbnail = thumbnails.subarray(cell, (cell += cells[0] * cells[1]));
    for (const head of ofLayer) head.entropy = take(windows * queries.size);
    for (const head of ofLayer) head.received = take(windows * keys.size);
    if (layer.sink) for (const head of ofLayer) head.sink = take(windows * queries.size);
  }
  let token = 0;
  for (const site of meta.sites) {
    const size = axes[site.axis].size;
    site.norms = norms.subarray(token, (token += size));
    site.updates = norms.subarray(token, (token += size));
  }
}

function mean(values) {
  let sum = 0, count = 0;
  for (const value of values) if (!Number.isNaN(value)) { sum += value; count++; }
  return count ? sum / count : NaN;
}

// decoded heads, those looked at last at the end; bounded by their weights
const decoded = new Map();
const MOST_DECODED = 24_000_000;
let decodedWeights = 0;

/** The codes [window, query, key] of a head; a promise, kept until many others were asked for. */
function patternOf(head) {
  const known = decoded.get(head.number);
  if (known) {
    decoded.delete(head.number);
    decoded.set(head.number, known);
    return known;
  }
  const size = head.layer.windows * head.layer.queries.size * head.layer.keys.size;
  const promise = inflate(`head${head.number}`).then((bytes) => {
    const codes = new Uint16Array(size);
    for (let i = 0; i < size; i++) codes[i] = (bytes[i] << 8) | bytes[size + i];
    return codes;
  });
  decoded.set(head.number, promise);
  decodedWeights += size;
  for (const [oldest] of decoded) {
    if (decodedWeights <= MOST_DECODED || oldest === head.number) break;
    decoded.delete(oldest);
    const { layer } = heads[oldest];
    decodedWeights -= layer.windows * layer.queries.size * layer.keys.size;
  }
  return promise;
}
