"use strict";
// Everything that came from a model or a data set is put on the page as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const images = data.images;
const models = data.models;
const [candidate, ...others] = models;
const reference = data.rival;
const LOCATED = data.located_from;
const colour = (model) => `var(--model-${models.indexOf(model) % 7})`;
const RATES_LOWER = ["miss_rate", "overkill", "miss_rate_at_threshold", "overkill_at_threshold"];
const LOWER_IS_BETTER = [...RATES_LOWER, "ece", "ece_of_score"];
const HIGHER_IS_BETTER = [
  "accuracy", "balanced_accuracy", "recall", "specificity", "precision", "parse_rate", "kind_right",
  "accuracy_at_threshold", "balanced_accuracy_at_threshold",
];
const PERCENT = [...HIGHER_IS_BETTER, ...RATES_LOWER];
const { threshold } = data.calibrations[candidate];
const MEANINGS = {
  balanced_accuracy: "mean of recall and specificity",
  recall: "defects flagged",
  specificity: "good parts passed",
  auroc: "defects rank above good parts",
  iou: "overlap with the true boxes",
  box_f1: `boxes with an IoU of at least ${LOCATED}`,
  parse_rate: "readable answers",
  kind_right: "defects of a known kind that are answered A with this kind",
  precision: "flagged parts that are defective",
  miss_rate: "defects that are not flagged",
  overkill: "good parts that are not passed",
  threshold: "the calibrated probability from which on an image is flagged",
  iou_at_threshold: "of all regions of a flagged image, whatever its letter",
  ece_of_score: "expected calibration error of the raw score",
  ece: "expected calibration error of the calibrated probability",
};
const OUTCOMES = {
  m: "escape: defect missed",
  x: "escape: no clean answer",
  o: "overkill: good part flagged",
  u: "overkill: no clean answer",
  e: "defect flagged, not located",
  l: "defect flagged and located",
  f: "defect flagged",
  p: "good part passed",
};
const WRONG = "mxou";
const DECISIONS = { m: "normal", x: "no clean answer", o: "anomalous", u: "no clean answer", e: "anomalous" };
Object.assign(DECISIONS, { l: "anomalous", f: "anomalous", p: "normal" });
const ANSWERS = { A: "A: a defect", B: "B: no defect", "-": "no clean answer" };
const count = (value) => value.toLocaleString("en");
const PAGE = 24;

const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const drawn = ["svg", "line", "path", "rect", "circle", "text"].includes(tag);
  const element = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------------------------------------- numbers

function number(value, metric, sign = "") {
  const text = PERCENT.includes(metric) ? (100 * value).toFixed(1) : value.toFixed(3);
  return (value < 0 ? "−" : sign) + text.replace("-", "");
}

const unit = (metric) => (PERCENT.includes(metric) ? " %" : "");

function range(low, high, metric, sign = "") {
  return `[${number(low, metric, sign)}, ${number(high, metric, sign)}]`;
}

// "better", "worse", or "" where the interval of a difference holds zero.
function verdict([, low, high], metric) {
  if (low === null || (low <= 0 && high >= 0)) return "";
  return low > 0 === !LOWER_IS_BETTER.includes(metric) ? "better" : "worse";
}

function judged(word) {
  if (!word) return "";
  return make("span", { class: word === "better" ? "good" : "bad" }, word === "better" ? "▲ better" : "▼ worse");
}

// ----------------------------------------------------------------------------------------------- figures

function drawAbout() {
  const compared = others.length ? `, compared with ${others.join(" and ")}` : "";
  const categories = images.categories.length === 1 ? "1 category" : `${images.categories.length} categories`;
  const split = `${count(images.id.length)} images of the ${data.about.split} split`;
  const alone = data.without_boxes;
  const left = alone ? ` ${count(alone)} anomalous images have no boxes; they are left out of IoU.` : "";
  byId("about").textContent = `${split}, ${categories}${compared}.${left} ${data.no_normal}`.trim();
  byId("more-images").textContent = data.more_images;
  byId("decides").textContent = models.map((model) => `${model}: ${data.calibrations[model].summary}`).join(" ");
  if (data.crossed) {
    const part = byId("crossed");
    const row = (cells, tag) => make("tr", {}, ...cells.map((cell) => make(tag, {}, cell)));
    part.hidden = false;
    part.querySelector("table").append(make("thead", {}, row(["", "all folds", "lowest and highest fold"], "th")));
    part.querySelector("table").append(make("tbody", {}, ...data.crossed.rows.map((cells) => row(cells, "td"))));
    part.querySelector("p").textContent = data.crossed.note;
  }
  const list = document.querySelector("#made dl");
  const facts = {
    ...Object.fromEntries(models.map((model) => [`Model ${model}`, data.about.models[model]])),
    "Fingerprint of the data": data.about.fingerprint,
    "Run in MLflow": data.about.mlflow_run_id,
    Settings: JSON.stringify(data.about.settings),
  };
  for (const [name, value] of Object.entries(facts)) {
    if (value) list.append(make("dt", {}, name), make("dd", {}, value));
  }
}

