"use strict";
// The canvas: what app.js's state looks like, and the pointer on it. Sections: pictures, overlays, drawing, pointer.
// Coordinates: image pixels (x right, y down; pixel i spans i to i + 1) and CSS pixels of the canvas.

// --- pictures ---

const size = () => {
  const [layer] = state.layers.values();
  return layer ? layer.shape.slice(1).reverse() : [1, 1];
};

function bitmap(width, height, fill) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  fill(image.data, width * height);
  context.putImageData(image, 0, 0);
  return canvas;
}

function picture(name) {
  const layer = state.layers.get(name);
  if (!layer) return null;
  const { level, width } = state.windows[WINDOW_OF[name]];
  const key = `${level} ${width}`;
  if (layer.key === key) return layer.bitmap;
  const range = layer.high - layer.low || 1;
  const black = layer.low + range * (level - width / 2);
  const scale = 255 / (range * width);
  const colour = layer.shape[0] === 3;
  layer.bitmap = bitmap(layer.shape[2], layer.shape[1], (out, n) => {
    for (let i = 0; i < n; i++) {
      for (let c = 0; c < 3; c++) out[4 * i + c] = (layer.data[colour ? c * n + i : i] - black) * scale;
      out[4 * i + 3] = 255;
    }
  });
  layer.key = key;
  return layer.bitmap;
}

const valuesAt = ({ data, shape: [channels, height, width] }, x, y) =>
  Array.from({ length: channels }, (_, c) => data[(c * height + y) * width + x]);

// --- overlays ---

// The stops of report_page.py: dark blue to yellow in equal steps of lightness.
const STOPS = [[13, 8, 60], [92, 22, 110], [175, 50, 90], [230, 95, 45], [250, 165, 25], [250, 250, 150]];

function colour(unit) {
  const place = clamp(unit, 0, 1) * (STOPS.length - 1);
  const index = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[index].map((start, c) => start + (place - index) * (STOPS[index + 1][c] - start));
}

// Blue shrinks, red grows, both by the logarithm; magenta folds.
function growth(determinant, largest) {
  if (determinant <= 0) return [255, 0, 255, 255];
  const power = clamp(Math.log2(determinant) / largest, -1, 1);
  return [...(power < 0 ? [60, 130, 255] : [255, 70, 50]), 255 * Math.abs(power)];
}

function largestGrowth(layer) {
  const powers = Array.from(layer.data, (value) => (value > 0 ? Math.abs(Math.log2(value)) : 0));
  return clamp(powers.reduce((a, b) => Math.max(a, b), 0), 0.1, 3);
}

function overlayBitmap() {
  const layer = state.layers.get(NEEDS[state.overlay]);
  if (!layer || state.overlay === "arrows") return null;
  layer.bitmaps ??= {};
  return (layer.bitmaps[state.overlay] ??= OVERLAY_BITMAPS[state.overlay](layer));
}

const OVERLAY_BITMAPS = {
  confidence: (layer) => bitmap(layer.shape[2], layer.shape[1], (out, n) => {
    for (let i = 0; i < n; i++) out.set([...colour(layer.data[i] / (layer.high || 1)), 255], 4 * i);
  }),
  jacobian: (layer) => {
    layer.growth = largestGrowth(layer);
    return bitmap(layer.shape[2], layer.shape[1], (out, n) => {
      for (let i = 0; i < n; i++) out.set(growth(layer.data[i], layer.growth), 4 * i);
    });
  },
  grid: gridBitmap,
};

const gridSpacing = (shape) => Math.max(4, Math.floor(Math.max(shape[1], shape[2]) / 16));

