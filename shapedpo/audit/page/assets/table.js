// The table of all hypotheses: filters, ranking, pages, export; and the search, which also looks into the rows.
"use strict";

const PAGE = 25;
const filters = byId("filters");
const table = { found: [], page: 0, sort: "strength", up: false, only: null };
const haystack = H.view.map((_, h) => {
  const of = [conditionKind(H.view[h]) && [conditionKind(H.view[h]), H.condition[h]], [responseKind(H.view[h]), H.response[h]]];
  const texts = of.filter(Boolean).map(([kind, number]) => {
    const c = data.clusters[kind];
    return [c.title[number], c.description[number], ...c.keywords[number], ...c.features[number].map(featureName)].join(" ");
  });
  return [...texts, ...(H.label[h] ?? []), whereName(h), whatName(h)].join(" ").toLowerCase();
});

const columns = [
  ["where", null],
  ["what", null],
  ...(H.predicted ? [["predicted", "predicted"]] : []),
  ...["delta", "d", "z", "q", "strength", "n", "named"].map((name) => [STATISTICS[name][0], name]),
];
for (const [title, name] of columns) {
  const head = element("th", name ? "num" : "");
  head.scope = "col";
  head.setAttribute("role", "columnheader");
  if (!name) head.append(title);
  else {
    const button = element("button", "sort", title);
    button.type = "button";
    button.title = STATISTICS[name][1];
    button.addEventListener("click", () => {
      table.up = table.sort === name ? !table.up : name === "q";
      table.sort = name;
      filters.elements.sort.value = name;
      filter();
    });
    head.append(button);
    head.dataset.name = name;
  }
  byId("head").append(head);
}
for (const [name, [title]] of Object.entries(STATISTICS)) filters.elements.sort.append(new Option(title === name ? name : `${title} ${name === "delta" ? "(delta)" : ""}`, name));

function filter() {
  const read = (name) => filters.elements[name].value;
  const bound = (name) => (read(name) === "" ? null : Number(read(name)));
  const [view, direction, q, d, least, most] = [read("view"), bound("direction"), bound("q"), bound("d"), bound("least"), bound("most")];
  const rare = filters.elements.rare.checked;
  const words = splitWords(byId("search").value);
  const of = STATISTICS[table.sort][2];
  table.found = [];
  for (let h = 0; h < COUNT; h += 1) {
    if (table.only && !table.only.has(h)) continue;
    if (view && H.view[h] !== view) continue;
    if (direction && Math.sign(H.delta[h]) !== direction) continue;
    if (q !== null && !(H.q[h] !== null && H.q[h] <= q)) continue;
    if (d !== null && Math.abs(H.d[h]) < d) continue;
    if (least !== null && H.n_in[h] < least) continue;
    if (most !== null && H.n_in[h] > most) continue;
    if (rare && !(H.n_named[h] > 0 && H.n_named[h] < data.rare * data.n_rows)) continue;
    if (!words.every((word) => haystack[h].includes(word))) continue;
    table.found.push(h);
  }
  const key = new Map(table.found.map((h) => [h, of(h) === null ? null : table.sort === "q" ? of(h) : Math.abs(of(h))]));
  const sign = table.up ? 1 : -1;
  table.found.sort((a, b) => {
    const [x, y] = [key.get(a), key.get(b)];
    return x === null || y === null ? (x === null) - (y === null) : sign * (x - y) || a - b;
  });
  table.page = 0;
  drawTable();
}

/** The table of some hypotheses alone, those of a cluster; without any, of all again. */
function showOnly(hypotheses, name = "") {
  table.only = hypotheses && new Set(hypotheses);
  byId("only").hidden = !hypotheses;
  byId("only").replaceChildren("only ", element("bdi", "data", name), " ✕");
  if (hypotheses) {
    filters.reset(); // what is asked for is all of these, within chance or not
    filters.elements.q.value = "";
    filters.elements.sort.value = table.sort;
    byId("hypotheses").scrollIntoView();
  }
  filter();
}
byId("only").addEventListener("click", () => showOnly(null));

function cell(title, text, className = "num") {
  const made = element("td", className);
  made.setAttribute("role", "cell");
  made.dataset.label = title;
  made.append(text);
  return made;
}

function line(h) {
  const row = element("tr", "item");
  row.setAttribute("role", "row");
  const what = element("td", "what");
  what.setAttribute("role", "cell");
  const button = element("button", "link");
  button.type = "button";
  const title = H.label[h]?.[0];
  button.append(element("span", side(H.delta[h]), `${arrow(H.delta[h])} `), element("bdi", "data", title ?? whatName(h)));
  if (title) button.title = whatName(h);
  button.addEventListener("click", () => openHypothesis(h));
  what.append(button);
  const where = element("td", "where");
  where.setAttribute("role", "cell");
  where.append(element("span", "muted", { feature: "answers about ", prompt: "prompt says " }[H.view[h]] ?? ""), element("bdi", "data", whereName(h)));
  row.append(where, what);
  for (const [title_, name] of columns.slice(2)) row.append(cell(title_, shownStatistic(name, STATISTICS[name][2](h))));
  return row;
}

