// The charts: of the concept in focus over the steps, of predicted against observed, and of the rates. Colours are CSS variables,
// so that a change of colours needs no new drawing.
"use strict";

const Z = 1.959964; // half the width of a 95 % interval, in standard errors

/**
 * Draws charts into a container, each [title, what Plot.plot takes by width, note]. All boxes are there before the first is
 * measured: they share the width.
 */
function drawCharts(container, charts) {
  container.dataset.count = charts.length;
  const boxes = charts.map(([title]) => {
    const box = element("div", "chart");
    box.append(element("h4", "", title));
    return box;
  });
  container.replaceChildren(...boxes);
  const widths = boxes.map((box) => Math.max(180, Math.floor(box.clientWidth)));
  charts.forEach(([title, make, note], index) => {
    boxes[index].append(Plot.plot({ className: "plot", width: widths[index], ariaLabel: title, ...make(widths[index]) }));
    if (note) boxes[index].append(element("p", "", note));
  });
}

// --- one concept over the steps

function series(name) {
  return data.steps
    .map((step, index) => {
      const value = data.concepts[focus][name][index];
      const [v, se] = Array.isArray(value) ? value : [value, null];
      return { step, v, low: known(se) ? v - Z * se : v, high: known(se) ? v + Z * se : v };
    })
    .filter((point) => known(point.v));
}

function line(points, color, label) {
  return [
    Plot.areaY(points, { x: "step", y1: "low", y2: "high", fill: color, fillOpacity: 0.15 }),
    Plot.lineY(points, { x: "step", y: "v", stroke: color, strokeWidth: 1.6 }),
    points.length === 1 ? Plot.dot(points, { x: "step", y: "v", fill: color }) : null,
    Plot.ruleX(points, Plot.pointerX({ x: "step", py: "v", stroke: "var(--muted)" })),
    Plot.tip(points, Plot.pointerX({ x: "step", y: "v", title: (d) => `step ${d.step}\n${label} ${fixed(d.v, 3)} [${fixed(d.low, 3)}, ${fixed(d.high, 3)}]` })),
  ];
}

function drawHistory() {
  const container = byId("history");
  if (!container || !data.concepts.length) return;
  const charts = [];
  const name = data.concepts[focus].label;
  const colors = { amplified: "var(--amplified)", suppressed: "var(--suppressed)" };
  const color = colors[data.concepts[focus].verdict] ?? "var(--unclear)";
  const observed = data.probes
    .map((probe) => ({ step: probe.step, v: probe.concepts[focus].change[0], se: probe.concepts[focus].change[1] ?? 0 }))
    .filter((point) => known(point.v));
  const axes = { height: 200, marginLeft: 44, marginRight: 14, x: { label: "step", ticks: 4 } };
  const amplification = series("amplification");
  charts.push([
    `Amplification of ${name}, sd`,
    () => ({
      ...axes,
      y: { label: null, grid: true, nice: true, ticks: 5 },
      marks: [
        Plot.ruleY([0], { stroke: "var(--muted)" }),
        ...line(amplification, color, "amplification"),
        Plot.ruleX(observed, { x: "step", y1: (d) => d.v - Z * d.se, y2: (d) => d.v + Z * d.se, stroke: "var(--observed)", strokeWidth: 1.6 }),
        Plot.dot(observed, { x: "step", y: "v", fill: "var(--panel)", stroke: "var(--observed)", strokeWidth: 1.8, r: 3.5 }),
      ],
    }),
    observed.length ? "Line and band: estimate with 95 % interval. Circles: change that probe rollouts show." : "Line and band: estimate with 95 % interval.",
  ]);
  for (const [key, title, from] of [["pressure", "Pressure, sd", null], ["strength", "Strength in force", 0]]) {
    const points = series(key);
    if (!points.length) continue;
    charts.push([title, () => ({
      ...axes,
      y: { label: null, grid: true, nice: true, ticks: 5, ...(from === 0 ? { zero: true } : {}) },
      marks: [Plot.ruleY([0], { stroke: "var(--muted)" }), ...line(points, "var(--ink)", key)],
    })]);
  }
  drawCharts(container, charts);
}

// --- predicted against observed

