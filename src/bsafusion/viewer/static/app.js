"use strict";
// The viewer's page; stage.js draws on its canvas.
// Sections: helpers, state, inputs, options, fusing, results, keys, table, start.

// --- helpers ---

const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function make(tag, parent, properties = {}) {
  const element = Object.assign(document.createElement(tag), properties);
  parent.append(element);
  return element;
}

async function call(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the viewer does not answer; is bsafusion view still running?");
  }
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  throw new Error(problem.error || `the viewer answered ${answer.status}`);
}

const getJson = async (path) => (await call(path)).json();

// --- state ---

const VIEWS = { four: "Four", fused: "Fused", swipe: "Swipe", checker: "Checker", blend: "Blend", blink: "Blink" };
const OVERLAYS = { none: "None", grid: "Grid", arrows: "Arrows", confidence: "Confidence", jacobian: "Jacobian" };
const NEEDS = { grid: "displacement", arrows: "displacement", confidence: "expected_error", jacobian: "jacobian" };
const DRAGS = { move: "Move", window: "Window" };
const NAMES = { fixed: "fixed", moving: "moving, as it came", aligned: "moving, aligned", fused: "fused" };
const WINDOW_OF = { fixed: "fixed", moving: "moving", aligned: "moving", fused: "fused" };
const LIMITS = { smallestZoom: 0.5, largestZoom: 64 };

const state = {
  inputs: { fixed: null, moving: null },
  files: { fixed: null, moving: null },
  turns: { fixed: 0, moving: 0 },
  changed: false, // whether an image has come since a pair was last fused
  unwanted: false, // whether the job is to be dropped
  largestUpload: Infinity,
  job: null,
  dropped: 0,
  result: null,
  layers: new Map(),
  opening: 0,
  view: "four",
  overlay: "none",
  drag: "move",
  blink: false,
  zoom: 1,
  centre: [0, 0],
  windows: {},
  pointer: null,
  rows: [],
  sort: { by: "status", worst: true },
};

function choose(name, value) {
  state[name] = value;
  for (const button of all(`[data-${name}]`)) button.setAttribute("aria-pressed", button.dataset[name] === value);
  for (const label of all(".tools [data-for]")) {
    const mapped = ["confidence", "jacobian", "grid", "arrows"].includes(state.overlay);
    label.hidden = label.dataset.for === "overlay" ? !mapped : label.dataset.for !== state.view;
  }
  $("partner-label").hidden = ["four", "fused"].includes(state.view);
  showLegend();
  redraw();
}

function buttons(parent, name, choices) {
  for (const [value, text] of Object.entries(choices)) {
    const button = make("button", $(parent), { type: "button", textContent: text });
    button.dataset[name] = value;
    button.addEventListener("click", () => choose(name, value));
  }
}

function page(name) {
  const fromTable = $("page-results").contains(document.activeElement);
  for (const other of ["pair", "results"]) {
    $(`page-${other}`).hidden = other !== name;
    $(`tab-${other}`).setAttribute("aria-pressed", other === name);
  }
  if (name === "results") listResults();
  else if (fromTable) $("canvas").focus(); // what was pressed is hidden now
  redraw();
}

// --- inputs ---

const zone = (role) => document.querySelector(`.drop[data-role=${role}]`);

// The newest upload of a role counts, whatever the order of the answers.
async function take(role, file, index = "") {
  const turn = ++state.turns[role];
  const box = zone(role);
  const slice = box.querySelector(".slice");
  const error = box.querySelector(".error");
  slice.querySelector("input").value = index;
  state.files[role] = file;
  state.inputs[role] = null;
  slice.hidden = !/\.nii(\.gz)?$/i.test(file.name);
  error.textContent = "";
  box.classList.remove("ready");
  box.querySelector(".file").textContent = `${file.name} …`;
  offer();
  try {
    if (file.size > state.largestUpload) {
      throw new Error(`${file.name}: ${megabytes(file.size)}; expected at most ${megabytes(state.largestUpload)}`);
    }
    const query = new URLSearchParams({ name: file.name, ...(index && { slice_index: index }) });
    const answer = await call(`/api/inputs/${role}?${query}`, { method: "POST", body: file });
    const image = await answer.json();
    if (turn !== state.turns[role]) return;
    state.inputs[role] = image;
    state.changed = true;
    const kind = image.modality === "unknown" ? "" : `, ${image.modality.toUpperCase()}`;
    const colour = image.colour ? "colour" : "grey";
    box.querySelector(".file").textContent = `${image.name}${sliceWords(image.slice_index)}: ${image.size.join(" × ")}, ${colour}${kind}`;
    box.classList.add("ready");
  } catch (problem) {
    if (turn !== state.turns[role]) return;
    box.querySelector(".file").textContent = "";
    error.textContent = problem.message;
  }
  offer();
}