// What the candidate has to beat: blind answers and the reference detector.
function drawReferences() {
  const { lines, sentence, verdict, table } = data.references;
  const judgement = verdict === "detector" ? "bad" : verdict === "candidate" ? "good" : "";
  const attributes = (line) => (line === sentence ? { class: judgement } : {});
  byId("verdict").append(...lines.map((line) => make("li", attributes(line), line)));
  byId("verdict").hidden = !lines.length;
  const region = byId("references").parentElement;
  region.hidden = region.nextElementSibling.hidden = !table.length;
  if (!table.length) return;
  const [head, ...rows] = table;
  const columns = make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name || "Answers of")));
  const body = make("tbody");
  for (const [name, ...cells] of rows) {
    const row = make("tr", {}, make("th", { scope: "row" }, name));
    for (const cell of cells) {
      const [value, interval] = cell.split(" [");
      row.append(make("td", {}, value, ...(interval ? [make("small", {}, `[${interval}`)] : [])));
    }
    body.append(row);
  }
  byId("references").append(make("caption", {}, "Models beside the blind answers"), make("thead", {}, columns), body);
}

function drawTiles() {
  const [normal, anomalous] = data.confusion[candidate];
  const sum = (row) => row.reduce((a, b) => a + b, 0);
  const tiles = [
    ["miss_rate", "escapes", `${sum(anomalous) - anomalous[1]} of ${sum(anomalous)} defective parts are not flagged`],
    ["overkill", "overkill", `${sum(normal) - normal[0]} of ${sum(normal)} good parts are not passed`],
    ["iou", "mean IoU", "overlap of predicted and true boxes on defective parts, 1 is perfect"],
    ["parse_rate", "readable answers", `${normal[2] + anomalous[2]} of ${images.id.length} cannot be read`],
  ];
  if (data.kinds[candidate]) tiles.splice(3, 0, ["kind_right", "kind right", MEANINGS.kind_right]);
  for (const [written, title, words] of tiles) {
    // What the threshold makes of it, where there is one, as in the counts beside it.
    const decided = `${written}_at_threshold`;
    const metric = threshold !== null && data.metrics[candidate][decided] ? decided : written;
    const [value, low, high] = data.metrics[candidate][metric];
    if (value === null) continue;
    const tile = make("div", { class: "tile" }, title, make("b", {}, number(value, metric) + unit(metric)));
    tile.append(make("span", {}, `95 % interval ${range(low, high, metric)}`), make("span", {}, words));
    const change = data.metrics[`${candidate}_minus_${reference}`]?.[metric];
    if (change && change[0] !== null) {
      const points = PERCENT.includes(metric) ? " points" : "";
      const text = `${number(change[0], metric, "+")}${points} against ${reference} `;
      tile.append(make("span", {}, text, judged(verdict(change, metric))));
    }
    byId("tiles").append(tile);
    if (written === "overkill" && data.located) byId("tiles").append(locatedTile(...data.located));
  }
}

function locatedTile(hits, share, low, high, images) {
  const tile = make("div", { class: "tile" }, "located", make("b", {}, `${number(share, "recall")} %`));
  tile.append(make("span", {}, `95 % interval ${range(low, high, "recall")}`));
  const rule = `${hits} of ${images} defective parts with boxes are flagged with an IoU of at least ${LOCATED}`;
  tile.append(make("span", {}, rule));
  return tile;
}