// The lines of a regular grid of the moving image, seen through the field: where x + u(x) is a multiple of the spacing.
function gridBitmap({ data, shape }) {
  const [, height, width] = shape;
  const spacing = gridSpacing(shape);
  const finer = clamp(Math.floor(2048 / Math.max(height, width)), 1, 4);
  return bitmap(width * finer, height * finer, (out) => {
    for (let row = 0; row < height * finer; row++) {
      const y = clamp((row + 0.5) / finer - 0.5, 0, height - 1);
      const y0 = Math.min(Math.floor(y), height - 2);
      for (let column = 0; column < width * finer; column++) {
        const x = clamp((column + 0.5) / finer - 0.5, 0, width - 1);
        const x0 = Math.min(Math.floor(x), width - 2);
        const at = y0 * width + x0;
        const v = y - y0;
        const h = x - x0;
        let alpha = 0;
        let inside = true;
        for (let c = 0; c < 2; c++) {
          const i = c * height * width + at;
          const top = data[i] + h * (data[i + 1] - data[i]);
          const bottom = data[i + width] + h * (data[i + width + 1] - data[i + width]);
          const point = (c ? x : y) + top + v * (bottom - top);
          inside &&= point >= -0.5 && point <= (c ? width : height) - 0.5;
          const distance = Math.abs(point - spacing * Math.round(point / spacing)) * finer;
          alpha = Math.max(alpha, clamp(1.6 - distance * 0.6, 0, 1));
        }
        if (inside) out.set([90, 220, 255, 255 * alpha], 4 * (row * width * finer + column));
      }
    }
  });
}

function drawArrows(context, place) {
  const layer = state.layers.get("displacement");
  const [, height, width] = layer.shape;
  const step = Math.max(3, Math.round(Math.max(height, width) / 26));
  context.strokeStyle = context.fillStyle = "#ffd54a";
  context.lineWidth = 1.3;
  for (let y = Math.floor(step / 2); y < height; y += step) {
    for (let x = Math.floor(step / 2); x < width; x += step) {
      const [down, right] = valuesAt({ ...layer, shape: [2, height, width] }, x, y);
      const [x0, y0] = place(x + 0.5, y + 0.5);
      const [x1, y1] = place(x + 0.5 + right, y + 0.5 + down);
      const length = Math.hypot(x1 - x0, y1 - y0);
      context.beginPath();
      if (length < 2) {
        context.arc(x0, y0, 1, 0, 7);
        context.fill();
        continue;
      }
      const head = Math.min(6, length / 2);
      const angle = Math.atan2(y1 - y0, x1 - x0);
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
      for (const turn of [2.6, -2.6]) {
        context.moveTo(x1, y1);
        context.lineTo(x1 + head * Math.cos(angle + turn), y1 + head * Math.sin(angle + turn));
      }
      context.stroke();
    }
  }
}

const LEGENDS = {
  grid: (layer) => ["", "", `lines every ${gridSpacing(layer.shape)} px of the moving image, as the field bends them`],
  arrows: () => ["", "", "from each pixel to where its content came from in the moving image; true length"],
  confidence: (layer) => ["0 px", `${layer.high.toFixed(1)} px`, "error that the network expects of its field; dark is sure"],
  jacobian: ({ growth: power = 1 }) => [`× ${(2 ** -power).toFixed(2)}`, `× ${(2 ** power).toFixed(2)}`,
    "area in the moving image per pixel; magenta folds"],
};

function showLegend() {
  const layer = state.layers.get(NEEDS[state.overlay]);
  $("legend").hidden = !layer;
  if (!layer) return;
  overlayBitmap();
  const texts = LEGENDS[state.overlay](layer);
  ["legend-low", "legend-high", "legend-text"].forEach((id, index) => { $(id).textContent = texts[index]; });
  const bar = $("legend-bar");
  bar.hidden = !texts[0];
  const context = bar.getContext("2d");
  for (let x = 0; x < bar.width; x++) {
    const unit = x / (bar.width - 1);
    const shades = state.overlay === "confidence" ? colour(unit) : growth(2 ** (2 * unit - 1), 1);
    context.clearRect(x, 0, 1, bar.height);
    context.fillStyle = `rgba(${shades.slice(0, 3)}, ${(shades[3] ?? 255) / 255})`;
    context.fillRect(x, 0, 1, bar.height);
  }
}

