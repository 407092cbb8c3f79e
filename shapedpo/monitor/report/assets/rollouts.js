// The rollouts of the same prompts before and after, with the tokens that carry the concept in focus marked.
"use strict";

const PAGE = 6; // rollouts shown at first, and added at a time
const SHORT = 700; // characters of a rollout shown at first
let shownRollouts = PAGE;

/** What a full mark stands for: the 98th percentile of the concept's activations over all rollouts, at least one sd. */
function fullMark() {
  const values = [];
  for (const probe of data.sampled) {
    for (const sample of probe.samples) {
      const flat = sample.activations[focus] ?? [];
      for (let i = 1; i < flat.length; i += 2) values.push(flat[i]);
    }
  }
  values.sort((a, b) => a - b);
  return Math.max(1, values[Math.floor(0.98 * (values.length - 1))] ?? 1);
}

function marked(sample, full) {
  const holder = element("bdi", "data");
  holder.dir = "auto";
  const flat = sample.activations[focus] ?? [];
  const strength = new Map();
  for (let i = 0; i < flat.length; i += 2) strength.set(flat[i], flat[i + 1]);
  let plain = "";
  sample.tokens.forEach((token, index) => {
    const word = token.trimStart() || token;
    if (!strength.has(index)) {
      plain += token;
      return;
    }
    plain += token.slice(0, token.length - word.length); // the space before a word stays unmarked
    if (plain) holder.append(plain);
    plain = "";
    const mark = element("mark", "act", word);
    mark.style.setProperty("--strength", String(Math.min(1, strength.get(index) / full)));
    mark.title = `${strength.get(index).toFixed(1)} sd`;
    holder.append(mark);
  });
  if (plain) holder.append(plain);
  return holder;
}

function side(title, sample, full) {
  const box = element("div");
  const head = element("h4");
  head.append(element("span", "", title));
  const score = sample?.scores[focus];
  if (known(score)) head.append(element("span", "", `score ${fixed(score)} sd`));
  box.append(head);
  if (!sample) {
    box.append(element("p", "muted", "no rollout"));
    return box;
  }
  const text = element("div", "text");
  text.append(marked(sample, full));
  if (sample.tokens.reduce((sum, token) => sum + token.length, 0) > SHORT) {
    text.classList.add("long");
    addMore(text);
  }
  box.append(text);
  return box;
}

function drawRollouts() {
  const list = byId("rollout-list");
  if (!list) return { rollouts: 0 };
  const before = data.sampled[0];
  const after = data.sampled.find((probe) => probe.step === Number(byId("after-step").value)) ?? before;
  const full = fullMark();
  const rows = before.samples.map((sample, index) => ({ before: sample, after: after.samples[index] ?? null }));
  if (!rows.length) rows.push(...after.samples.map((sample) => ({ before: null, after: sample })));
  const gain = (row) => (row.after?.scores[focus] ?? 0) - (row.before?.scores[focus] ?? 0);
  if (state.order === "rise") rows.sort((a, b) => gain(b) - gain(a));
  if (state.order === "fall") rows.sort((a, b) => gain(a) - gain(b));
  const text = (sample) => (sample ? `${sample.prompt}\n${sample.tokens.join("")}` : "");
  const found = rows.filter((row) => matches(`${text(row.before)}\n${text(row.after)}`.toLowerCase()));
  const alone = after === before;
  list.replaceChildren(
    ...found.slice(0, shownRollouts).map((row) => {
      const card = element("article", "rollout");
      const prompt = element("p", "prompt");
      prompt.append(element("bdi", "data", (row.before ?? row.after).prompt));
      const sides = element("div", "sides");
      sides.append(side(before.step === 0 ? "before training" : `step ${before.step}`, row.before, full));
      if (!alone) sides.append(side(`step ${after.step}`, row.after, full));
      card.append(prompt, sides);
      return card;
    }),
  );
  if (!found.length) list.append(element("p", "empty", "No rollout matches the search."));
  const left = found.length - shownRollouts;
  byId("more-rollouts").hidden = left <= 0;
  byId("more-rollouts").textContent = `show ${Math.min(left, 2 * PAGE)} more of ${found.length}`;
  fitTexts();
  const legend = byId("legend");
  legend.replaceChildren(element("span", "", "activation"));
  for (const strength of [0.15, 0.5, 1]) {
    const mark = element("mark", "act", (strength * full).toFixed(1));
    mark.style.setProperty("--strength", String(strength));
    legend.append(mark);
  }
  legend.append(element("span", "", "sd"));
  return { rollouts: found.length };
}

const afterSelect = byId("after-step");
if (afterSelect) {
  const later = data.sampled.slice(1);
  for (const probe of later) afterSelect.append(new Option(`step ${probe.step}`, String(probe.step)));
  if (!later.length) afterSelect.append(new Option("no later probe yet", ""));
  const wanted = later.some((probe) => probe.step === state.after) ? state.after : later.at(-1)?.step;
  afterSelect.value = String(wanted ?? "");
  afterSelect.addEventListener("change", () => {
    state.after = Number(afterSelect.value) === later.at(-1)?.step ? null : Number(afterSelect.value);
    drawRollouts();
  });
  byId("rollout-order").value = state.order;
  byId("rollout-order").addEventListener("change", () => {
    state.order = byId("rollout-order").value;
    drawRollouts();
  });
  byId("more-rollouts").addEventListener("click", () => {
    shownRollouts += 2 * PAGE;
    drawRollouts();
  });
}
onFocus.push(drawRollouts);
onSearch.push(drawRollouts);
start();
