"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const rows = report.rows;
const at = (id) => document.getElementById(id);
const known = (value) => value !== null && value !== undefined;

/** Make an element; text goes in as text, so that no name can become markup. */
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "style") Object.assign(element.style, value);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter(known));
  return element;
}

// ---- numbers, each with its unit --------------------------------------------------------------------------------
const dash = "\u2013", arrow = " \u2192 ", times = "\u00d7";
function scaled(value, units, step) {
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) { value /= step; unit += 1; }
  return (unit && value < 99.95 ? value.toPrecision(3) : value.toFixed(0)) + units[unit];
}
const ms = (v) => (known(v) ? v.toFixed(v === 0 ? 0 : v < 0.1 ? 4 : v < 10 ? 3 : v < 100 ? 2 : 1) + " ms" : dash);
const roughMs = (v) => v.toFixed(v === 0 ? 0 : v < 0.1 ? 4 : v < 1 ? 3 : v < 10 ? 2 : v < 100 ? 1 : 0) + " ms";
const count = (v) => (known(v) ? scaled(v, ["", " k", " M", " G", " T"], 1000) : dash);
const bytes = (v) => (known(v) ? scaled(v, [" B", " kB", " MB", " GB"], 1000) : dash);
const percent = (v) => (known(v) ? (100 * v).toFixed(v < 0.0995 ? 1 : 0) + " %" : dash);
const ratio = (v) => (known(v) ? v.toFixed(v < 99.5 ? 2 : 0) + times : dash);
const shape = (v) => (known(v) ? v.join(times) : dash);
const fraction = (a, b) => (known(a) && known(b) && b > 0 ? a / b : null);
/** "18.6 ms -> 5.75 ms", and "18.6 -> 5.75 ms" where both have one unit. */
function change(a, b, text) {
  const [from, to] = [text(a), text(b)], suffix = (value) => value.replace(/^[\d.]+/, "");
  return (suffix(from) === suffix(to) ? from.slice(0, from.length - suffix(to).length) : from) + arrow + to;
}
function less(a, b, smaller, larger) {
  return a >= b ? ratio(fraction(a, b)) + " " + smaller : ratio(fraction(b, a)) + " " + larger;
}
const convolutions = (n) => n + (n === 1 ? " convolution" : " convolutions");

// ---- what is compared: time where anything was measured, else multiply-adds, else bytes -------------------------
const measures = {
  time: {
    noun: "time", total: "Convolution time", vanilla: "vanilla_ms", sparse: "sparse_ms", text: ms, rough: roughMs,
  },
  macs: {
    noun: "multiply-adds", total: "Multiply-adds", vanilla: "macs", sparse: "sparse_macs", text: count, rough: count,
  },
  bytes: {
    noun: "bytes of weights", total: "Convolution weights", vanilla: "vanilla_bytes", sparse: "sparse_bytes",
    text: bytes, rough: bytes,
  },
};
const somewhere = (m) => rows.some((row) => known(row[m.vanilla]) || known(row[m.sparse]));
const unit = Object.values(measures).find(somewhere) || measures.bytes;
const timed = unit === measures.time;
const before = (row, m) => row[m.vanilla];
const after = (row, m) => row[row.path === "sparse" ? m.sparse : m.vanilla];
const gain = (row) => fraction(row[unit.vanilla], row[unit.sparse]);
const bothKnown = (row, m) => known(before(row, m)) && known(after(row, m));
const saved = (row) => (bothKnown(row, unit) ? before(row, unit) - after(row, unit) : null);
const reached = (row) => fraction(row.bound_ms, after(row, measures.time));
function totals(some, m) {
  const both = some.filter((row) => bothKnown(row, m));
  const sum = (value) => both.reduce((total, row) => total + value(row, m), 0);
  return { before: sum(before), after: sum(after), rows: both.length };
}
const sparseRows = rows.filter((row) => row.path === "sparse");
const denseRows = rows.filter((row) => row.path !== "sparse");