function offer() {
  const ready = Boolean(state.inputs.fixed && state.inputs.moving);
  $("run").disabled = !ready || Boolean(state.job);
  $("swap").disabled = Boolean(state.job) || !(state.files.fixed || state.files.moving);
  return ready;
}

const sliceWords = (index) => (index == null ? "" : `, slice ${index}`);

async function takeAll(files, role, index) {
  if (!files.length) return; // a text or a link was dropped
  $("job-error").textContent = "";
  state.dropped = performance.now();
  page("pair");
  if (files.length > 2) {
    $("job-error").textContent = `${files.length} files; expected two images: one fixed, one moving`;
    return;
  }
  if (files.length === 2) {
    const [fixed, moving] = [...files].sort((a, b) => looksFixed(b.name) - looksFixed(a.name));
    await Promise.all([take("fixed", fixed), take("moving", moving)]);
    // Only a moving image may be in colour: then the names have misled.
    const misled = offer() && state.inputs.fixed.colour && !state.inputs.moving.colour;
    if (misled && state.files.fixed === fixed && state.files.moving === moving) await swap();
  } else {
    await take(role || (state.files.fixed ? "moving" : "fixed"), files[0], index);
  }
  await fuseAtOnce();
}

// Which of two file names is rather that of the fixed image.
const looksFixed = (name) =>
  [[/fixed/i, 4], [/moving/i, -4], [/mr|t1|t2|flair/i, 1], [/ct|pet|spect/i, -1]]
    .reduce((sum, [pattern, weight]) => sum + (pattern.test(name) ? weight : 0), 0);
const megabytes = (bytes) => `${(bytes / 2 ** 20).toPrecision(3)} MiB`;

async function swap() {
  const { fixed, moving } = state.files;
  const [ofFixed, ofMoving] = ["fixed", "moving"].map((role) => zone(role).querySelector(".slice input").value);
  state.dropped = performance.now();
  for (const role of ["fixed", "moving"]) {
    state.turns[role]++;
    state.files[role] = state.inputs[role] = null;
    zone(role).classList.remove("ready");
    zone(role).querySelector(".slice").hidden = true;
    for (const part of zone(role).querySelectorAll(".file, .error")) part.textContent = "";
  }
  offer();
  await Promise.all([moving && take("fixed", moving, ofMoving), fixed && take("moving", fixed, ofFixed)]);
  await fuseAtOnce();
}

function listenForFiles() {
  const boxes = [...all(".drop"), $("stage-box")];
  const boxOf = (event) => boxes.find((box) => box.contains(event.target)) || $("stage-box");
  const light = (lit) => boxes.forEach((box) => box.classList.toggle("over", box === lit));
  document.addEventListener("dragover", (event) => { event.preventDefault(); light(boxOf(event)); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) light(null); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    light(null);
    takeAll([...event.dataTransfer.files], boxOf(event).dataset.role);
  });
  for (const box of all(".drop")) {
    box.querySelector("input[type=file]").addEventListener("change", (event) => {
      takeAll([...event.target.files], box.dataset.role);
      event.target.value = "";
    });
    box.querySelector(".slice input").addEventListener("change", (event) => {
      const { role } = box.dataset;
      if (state.files[role]) takeAll([state.files[role]], role, event.target.value);
    });
  }
}

// --- options ---

// Each option by its name in a report: its default, how to read and set its control, and its words beside a result.
const byValue = (id, kind = String) => [() => kind($(id).value), (value) => { $(id).value = value; }];
const byTick = (id) => [() => $(id).checked, (value) => { $(id).checked = value; }];
const OPTIONS = {
  fusion: ["network", ...byValue("fusion"), (v) => `${v} fusion`],
  blend: ["luminance", ...byValue("blend"), (v) => `blend ${v}`],
  colormap: ["none", ...byValue("colormap"), (v) => `colour map ${v}`],
  weight_fixed: [0.5, ...byValue("weight", Number), (v) => `fixed image at ${v}`],
  aligned: [false, ...byTick("aligned"), () => "aligned already"],
  align_only: [false, ...byTick("align-only"), () => "align only"],
  refine: [0, ...byValue("refine", Number), (v) => (v ? `${v} step${v === 1 ? "" : "s"} of refinement` : "")],
  mirrored: ["auto", ...byValue("mirrored"), (v) => ({ always: "mirror images too", never: "no mirror images" })[v]],
};