function drawScatter() {
  const container = byId("scatter");
  if (!container) return;
  const step = Number(byId("truth-step").value);
  const probe = data.sampled.find((candidate) => candidate.step === step);
  const rates = data.probes.find((candidate) => candidate.step === step);
  byId("truth-facts").replaceChildren();
  const point = (kind) => ([label, p, pse, o, ose]) => ({ kind, label, p, o, pse: pse ?? 0, ose: ose ?? 0 });
  const concepts = (rates?.concepts ?? [])
    .map((values, index) => point("concept")([data.concepts[index].label, ...values.predicted, ...values.change]))
    .filter((d) => known(d.p) && known(d.o));
  const features = (probe?.features ?? []).map(point("feature")).filter((d) => known(d.p) && known(d.o));
  const points = [...features, ...concepts];
  if (!points.length) {
    container.replaceChildren(element("p", "empty", step === 0 ? "Before training nothing has been predicted yet. The next probe shows the first comparison." : "This probe has no predictions."));
    return;
  }
  const facts = [];
  if (known(probe?.r2)) facts.push(`R² ${probe.r2.toFixed(2)} over all monitored features`);
  if (probe?.predictor) facts.push(`predicted by ${probe.predictor}`);
  if (probe?.estimator) facts.push(`observed by ${probe.estimator}`);
  byId("truth-facts").append(element("bdi", "data", facts.join(" · ")));
  const reach = (ends) => [Math.min(0, ...ends), Math.max(0, ...ends)];
  let across = reach(points.flatMap((d) => [d.p - Z * d.pse, d.p + Z * d.pse]));
  let up = reach(points.flatMap((d) => [d.o - Z * d.ose, d.o + Z * d.ose]));
  const both = reach([...across, ...up]);
  // One scale for both, unless one of them would then be a mere line.
  const apart = (both[1] - both[0]) / Math.max(Math.min(across[1] - across[0], up[1] - up[0]), 1e-12) > 4;
  if (!apart) across = up = both;
  const exact = [Math.max(across[0], up[0]), Math.min(across[1], up[1])];
  const told = (d) => `${d.label}\npredicted ${fixed(d.p)} ± ${(Z * d.pse).toFixed(2)}\nobserved ${fixed(d.o)} ± ${(Z * d.ose).toFixed(2)}`;
  const color = (d) => (d.kind === "concept" ? "var(--observed)" : "var(--muted)");
  const faint = (d) => (d.kind === "concept" ? 0.9 : 0.35);
  const counted = [];
  if (concepts.length) counted.push(`${concepts.length} concept${concepts.length === 1 ? "" : "s"} (large)`);
  if (features.length) counted.push(`${features.length} features (small), those with the largest changes`);
  const charts = [];
  charts.push([
    "Change of the mean score, sd",
    (width) => ({
      height: Math.min(width, 540) - 20,
      marginLeft: 46,
      marginBottom: 36,
      x: { label: "predicted →", domain: across, nice: true, grid: true, ticks: 5 },
      y: { label: "↑ observed in rollouts", domain: up, nice: true, grid: true, ticks: 5 },
      color: { type: "identity" },
      marks: [
        Plot.ruleX([0], { stroke: "var(--line)" }),
        Plot.ruleY([0], { stroke: "var(--line)" }),
        Plot.line([[exact[0], exact[0]], [exact[1], exact[1]]], { stroke: "var(--muted)", strokeDasharray: "4 3" }),
        Plot.ruleX(points, { x: "p", y1: (d) => d.o - Z * d.ose, y2: (d) => d.o + Z * d.ose, stroke: color, strokeOpacity: faint }),
        Plot.ruleY(points, { y: "o", x1: (d) => d.p - Z * d.pse, x2: (d) => d.p + Z * d.pse, stroke: color, strokeOpacity: faint }),
        Plot.dot(points, { x: "p", y: "o", fill: color, r: (d) => (d.kind === "concept" ? 4.5 : 2.2), fillOpacity: (d) => (d.kind === "concept" ? 1 : 0.7) }),
        Plot.tip(points, Plot.pointer({ x: "p", y: "o", title: told })),
      ],
      r: { type: "identity" },
    }),
    `${counted.join(", ")}. Bars are 95 % intervals; on the dashed line the estimate is exact.${apart ? " The two axes have scales of their own." : ""}`,
  ]);
  const order = [...concepts].sort((a, b) => b.o - a.o).slice(0, 24);
  const short = (label) => (label.length > 18 ? `${label.slice(0, 17)}…` : label);
  const place = new Map(order.map((d, index) => [d, `${index}`]));
  if (order.length) charts.push([
    "The named concepts, sd",
    () => ({
      height: 46 + 26 * order.length,
      marginLeft: 120,
      x: { label: null, grid: true, nice: true, ticks: 5 },
      y: { label: null, domain: order.map((d) => place.get(d)), tickFormat: (key) => short(order[Number(key)].label), tickSize: 0 },
      marks: [
        Plot.ruleX([0], { stroke: "var(--muted)" }),
        Plot.ruleY(order, { y: (d) => place.get(d), x1: (d) => d.p - Z * d.pse, x2: (d) => d.p + Z * d.pse, stroke: "var(--muted)", strokeWidth: 5, strokeOpacity: 0.35 }),
        Plot.tickX(order, { y: (d) => place.get(d), x: "p", stroke: "var(--muted)", strokeWidth: 2, insetTop: 5, insetBottom: 5 }),
        Plot.ruleY(order, { y: (d) => place.get(d), x1: (d) => d.o - Z * d.ose, x2: (d) => d.o + Z * d.ose, stroke: "var(--observed)", strokeWidth: 1.6 }),
        Plot.dot(order, { y: (d) => place.get(d), x: "o", fill: "var(--panel)", stroke: "var(--observed)", strokeWidth: 1.8, r: 3.6 }),
        Plot.tip(order, Plot.pointerY({ y: (d) => place.get(d), x: "o", title: told })),
      ],
    }),
    "Circles: observed. Grey bars: predicted. Each with its 95 % interval.",
  ]);
  drawCharts(container, charts);
}