// ---- top: what came out -----------------------------------------------------------------------------------------
function showResult() {
  const whole = fraction(report.model_vanilla_ms, report.model_ms);
  if (whole) {
    const faster = whole >= 1.005, slower = whole < 0.995;
    at("headline").textContent =
      faster ? ratio(whole) + " faster" : slower ? ratio(1 / whole) + " slower" : "No change in speed";
    at("subline").textContent =
      "Whole model: " + change(report.model_vanilla_ms, report.model_ms, roughMs) +
      " a call, all vanilla against as converted.";
  } else if (rows.length === 0) {
    at("headline").textContent = "No convolutions";
    at("subline").textContent = "The model has no 2-D convolution, so nothing was converted.";
  } else {
    at("headline").textContent = sparseRows.length + " of " + convolutions(rows.length) + " sparse";
    const bars = somewhere(unit) ? ": the bars show " + unit.noun + ", not time." : ".";
    at("subline").textContent = timed
      ? "The whole model was not measured."
      : "Nothing was measured" + bars + " Calibrate with example inputs to measure.";
  }
  const fact = (title, value, detail) =>
    at("facts").append(make("div", {}, make("dt", {}, title),
      make("dd", {}, make("b", {}, value), make("span", { class: "small muted" }, detail))));
  fact("Run sparse", sparseRows.length + " of " + rows.length, "convolutions");
  for (const m of Object.values(measures)) {
    const total = totals(rows, m);
    if (!total.rows) continue;
    const part = total.rows < rows.length ? ", " + total.rows + " of " + rows.length + " known" : "";
    fact(m.total, change(total.before, total.after, m.rough), less(total.before, total.after, "less", "more") + part);
  }
  if (known(report.bytes_before) && known(report.bytes_after)) {
    const size = change(report.bytes_before, report.bytes_after, bytes);
    fact("Model, frozen", size, less(report.bytes_before, report.bytes_after, "smaller", "larger"));
  }
  const bounded = rows.filter((row) => known(reached(row)));
  const sum = (value) => bounded.reduce((total, row) => total + value(row), 0);
  if (bounded.length) {
    const near = sum((row) => row.bound_ms) / sum((row) => after(row, measures.time));
    fact("Of the roofline bound", percent(near), "reached, as converted");
  }
}

function panel(title, ...children) {
  at("panels").append(make("section", { class: "card" }, make("h2", {}, title), ...children));
}

function showSplit() {
  const parts = [
    ["is-sparse", "Sparse", totals(sparseRows, unit)],
    ["is-vanilla", "Vanilla", totals(denseRows, unit)],
  ];
  const sum = (side) => parts.reduce((total, part) => total + part[2][side], 0);
  const whole = timed && known(report.model_vanilla_ms) && known(report.model_ms);
  if (whole) {
    parts.push(["is-rest", "Everything else", {
      before: Math.max(0, report.model_vanilla_ms - sum("before")), after: Math.max(0, report.model_ms - sum("after")),
    }]);
  }
  const most = Math.max(sum("before"), sum("after"));
  if (!(most > 0)) return;
  const bar = (side) => make("div", { class: "stack", "aria-hidden": "true" }, ...parts.map(([kind, , part]) =>
    make("span", { class: kind, style: { width: "calc(" + 100 * part[side] / most + "% - 1px)" } })));
  const body = parts.map(([kind, title, part]) => make("tr", {},
    make("th", { scope: "row" }, make("span", { class: "swatch " + kind }), title),
    make("td", {}, unit.text(part.before)), make("td", {}, unit.text(part.after))));
  panel("Where the " + unit.noun + (timed ? " goes" : " go"),
    make("div", { class: "stacked small" }, "vanilla", bar("before"), "converted", bar("after")),
    make("table", { class: "split" },
      make("thead", {}, make("tr", {},
        make("th", { scope: "col" }, make("span", { class: "hidden" }, "Part")),
        make("th", { scope: "col" }, "vanilla"), make("th", { scope: "col" }, "converted"))),
      make("tbody", {}, ...body)),
    whole
      ? make("p", { class: "small muted note" }, "Convolutions are timed one by one, so the parts add up only about.")
      : null);
}

// Reasons that differ only in their numbers are one reason.
const reasonKind = (row) => row.reason.replace(/\d+(\.\d+)?/g, "#");
let pressed = null;
function press(kind) {
  pressed = kind;
  for (const button of document.querySelectorAll("[data-kind]")) {
    button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
  }
}
function showReasons() {
  const kinds = new Map();
  for (const row of denseRows) kinds.set(reasonKind(row), [...(kinds.get(reasonKind(row)) || []), row]);
  if (!kinds.size) return;
  const list = make("ul", { class: "plain why small" });
  const cost = (some) => totals(some, unit).before;
  for (const [kind, some] of [...kinds].sort((a, b) => cost(b[1]) - cost(a[1]) || b[1].length - a[1].length)) {
    const alike = new Set(some.map((row) => row.reason)).size > 1 ? " (and alike)" : "";
    const button = make("button", { type: "button", "aria-pressed": "false", "data-kind": kind },
      make("b", {}, some.length + times), make("span", {}, (some[0].reason || "no reason given") + alike),
      make("span", { class: "muted number" }, cost(some) ? unit.text(cost(some)) : ""));
    button.addEventListener("click", () => {
      press(pressed === kind ? null : kind);
      update();
    });
    list.append(make("li", {}, button));
  }
  panel("Why " + convolutions(denseRows.length) + (denseRows.length === 1 ? " stays" : " stay") + " vanilla", list,
    make("p", { class: "small muted" }, "Choose a reason to see only those below."));
}