const BLENDS = {
  luminance: "fused, in the moving image's hue",
  alpha: "moving laid over fixed",
  none: "fused, in grey",
};

const MIRRORED = {
  auto: "aligned as well where a large error is expected",
  always: "aligned as well: slower",
  never: "not looked at",
};

const chosenOptions = () => Object.fromEntries(Object.entries(OPTIONS).map(([name, [, read]]) => [name, read()]));

// What of a report's or the page's options is worth saying: null had no part in a result, false and 0 steps are off.
const optionWords = (options, sayDefaults) => Object.entries(OPTIONS)
  .filter(([name, [usual]]) => ![undefined, null, false].includes(options[name]) && (sayDefaults || options[name] !== usual))
  .map(([name, [, , , words]]) => words(options[name])).filter(Boolean).join(", ");

function showOptions() {
  const weight = Number($("weight").value);
  const meaning = { 0: "the moving image alone", 0.5: "as trained", 1: "the fixed image alone" }[weight];
  $("about-blend").textContent = BLENDS[$("blend").value];
  $("about-mirrored").textContent = MIRRORED[$("mirrored").value];
  $("about-weight").textContent = weight.toFixed(2) + (meaning ? `: ${meaning}` : "");
  $("chosen").textContent = optionWords(chosenOptions(), false);
}

function defaultOptions() {
  for (const [usual, , set] of Object.values(OPTIONS)) set(usual);
  showOptions();
}

// --- fusing ---

async function fuseAtOnce() {
  if (!$("at-once").checked || !state.changed || !offer()) return;
  if (state.job) state.unwanted = true; // of images that are not shown any more; fuse() comes back here
  else await fuse();
}

async function fuse() {
  if (state.job) {
    $("job-error").textContent = "another pair is being fused; press Fuse when it is done";
    return;
  }
  const pair = { fixed: state.inputs.fixed.id, moving: state.inputs.moving.id };
  const body = { ...pair, task: $("task").value, options: chosenOptions() };
  const { badInput, stepMismatch } = $("refine").validity;
  $("job-error").textContent = "";
  state.changed = state.unwanted = false;
  const follow = (told) => {
    state.job = told;
    showJob();
  };
  follow({ progress: 0, stage: "" });
  try {
    // Too many or too few are the server's to refuse; this would not reach it as a number of steps.
    if (badInput || stepMismatch) throw new Error(`steps of refinement: expected a whole number, 0 (none) to ${$("refine").max}`);
    const options = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
    follow(await (await call("/api/jobs", options)).json());
    while (state.job.state === "running") {
      await sleep(50);
      follow(await (await call(`/api/jobs/${state.job.id}`, state.unwanted ? { method: "DELETE" } : undefined)).json());
    }
    if (state.unwanted) return;
    if (state.job.state === "failed") throw new Error(state.job.message);
    if (state.job.state === "done") await open(state.job.result);
  } catch (problem) {
    $("job-error").textContent = problem.message;
  } finally {
    state.job = null;
    showJob();
    await fuseAtOnce();
  }
}

function showJob() {
  const running = Boolean(state.job);
  $("progress").hidden = $("cancel").hidden = !running;
  if (running) {
    $("progress").querySelector("progress").value = state.job.progress;
    $("stage").textContent = state.job.stage;
  }
  offer();
}

function cancel() {
  state.unwanted = true;
}

// --- results ---