// What the gate judges: escapes and overkill first.
function drawCompared() {
  const columns = [candidate, ...(reference ? [reference, `${candidate} − ${reference}`] : [])];
  const head = make("tr", {}, ...["", ...columns, "images"].map((name) => make("th", { scope: "col" }, name || "Metric")));
  const body = make("tbody");
  for (const { title, higher, over, images: of, cells } of data.compared) {
    const row = make("tr", {}, make("th", { scope: "row" }, `${title}, %`, make("small", {}, `of ${over}`)));
    cells.forEach(([value, low, high], i) => {
      const sign = i === 2 ? "+" : "";
      const cell = make("td", {}, number(value, "recall", sign));
      if (sign) cell.append(" ", judged(verdict([value, low, high], higher ? "recall" : "miss_rate")));
      cell.append(make("small", {}, range(low, high, "recall", sign)));
      row.append(cell);
    });
    row.append(make("td", {}, count(of)));
    body.append(row);
  }
  const decides = threshold === null ? "by the letters as written" : "decided at the threshold";
  const caption = make("caption", {}, `Escapes and overkill first, ${decides}`);
  byId("compared").append(caption, make("thead", {}, head), body);
}

function drawHeadline() {
  const differences = Object.keys(data.metrics).filter((name) => !models.includes(name));
  const columns = [...models, ...differences];
  const head = make("tr", {}, make("th", { scope: "col" }, "Metric"));
  for (const name of columns) head.append(make("th", { scope: "col" }, name.replace("_minus_", " − ")));
  const body = make("tbody");
  for (const metric of Object.keys(data.metrics[candidate])) {
    const percent = PERCENT.includes(metric) ? ", %" : "";
    const title = make("th", { scope: "row" }, (data.titles[metric] ?? metric.replaceAll("_", " ")) + percent);
    if (MEANINGS[metric]) title.append(make("small", {}, MEANINGS[metric]));
    const row = make("tr", {}, title);
    for (const name of columns) {
      const [value, low, high] = data.metrics[name][metric];
      const sign = differences.includes(name) ? "+" : "";
      const cell = make("td", {}, value === null ? "–" : number(value, metric, sign));
      if (sign && value !== null) cell.append(" ", judged(verdict([value, low, high], metric)));
      if (low !== null) cell.append(make("small", {}, range(low, high, metric, sign)));
      row.append(cell);
    }
    body.append(row);
  }
  byId("headline").append(make("caption", {}, "Held-out images"), make("thead", {}, head), body);
}

function drawConfusion() {
  for (const model of models) {
    drawMatrix(data.written[model], `${model}, letters as written`, "written");
    if (data.calibrations[model].threshold !== null) {
      drawMatrix(data.confusion[model], `${model}, at the threshold`, "decided");
    }
  }
  for (const [model, { rows, columns, counts }] of Object.entries(data.kinds)) {
    drawMatrix(counts, `${model}, kinds as written`, "kinds", rows, columns);
  }
}

function drawMatrix(matrix, title, kind, names = ["normal", "anomalous"], answers = [...names, "unparseable"]) {
  const head = make("tr", {}, make("th", { scope: "col" }, "part"));
  for (const answer of answers) head.append(make("th", { scope: "col" }, isolated(answer)));
  const body = make("tbody");
  matrix.forEach((counts, i) => {
    const total = counts.reduce((a, b) => a + b, 0) || 1;
    const row = make("tr", {}, make("th", { scope: "row" }, isolated(names[i])));
    for (const count of counts) {
      const cell = make("td", {}, String(count), make("small", {}, `${Math.round((100 * count) / total)} %`));
      cell.style.background = `rgba(var(--shade), ${(0.45 * count) / total})`;
      row.append(cell);
    }
    body.append(row);
  });
  const table = make("table", {}, make("caption", {}, title), make("thead", {}, head), body);
  byId("confusion").append(make("div", { "data-model": title.split(",")[0], "data-kind": kind }, table));
}