function showNotes() {
  const lines = [...report.notes, ...report.plan_notes];
  for (const [rung, reason] of Object.entries(report.refused)) {
    lines.push("Capture by \u201c" + rung + "\u201d refused: " + reason);
  }
  if (lines.length) panel("Notes", make("ul", { class: "notes small" }, ...lines.map((line) => make("li", {}, line))));
  at("footer").textContent = ["captured by " + report.rung,
    ...Object.entries(report.environment).map(([key, value]) => key + ": " + value)].join("  \u00b7  ");
}

// ---- the list ---------------------------------------------------------------------------------------------------
const longest = Math.max(0, ...rows.flatMap((row) => [row[unit.vanilla] || 0, row[unit.sparse] || 0]));

function arm(row, path) {
  const value = row[unit[path]];
  if (!known(value)) return null;
  const chosen = path === row.path;
  const share = (v) => (longest ? Math.min(100, 100 * v / longest) : 0) + "%";
  const bounded = timed && chosen && row.bound_ms > longest / 200; // a tick on a bar of no length hides it
  const track = make("div", { class: "track", "aria-hidden": "true" },
    make("div", { class: "fill is-" + path, style: { width: share(value) } }),
    bounded ? make("div", { class: "tick", style: { left: share(row.bound_ms) } }) : null);
  return make("div", { class: "arm" + (chosen ? " chosen" : "") }, make("span", {}, path), track,
    make("span", { class: "number" }, unit.text(value), chosen ? make("span", { class: "hidden" }, ", chosen") : null));
}

function value(text, label, good) {
  return make("div", { class: "value" + (good ? " good" : "") }, text, make("span", {}, label));
}

function listItem(row, index) {
  const id = "detail-" + index;
  const button = make("button", { class: "name", type: "button", "aria-expanded": "false", "aria-controls": id },
    row.name || "(the model itself)");
  const arms = [arm(row, "vanilla"), arm(row, "sparse")].filter(known);
  if (!arms.length) arms.push(make("p", { class: "small muted" }, timed ? "not measured" : "not known"));
  const detail = make("div", { class: "detail", id, hidden: "" });
  const summary = make("div", { class: "sum" },
    make("div", { class: "what" }, make("h3", {}, button),
      make("p", { class: "about" },
        row.weight_shape ? shape(row.weight_shape) + " \u00b7 " : null, make("span", { class: row.path }, row.path),
        row.reason ? ": " : null, row.path === "sparse" ? row.reason : make("b", {}, row.reason))),
    make("div", { class: "bars" }, ...arms),
    value(ratio(gain(row)), timed ? "gain" : "less", row.path === "sparse" && gain(row) > 1),
    timed ? value(percent(reached(row)), "of bound") : null);
  summary.addEventListener("click", (event) => {
    if (event.target !== button && String(getSelection())) return; // the user is marking text
    const open = button.getAttribute("aria-expanded") !== "true";
    if (open && !detail.hasChildNodes()) fillDetail(detail, row);
    button.setAttribute("aria-expanded", String(open));
    detail.hidden = !open;
  });
  return make("li", { "data-name": row.name, "data-path": row.path }, summary, detail);
}