// --- drawing ---

let pending = false;

function redraw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => { pending = false; drawNow(); });
}

function panes() {
  const { clientWidth: width, clientHeight: height } = $("canvas");
  if (state.view !== "four") return [{ x: 0, y: 0, width, height, shows: state.view }];
  return ["fixed", "moving", "aligned", "fused"].map((shows, index) => ({
    x: ((index % 2) * width) / 2, y: (Math.floor(index / 2) * height) / 2, width: width / 2, height: height / 2, shows,
  }));
}

// How image pixels lie in a pane: CSS = offset + scale * image.
function placement(pane) {
  const [width, height] = size();
  const scale = state.zoom * Math.min(pane.width / width, pane.height / height);
  return {
    scale,
    left: pane.x + pane.width / 2 - scale * state.centre[0],
    top: pane.y + pane.height / 2 - scale * state.centre[1],
  };
}

function dividerX(pane) {
  const { scale, left } = placement(pane);
  return left + scale * size()[0] * ($("swipe").value / 100);
}

function squareSide() {
  return Math.max(1, Math.min(...size()) / $("squares").value);
}

function drawNow() {
  const canvas = $("canvas");
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth * ratio, canvas.clientHeight * ratio].map(Math.round);
  if (!width || !height) return;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = "#07090c";
  context.fillRect(0, 0, canvas.clientWidth, canvas.clientHeight);
  if (state.result) for (const pane of panes()) drawPane(context, pane);
}

function drawPane(context, pane) {
  const place = placement(pane);
  const [width, height] = size();
  const draw = (image) => {
    if (image) context.drawImage(image, place.left, place.top, place.scale * width, place.scale * height);
  };
  context.save();
  context.beginPath();
  context.rect(pane.x, pane.y, pane.width, pane.height);
  context.clip();
  context.imageSmoothingEnabled = place.scale < 3;
  const partner = $("partner").value;
  const label = (DRAW[pane.shows] || drawOne)({ context, pane, place, draw, partner });
  drawOverlay(context, place, draw);
  drawCross(context, place);
  drawLabel(context, pane, label);
  context.strokeStyle = "#2a313b";
  context.lineWidth = 1;
  context.strokeRect(pane.x, pane.y, pane.width, pane.height);
  context.restore();
}

function drawOne({ pane, draw }) {
  draw(picture(pane.shows));
  if (state.layers.has(pane.shows)) return NAMES[pane.shows];
  const asked = pane.shows !== "fused" || state.result.report.mode !== "align only";
  return `${NAMES[pane.shows]}: ${asked ? "not in this folder" : "nothing was fused, as asked"}`;
}

const DRAW = {
  swipe({ context, pane, draw, partner }) {
    const x = dividerX(pane);
    draw(picture("fixed"));
    context.save();
    context.beginPath();
    context.rect(x, pane.y, pane.x + pane.width - x, pane.height);
    context.clip();
    context.fillStyle = "#07090c";
    context.fill();
    draw(picture(partner));
    context.restore();
    context.fillStyle = "#ffd54a";
    context.fillRect(x - 1, pane.y, 2, pane.height);
    context.beginPath();
    context.arc(x, pane.y + pane.height / 2, 7, 0, 7);
    context.fill();
    return `fixed | ${NAMES[partner]}`;
  },
  checker({ context, place, draw, partner }) {
    const [width, height] = size();
    const side = squareSide();
    draw(picture("fixed"));
    context.save();
    context.beginPath();
    for (let row = 0; row * side < height; row++) {
      for (let column = 1 - (row % 2); column * side < width; column += 2) {
        const x = place.left + place.scale * column * side;
        context.rect(x, place.top + place.scale * row * side, place.scale * side, place.scale * side);
      }
    }
    context.clip();
    draw(picture(partner));
    context.restore();
    return `fixed and ${NAMES[partner]} in turn`;
  },
  blend({ context, draw, partner }) {
    const alpha = $("alpha").value / 100;
    draw(picture("fixed"));
    context.globalAlpha = alpha;
    draw(picture(partner));
    context.globalAlpha = 1;
    return `${Math.round(100 * (1 - alpha))} % fixed, ${Math.round(100 * alpha)} % ${NAMES[partner]}`;
  },
  blink({ draw, partner }) {
    const shown = state.blink ? partner : "fixed";
    draw(picture(shown));
    return `blink: ${NAMES[shown]}`;
  },
};