function drawGroups() {
  const columns = [["miss_rate", "missed, %"], ["overkill", "overkill, %"], ["iou", "IoU"]];
  const kind = data.kinds[candidate] ? [["kind_right", "kind right, %"]] : [];
  for (const [title, groups, shown] of [
    ["By category", data.categories, [["images", "images"], ...columns]],
    ["By defect", data.defects, [["anomalous", "images"], columns[0], columns[2], ...kind]],
  ]) {
    if (!Object.keys(groups).length) continue;
    const head = make("tr", {}, make("th", { scope: "col" }, title.slice(3)));
    for (const [, name] of shown) head.append(make("th", { scope: "col" }, name));
    const body = make("tbody");
    for (const [name, found] of Object.entries(groups)) {
      const row = make("tr", {}, make("th", { scope: "row" }, name));
      for (const [metric] of shown) {
        const value = found[metric];
        const cell = make("td");
        if (metric === "images") {
          const button = make("button", { type: "button", "aria-label": `show the ${value} images of ${name}` }, value);
          button.addEventListener("click", () => showCategory(name));
          cell.append(button);
        } else if (metric === "anomalous") cell.append(value);
        else if (value === null || value === undefined) cell.append("–");
        else {
          const interval = range(found[`${metric}_low`], found[`${metric}_high`], metric);
          cell.append(number(value, metric), make("small", {}, interval));
        }
        row.append(cell);
      }
      body.append(row);
    }
    const caption = make("caption", {}, `${title}: ${candidate}, letters as written`);
    const table = make("table", {}, caption, make("thead", {}, head), body);
    byId("groups").append(make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": title }, table));
  }
}

// ------------------------------------------------------------------------------------------------ charts

const PLOT = { left: 44, top: 10, width: 380, height: 200 };

// The next round number, so that quarters of it are round too.
const nice = (span) => [0.2, 0.4, 0.8, 1, 2, 4, 8].find((round) => round >= span) ?? 4 * Math.ceil(span / 4);

// A figure with axes; `x` and `y` map values to places in it.
function chart(title, labels, limits, series, ticks) {
  const { left, top, width, height } = PLOT;
  const x = (value) => left + ((value - limits.x[0]) / (limits.x[1] - limits.x[0] || 1)) * width;
  const y = (value) => top + height - ((value - limits.y[0]) / (limits.y[1] - limits.y[0] || 1)) * height;
  const legend = series.map(({ name }) => name).join("; ");
  const svg = make("svg", { viewBox: "0 0 440 260", role: "img", "aria-label": `${title}. ${legend}` });
  const say = (at, words, anchor = "middle") => {
    svg.append(make("text", { x: at[0], y: at[1], "text-anchor": anchor }, words));
  };
  for (let i = 0; i <= 4; i++) {
    const value = limits.y[0] + ((limits.y[1] - limits.y[0]) * i) / 4;
    svg.append(make("line", { class: "grid", x1: left, x2: left + width, y1: y(value), y2: y(value) }));
    say([left - 6, y(value) + 4], String(Number(value.toFixed(2))), "end");
  }
  const quarters = [0, 1, 2, 3, 4].map((i) => limits.x[0] + ((limits.x[1] - limits.x[0]) * i) / 4);
  ticks ??= quarters.map((value) => [value, String(Number(value.toFixed(limits.x[1] > 10 ? 0 : 2)))]);
  for (const [value, words] of ticks) {
    words.split("\n").forEach((line, i) => say([x(value), top + height + 16 + 14 * i], line));
  }
  if (labels[0]) say([left + width / 2, 254], labels[0]);
  const list = make("ul");
  for (const { name, stroke } of series) {
    const item = make("li", {}, name);
    item.style.setProperty("--colour", stroke);
    list.append(item);
  }
  const note = make("small", {}, labels[1]);
  byId("charts").append(make("figure", { class: "chart" }, make("figcaption", {}, title), note, svg, list));
  return { svg, x, y };
}

function drawLines(title, labels, limits, series, ticks) {
  const { svg, x, y } = chart(title, labels, limits, series, ticks);
  for (const { points, stroke, own, chosen, thin } of [...series].reverse()) {
    const places = points.map(([a, b]) => `${x(a).toFixed(1)} ${y(b).toFixed(1)}`);
    const line = make("path", { class: thin ? "line thin" : "line", d: `M${places.join("L")}` });
    line.style.stroke = stroke;
    svg.append(line);
    for (const [dot, fill] of [[own, stroke], [chosen, "var(--sheet)"]]) {
      if (!dot || dot.includes(null)) continue;
      const mark = make("circle", { cx: x(dot[0]), cy: y(dot[1]), r: 5, "stroke-width": 2 });
      Object.assign(mark.style, { stroke, fill });
      svg.append(mark);
    }
  }
}

function drawCurves() {
  const known = models.filter((model) => data.curves[model]);
  if (!known.length) return;
  const all = { x: [0, 1], y: [0, 1] };
  const at = (model, metric) => data.metrics[model][metric]?.[0] ?? null;
  const roc = known.map((model) => {
    const missed = at(model, "miss_rate_at_threshold");
    return {
      name: `${model}, AUROC ${at(model, "auroc")?.toFixed(3)}`,
      stroke: colour(model),
      points: data.curves[model].roc,
      own: [at(model, "overkill"), at(model, "recall")],
      chosen: [at(model, "overkill_at_threshold"), missed === null ? null : 1 - missed],
    };
  });
  const ring = roc.some(({ chosen }) => !chosen.includes(null)) ? ", a ring what the threshold makes of them" : "";
  const note = `share of defects flagged; a dot is where a model's own answers stand${ring}`;
  drawLines("ROC curve", ["overkill: share of good parts flagged", note], all, roc);
  const precision = known.map((model) => ({
    name: model,
    stroke: colour(model),
    points: data.curves[model].precision_recall,
    own: [at(model, "recall"), at(model, "precision")],
  }));
  const labels = ["recall: share of defects flagged", "share of flagged parts that are defective"];
  drawLines("Precision and recall", labels, all, precision);
}

function drawReliability() {
  const series = models.filter((model) => data.reliability[model].probability?.length).map((model) => ({
    name: `${model}, error ${data.metrics[model].ece?.[0]?.toFixed(3)}`,
    stroke: colour(model),
    points: data.reliability[model].probability,
  }));
  if (!series.length) return;
  series.push({
    name: `${candidate}, raw score, error ${data.metrics[candidate].ece_of_score?.[0]?.toFixed(3)}`,
    stroke: "var(--line)",
    points: data.reliability[candidate].score,
  });
  series.push({ name: "perfect", stroke: "var(--faint)", points: [[0, 0], [1, 1]] });
  const note = "share of defective images; ten groups of equally many images by their probability";
  drawLines("Reliability", ["mean probability of a defect", note], { x: [0, 1], y: [0, 1] }, series);
}

function drawSizes() {
  const sizes = Object.keys(data.sizes[candidate]);
  if (!sizes.length) return;
  const { small, large } = data.about.settings;
  const limits = {
    small: `below ${100 * small} %`,
    medium: `${100 * small} to ${100 * large} %`,
    large: `from ${100 * large} %`,
  };
  const highest = Math.max(...models.flatMap((model) => sizes.map((size) => data.sizes[model][size].iou_high ?? 0)));
  const words = (size) => `${size}\n${limits[size]}\n${data.sizes[candidate][size].images} images`;
  const ticks = sizes.map((size, i) => [i + 0.5, words(size)]);
  const series = models.map((model) => ({ name: model, stroke: colour(model) }));
  const labels = ["", "mean IoU, with 95 % intervals; size as share of the image"];
  const area = { x: [0, sizes.length], y: [0, Math.min(1, nice(highest))] };
  const { svg, x, y } = chart("Localisation by size of the defect", labels, area, series, ticks);
  sizes.forEach((size, i) => models.forEach((model, k) => {
    const { iou, iou_low: low, iou_high: high } = data.sizes[model][size];
    if (iou === null) return;
    const width = 0.7 / models.length;
    const from = i + 0.15 + k * width;
    const bar = make("rect", { x: x(from), y: y(iou), width: x(width * 0.9) - x(0), height: y(0) - y(iou) });
    bar.style.fill = colour(model);
    const middle = x(from + width * 0.45);
    svg.append(bar, make("line", { class: "whisker", x1: middle, x2: middle, y1: y(low), y2: y(high) }));
  }));
}

// Probability of detection: the share of defects that is flagged, against their size.
function drawDetection() {
  const curves = Object.entries(data.detection);
  const known = curves.filter(([, { points }]) => points.length);
  if (known.length) {
    const low = Math.log10(Math.min(...known.map(([, { smallest }]) => smallest)));
    const high = Math.log10(Math.max(...known.map(([, { largest }]) => largest)));
    const line = (points, of) => points
      .filter((point) => point[of] !== null)
      .map((point) => [Math.log10(point[of]), point.detection])
      .filter(([x]) => x >= low && x <= high);
    const series = known.map(([name, { points }]) => ({ name, stroke: colour(name), points: line(points, "size") }));
    const own = data.detection[candidate];
    if (own.points.length) {
      series.push({ name: `${candidate}, lower 95 % limit`, stroke: "var(--faint)", points: line(own.points, "high") });
    }
    const ticks = [0, 1, 2, 3, 4].map((i) => {
      const place = low + ((high - low) * i) / 4;
      return [place, `${Number((100 * 10 ** place).toPrecision(2))} %`];
    });
    const labels = ["size of the defect: share of the image", "probability that a defect of this size is flagged"];
    const limits = { x: [low, high], y: [0, 1] };
    drawLines("Probability of detection", labels, limits, series.filter(({ points }) => points.length > 1), ticks);
  }
  const names = ["a50", "a90", "a90_95"];
  const columns = ["Model", "flagged", "a50", "a90", "a90/95"];
  const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
  const body = make("tbody");
  for (const [name, curve] of curves) {
    const flagged = make("td", {}, `${curve.hits} of ${curve.defects}`);
    const row = make("tr", {}, make("th", { scope: "row" }, name), flagged);
    if (curve.reason) row.append(make("td", { colspan: 3, class: "reason" }, curve.reason));
    else {
      for (const size of names) {
        const side = curve.side[size];
        const cell = make("td", {}, curve[size] === null ? "–" : `${Number((100 * curve[size]).toPrecision(3))} %`);
        if (side) cell.append(make("small", {}, `${Number(side.toPrecision(3))} px square`));
        row.append(cell);
      }
    }
    body.append(row);
    if (curve.note) {
      body.append(make("tr", {}, make("td", { colspan: 5, class: "reason" }, `${name}: ${curve.note}`)));
    }
  }
  byId("detection").append(
    make("caption", {}, "Size of defects that are flagged with a probability of 50 and 90 %"),
    make("thead", {}, head),
    body,
  );
}

function drawRewards() {
  const stroke = "var(--model-0)";
  const faint = `color-mix(in srgb, ${stroke} 45%, transparent)`;
  for (const [name, { raw, smooth }] of Object.entries(data.rewards)) {
    const rewards = raw.map(([, reward]) => reward);
    const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
    // Of a curve that hardly moves, the scale shows that it does not.
    const room = Math.max(0, 0.1 - (high - low)) / 2;
    const limits = { x: [0, raw.at(-1)[0]], y: [low - room, high + room] };
    const series = [{ name: "smoothed", points: smooth, stroke }, { name: "each step", points: raw, stroke: faint, thin: true }];
    drawLines(`Reward in training: ${name}`, ["step", "mean of the sampled completions"], limits, series);
  }
}

// ------------------------------------------------------------------------------------ pictures and words

const held = new Map(); // position -> [picture, think, rethink, all of it if it is not in form]
data.embedded.forEach((row, i) => held.set(i, row));
const asked = new Set(); // files
const recent = [];
const MOST_FILES = 40; // in memory, about a megabyte each
let alone = !["file:", "http:", "https:"].includes(location.protocol);

function fileOf(position) {
  let low = 0;
  let high = data.starts.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (data.starts[middle] <= position) low = middle;
    else high = middle - 1;
  }
  return low;
}

