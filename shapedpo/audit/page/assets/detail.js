// One hypothesis or lesson: what it says, its figures, its clusters, and its rows. Its address ends with #h=NUMBER or #l=NUMBER.
"use strict";

const ROWS = 8;
const AGREE = 8; // hypotheses of a lesson that are listed
let asked = 0; // so that a late answer does not draw into another hypothesis

const dialog = byId("detail");

const taught = new Map(Object.values(data.lessons).flat().map((lesson) => [lesson.lesson, lesson]));

function go(address) {
  if (location.hash === address) follow();
  else location.hash = address;
}
const openHypothesis = (h) => go(`#h=${h}`);
const openLesson = (number) => go(`#l=${number}`);

/** A hypothesis in a line, as a button that opens it. */
function partner(h, name = null) {
  const item = element("li");
  const button = element("button", "link");
  button.type = "button";
  button.append(element("span", side(H.delta[h]), `${arrow(H.delta[h])} `));
  if (name) button.append(element("bdi", "data", name));
  else button.append(element("bdi", "data", whatName(h)), element("span", "muted", " · "), element("bdi", "data muted", whereName(h)));
  button.addEventListener("click", () => openHypothesis(h));
  if (!significant(h)) item.classList.add("chance");
  item.append(button, element("span", "muted num", ` d ${signed(H.d[h])} · q ${plainNumber(H.q[h])}`));
  return item;
}

function figure(name, text, about) {
  const box = element("div");
  box.title = about;
  box.append(element("dt", "", name), element("dd", "", text));
  return box;
}

function clusterBox(kind, number, title) {
  const box = element("div", "cluster-box");
  box.append(element("h3", "", title));
  const of = data.clusters[kind];
  const name = element("p");
  name.append(element("bdi", "data name", clusterName(kind, number, 6)));
  box.append(name);
  if (of.description[number]) box.append(element("bdi", "data", of.description[number]));
  if (of.features[number].length) {
    const tokens = element("p", "tokens");
    tokens.append(...of.features[number].map((feature) => {
      const chip = element("bdi", "token data", featureName(feature));
      chip.title = `feature ${feature}`;
      return chip;
    }));
    box.append(tokens);
    const left = of.size[number] - of.features[number].length;
    if (left > 0) box.append(element("p", "muted", `and ${whole(left)} more features`));
  }
  box.append(element("p", "muted", `${kind === "data" ? "" : "about "}${whole(of.rows[number])} rows`));
  return box;
}

/** A hypothesis, or the lesson that it stands for. */
function show(h, lesson = null) {
  const turn = ++asked;
  const view = H.view[h];
  const subject = lesson
    ? { kind: "lesson", number: lesson.lesson, n_rows: lesson.n_rows, n_named: lesson.n_named }
    : { kind: "hypothesis", number: h, n_rows: H.n_rows[h], n_named: H.n_named[h] };
  const head = element("header", "detail-head");
  const title = element("h2");
  title.id = "detail-title";
  title.append(H.label[h] ? element("bdi", "data", H.label[h][0]) : lesson ? lessonStatement(lesson) : statement(h));
  const close = element("button", "close", "✕");
  close.type = "button";
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", () => dialog.close());
  head.append(title, close);
  const body = element("div", "detail-body");
  if (H.label[h]) {
    const said = element("p");
    said.append(H.label[h][1] ? element("bdi", "data", H.label[h][1]) : "");
    const plain = element("p", "muted");
    plain.append(lesson ? lessonStatement(lesson) : statement(h));
    body.append(said, plain);
  }
  const figures = element("dl", "facts figures");
  const guess = prediction(h);
  if (guess) {
    const range = known(guess.low) ? ` [${signed(guess.low)}, ${signed(guess.high)}]` : "";
    const about = `change of the mean score that the audit predicts in rollouts after training, with its interval${guess.rates ? "" : "; its sign and rank: how far a run goes is not in the data"}`;
    figures.append(figure("predicted change", `${signed(guess.score)} sd${range}`, about));
    if (guess.rates) {
      const [base, after, low, high] = guess.rates;
      figures.append(figure("in rollouts", `${percent(base)} → ${percent(after)} (${percent(low)} to ${percent(high)})`, "share of rollouts that show it, before and after"));
    }
  }
  const given = everywhere(view) ? "chosen minus rejected, all rows" : "in the condition";
  figures.append(figure("mean score", `${signed(H.mean_in[h])}${everywhere(view) ? "" : ` in, ${signed(H.mean_out[h])} elsewhere`}`, `response score, chosen minus rejected, ${given}`));
  for (const [name, [short, about, value]] of Object.entries(STATISTICS)) {
    if (name === "predicted" || (lesson && (name === "n" || name === "named"))) continue; // a lesson has rows of its own
    figures.append(figure(short, shownStatistic(name, value(h)), about));
  }
  figures.append(figure("halves", H.halves[h].map((half) => signed(half)).join(" / "), "Δ among rows of even and of odd number"));
  body.append(figures);
  const boxes = element("div", "twin-boxes");
  if (!everywhere(view)) boxes.append(clusterBox(conditionKind(view), H.condition[h], view === "prompt" ? "Where the prompt says" : "Where answers are about"));
  boxes.append(clusterBox(responseKind(view), H.response[h], rises(h) ? "chosen shows more of" : "chosen shows less of"));
  body.append(boxes);
  if (lesson?.hypotheses.length > 1) body.append(agreeing(lesson.hypotheses));
  const step = element("p", "muted", "A recipe that holds it, the data without its rows, and what is predicted then (DIR is the audit's folder): ");
  step.append(element("code", "", `shapedpo fix DIR ${lesson ? `--finding ${lesson.lesson + 1}` : `--hypothesis ${h}`}`));
  body.append(step, rowList(h, subject, turn));
  dialog.replaceChildren(head, body);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  close.focus({ preventScroll: true });
}