function drawOverlay(context, place, draw) {
  const image = overlayBitmap();
  context.globalAlpha = $("strength").value / 100;
  if (image) draw(image);
  if (state.overlay === "arrows" && state.layers.has("displacement")) {
    drawArrows(context, (x, y) => [place.left + place.scale * x, place.top + place.scale * y]);
  }
  context.globalAlpha = 1;
}

function drawCross(context, { scale, left, top }) {
  if (!state.pointer) return;
  const [x, y] = state.pointer.map((value) => Math.floor(value) + 0.5);
  context.strokeStyle = "#ffffffb0";
  context.lineWidth = 1;
  context.beginPath();
  for (const sign of [-1, 1]) {
    context.moveTo(left + scale * x + sign * 4, top + scale * y);
    context.lineTo(left + scale * x + sign * 12, top + scale * y);
    context.moveTo(left + scale * x, top + scale * y + sign * 4);
    context.lineTo(left + scale * x, top + scale * y + sign * 12);
  }
  context.stroke();
}

function drawLabel(context, pane, text) {
  const tag = (words, x, back, ink) => {
    context.font = '12px system-ui, "DejaVu Sans", sans-serif';
    const width = context.measureText(words).width + 12;
    context.fillStyle = back;
    context.fillRect(x < 0 ? pane.x + pane.width - width - 6 : pane.x + x, pane.y + 6, width, 20);
    context.fillStyle = ink;
    context.fillText(words, (x < 0 ? pane.x + pane.width - width - 6 : pane.x + x) + 6, pane.y + 20);
  };
  tag(text, 6, "#000000a0", "#e5e9ef");
  if (state.result.report.status !== "ok" && (pane.shows !== "fixed" && pane.shows !== "moving")) {
    tag(state.result.report.status.toUpperCase(), -1, "#c9372c", "#fff");
  }
}

// --- pointer ---

function resetView() {
  const [width, height] = size();
  state.zoom = 1;
  state.centre = [width / 2, height / 2];
  state.windows = Object.fromEntries(["fixed", "moving", "fused"].map((name) => [name, { level: 0.5, width: 1 }]));
  redraw();
}

function imagePoint(pane, x, y) {
  const { scale, left, top } = placement(pane);
  return [(x - left) / scale, (y - top) / scale];
}

const paneAt = (x, y) =>
  panes().find((p) => x >= p.x && x < p.x + p.width && y >= p.y && y < p.y + p.height) || panes()[0];

function zoomBy(factor, at) {
  const pane = at ? paneAt(...at) : panes()[0];
  const before = at ? imagePoint(pane, ...at) : state.centre;
  state.zoom = clamp(state.zoom * factor, LIMITS.smallestZoom, LIMITS.largestZoom);
  const after = at ? imagePoint(pane, ...at) : state.centre;
  state.centre = state.centre.map((value, axis) => value + before[axis] - after[axis]);
  redraw();
}