function ask(position) {
  if (held.has(position)) return fill(position);
  const file = fileOf(position);
  if (alone) return fill(position);
  if (asked.has(file)) return;
  asked.add(file);
  const failed = () => {
    alone = true;
    document.querySelectorAll("article").forEach((card) => fill(Number(card.dataset.position)));
  };
  const script = make("script", { src: `images/${String(file).padStart(3, "0")}.js` });
  script.addEventListener("load", () => (script.remove(), recent.includes(file) || failed()));
  script.addEventListener("error", () => (script.remove(), failed()));
  document.head.append(script);
}

// The files call this.
function pictures(file, rows) {
  rows.forEach((row, i) => {
    held.set(data.starts[file] + i, row);
    fill(data.starts[file] + i);
  });
  recent.push(file);
  if (recent.length > MOST_FILES) {
    const oldest = recent.shift();
    asked.delete(oldest);
    for (let i = data.starts[oldest]; i < (data.starts[oldest + 1] ?? images.id.length); i++) held.delete(i);
  }
}

// ----------------------------------------------------------------------------------------------- gallery

const position = images.id.map((_, i) => i);
const ascending = (values) => (a, b) => (values[a] ?? 0.5) - (values[b] ?? 0.5);
const descending = (values) => (a, b) => (values[b] ?? 0.5) - (values[a] ?? 0.5);
const EVERY = Object.keys(OUTCOMES).join("");
const rank = (i) => EVERY.indexOf(images.outcome[i]);
// Title, outcomes, order; and which of these images, if not all.
const GALLERIES = {
  escapes: ["Escapes", "mx", ascending(images.score)],
  overkill: ["Overkill", "ou", descending(images.score)],
  changed: ["Changed", EVERY, (a, b) => rank(a) - rank(b), (i) => data.changed[i] === "1"],
  elsewhere: ["Flagged, not located", "e", ascending(images.iou)],
  located: ["Located", "l", descending(images.iou)],
  flagged: ["Flagged, label alone known", "f", descending(images.score)],
  unparseable: ["Unparseable", "xu", () => 0],
  passed: ["Passed", "p", descending(images.score)],
  all: ["All", EVERY, (a, b) => (images.source[a] < images.source[b] ? -1 : 1)],
};
const belongs = (gallery, i) => {
  const [, letters, , only] = GALLERIES[gallery];
  return letters.includes(images.outcome[i]) && (!only || only(i));
};
const haystack = images.id.map((id, i) => `${id}\n${images.source[i]}`.toLowerCase());
const form = byId("filters");
let found = [];
let page = 0;