async function open(key) {
  const turn = ++state.opening;
  const result = await getJson(`/api/results/${key}`);
  const layers = new Map();
  const load = async (names) => Promise.all(names.map(async (name) => {
    if (!result.layers[name]) return;
    const bytes = await (await call(`/api/results/${key}/layers/${name}`)).arrayBuffer();
    const data = result.layers[name].dtype === "uint8" ? new Uint8Array(bytes) : new Float32Array(bytes);
    layers.set(name, { ...result.layers[name], data });
  }));
  await load(Object.keys(NAMES));
  if (turn !== state.opening) return;
  Object.assign(state, { result, layers, pointer: null });
  resetView();
  showResult();
  page("pair");
  drawNow();
  if (state.dropped) document.body.dataset.seconds = ((performance.now() - state.dropped) / 1000).toFixed(3);
  state.dropped = 0;
  await load(Object.values(NEEDS).filter((name, index, list) => list.indexOf(name) === index));
  if (turn !== state.opening) return;
  for (const [overlay, name] of Object.entries(NEEDS)) {
    document.querySelector(`[data-overlay=${overlay}]`).disabled = !layers.has(name);
  }
  document.body.dataset.complete = key;
  choose("overlay", layers.has(NEEDS[state.overlay]) ? state.overlay : "none");
}

function showResult() {
  const { report, words, note, files, key, name } = state.result;
  const banner = $("verdict");
  const suspect = report.status !== "ok";
  const skipped = report.mode === "fuse only"; // the words are those of report_page.py
  NAMES.aligned = skipped ? "moving, taken as aligned" : "moving, aligned";
  $("partner").querySelector("[value=aligned]").textContent = NAMES.aligned;
  const fusedOption = $("partner").querySelector("[value=fused]");
  fusedOption.disabled = !state.layers.has("fused");
  if (fusedOption.disabled && fusedOption.selected) $("partner").value = "aligned";
  banner.hidden = false;
  banner.className = suspect ? "suspect" : "ok";
  banner.replaceChildren();
  make("strong", banner, { textContent: suspect ? `⚠ ${report.status}` : "ok" });
  const what = skipped ? "that the images lie on each other" : suspect ? "this alignment" : "the alignment";
  make("span", banner, {
    textContent: suspect ? `Do not trust ${what} without looking closely:` : `No check found a reason to doubt ${what}.`,
  });
  if (suspect) for (const reason of report.reasons) make("li", banner.querySelector("ul") || make("ul", banner), { textContent: reason });
  $("stage-box").classList.toggle("suspect", suspect);
  document.title = `${suspect ? "SUSPECT: " : ""}${name} – bsafusion viewer`;
  $("empty").hidden = true;
  $("evidence").hidden = false;
  const task = report.options && report.options.task ? `; task ${report.options.task}, from ${report.options.task_from}` : "";
  const slices = Object.entries(report.inputs || {})
    .filter(([, input]) => input.notes && "slice_index" in input.notes)
    .map(([role, input]) => `; ${role} slice ${input.notes.slice_index}`).join("");
  $("pair-name").textContent = name + slices + task;
  $("words").replaceChildren();
  for (const [term, sentence] of words) {
    make("dt", $("words"), { textContent: term });
    make("dd", $("words"), { textContent: sentence });
  }
  const asked = optionWords(report.options || {}, true);
  if (asked) {
    make("dt", $("words"), { textContent: "Options" });
    make("dd", $("words"), { textContent: `${asked}.` });
  }
  if (report.grid && report.grid.note) {
    make("dt", $("words"), { textContent: "Grids" });
    make("dd", $("words"), { textContent: report.grid.note });
  }
  $("note").textContent = note;
  $("zip").href = `/api/results/${key}/zip`;
  $("files").replaceChildren();
  for (const file of files) {
    const line = make("li", $("files"));
    const href = `/api/results/${key}/files/${encodeURIComponent(file.name)}`;
    make("a", line, { textContent: file.name, href, download: file.name });
    make("span", line, { textContent: `${Math.ceil(file.bytes / 1024)} KiB`, className: "hint" });
  }
}

// --- keys ---

function blinkOnOff() {
  if (state.view === "blink") return choose("view", state.before || "four");
  state.before = state.view;
  choose("view", "blink");
}

const toggleOverlay = (name) => {
  const button = document.querySelector(`[data-overlay=${name}]`);
  if (!button.disabled) choose("overlay", state.overlay === name ? "none" : name);
};

function nudge(steps) {
  const slider = { swipe: $("swipe"), blend: $("alpha"), checker: $("squares") }[state.view];
  if (slider) slider.value = Number(slider.value) + steps * (state.view === "checker" ? 1 : 2);
  redraw();
}

