// The page: its state (which survives a reload), search, sorting, and reloading while the run goes.
"use strict";

const REFRESH = 10_000; // milliseconds
// --- state: what the reader has chosen, kept over reloads of this tab

const stateKey = `shapedpo:${location.pathname}:${data.run.join(":")}`;
const state = { search: "", concept: "", truth: null, after: null, order: "prompt", open: {}, sort: {}, scroll: 0, live: true };
try {
  Object.assign(state, JSON.parse(sessionStorage.getItem(stateKey) ?? "{}"));
} catch {
  // Storage is off, or holds something else: begin afresh.
}
function save() {
  state.scroll = scrollY;
  state.active = document.activeElement?.id ?? "";
  try {
    sessionStorage.setItem(stateKey, JSON.stringify(state));
  } catch {
    // Storage is off: the page works, and a reload forgets.
  }
}
addEventListener("pagehide", save);

// --- the concept in focus, the same in all its selectors

let focus = Math.max(0, data.concepts.findIndex((concept) => concept.name === state.concept));
const onFocus = [];
function setFocus(index) {
  focus = index;
  state.concept = data.concepts[index]?.name ?? "";
  for (const select of all(".concept-select")) select.value = String(index);
  for (const row of all("tbody[data-concept]")) row.classList.toggle("focus", Number(row.dataset.concept) === index);
  for (const button of all(".focus-concept")) button.setAttribute("aria-pressed", String(Number(button.dataset.concept) === index));
  for (const redraw of onFocus) redraw();
}
for (const select of all(".concept-select")) {
  data.concepts.forEach((concept, index) => select.append(new Option(concept.label, String(index))));
  select.addEventListener("change", () => setFocus(Number(select.value)));
}
for (const button of all(".focus-concept")) button.addEventListener("click", () => setFocus(Number(button.dataset.concept)));

// --- sorting: each item of a table is a tbody of its own

function sortTable(table, column, direction) {
  const items = all(":scope > tbody.item", table);
  const keys = new Map(
    items.map((item) => {
      const cell = item.rows[0].cells[column];
      const value = cell.dataset.v;
      return [item, value ? Number(value) : value === "" && cell.classList.contains("num") ? null : cell.textContent.trim().toLowerCase()];
    }),
  );
  const sign = direction === "ascending" ? 1 : -1;
  items.sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (x === null || y === null) return (x === null) - (y === null); // unknown values last, either way
    return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
  });
  table.append(...items);
  for (const header of all("thead th", table)) header.removeAttribute("aria-sort");
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", direction);
  state.sort[table.dataset.table] = [column, direction];
}
for (const table of all("table[data-table]")) {
  for (const button of all("thead .sort", table)) {
    const header = button.closest("th");
    button.addEventListener("click", () => {
      const numeric = all("tbody.item", table).some((item) => item.rows[0].cells[header.cellIndex].dataset.v);
      const first = numeric ? "descending" : "ascending";
      const other = numeric ? "ascending" : "descending";
      sortTable(table, header.cellIndex, header.getAttribute("aria-sort") === first ? other : first);
    });
  }
  const sorted = Object.hasOwn(state.sort, table.dataset.table) ? state.sort[table.dataset.table] : null;
  if (sorted && table.tHead.rows[0].cells[sorted[0]]) sortTable(table, ...sorted);
}

// --- long texts

/** A button after a long text that shows all of it, or less again. */
function addMore(text) {
  const button = element("button", "more-text", "show more");
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  button.addEventListener("click", () => {
    const shown = text.classList.toggle("shown");
    button.textContent = shown ? "show less" : "show more";
    button.setAttribute("aria-expanded", String(shown));
  });
  text.append(button);
}
/** Offers to show more only where something is hidden; what is not visible now is looked at when it becomes so. */
let fitting = 0;
function fitTexts() {
  fitting ||= requestAnimationFrame(fitNow); // once, however many rows open together
}
function fitNow() {
  fitting = 0;
  const cut = all(".text.long:not(.shown)").map((text) => [text.querySelector(".data"), text.querySelector(".more-text")]);
  const hidden = cut.map(([shown]) => shown.clientHeight > 0 && shown.scrollHeight <= shown.clientHeight + 1);
  cut.forEach(([, button], index) => (button.hidden = hidden[index])); // after all are measured: one layout, not hundreds
}
document.documentElement.classList.add("js");
for (const text of all(".text.long")) addMore(text);
addEventListener("toggle", fitTexts, true); // of any details
addEventListener("resize", fitTexts);

// --- what opens and closes