function drawFilters() {
  for (const [key, [title]] of Object.entries(GALLERIES)) {
    const input = make("input", { type: "radio", name: "gallery", value: key });
    const label = make("label", {}, input, `${title} `, make("span", { "data-count": key }));
    label.hidden = key === "changed" ? !reference : key === "flagged" && !images.outcome.includes("f");
    byId("galleries").append(label);
  }
  const start = Object.keys(GALLERIES).find((key) => position.some((i) => belongs(key, i)));
  form.elements.gallery.value = start ?? "all";
  images.categories.forEach((name, i) => form.elements.category.append(make("option", { value: i }, name)));
  for (const model of others) {
    form.elements.change.append(make("option", { value: `wrong ${model}` }, `wrong, ${model} is right`));
    form.elements.change.append(make("option", { value: `right ${model}` }, `right, ${model} is wrong`));
  }
  byId("changes").hidden = !others.length;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => select());
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
}

function showCategory(name) {
  form.elements.category.value = images.categories.indexOf(name);
  form.elements.gallery.value = "all";
  select();
  byId("images").scrollIntoView();
  form.elements.category.focus({ preventScroll: true });
}

function select() {
  const { gallery, category, change, text, boxes } = Object.fromEntries(new FormData(form));
  const [now, other] = change ? change.split(" ") : [];
  const wanted = text.trim().toLowerCase();
  const kept = position.filter((i) => {
    if (category !== "" && images.category[i] !== Number(category)) return false;
    if (other) {
      const wrong = WRONG.includes(images.outcome[i]);
      if (wrong !== (now === "wrong") || WRONG.includes(data.others[other][i]) === wrong) return false;
    }
    return !wanted || haystack[i].includes(wanted);
  });
  for (const key of Object.keys(GALLERIES)) {
    const held = kept.filter((i) => belongs(key, i)).length;
    document.querySelector(`[data-count="${key}"]`).textContent = count(held);
  }
  found = kept.filter((i) => belongs(gallery, i)).sort(GALLERIES[gallery][2]);
  byId("cards").classList.toggle("no-boxes", !boxes);
  page = 0;
  drawPage();
}