// --- rates

function drawRates() {
  const container = byId("rate-chart");
  if (!container) return;
  const charts = [];
  data.concepts.slice(0, 24).forEach((concept, index) => {
    const points = data.probes
      .map((probe) => ({ step: probe.step, rate: probe.concepts[index].rate.map((value) => (known(value) ? 100 * value : value)) }))
      .filter((point) => known(point.rate[0]));
    if (points.length < 2) return;
    const banded = points.filter((d) => known(d.rate[1]) && known(d.rate[2]));
    charts.push([`${concept.label}, %`, () => ({
      height: 110,
      marginLeft: 34,
      marginRight: 12,
      marginTop: 10,
      marginBottom: 24,
      x: { label: null, ticks: 3 },
      y: { label: null, ticks: 3, zero: true, nice: true, grid: true },
      marks: [
        Plot.ruleY([points[0].rate[0]], { stroke: "var(--muted)", strokeDasharray: "3 3" }),
        Plot.lineY(points, { x: "step", y: (d) => d.rate[0], stroke: "var(--observed)", strokeOpacity: 0.5 }),
        Plot.ruleX(banded, { x: "step", y1: (d) => d.rate[1], y2: (d) => d.rate[2], stroke: "var(--observed)", strokeWidth: 1.5 }),
        Plot.dot(points, { x: "step", y: (d) => d.rate[0], r: 3, fill: "var(--panel)", stroke: "var(--observed)", strokeWidth: 1.6 }),
      ],
    })]);
  });
  drawCharts(container, charts);
}

const truthSelect = byId("truth-step");
if (truthSelect) {
  for (const probe of data.sampled) truthSelect.append(new Option(probe.step === 0 ? "0 (before)" : String(probe.step), String(probe.step)));
  const wanted = data.sampled.some((probe) => probe.step === state.truth) ? state.truth : data.sampled.at(-1)?.step;
  truthSelect.value = String(wanted ?? "");
  truthSelect.addEventListener("change", () => {
    // The last step stays the last one while the run goes on.
    state.truth = Number(truthSelect.value) === data.sampled.at(-1).step ? null : Number(truthSelect.value);
    drawScatter();
  });
}
onFocus.push(drawHistory);
drawScatter();
drawRates();

let drawnWidth = document.documentElement.clientWidth;
let resizeTimer = 0;
addEventListener("resize", () => {
  clearTimeout(resizeTimer);
  resizeTimer = setTimeout(() => {
    if (document.documentElement.clientWidth === drawnWidth) return;
    drawnWidth = document.documentElement.clientWidth;
    drawHistory();
    drawScatter();
    drawRates();
  }, 150);
});
