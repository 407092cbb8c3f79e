// Where rows come from: the page itself, or the server that served it. Both give the same, and only this file knows which.
"use strict";

const H = data.hypotheses; // columns
const COUNT = H.view.length;

async function ask(path, query) {
  const answer = await fetch(`/api/${path}?${new URLSearchParams(query)}`);
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

// A subject is what rows are behind: `{ kind, number }`, kind "hypothesis" or "lesson".
const served = {
  /** Rows of a subject, the most responsible first. */
  async rowsOf(subject, start, count) {
    return (await (await ask("rows", { [subject.kind]: subject.number, start, count })).json()).rows;
  },
  /** How many rows of a subject can be shown. */
  shown: (subject) => subject.n_rows,
  async byNumber(numbers, cluster) {
    return numbers.length ? (await (await ask("numbers", { numbers: numbers.join(","), cluster })).json()).rows : [];
  },
  /** Rows with all words of a text: how many there are, and the first of them. */
  async search(text) {
    return (await ask("search", { text })).json();
  },
  /** The hypotheses that hold a row responsible. */
  async teaches(row) {
    return (await (await ask("teaches", { row })).json()).hypotheses;
  },
  /** The numbers of a subject's rows as CSV. */
  async numbers(subject) {
    return (await ask("export", { [subject.kind]: subject.number })).text();
  },
  numbersNote: () => "",
};

const embedded = {
  async rowsOf({ kind, number }, start, count) {
    return data.shown[kind][number].slice(start, start + count).map(([row, value]) => ({ ...data.rows[row], value }));
  },
  shown: ({ kind, number }) => data.shown[kind][number].length,
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
    return data.numbers.hypothesis.flatMap((rows, h) => (rows.slice(0, H.n_named[h]).includes(row) ? [h] : []));
  },
  async numbers({ kind, number, n_named }) {
    return `row,named\n${data.numbers[kind][number].map((row, place) => `${row},${Number(place < n_named)}\n`).join("")}`;
  },
  numbersNote({ kind, number, n_rows }) {
    const held = data.numbers[kind][number].length;
    return held < n_rows ? `the first ${whole(held)} of ${whole(n_rows)}; “shapedpo view” has all` : "";
  },
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