function setOpen(button, open) {
  button.setAttribute("aria-expanded", String(open));
  state.open[button.dataset.keep] = open;
  if (button.classList.contains("all")) {
    button.previousElementSibling.classList.toggle("whole", open);
    button.textContent = open ? "show fewer" : `show all ${all("tbody.item", button.previousElementSibling).length}`;
  } else {
    byId(button.getAttribute("aria-controls")).hidden = !open;
    fitTexts();
  }
}
for (const button of all("button[data-keep]")) {
  button.addEventListener("click", () => setOpen(button, button.getAttribute("aria-expanded") !== "true"));
  if (Object.hasOwn(state.open, button.dataset.keep)) setOpen(button, state.open[button.dataset.keep]);
}
for (const details of all("details[data-keep]")) {
  if (Object.hasOwn(state.open, details.dataset.keep)) details.open = state.open[details.dataset.keep];
  details.querySelector("summary").addEventListener("click", () => {
    state.open[details.dataset.keep] = !details.open; // as it will be after this click
  });
}

// --- search: every word must be in the item

const texts = new WeakMap();
let words = [];
const onSearch = []; // each filters what it draws, and returns [how many match, what they are called]
function matches(text) {
  return words.every((word) => text.includes(word));
}
function textOf(item) {
  if (!texts.has(item)) texts.set(item, item.textContent.toLowerCase());
  return texts.get(item);
}
function search() {
  state.search = byId("search").value;
  words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  document.body.classList.toggle("searching", words.length > 0);
  const counts = { concepts: 0, features: 0, pairs: 0 };
  for (const item of all("tbody.item")) {
    const found = matches(textOf(item)) || (item.dataset.kind === "pairs" && words.length > 0 && matches(textOf(item.closest("details").querySelector("summary .name"))));
    item.hidden = !found;
    if (found && item.dataset.kind in counts) counts[item.dataset.kind] += 1;
  }
  for (const group of all("details.group")) {
    const some = all("tbody.item", group).some((item) => !item.hidden);
    group.hidden = !some;
    if (words.length && some) group.open = true;
    else if (!words.length) group.open = state.open[group.dataset.keep] ?? group === document.querySelector("details.group");
  }
  for (const redraw of onSearch) Object.assign(counts, redraw());
  const parts = Object.entries(counts).map(([kind, count]) => `${count} ${count === 1 ? kind.slice(0, -1) : kind}`);
  byId("found").hidden = !words.length;
  byId("found").textContent = words.length ? `Found: ${parts.join(" · ")}` : "";
  highlight();
}
/** Marks what was found, where the browser can without touching the text. */
function highlight() {
  if (!("highlights" in CSS)) return;
  CSS.highlights.delete("found");
  const ranges = [];
  if (words.length) {
    const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node && ranges.length < 1000; node = walker.nextNode()) {
      if (!node.parentElement.checkVisibility()) continue;
      const text = node.data.toLowerCase();
      if (text.length !== node.data.length) continue; // a letter whose lower case is longer: the places would be off
      for (const word of words) {
        for (let at = text.indexOf(word); at >= 0 && ranges.length < 1000; at = text.indexOf(word, at + word.length)) {
          const range = new Range();
          range.setStart(node, at);
          range.setEnd(node, at + word.length);
          ranges.push(range);
        }
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}
let searchTimer = 0;
byId("search").addEventListener("input", () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(search, 80);
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && event.target === byId("search")) {
    byId("search").value = "";
    search();
  }
});

// --- reloading while the run goes

function setLive(live) {
  state.live = live;
  byId("live").setAttribute("aria-pressed", String(live));
}
byId("live").addEventListener("click", () => setLive(!state.live));
setLive(state.live);

function tellAge() {
  if (!data.written) return;
  const seconds = Math.max(0, Date.now() / 1000 - data.written);
  const age = seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
  byId("age").textContent = data.finished
    ? new Date(data.written * 1000).toLocaleString()
    : seconds > 900 ? `no news for ${age}: the run may have stopped` : `written ${age} ago`;
}
tellAge();
setInterval(tellAge, 5_000);

if (!data.finished) {
  setInterval(() => {
    const busy = document.activeElement instanceof HTMLSelectElement || !(getSelection()?.isCollapsed ?? true);
    if (!state.live || document.hidden || busy) return;
    location.reload();
  }, REFRESH);
}

/** The last of the scripts calls this, when everything is drawn. */
function start() {
  history.scrollRestoration = "manual";
  byId("search").value = state.search;
  setFocus(focus);
  search();
  const opened = [];
  addEventListener("beforeprint", () => {
    for (const details of all("details:not([open])")) opened.push(details), (details.open = true);
  });
  addEventListener("afterprint", () => {
    for (const details of opened.splice(0)) details.open = false;
  });
  if (state.active) byId(state.active)?.focus({ preventScroll: true });
  if (state.scroll && !location.hash) scrollTo(0, state.scroll);
  document.documentElement.dataset.ready = "true"; // for whoever drives the page
}