function turn(by) {
  page += by;
  drawPage();
  byId("images").scrollIntoView();
}

const near = new IntersectionObserver(
  (seen) => seen.forEach(({ isIntersecting, target }) => {
    if (!isIntersecting) return;
    near.unobserve(target);
    ask(Number(target.dataset.position));
  }),
  { rootMargin: "600px" },
);

function drawPage() {
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  const shown = found.slice(page * PAGE, (page + 1) * PAGE);
  near.disconnect();
  byId("cards").replaceChildren(...shown.map(card));
  for (const element of byId("cards").children) near.observe(element);
  byId("status").textContent = `${count(found.length)} of ${count(images.id.length)} images`;
  byId("page").textContent = `page ${page + 1} of ${pages}`;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page === pages - 1;
}

// A name from the data: direction marks in it turn no other words round.
const isolated = (text) => make("bdi", {}, text);

function card(i) {
  const wrong = WRONG.includes(images.outcome[i]);
  const truth = images.anomalous[i] ? (images.defects[images.defect[i]] ?? "defective") : "good part";
  const title = `${wrong ? "✗" : "✓"} ${OUTCOMES[images.outcome[i]]}`;
  const category = images.categories[images.category[i]];
  const facts = [];
  if (images.anomalous[i] && images.iou[i] === null) facts.push("label alone known");
  else if (images.outcome[i] === "l") facts.push(`IoU ${images.iou[i].toFixed(2)}, at least ${LOCATED}`);
  else if (images.outcome[i] === "e") facts.push(`IoU ${images.iou[i].toFixed(2)}, below ${LOCATED}`);
  if (images.score[i] !== null) facts.push(`probability of a defect ${images.score[i].toFixed(2)}`);
  const says = { A: "elfo", B: "mp", "-": "xu" }[images.letter[i]];
  if (!says.includes(images.outcome[i])) facts.push(`the model wrote ${ANSWERS[images.letter[i]]}`);
  for (const other of others) {
    const before = data.others[other][i];
    facts.push(`${other}: ${OUTCOMES[before]}`);
    if (other === reference && data.changed[i] === "1") {
      facts.push(`changed: ${DECISIONS[before]} by ${other}, ${DECISIONS[images.outcome[i]]} by ${candidate}`);
    }
  }
  const [width, height] = images.size[i];
  const picture = make("button", { type: "button", class: "picture", "aria-expanded": false });
  picture.style.aspectRatio = `${width} / ${height}`;
  picture.append(overlay(i));
  const article = make(
    "article",
    { "data-position": i },
    make("h3", {}, make("span", { class: wrong ? "bad" : "good" }, title), " · ", isolated(category), ", ", isolated(truth)),
    make("p", { class: "facts" }, facts.join(" · ")),
    make("p", { class: "facts" }, isolated(images.source[i]), " · ", isolated(images.id[i])),
    picture,
    make("div", { class: "words" }),
  );
  picture.addEventListener("click", () => {
    picture.setAttribute("aria-expanded", article.classList.toggle("large"));
    article.scrollIntoView({ block: "nearest" });
  });
  return article;
}

