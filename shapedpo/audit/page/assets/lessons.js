// The first screen: the strongest lessons in words. The last script: it starts the page.
"use strict";

const GROUPS = [
  ["everywhere", "In all answers", "What is taught whatever the prompt."],
  ["conditional", "Only in some rows", "Taught where prompt or answer is about something, and not elsewhere."],
  ["rare", "In few rows", `Taught by less than ${percent(data.rare)} of the rows: what nobody would look for.`],
];
const FIRST = 3; // lessons of a group that are shown at first

/** A list of words, each on its own. */
function wordList(words) {
  const holder = element("span", "words-list");
  words.forEach((word, place) => holder.append(...(place ? [" "] : []), element("bdi", "word data", word)));
  return holder;
}

function lessonCard(lesson, strongest) {
  const h = lesson.hypotheses[0];
  const card = element("button", `lesson ${side(H.delta[h])}`);
  card.type = "button";
  const head = element("span", "lesson-head");
  head.append(element("span", "rank", String(lesson.lesson + 1))); // as in the summary, and for `shapedpo fix`
  const where = element("span", "lesson-where");
  where.append(lessonWhere(lesson));
  head.append(where, element("span", "muted lesson-rows", lesson.n_named ? `${whole(lesson.n_named)} rows` : "no rows stand out"));
  card.append(head);
  if (H.label[h]) card.append(element("bdi", "data lesson-title", H.label[h][0]));
  const gain = element("span", "lesson-line");
  const loss = element("span", "lesson-line");
  if (lesson.more.length) gain.append(element("span", "amplified", "▲ chosen says "), wordList(lesson.more));
  if (lesson.less.length) loss.append(element("span", "suppressed", "▼ rejected says "), wordList(lesson.less));
  if (!lesson.more.length && !lesson.less.length) {
    gain.append(element("span", side(H.delta[h]), rises(h) ? "▲ chosen shows more of " : "▼ chosen shows less of "), element("bdi", "word data", whatName(h)));
  }
  for (const part of [gain, loss]) if (part.childNodes.length) card.append(part);
  const example = element("span", "lesson-example");
  for (const [name, words] of [["chosen", lesson.more], ["rejected", lesson.less]]) {
    const quote = element("span", "quote");
    quote.append(element("span", `${name === "chosen" ? "amplified" : "suppressed"} quote-side`, `${name} `), excerpt(lesson.example[name], words));
    example.append(quote);
  }
  card.append(example);
  const foot = element("span", "lesson-foot muted");
  const bar = element("span", "bar-track");
  const fill = element("span", side(H.delta[h]));
  fill.style.width = `${Math.round(100 * Math.min(1, Math.abs(H.d[h]) / strongest))}%`;
  bar.append(fill);
  bar.title = "Cohen's d";
  const guess = prediction(h);
  const said = [`d ${signed(H.d[h])}`];
  if (guess?.rates) said.push(`predicted in ${percent(guess.rates[0])} → ${percent(guess.rates[1])} of rollouts`);
  else if (guess && known(guess.score)) said.push(`predicted ${signed(guess.score)} sd`);
  if (lesson.hypotheses.length > 1) said.push(`${whole(lesson.hypotheses.length)} hypotheses agree`);
  foot.append(bar, element("span", "", said.join(" · ")));
  card.append(foot);
  card.addEventListener("click", () => openLesson(lesson.lesson));
  return card;
}

/** A pattern of a word that is not within a longer one. */
function wholeWord(word) {
  const [before, after] = [/^\p{L}/u.test(word) ? "(?<!\\p{L})" : "", /\p{L}$/u.test(word) ? "(?!\\p{L})" : ""];
  return before + word.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&") + after;
}

/** Some of a text around the first of these words, which are marked. */
function excerpt(text, words) {
  const holder = element("bdi", "data");
  holder.dir = "auto";
  const places = words.length ? [...text.matchAll(new RegExp(words.map(wholeWord).join("|"), "giu"))] : [];
  const from = boundary(text, Math.max(0, (places[0]?.index ?? 0) - 50));
  const to = boundary(text, Math.min(text.length, from + 170));
  if (from > 0) holder.append("…");
  let at = from;
  for (const found of places) {
    const end = found.index + found[0].length;
    if (end > to) break;
    holder.append(text.slice(at, found.index), element("mark", "act lesson-mark", found[0]));
    at = end;
  }
  holder.append(text.slice(at, to));
  if (to < text.length) holder.append("…");
  return holder;
}

function drawLessons() {
  const holder = byId("lesson-groups");
  for (const [name, title, about] of GROUPS) {
    const lessons = data.lessons[name];
    const part = element("section", "lesson-group");
    const head = element("div", "section-head");
    head.append(element("h3", "", title), element("span", "muted", about));
    part.append(head);
    const strongest = Math.min(LARGE, Math.max(0.1, ...lessons.map((lesson) => Math.abs(H.d[lesson.hypotheses[0]]))));
    const cards = element("div", "cards-grid");
    cards.append(...lessons.slice(0, FIRST).map((lesson) => lessonCard(lesson, strongest)));
    part.append(lessons.length ? cards : element("p", "muted", "Nothing found."));
    if (lessons.length > FIRST) {
      const more = element("button", "all", `show all ${lessons.length}`);
      more.type = "button";
      more.addEventListener("click", () => {
        cards.append(...lessons.slice(FIRST).map((lesson) => lessonCard(lesson, strongest)));
        more.remove();
      });
      part.append(more);
    }
    holder.append(part);
  }
  const kept = H.q.filter((q) => q !== null && q <= data.max_q).length;
  byId("facts").append(
    element("b", "", `${whole(data.n_rows)} pairs`),
    ` · ${whole(Object.values(data.tested).reduce((a, b) => a + b, 0))} hypotheses tested · `,
    kept ? `${whole(kept)} of those kept have q of ${data.max_q} or less` : "none stands out from what chance would make",
  );
  const foot = [["model", data.model], ["SAE", data.sae], ["labels by", data.labelled_by]].filter(([, value]) => value);
  foot.forEach(([name, value], place) => byId("foot").append(`${place ? " · " : ""}${name} `, element("bdi", "data", value)));
  byId("foot").append(`${foot.length ? ". " : ""}${data.served ? "Served by shapedpo view to this machine only." : "This page loads nothing from the network."} Marks are where features peak; lessons hold for this model's features.`);
}

drawLessons();
drawMaps();
filter();
follow();
document.documentElement.dataset.ready = "true"; // for whoever drives the page