function drawTable() {
  const pages = Math.max(1, Math.ceil(table.found.length / PAGE));
  table.page = Math.min(table.page, pages - 1);
  const begin = table.page * PAGE;
  byId("body").replaceChildren(...table.found.slice(begin, begin + PAGE).map(line));
  if (!table.found.length) {
    const empty = element("td", "muted", "Nothing fits these filters.");
    empty.colSpan = columns.length;
    byId("body").append(element("tr"));
    byId("body").firstChild.append(empty);
  }
  byId("count").textContent = `${whole(table.found.length)} of ${whole(COUNT)} kept, of ${whole(Object.values(data.tested).reduce((a, b) => a + b, 0))} tested`;
  byId("page").textContent = table.found.length ? `${whole(begin + 1)} to ${whole(Math.min(begin + PAGE, table.found.length))} of ${whole(table.found.length)}` : "";
  byId("previous").disabled = table.page === 0;
  byId("next").disabled = table.page >= pages - 1;
  for (const head of all("#head th")) {
    head.removeAttribute("aria-sort");
    if (head.dataset.name === table.sort) head.setAttribute("aria-sort", table.up ? "ascending" : "descending");
  }
}
function turn(by) {
  table.page += by;
  drawTable();
  byId("hypotheses").scrollIntoView();
}
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("input", () => {
  if (filters.elements.sort.value !== table.sort) [table.sort, table.up] = [filters.elements.sort.value, filters.elements.sort.value === "q"];
  filter();
});

// --- export of what is filtered

function records() {
  return table.found.map((h) => ({
    hypothesis: h,
    ...Object.fromEntries(["view", "condition", "response", "delta", "mean_in", "mean_out", "d", "z", "p", "q", "strength", "n_in", "n_named"].map((name) => [name, H[name][h]])),
    ...(H.predicted ? { predicted: H.predicted[h]?.[0] ?? null } : {}),
    where: whereName(h),
    what: whatName(h),
    title: H.label[h]?.[0] ?? "",
  }));
}
/** A cell of CSV. What a spreadsheet would take for a formula gets an apostrophe before it: texts come from the data. */
function csvCell(value) {
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value ?? "");
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
byId("json").addEventListener("click", () => download("hypotheses.json", "application/json", JSON.stringify(records(), null, 1)));
byId("csv").addEventListener("click", () => {
  const rows = records();
  const names = Object.keys(rows[0] ?? { hypothesis: 0 });
  download("hypotheses.csv", "text/csv", `${[names, ...rows.map((row) => names.map((name) => row[name]))].map((cells) => cells.map(csvCell).join(",")).join("\n")}\n`);
});

// --- search: the labels at once, the rows a moment later

let searchTimer = 0;
let searched = 0;
async function search() {
  const text = byId("search").value.trim();
  const turn_ = ++searched;
  filter();
  byId("found").hidden = !text;
  byId("found-section").hidden = true;
  if (!text) return;
  byId("found").textContent = `${whole(table.found.length)} hypotheses; looking into the rows …`;
  let found;
  try {
    found = await source.search(text);
  } catch (error) {
    byId("found").textContent = `${whole(table.found.length)} hypotheses; the rows could not be searched: ${error.message}`;
    return;
  }
  if (turn_ !== searched) return;
  byId("found").textContent = `Found: ${whole(table.found.length)} hypotheses · ${whole(found.total)} rows`;
  byId("found-section").hidden = false;
  const of = data.served ? "" : ` among the ${whole(Object.keys(data.rows).length)} rows whose texts this page holds, of ${whole(data.n_rows)}`;
  byId("rows-note").textContent = `${whole(found.total)}${of}${found.total > found.rows.length ? `, the first ${found.rows.length}` : ""}`;
  byId("found-rows").replaceChildren(...found.rows.slice(0, 10).map((row) => rowCard(row, [], { teaches: true })));
  if (found.rows.length > 10) {
    const more = element("button", "", `show ${found.rows.length - 10} more`);
    more.type = "button";
    more.addEventListener("click", () => more.replaceWith(...found.rows.slice(10).map((row) => rowCard(row, [], { teaches: true }))));
    byId("found-rows").append(more);
  }
}
byId("search").addEventListener("input", () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(search, 120);
});
byId("search").addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  byId("search").value = "";
  search();
});