// Boxes are in pixels of the original image, whatever the size of the picture.
function overlay(i) {
  const [width, height] = images.size[i];
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": true });
  for (const [kind, boxes] of [["truth", images.boxes[i]], ["predicted", images.predicted[i]]]) {
    for (let k = 0; k < boxes.length; k += 4) {
      const [x1, x2] = [boxes[k], boxes[k + 2]].map((x) => Math.min(Math.max(x, 0), width));
      const [y1, y2] = [boxes[k + 1], boxes[k + 3]].map((y) => Math.min(Math.max(y, 0), height));
      const place = { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1) };
      svg.append(make("rect", { class: "halo", ...place }), make("rect", { class: kind, ...place }));
    }
  }
  return svg;
}

// Puts the picture and the words into the card of an image, if the card is on the page.
function fill(i) {
  const article = document.querySelector(`article[data-position="${i}"]`);
  if (!article || article.querySelector("img, .missing")) return;
  const [picture, words] = [article.querySelector(".picture"), article.querySelector(".words")];
  const counts = [images.boxes[i].length / 4, images.predicted[i].length / 4];
  const alt = `${images.source[i]}: ${OUTCOMES[images.outcome[i]]}; true boxes: ${counts[0]}, predicted: ${counts[1]}`;
  const row = held.get(i);
  if (!row) {
    const why = "Picture and words are in the folder “images” beside the page, and this page is alone.";
    picture.prepend(make("span", { class: "missing" }, why));
    return;
  }
  const [content, think, rethink, all] = row;
  picture.prepend(make("img", { src: `data:image/jpeg;base64,${content}`, alt, decoding: "async" }));
  const stages = { "1 · Regions (think)": think, "2 · Examination (rethink)": rethink };
  for (const [title, text] of Object.entries({ ...stages, "3 · Answer": ANSWERS[images.letter[i]] })) {
    words.append(make("h4", {}, title), make("p", { dir: "auto" }, text ?? "(not there)"));
  }
  if (all === null) return;
  words.append(make("h4", {}, "As the model wrote it"));
  words.append(make("pre", { dir: "auto", tabindex: 0 }, all || "(nothing)"));
}

drawAbout();
drawReferences();
drawTiles();
drawCompared();
drawHeadline();
drawConfusion();
drawGroups();
drawCurves();
drawReliability();
drawSizes();
drawDetection();
drawRewards();
drawFilters();
select();
