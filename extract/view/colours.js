// Colours of the theme, and how a weight becomes one.
const theme = {};
const SHADES = 256;
const ratio = () => window.devicePixelRatio || 1;

/** Read the theme's colours from the style sheet, and make the ramp of shades. */
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["paper", "card", "ink", "soft", "line", "accent", "wash", "query", "key", "unmeasured"])
    theme[name] = style.getPropertyValue(`--${name}`).trim();
  const stops = style.getPropertyValue("--ramp").split(",").map((stop) => rgbOf(stop.trim()));
  theme.ramp = new Uint32Array(SHADES);
  for (let i = 0; i < SHADES; i++) {
    const place = (i / (SHADES - 1)) * (stops.length - 1), at = Math.min(Math.floor(place), stops.length - 2);
    theme.ramp[i] = packed(stops[at].map((from, c) => from + (stops[at + 1][c] - from) * (place - at)));
  }
  theme.font = '12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif';
}

function rgbOf(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

/** A pixel of an image: red, green, blue and full opacity. */
function packed([r, g, b]) {
  return (255 << 24) | (Math.round(b) << 16) | (Math.round(g) << 8) | Math.round(r);
}

const cssOf = (pixel) => `rgb(${pixel & 255} ${(pixel >> 8) & 255} ${(pixel >> 16) & 255})`;

/** Where a weight is on the chosen scale, from 0 to 1. The logarithmic one begins at 0.0001. */
function strength(weight) {
  if (state.scale === "linear") return weight;
  if (state.scale === "root") return Math.sqrt(weight);
  return weight > 0 ? Math.max(0, 1 + Math.log10(weight) / 4) : 0;
}

// of every code its strength and its pixel, of every shade of thumbnails its pixel; made anew for each theme and scale
const strengthOf = new Float32Array(1 << 16), pixelOf = new Uint32Array(1 << 16), thumbnailPixel = new Uint32Array(256);
function makePixels() {
  for (let code = 0; code < strengthOf.length; code++) {
    strengthOf[code] = strength(weightOf[code]);
    pixelOf[code] = theme.ramp[Math.round(strengthOf[code] * (SHADES - 1))];
  }
  const nothing = packed(rgbOf(theme.card));
  pixelOf[HIDDEN] = nothing;
  pixelOf[UNMEASURED] = packed(rgbOf(theme.unmeasured));
  for (let shade = 0; shade < 256; shade++) {
    const weight = shade < 2 ? 0 : 10 ** ((4 * (shade - 1)) / 254 - 4);
    thumbnailPixel[shade] = theme.ramp[Math.round(strength(weight) * (SHADES - 1))];
  }
  thumbnailPixel[0] = nothing;
}

function drawRamp(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = cssOf(theme.ramp[Math.round((x / (canvas.width - 1)) * (SHADES - 1))]);
    context.fillRect(x, 0, 1, canvas.height);
  }
}

/** Give a canvas a size in CSS pixels, sharp on this screen; returns its cleared context. */
function sized(canvas, width, height) {
  const scale = ratio();
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== h) canvas.height = h;
  canvas.style.width = `${w / scale}px`;
  canvas.style.height = `${h / scale}px`;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = theme.font;
  context.textBaseline = "middle";
  return context;
}

/** The text, cut to a width with an ellipsis. */
function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let [low, high] = [0, text.length];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (context.measureText(`${text.slice(0, middle)}…`).width <= width) low = middle;
    else high = middle - 1;
  }
  return `${text.slice(0, low)}…`;
}

/** A step of 1, 2 or 5 times a power of ten that leaves at most so many ticks. */
function tickStep(size, most) {
  let step = 1;
  for (let factors = [2, 2.5, 2], i = 0; size / step > most; i++) step *= factors[i % 3];
  return step;
}
