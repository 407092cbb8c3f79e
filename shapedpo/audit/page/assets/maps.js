// The two maps of a view: its conditions, and what answers show in them. A cluster that is chosen on one colours the other.
"use strict";

const NAMED = 16; // clusters with their name on a map
const PARTNERS = 6;
const NOTES = {
  feature: "Left: rows whose two answers are about the same things, as clusters. Right: clusters of SAE features that fire together in answers. Circles near each other are about the same rows; size is the number of rows; orange is where chosen has more, blue where it has less. Choose a circle: the other map shows its partners.",
  prompt: "Left: clusters of features that prompts show. Right: clusters of features by which answers differ. Circles near each other are about the same rows; size is the number of rows; orange is where chosen has more, blue where it has less. Choose a circle: the other map shows its partners.",
};
const mapState = { view: "feature", condition: null, response: null };

const svgElement = (tag, attributes) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};

const byView = H.view.reduce((found, view, h) => ((found[view] ??= []).push(h), found), {});
const ofView = (view) => byView[view] ?? [];

/** By number, which way each cluster of a map leans, and the hypothesis that says so. */
function leans(role) {
  const other = role === "condition" ? "response" : "condition";
  const found = new Map();
  for (const h of ofView(mapState.view)) {
    if (mapState[other] !== null ? H[other][h] !== mapState[other] : !significant(h)) continue;
    const known_ = found.get(H[role][h]);
    if (known_ === undefined || Math.abs(H.d[h]) > Math.abs(H.d[known_])) found.set(H[role][h], h);
  }
  return found;
}

function drawMap(role) {
  const kind = role === "condition" ? conditionKind(mapState.view) : responseKind(mapState.view);
  const box = byId(`map-${role}`);
  const of = data.clusters[kind];
  const other = role === "condition" ? "response" : "condition";
  const against = mapState[other];
  const lean = leans(role);
  const values = of.rows.map((_, number) => {
    if (lean.has(number)) return H.d[lean.get(number)];
    return role === "response" && against === null && known(of.lean[number]) ? of.lean[number] : 0;
  });
  const reach = Math.min(LARGE, Math.max(0.3, ...values.map(Math.abs)));
  const most = Math.max(1, ...of.rows);
  const [wide, tall] = box.clientWidth < 500 ? [560, 460] : [1000, 640]; // units of the drawing: text keeps its size
  const svg = svgElement("svg", { viewBox: `0 0 ${wide} ${tall}`, role: "img", class: "clusters", "aria-label": `Map: ${KINDS[kind]}` });
  const places = of.x.map((x, number) => [
    wide / 2 + x * (wide / 2 - 60),
    tall / 2 + of.y[number] * (tall / 2 - 45),
    5 + (wide / 33) * Math.sqrt(of.rows[number] / most),
  ]);
  const order = places.map((_, number) => number).sort((a, b) => of.rows[b] - of.rows[a]);
  for (const number of order) {
    const [cx, cy, r] = places[number];
    const value = values[number];
    const circle = svgElement("circle", { cx, cy, r, "data-number": number, class: value ? side(value) : "none" });
    circle.style.fillOpacity = String(value ? 0.2 + 0.65 * Math.min(1, Math.abs(value) / reach) : against === null ? 0.14 : 0.05);
    if (number === mapState[role]) circle.classList.add("selected");
    svg.append(circle);
  }
  nameSome(svg, kind, places, values, order, mapState[role], wide);
  if (box.dataset.view !== mapState.view) box.replaceChildren(mapCaption(role, kind, order));
  box.dataset.view = mapState.view;
  byId(`select-${role}`).value = mapState[role] === null ? "" : String(mapState[role]);
  box.querySelector("svg")?.remove();
  box.append(svg);
  svg.addEventListener("click", (event) => {
    const number = event.target.dataset?.number;
    choose(role, number === undefined || Number(number) === mapState[role] ? null : Number(number));
  });
  svg.addEventListener("pointermove", (event) => tip(event, kind, values));
  svg.addEventListener("pointerleave", () => (byId("tip").hidden = true));
}

/** The list of a map's clusters, the largest first: for the keyboard, and for small ones. */
function mapCaption(role, kind, order) {
  const caption = element("figcaption");
  const label = element("label", "", { data: "kinds of answer ", prompt: "what prompts say " }[kind] ?? "what answers show ");
  const select = element("select");
  select.id = `select-${role}`;
  select.append(new Option(`all ${whole(order.length)}`, ""), ...order.map((number) => new Option(clusterName(kind, number), String(number))));
  select.addEventListener("change", () => choose(role, select.value === "" ? null : Number(select.value)));
  label.append(select);
  caption.append(label);
  if (!order.length) caption.append(element("p", "empty", "There are no such clusters: the data is too small or too uniform."));
  return caption;
}

