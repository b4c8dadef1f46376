// The norm of the residual stream after each sublayer: sites run down, tokens across.
const stream = { stack: null };
const STREAM_TOP = 5;
const STREAM_STACKS = [...new Set(meta.sites.map((site) => site.stack))];

function buildStream() {
  $("stream-section").hidden = !meta.sites.length;
  if (!meta.sites.length) return;
  stream.stack = STREAM_STACKS[0];
  for (const stack of STREAM_STACKS) $("stream-stack").append(new Option(stack, stack));
  $("stream-stack-control").hidden = STREAM_STACKS.length < 2;
  $("stream-stack").addEventListener("change", () => { stream.stack = $("stream-stack").value; drawStream(); });
  const surface = $("stream");
  surface.addEventListener("pointermove", (event) => {
    const place = siteAt(event);
    markStream(place);
    if (place) showTip(event, siteText(place));
    else hideTip();
  });
  surface.addEventListener("pointerleave", () => { markStream(null); hideTip(); });
}

/** The sites of a stack with the axis of most of them: a stack may shorten its stream. */
function sitesOf(stack) {
  const sites = meta.sites.filter((site) => site.stack === stack);
  return { sites, size: Math.max(...sites.map((site) => axes[site.axis].size)) };
}

function drawStream() {
  if (!meta.sites.length) return;
  const { sites, size } = sitesOf(stream.stack);
  const first = axes[sites.find((site) => axes[site.axis].size === size).axis];
  const canvas = $("stream").firstElementChild, probe = canvas.getContext("2d");
  probe.font = theme.font;
  const left = 8 + Math.max(...sites.map((site) => probe.measureText(siteName(site)).width));
  const room = $("stream-section").clientWidth - left - 40;
  const cell = Math.min(64, room / size);
  const row = Math.max(7, Math.min(20, Math.floor(560 / sites.length)));
  const turned = cell < 60, labelled = cell >= 13;
  const bottom = labelled ? (turned ? marginFor(probe, first, 110) : 20) : 18;
  Object.assign(stream, { sites, size, left, cell, row, bottom, axis: first });
  stream.width = left + cell * size;
  stream.height = STREAM_TOP + row * sites.length + bottom;
  const context = sized(canvas, stream.width, stream.height);
  drawNorms(context);
  drawSiteNames(context);
  drawTokenNames(context, { labelled, turned });
  markStream(null);
  $("stream").setAttribute("aria-label", `Norm of the residual stream of the ${stream.stack}, ${sites.length} sites by ${size} tokens, from ${numberText(stream.low)} to ${numberText(stream.high)}.`);
}

function drawNorms(context) {
  const { sites, left, cell, row } = stream;
  let [low, high] = [Infinity, 0];
  for (const site of sites)
    for (const norm of site.norms) if (norm > 0) { low = Math.min(low, norm); high = Math.max(high, norm); }
  const span = Math.log(high / low) || 1;
  for (const [number, site] of sites.entries()) {
    const width = (stream.size * cell) / site.norms.length;
    for (let token = 0; token < site.norms.length; token++) {
      const shade = site.norms[token] > 0 ? Math.log(site.norms[token] / low) / span : 0;
      context.fillStyle = Number.isNaN(site.norms[token]) ? theme.unmeasured : cssOf(theme.ramp[Math.round(shade * (SHADES - 1))]);
      // a little wider, so that no gaps show between cells of part of a pixel
      context.fillRect(left + token * width, STREAM_TOP + number * row, width + (width > 8 ? -1 : 0.5), row - (row > 9 ? 1 : 0));
    }
  }
  Object.assign(stream, { low, high });
  $("stream-low").textContent = numberText(low);
  $("stream-high").textContent = numberText(high);
  drawRamp($("stream-ramp"));
}

function drawSiteNames(context) {
  const { sites, left, row } = stream;
  context.fillStyle = theme.soft;
  context.textAlign = "right";
  context.font = theme.font.replace("12px", "11px");
  const every = row >= 11 ? 1 : Math.ceil(12 / row);
  for (const [number, site] of sites.entries())
    if (number % every === 0) context.fillText(siteName(site), left - 6, STREAM_TOP + (number + 0.5) * row);
}

function drawTokenNames(context, { labelled, turned }) {
  const { axis, left, cell, row, sites, bottom } = stream;
  const y = STREAM_TOP + sites.length * row + 5;
  context.font = theme.font;
  if (!labelled) {
    context.fillStyle = theme.soft;
    context.textAlign = "center";
    context.font = theme.font.replace("12px", "10px");
    const every = tickStep(axis.size, (cell * axis.size) / 50);
    for (let token = 0; token < axis.size; token += every) context.fillText(token, left + (token + 0.5) * cell, y + 6);
    return;
  }
  for (let token = 0; token < axis.size; token++) {
    context.fillStyle = axis.special.has(token) ? theme.soft : theme.ink;
    context.save();
    context.translate(left + (token + 0.5) * cell, turned ? y : y + 8);
    if (turned) context.rotate(-Math.PI / 2);
    context.textAlign = turned ? "right" : "center";
    context.fillText(fitted(context, labelOf(axis, token), turned ? bottom - 8 : cell - 4), 0, 0);
    context.restore();
  }
}

function siteName(site) {
  const name = site.site.replaceAll("_", " ");
  return site.site === "embedding" || site.site === "final_norm" ? name : `L${site.layer} ${name}`;
}

function siteAt(event) {
  const box = $("stream").getBoundingClientRect();
  const site = stream.sites[Math.floor((event.clientY - box.top - STREAM_TOP) / stream.row)];
  if (!site) return null;
  const width = (stream.size * stream.cell) / site.norms.length;
  const token = Math.floor((event.clientX - box.left - stream.left) / width);
  return token >= 0 && token < site.norms.length ? { site, token, width } : null;
}

function siteText({ site, token }) {
  const update = site.updates[token];
  const facts = [`${nameOf(axes[site.axis], token)} after ${siteName(site)}`, `norm ${numberText(site.norms[token])}`];
  if (!Number.isNaN(update)) facts.push(`of the update ${numberText(update)}`);
  return facts.join("\n");
}

function markStream(place) {
  const context = sized($("stream").lastElementChild, stream.width, stream.height);
  if (!place) return;
  context.strokeStyle = theme.accent;
  context.lineWidth = 2;
  const y = STREAM_TOP + stream.sites.indexOf(place.site) * stream.row;
  context.strokeRect(stream.left + place.token * place.width, y, Math.max(2, place.width), stream.row);
}
