// What hypotheses and clusters are called, and numbers as text.
"use strict";

const LARGEST = 1e6; // where z and d are cut off
const LARGE = 3; // from which d on a bar or a circle is full, so that one such does not hide the others
const whole = (value) => (known(value) ? Math.round(value).toLocaleString("en") : "–");
const signed = (value, digits = 2) => (known(value) ? `${value > 0 ? "+" : ""}${plainNumber(value, digits)}` : "–");
const percent = (value) => (known(value) ? `${value < 0.0995 && value > 0 ? Number((100 * value).toPrecision(2)) : Math.round(100 * value)} %` : "–");
function plainNumber(value, digits = 2) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (size >= LARGEST) return value > 0 ? "∞" : "−∞"; // sides that differ and do not vary
  const text = size > 0 && (size < 0.00095 || size >= 1e5) ? value.toExponential(0) : value.toFixed(size < 0.0995 && size > 0 ? digits + 1 : digits);
  return text.replaceAll("-", "−");
}

const conditionKind = (view) => ({ feature: "data", prompt: "prompt" })[view];
const responseKind = (view) => ({ prompt: "response", single: "single" })[view] ?? "feature";
const everywhere = (view) => view === "global" || view === "single";
const KINDS = { feature: "what answers show", response: "what answers show", single: "what answers show", prompt: "what prompts say", data: "kind of answer" };

const DATA_NAME = { feature: "features", response: "features", single: "feature", prompt: "prompt features", data: "rows" };
/** What a cluster is called: its title, or its keywords, or its number. */
function clusterName(kind, number, most = 4) {
  const of = data.clusters[kind];
  return of.title[number] || of.keywords[number].slice(0, most).join(", ") || `${DATA_NAME[kind]} ${number}`;
}
const featureName = (feature) => data.features[feature] ?? `feature ${feature}`; // a bare number could be a token

function whereName(h) {
  return everywhere(H.view[h]) ? "everywhere" : clusterName(conditionKind(H.view[h]), H.condition[h]);
}
const whatName = (h) => clusterName(responseKind(H.view[h]), H.response[h]);
const significant = (h) => H.q[h] !== null && H.q[h] <= data.max_q;
const rises = (h) => H.delta[h] > 0;
const side = (value) => (value > 0 ? "amplified" : "suppressed");
const arrow = (value) => (value > 0 ? "▲" : "▼");

/** A sentence of a hypothesis as text nodes and marks. */
function statement(h) {
  const holder = element("span");
  const what = element("bdi", `data ${side(H.delta[h])}`, whatName(h));
  const where = element("bdi", "data", whereName(h));
  if (everywhere(H.view[h])) holder.append("Chosen answers show ", rises(h) ? "more" : "less", " of ", what, " than rejected ones.");
  else {
    holder.append(H.view[h] === "prompt" ? "Where the prompt says " : "Among answers about ", where, ", chosen shows ", rises(h) ? "more" : "less", " of ", what);
    holder.append(" over rejected than it does elsewhere.");
  }
  return holder;
}

/** Where a lesson holds: "everywhere", or words of its rows' prompts. */
function lessonWhere(lesson) {
  const [h] = lesson.hypotheses;
  const title = data.clusters[conditionKind(H.view[h])]?.title[H.condition[h]];
  const holder = element("span");
  if (everywhere(H.view[h])) holder.append("everywhere");
  else if (title) holder.append("where: ", element("bdi", "data", title));
  else if (/^(data cluster|prompts with) /.test(lesson.where)) holder.append(element("bdi", "data", lesson.where));
  else holder.append("prompts that say ", element("bdi", "data", lesson.where));
  return holder;
}

/** A sentence of a lesson. */
function lessonStatement(lesson) {
  const [h] = lesson.hypotheses;
  if (!lesson.more.length && !lesson.less.length) return statement(h);
  const holder = element("span");
  const words = (name, those) => [element("span", name === "chosen" ? "amplified" : "suppressed", name), " says ", element("bdi", "data", those.join(", "))];
  const where = lessonWhere(lesson);
  where.firstChild.textContent = where.firstChild.textContent.replace(/^./, (letter) => letter.toUpperCase());
  holder.append(where, ": ");
  if (lesson.more.length) holder.append(...words("chosen", lesson.more));
  if (lesson.less.length) holder.append(lesson.more.length ? "; " : "", ...words("rejected", lesson.less));
  return holder;
}

/** What the page can say of a predicted change: its score, and where the scale is known, from which share of rollouts to which. */
function prediction(h) {
  const values = H.predicted?.[h];
  if (!values) return null;
  const [score, low, high, odds, oddsLow, oddsHigh, base] = values;
  const moved = (by) => 1 / (1 + Math.exp(-(Math.log(base / (1 - base)) + by)));
  const rates = known(base) && known(odds) && base > 0 && base < 1 ? [base, moved(odds), moved(oddsLow ?? odds), moved(oddsHigh ?? odds)] : null;
  return { score, low, high, rates };
}

const STATISTICS = {
  strength: ["strength", "the smaller of the effects among even and among odd rows: what the paper ranks by", (h) => H.strength[h]],
  delta: ["Δ", "mean response score in the condition minus that elsewhere; above 0 where chosen has more", (h) => H.delta[h]],
  d: ["d", "Cohen's d: the difference in standard deviations", (h) => H.d[h]],
  z: ["z", "Welch's statistic", (h) => H.z[h]],
  q: ["q", "p value corrected for the number of hypotheses (Benjamini and Hochberg)", (h) => H.q[h]],
  n: ["rows", "rows in the condition", (h) => H.n_in[h]],
  named: ["named", "rows that are held responsible, beyond chance", (h) => H.n_named[h]],
};
if (H.predicted) STATISTICS.predicted = ["predicted", "predicted change of the mean score in rollouts after training", (h) => H.predicted[h]?.[0] ?? null];
const shownStatistic = (name, value) => (name === "n" || name === "named" ? whole(value) : name === "q" || name === "strength" ? plainNumber(value) : signed(value));