const KEYS = {
  " ": blinkOnOff,
  g: () => toggleOverlay("grid"),
  a: () => toggleOverlay("arrows"),
  c: () => toggleOverlay("confidence"),
  j: () => toggleOverlay("jacobian"),
  m: () => { $("partner").value = $("partner").value === "moving" ? "aligned" : "moving"; redraw(); },
  w: () => choose("drag", state.drag === "move" ? "window" : "move"),
  "+": () => zoomBy(1.25),
  "=": () => zoomBy(1.25),
  "-": () => zoomBy(0.8),
  0: resetView,
  ArrowLeft: () => nudge(-1),
  ArrowRight: () => nudge(1),
  "?": () => $("help").showModal(),
};
Object.keys(VIEWS).forEach((view, index) => { KEYS[index + 1] = () => choose("view", view); });

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input:not([type=range], [type=checkbox]), select, dialog")
      || (event.target.closest("[type=range]") && event.key.startsWith("Arrow"));
    const pressing = event.key === " " && event.target.closest("button, a, summary, [type=checkbox]");
    const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action || typing || pressing || event.ctrlKey || event.metaKey || event.altKey || $("page-pair").hidden) return;
    event.preventDefault();
    action();
  });
  // A button clicked with the mouse must not catch the space bar that is meant for blinking.
  document.addEventListener("click", (event) => {
    if (event.detail > 0 && event.target.closest(".tools button")) $("canvas").focus();
  });
  setInterval(() => {
    if (state.view !== "blink") return;
    state.blink = !state.blink;
    redraw();
  }, 450);
}

// --- table ---

const percent = (value) => `${(100 * value).toFixed(value && value < 0.001 ? 3 : 1)} %`;
const gain = (row) => (row.similarity_after == null ? null : row.similarity_after - row.similarity_before);
const BAD = { unreadable: 2, suspect: 1 };

// Each column: its title, the value to sort by, how to write it, and whether high values are the bad ones.
const COLUMNS = {
  name: ["Name", (row) => row.name, String, false],
  status: ["Status", (row) => BAD[row.status] ?? 0, null, true],
  task: ["Task", (row) => row.task ?? null, String, false],
  expected_error: ["Expected error", (row) => row.expected_error ?? null, (v) => `${v.toFixed(1)} px`, true],
  similarity_after: ["Similarity", (row) => row.similarity_after ?? null, (v) => v.toFixed(3), false],
  gain: ["Gain", gain, (v) => v.toFixed(3), false],
  displacement_mean: ["Mean shift", (row) => row.displacement_mean ?? null, (v) => `${v.toFixed(1)} px`, true],
  displacement_max: ["Largest shift", (row) => row.displacement_max ?? null, (v) => `${v.toFixed(1)} px`, true],
  folded_share: ["Folded", (row) => row.folded_share ?? null, percent, true],
  outside_share: ["Outside", (row) => row.outside_share ?? null, percent, true],
};

const order = (a, b) => (a === null || b === null ? (a === null) - (b === null) : a < b ? -1 : a > b ? 1 : 0);

function sorted(rows) {
  const { by, worst } = state.sort;
  const [, value, , highIsBad] = COLUMNS[by];
  const sign = worst === highIsBad ? -1 : 1;
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    return x === null || y === null ? order(x, y) : sign * order(x, y);
  };
  const error = (row) => -(row.expected_error ?? Infinity);
  return [...rows].sort((a, b) => compare(a, b) || order(error(a), error(b)) || order(a.name, b.name));
}

function showTable() {
  const line = make("tr", $("table").tHead);
  $("table").tHead.replaceChildren(line);
  make("th", line, { textContent: "Fused" });
  for (const [by, [title, , , highIsBad]] of Object.entries(COLUMNS)) {
    const head = make("th", line, { scope: "col" });
    const button = make("button", head, { textContent: title, type: "button" });
    button.dataset.by = by;
    if (state.sort.by === by) head.ariaSort = state.sort.worst === highIsBad ? "descending" : "ascending";
    button.addEventListener("click", () => {
      state.sort = { by, worst: state.sort.by === by ? !state.sort.worst : true };
      showTable();
      document.querySelector(`[data-by=${by}]`).focus();
    });
  }
  const wanted = $("filter").value.trim().toLowerCase();
  const matches = (row) => [row.name, row.status, row.task].join(" ").toLowerCase().includes(wanted);
  const rows = sorted(state.rows.filter(matches));
  $("table").tBodies[0].replaceChildren(...rows.map(tableRow));
  const suspect = state.rows.filter((row) => row.status !== "ok").length;
  $("summary").textContent = state.rows.length
    ? `${rows.length} of ${state.rows.length} shown, ${suspect} not ok`
    : "None here: start with bsafusion view RESULT ...";
}