/** Names where there is room: the chosen one, then those that lean most. */
function nameSome(svg, kind, places, values, order, chosen, wide) {
  const taken = [];
  const weight = (number) => (number === chosen ? Infinity : Math.abs(values[number]) * Math.sqrt(places[number][2]));
  const ranked = [...order].sort((a, b) => weight(b) - weight(a)).filter((number) => weight(number) > 0);
  for (const number of ranked) {
    if (taken.length >= (wide * NAMED) / 1000) break;
    const name = clusterName(kind, number, 2);
    const text = name.length > 26 ? `${name.slice(0, 25)}…` : name;
    const [x, y, r] = places[number];
    const width = text.length * 11.5;
    const left = Math.min(Math.max(4, x - width / 2), wide - width - 4);
    const top = y - r - 8 < 22 ? y + r + 20 : y - r - 8;
    const box = [left, top - 20, left + width, top + 4];
    if (taken.some((b) => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3])) continue;
    taken.push(box);
    const label = svgElement("text", { x: left + width / 2, y: top, class: number === chosen ? "selected" : "" });
    label.textContent = text;
    svg.append(label);
  }
}

function tip(event, kind, values) {
  const number = event.target.dataset?.number;
  const box = byId("tip");
  box.hidden = number === undefined;
  if (box.hidden) return;
  const value = values[number];
  box.replaceChildren(element("bdi", "data name", clusterName(kind, Number(number), 6)), element("span", "muted", `${whole(data.clusters[kind].rows[number])} rows`));
  if (value) box.append(element("span", side(value), `${arrow(value)} d ${signed(value)}`));
  const wide = document.documentElement.clientWidth;
  box.style.left = `${Math.max(8, Math.min(event.clientX + 14, wide - box.offsetWidth - 12))}px`;
  box.style.top = `${event.clientY + 18}px`;
}

function choose(role, number) {
  mapState[role] = number;
  if (number !== null) mapState[role === "condition" ? "response" : "condition"] = null;
  drawMaps();
  drawCluster(role, number);
}

/** The chosen cluster: what it is, its partners, and rows that show it. */
async function drawCluster(role, number) {
  const box = byId("cluster");
  box.hidden = number === null;
  if (number === null) return;
  const kind = role === "condition" ? conditionKind(mapState.view) : responseKind(mapState.view);
  const found = ofView(mapState.view).filter((h) => H[role][h] === number);
  const overall = role === "response" && kind === "feature" ? ofView("global").filter((h) => H.response[h] === number) : [];
  const name = (h) => (role === "condition" ? whatName(h) : whereName(h));
  const lists = element("div", "partner-lists");
  for (const sign of [1, -1]) {
    const best = found.filter((h) => Math.sign(H.delta[h]) === sign).sort((a, b) => Math.abs(H.d[b]) - Math.abs(H.d[a]));
    const part = element("div");
    const title = role === "condition" ? (sign > 0 ? "chosen shows more of" : "chosen shows less of") : sign > 0 ? "chosen has more where" : "chosen has less where";
    part.append(element("h3", side(sign), `${arrow(sign)} ${title}`));
    const list = element("ul", "partners");
    list.append(...best.slice(0, PARTNERS).map((h) => partner(h, name(h))));
    part.append(best.length ? list : element("p", "muted", "nothing beyond the smallest effect"));
    if (best.length > PARTNERS) part.append(element("p", "muted", `and ${whole(best.length - PARTNERS)} more`));
    lists.append(part);
  }
  const ranked = element("button", "", `rank all ${whole(found.length + overall.length)} in the table`);
  ranked.type = "button";
  ranked.addEventListener("click", () => showOnly([...found, ...overall], clusterName(kind, number)));
  lists.append(ranked);
  const about = clusterBox(kind, number, { data: "A kind of answer", prompt: "What prompts say" }[kind] ?? "What answers show");
  if (overall.length) {
    const list = element("ul", "partners");
    list.append(...overall.map((h) => partner(h, "everywhere")));
    about.append(list);
  }
  const rows = element("div", "exemplars");
  box.replaceChildren(about, lists, rows);
  const exemplars = await source.byNumber(data.clusters[kind].exemplars[number], `${kind}:${number}`);
  if (mapState[role] !== number) return;
  rows.append(element("h3", "", kind === "prompt" ? "Prompts that show it" : "Rows that show it"));
  for (const row of exemplars) {
    const item = element("div", "exemplar");
    item.append(element("h4", "", `row ${row.row}`));
    const span = kind === "prompt" || kind === "data" ? "prompt" : "chosen";
    item.append(textBox(row[span], marksOf(row, [`${kind}:${number}`], span), row.cut?.[span]));
    rows.append(item);
  }
  if (!exemplars.length) rows.append(element("p", "muted", "This page does not hold them; “shapedpo view” does."));
}

function drawMaps() {
  byId("maps-note").textContent = NOTES[mapState.view];
  for (const button of all("[data-view]")) button.setAttribute("aria-pressed", String(button.dataset.view === mapState.view));
  drawMap("condition");
  drawMap("response");
}
for (const button of all("[data-view]")) {
  button.addEventListener("click", () => {
    Object.assign(mapState, { view: button.dataset.view, condition: null, response: null });
    drawMaps();
    drawCluster("condition", null);
  });
}