function fillDetail(detail, row) {
  const interval = (ci) => (ci ? "95 % CI " + ci.map((end) => ms(end).replace(" ms", "")).join(dash) : null);
  const pair = (a, b, text) => (known(a) || known(b) ? text(a) + arrow + text(b) : dash);
  const facts = [
    ["Weight", shape(row.weight_shape), "O, C / groups, kh, kw"],
    ["Input", shape(row.input_shape), "N, C, H, W"],
    ["Layout", row.layout ? row.layout.replace("_", " ") : dash],
    ["Vanilla", ms(row.vanilla_ms), interval(row.vanilla_ci)],
    ["Sparse", ms(row.sparse_ms), interval(row.sparse_ci)],
    ["Roofline bound", ms(row.bound_ms), known(reached(row)) ? percent(reached(row)) + " reached" : null],
    ["Multiply-adds", pair(row.macs, row.sparse_macs, count), "vanilla, sparse"],
    ["Weight size", pair(row.vanilla_bytes, row.sparse_bytes, bytes), "vanilla, sparse"],
    ["Kept", percent(row.density), "of the weights"],
    ["Blocks", known(row.blocks) ? String(row.blocks) : dash],
    ["Fill-in", percent(row.fill_in), "of the kept weights"],
    ["Residual", percent(row.residual), "of the kept weights"],
  ];
  detail.append(make("dl", {}, ...facts.map(([title, text, small]) => make("div", {}, make("dt", {}, title),
    make("dd", {}, text, small && text !== dash ? make("span", {}, small) : null)))));
  const p = row.picture;
  if (!p) {
    detail.append(make("p", { class: "small muted lacking" }, "There is no picture: the weight was not regrouped."));
    return;
  }
  const number = (n, one) => n + " " + one + (n === 1 ? "" : "s");
  const size = number(p.rows, "row") + " (output channels) " + times + " " + number(p.columns, "column") +
    " (input channel and tap)";
  const kind = "matrix" + (p.width < 150 ? " crisp" : "") + (p.outlines.length > 40 ? " fine" : "");
  const height = Math.min(220, Math.max(28, 14 * p.height)) + "px";
  const place = ([left, top, width, height]) =>
    ({ left: left / 100 + "%", top: top / 100 + "%", width: width / 100 + "%", height: height / 100 + "%" });
  const figure = (title, source, outlines, text) => make("figure", {},
    make("div", { class: kind, style: { height } },
      ...outlines.map((outline) => make("s", { style: place(outline) })),
      make("img", { src: source, alt: title + " regrouping: " + text, width: p.width, height: p.height }),
      ...outlines.map((outline) => make("i", { style: place(outline) }))),
    make("figcaption", {}, make("b", {}, title + ". "), text));
  const blocks = p.outlines.length
    ? "The blocks are outlined, each with its columns moved to the left: orange inside is fill-in, blue outside is " +
      "residual."
    : row.density === 0 ? "Every weight is pruned." : "There is no block: every kept weight is residual.";
  detail.append(make("div", { class: "pictures" },
    figure("Before", p.before, [], size + ": the stronger the blue, the more weights are kept."),
    figure("After", p.after, p.outlines, blocks)));
}

const sorts = {
  cost: ["vanilla " + unit.noun, (row) => before(row, unit)],
  saved: [unit.noun + " saved", saved],
  gain: ["gain", gain],
  graph: ["order in the model", null],
  name: ["name", null],
};
const items = rows.map(listItem);
const haystacks = rows.map((row) => [
  row.name, row.path, shape(row.weight_shape), (row.weight_shape || []).join("x"), row.reason,
].join(" ").toLowerCase());

function update() {
  const text = at("text").value.trim().toLowerCase();
  const path = document.querySelector("input[name=path]:checked").value;
  let visible = 0;
  rows.forEach((row, i) => {
    const fits = haystacks[i].includes(text) && (!path || row.path === path) &&
      (pressed === null || (row.path !== "sparse" && reasonKind(row) === pressed));
    items[i].hidden = !fits;
    visible += fits;
  });
  at("shown").textContent =
    visible === rows.length ? convolutions(visible) : visible + " of " + convolutions(rows.length) + " shown";
}

function sortRows() {
  const key = at("sort").value, value = sorts[key][1];
  const order = rows.map((_, i) => i);
  if (key === "name") order.sort((a, b) => rows[a].name.localeCompare(rows[b].name, undefined, { numeric: true }));
  else if (value) order.sort((a, b) => (value(rows[b]) ?? -Infinity) - (value(rows[a]) ?? -Infinity) || a - b);
  at("rows").append(...order.map((i) => items[i]));
}

showResult();
showSplit();
showReasons();
showNotes();
for (const [key, [title]] of Object.entries(sorts)) at("sort").append(make("option", { value: key }, title));
const key = (mark, text) => make("span", {}, make("span", { class: mark }), text);
at("legend").append(...[
  key("swatch is-vanilla", "vanilla"), key("swatch is-sparse", "sparse"),
  make("span", {}, "bold = chosen, pale = not chosen"),
  timed ? key("tick-key", "roofline bound of the chosen path") : null,
].filter(known));
at("text").addEventListener("input", update);
at("sort").addEventListener("change", sortRows);
document.querySelectorAll("input[name=path]").forEach((input) => input.addEventListener("change", () => {
  press(null); // a reason is of vanilla convolutions only
  update();
}));
const themes = ["auto", "light", "dark"];
at("theme").addEventListener("click", () => {
  themes.push(themes.shift());
  document.documentElement.style.colorScheme = themes[0] === "auto" ? "" : themes[0];
  at("theme").textContent = "Theme: " + themes[0];
});
sortRows();
update();
at("list").hidden = rows.length === 0;
document.querySelector("main").hidden = false;