function tableRow(row) {
  const line = document.createElement("tr");
  const src = `/api/results/${row.key}/thumbnail`;
  make("img", make("td", line), { src, alt: "", loading: "lazy", width: 56, height: 56 });
  for (const [by, [, value, text]] of Object.entries(COLUMNS)) {
    const cell = make("td", line, { className: ["name", "status", "task"].includes(by) ? "" : "number" });
    if (by === "name") {
      const button = make("button", cell, { type: "button", textContent: row.name });
      button.addEventListener("click", () => {
        open(row.key).catch((problem) => { $("summary").textContent = problem.message; });
      });
    } else if (by === "status") {
      make("span", cell, { className: `badge ${row.status}`, textContent: row.status, title: row.reasons.join("; ") });
    } else {
      cell.textContent = value(row) === null ? "–" : text(value(row));
    }
  }
  return line;
}

async function listResults() {
  try {
    state.rows = await getJson("/api/results");
    $("count").textContent = state.rows.length ? `(${state.rows.length})` : "";
    showTable();
  } catch (problem) {
    $("summary").textContent = problem.message;
  }
}

// --- start ---

function theme(next) {
  const order = ["auto", "light", "dark"];
  const current = localStorage.getItem("theme") || "auto";
  const chosen = next ? order[(order.indexOf(current) + 1) % 3] : current;
  localStorage.setItem("theme", chosen);
  document.documentElement.dataset.theme = chosen;
  $("theme").textContent = `Theme: ${chosen}`;
}

async function watchModel() {
  for (;;) {
    const { model, message } = await getJson("/api/state");
    $("model").textContent = { loading: "loading the model", ready: "model ready", failed: message }[model];
    $("model").classList.toggle("error", model === "failed");
    if (model !== "loading") return;
    await sleep(300);
  }
}

async function start() {
  theme(false);
  buttons("views", "view", VIEWS);
  buttons("overlays", "overlay", OVERLAYS);
  buttons("drags", "drag", DRAGS);
  for (const name of ["view", "overlay", "drag"]) choose(name, state[name]);
  listenForFiles();
  listenToPointer();
  listenToKeys();
  for (const id of ["swipe", "alpha", "squares", "strength", "partner"]) $(id).addEventListener("input", redraw);
  $("inputs").addEventListener("submit", (event) => {
    event.preventDefault();
    state.dropped = performance.now();
    fuse();
  });
  const clicks = {
    cancel, swap, defaults: defaultOptions, theme: () => theme(true), reset: resetView, "zoom-in": KEYS["+"], "zoom-out": KEYS["-"],
    "help-open": KEYS["?"], "tab-pair": () => page("pair"), "tab-results": () => page("results"),
  };
  for (const [id, action] of Object.entries(clicks)) $(id).addEventListener("click", action);
  $("options").addEventListener("input", showOptions);
  $("filter").addEventListener("input", showTable);
  new ResizeObserver(redraw).observe($("stage-box"));
  offer();
  // The server begins to load the model at the first call: not before the page is there to be seen.
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 30)));
  try {
    const { version, tasks, choices, most_steps: most, largest_upload: largest, browse } = await getJson("/api/state");
    $("version").textContent = `bsafusion ${version}`;
    state.largestUpload = largest;
    $("task").replaceChildren();
    for (const task of tasks) make("option", $("task"), { textContent: task });
    for (const [name, values] of Object.entries(choices)) {
      $(name).replaceChildren();
      for (const value of values) make("option", $(name), { textContent: value });
    }
    $("refine").max = most;
    $("about-refine").textContent = `0 to ${most}; 0 takes the network's answer`;
    defaultOptions();
    if (browse) {
      await listResults();
      if (state.rows.length !== 1) page("results");
      else await open(state.rows[0].key).catch((problem) => { $("job-error").textContent = problem.message; });
    }
    await watchModel();
  } catch (problem) {
    $("job-error").textContent = problem.message;
  }
}

start();