/** The other hypotheses that a lesson explains. */
function agreeing(hypotheses) {
  const part = element("details");
  part.append(element("summary", "", `${whole(hypotheses.length)} hypotheses rest on these rows`));
  const list = element("ul", "partners");
  list.append(...hypotheses.slice(0, AGREE).map((h) => partner(h)));
  part.append(list);
  if (hypotheses.length > AGREE) part.append(element("p", "muted", `and ${whole(hypotheses.length - AGREE)} more`));
  return part;
}

function rowList(h, subject, turn) {
  const view = H.view[h];
  const clusters = [`${responseKind(view)}:${H.response[h]}`, ...(view === "prompt" ? [`prompt:${H.condition[h]}`] : [])];
  const part = element("section", "row-list");
  const head = element("div", "section-head");
  head.append(element("h3", "", "The rows behind it"));
  const { n_rows, n_named } = subject;
  const named = !n_named
    ? `${whole(n_rows)} rows go this way; none stands out from chance`
    : n_named < n_rows
      ? `${whole(n_named)} rows are held responsible beyond chance, of ${whole(n_rows)} that go this way`
      : `${whole(n_named)} rows are held responsible`;
  head.append(element("span", "muted", named));
  const csv = element("button", "", "row numbers, CSV");
  csv.type = "button";
  csv.addEventListener("click", async () => download(`rows-${subject.kind}-${subject.number}.csv`, "text/csv", await source.numbers(subject)));
  head.append(csv);
  head.append(element("span", "muted", source.numbersNote(subject)));
  const note = element("p", "note", "Marked: the token of a text at which a feature of the cluster is largest; the darker, the more of its features peak there. Where else they are active is not stored.");
  const list = element("div", "row-cards");
  const more = element("button", "", "more rows");
  more.type = "button";
  let shown = 0;
  async function next() {
    more.disabled = true;
    try {
      const rows = await source.rowsOf(subject, shown, ROWS);
      if (turn !== asked) return;
      list.append(...rows.map((row) => rowCard(row, clusters, { measure: subject.kind === "lesson" ? "log-odds" : "score" })));
      shown += ROWS;
    } catch (error) {
      list.append(element("p", "empty", `The rows could not be had: ${error.message}`));
    }
    const left = source.shown(subject) - shown;
    more.hidden = left <= 0;
    more.disabled = false;
    more.textContent = `${whole(Math.min(left, ROWS))} more of ${whole(source.shown(subject))}`;
    if (left <= 0 && source.shown(subject) < n_rows) list.append(element("p", "muted", `This page holds ${whole(source.shown(subject))} of ${whole(n_rows)} rows; “shapedpo view” shows all.`));
  }
  more.addEventListener("click", next);
  part.append(head, note, list, more);
  part.ready = next();
  return part;
}

function follow() {
  const [, kind, number] = location.hash.match(/^#([hl])=(\d+)$/) ?? [];
  if (kind === "h" && Number(number) < COUNT) show(Number(number));
  else if (kind === "l" && taught.has(Number(number))) show(taught.get(Number(number)).hypotheses[0], taught.get(Number(number)));
  else if (dialog.open) dialog.close();
}
addEventListener("hashchange", follow);
dialog.addEventListener("close", () => {
  asked += 1;
  if (/^#[hl]=/.test(location.hash)) history.replaceState(null, "", location.pathname + location.search);
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close(); // beside it
});
