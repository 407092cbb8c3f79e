// Rows of the dataset, with the tokens marked at which features of some clusters peak.
"use strict";

const EXCERPT = 420; // characters of a text that are shown at first
const BEFORE = 120; // of these, before the first mark

/** A part of a text, with marks `[start, end, features]`. */
function markedText(text, marks, from, to) {
  const holder = element("bdi", "data");
  holder.dir = "auto";
  let at = from;
  const most = Math.max(3, ...marks.map((mark) => mark[2]));
  for (const [start, end, features] of marks) {
    if (start < at || end > to) continue;
    holder.append(text.slice(at, start));
    const mark = element("mark", "act", text.slice(start, end));
    mark.style.setProperty("--strength", String(0.25 + 0.75 * (features / most)));
    mark.title = `${features} of the features ${features === 1 ? "peaks" : "peak"} here`;
    holder.append(mark);
    at = end;
  }
  holder.append(text.slice(at, to));
  return holder;
}

/** Not in the middle of a character of two units. */
const boundary = (text, at) => (at > 0 && at < text.length && text.charCodeAt(at) >= 0xdc00 && text.charCodeAt(at) < 0xe000 ? at - 1 : at);

function textBox(text, marks, more = 0) {
  const box = element("div", "text");
  const ordered = [...marks].sort((a, b) => a[0] - b[0]);
  const long = text.length > EXCERPT * 1.25;
  const draw = (full) => {
    const [mark] = ordered;
    const first = full || !mark || mark[1] <= EXCERPT ? 0 : boundary(text, mark[0] - BEFORE);
    const to = full ? text.length : boundary(text, Math.min(text.length, first + EXCERPT));
    box.replaceChildren();
    if (!text) box.append(element("span", "muted", "(empty)"));
    if (first > 0) box.append(element("span", "muted", "… "));
    box.append(markedText(text, ordered, first, to));
    if (to < text.length) box.append(element("span", "muted", " …"));
    if (full && more) box.append(element("span", "muted", ` … (${whole(more)} more characters, not in this page)`));
    if (!long) return;
    const button = element("button", "more-text", full ? "show less" : "show all");
    button.type = "button";
    button.addEventListener("click", () => draw(!full));
    box.append(" ", button);
  };
  draw(!long);
  return box;
}

/** Ranges of several clusters together, in one span of a row. */
function marksOf(row, clusters, span) {
  const found = new Map();
  for (const cluster of clusters) {
    for (const [start, end, features] of row.marks[cluster]?.[span] ?? []) {
      const key = `${start}:${end}`;
      found.set(key, [start, end, features + (found.get(key)?.[2] ?? 0)]);
    }
  }
  return [...found.values()];
}

/** A row: its prompt, and chosen and rejected side by side. */
function rowCard(row, clusters, { teaches = false, measure = "score" } = {}) {
  const card = element("article", "row");
  const head = element("p", "row-head");
  head.append(element("b", "", `row ${row.row}`));
  if (known(row.value)) head.append(element("span", "muted", `${measure} ${signed(row.value)}`));
  if (teaches) {
    const button = element("button", "more-text", "what it teaches");
    button.type = "button";
    button.addEventListener("click", async () => {
      const found = (await source.teaches(row.row)).slice(0, 20);
      const list = element("ul", "partners");
      list.append(...found.map((h) => partner(h)));
      button.replaceWith(element("span", "muted", found.length ? `held responsible for ${found.length}:` : "held responsible for nothing"));
      if (found.length) head.after(list);
    });
    head.append(button);
  }
  card.append(head);
  const prompt = element("div", "prompt-text");
  prompt.append(element("h4", "", "prompt"), textBox(row.prompt, marksOf(row, clusters, "prompt"), row.cut?.prompt));
  const sides = element("div", "sides");
  for (const name of ["chosen", "rejected"]) {
    const box = element("div", name);
    box.append(element("h4", name === "chosen" ? "amplified" : "suppressed", name), textBox(row[name], marksOf(row, clusters, name), row.cut?.[name]));
    sides.append(box);
  }
  card.append(prompt, sides);
  return card;
}
