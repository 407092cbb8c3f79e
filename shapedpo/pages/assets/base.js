// What every page needs: its data, elements that take text as text, numbers, colours, and "/" for the search box.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

/** An element of this class holding this text. Text goes in as text, whatever is in it. */
function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  return made;
}
const fixed = (value, digits = 2) => value.toFixed(digits).replace("-", "−"); // a true minus sign
const known = (value) => value !== null && value !== undefined;

// --- colours

const themes = { system: "◐", light: "☀", dark: "☾" };
function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = themes[theme];
  byId("theme").setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
  byId("theme").title = byId("theme").getAttribute("aria-label");
}
let theme = "system";
try {
  theme = localStorage.getItem("shapedpo:theme") ?? "system";
} catch {
  // Storage is off.
}
if (!(theme in themes)) theme = "system";
setTheme(theme);
byId("theme").addEventListener("click", () => {
  const names = Object.keys(themes);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  setTheme(theme);
  try {
    localStorage.setItem("shapedpo:theme", theme);
  } catch {
    // Storage is off.
  }
});

addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    byId("search").focus();
  }
});