// The image that is seen at a point; where both are, the one that is seen more.
function windowOf(pane, x, y) {
  if (WINDOW_OF[pane.shows]) return WINDOW_OF[pane.shows];
  const squares = imagePoint(pane, x, y).map((value) => Math.floor(value / squareSide()));
  const showsPartner = {
    swipe: x >= dividerX(pane),
    checker: (squares[0] + squares[1]) % 2 !== 0,
    blend: $("alpha").value > 50,
    blink: state.blink,
  };
  return showsPartner[pane.shows] ? WINDOW_OF[$("partner").value] : "fixed";
}

function listenToPointer() {
  const canvas = $("canvas");
  let grip = null;
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomBy(Math.exp(-event.deltaY / 400), [event.offsetX, event.offsetY]);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    if (!state.result) return;
    canvas.setPointerCapture(event.pointerId);
    const pane = paneAt(event.offsetX, event.offsetY);
    const windowing = event.button === 2 || event.shiftKey || state.drag === "window";
    const onDivider = state.view === "swipe" && Math.abs(event.offsetX - dividerX(pane)) < 10;
    const kind = onDivider ? "divider" : windowing ? "window" : "move";
    grip = { kind, pane, window: windowOf(pane, event.offsetX, event.offsetY), x: event.offsetX, y: event.offsetY };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!state.result) return;
    const pane = grip ? grip.pane : paneAt(event.offsetX, event.offsetY);
    state.pointer = imagePoint(pane, event.offsetX, event.offsetY);
    if (grip) {
      dragTo(grip, event.offsetX, event.offsetY);
      Object.assign(grip, { x: event.offsetX, y: event.offsetY });
    }
    showValues();
    redraw();
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { grip = null; });
  canvas.addEventListener("pointerleave", () => { state.pointer = null; redraw(); });
}

function dragTo(grip, x, y) {
  const [dx, dy] = [x - grip.x, y - grip.y];
  const { scale, left } = placement(grip.pane);
  if (grip.kind === "divider") {
    $("swipe").value = clamp((100 * (x - left)) / (scale * size()[0]), 0, 100);
  } else if (grip.kind === "window") {
    const chosen = state.windows[grip.window];
    chosen.width = clamp(chosen.width * Math.exp(dx / 200), 0.01, 20);
    chosen.level = clamp(chosen.level - (dy / 300) * chosen.width, -1, 2);
  } else {
    state.centre = [state.centre[0] - dx / scale, state.centre[1] - dy / scale];
  }
}

function showValues() {
  const [width, height] = size();
  const [x, y] = state.pointer.map(Math.floor);
  if (x < 0 || y < 0 || x >= width || y >= height) {
    $("pixel").textContent = "outside the image";
    return;
  }
  const number = (value, layer) => (layer.dtype === "uint8" ? String(value) : String(Number(value.toPrecision(4))));
  const parts = [`x ${x}  y ${y}`];
  for (const name of Object.keys(NAMES)) {
    const layer = state.layers.get(name);
    if (layer) parts.push(`${name} ${valuesAt(layer, x, y).map((v) => number(v, layer)).join("/")}`);
  }
  const one = (name) => (state.layers.has(name) ? valuesAt(state.layers.get(name), x, y) : null);
  const [shift, error, jacobian] = ["displacement", "expected_error", "jacobian"].map(one);
  if (shift) parts.push(`shift x ${shift[1].toFixed(1)} y ${shift[0].toFixed(1)} px`);
  if (error) parts.push(`expected error ${error[0].toFixed(1)} px`);
  if (jacobian) parts.push(`Jacobian ${jacobian[0].toFixed(2)}`);
  for (const [name, { level, width: span }] of Object.entries(state.windows)) {
    const layer = state.layers.get(name === "moving" ? "aligned" : name);
    if (!layer || (level === 0.5 && span === 1)) continue;
    const [low, high] = [level - span / 2, level + span / 2].map((v) => layer.low + (layer.high - layer.low) * v);
    parts.push(`${name} window ${Number(low.toPrecision(3))} to ${Number(high.toPrecision(3))}`);
  }
  $("pixel").textContent = parts.join("  ·  ");
}
