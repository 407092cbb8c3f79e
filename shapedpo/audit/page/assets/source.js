// Where rows come from: the page itself, or the server that served it. Both give the same, and only this file knows which.
"use strict";

const H = data.hypotheses; // columns
const COUNT = H.view.length;

async function ask(path, query) {
  const answer = await fetch(`/api/${path}?${new URLSearchParams(query)}`);
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

const served = {
  /** Rows of a hypothesis, the most responsible first. */
  async rowsOf(h, start, count) {
    return (await (await ask("rows", { hypothesis: h, start, count })).json()).rows;
  },
  /** How many rows of a hypothesis can be shown. */
  shown: (h) => H.n_rows[h],
  async byNumber(numbers) {
    return numbers.length ? (await (await ask("numbers", { numbers: numbers.join(",") })).json()).rows : [];
  },
  /** Rows with all words of a text: how many there are, and the first of them. */
  async search(text) {
    return (await ask("search", { text })).json();
  },
  async teaches(row) {
    return (await (await ask("teaches", { row })).json()).hypotheses;
  },
  /** The numbers of a hypothesis' rows as CSV. */
  async numbers(h) {
    return (await ask("export", { hypothesis: h })).text();
  },
  numbersNote: () => "",
};

const embedded = {
  async rowsOf(h, start, count) {
    return data.shown[h].slice(start, start + count).map(([row, contribution]) => ({ ...data.rows[row], contribution }));
  },
  shown: (h) => data.shown[h].length,
  async byNumber(numbers) {
    return numbers.filter((row) => row in data.rows).map((row) => data.rows[row]);
  },
  async search(text) {
    const words = splitWords(text);
    const found = Object.values(data.rows).filter((row) => {
      row.lower ??= `${row.prompt}\n${row.chosen}\n${row.rejected}`.toLowerCase();
      return words.every((word) => row.lower.includes(word));
    });
    return { total: found.length, rows: found.slice(0, 50) };
  },
  async teaches(row) {
    return data.numbers.flatMap((rows, h) => (rows.slice(0, H.n_named[h]).includes(row) ? [h] : []));
  },
  async numbers(h) {
    return `row,named\n${data.numbers[h].map((row, place) => `${row},${Number(place < H.n_named[h])}\n`).join("")}`;
  },
  numbersNote: (h) => (data.numbers[h].length < H.n_rows[h] ? `the first ${whole(data.numbers[h].length)} of ${whole(H.n_rows[h])}; the server that “shapedpo view” starts has all` : ""),
};

const source = data.served ? served : embedded;
const splitWords = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);

/** Offers a text as a file. */
function download(name, type, text) {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
