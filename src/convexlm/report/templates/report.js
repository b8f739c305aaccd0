"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const controls = ["arm", "base", "search", "seed", "corpus", "sort", "marks", "filter", "differ"];
  const at = Object.fromEntries(controls.map((id) => [id, byId(id)]));
  const list = byId("list"), count = byId("count"), more = byId("more");
  const STEP = 20, LONGEST = 600;
  // The same characters as `text.UNSEEN`: what shows nothing, or would reorder the text around it.
  const UNSEEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
  // Words, single Chinese or Japanese characters, blanks, other signs one by one.
  const TOKEN = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]|[\p{L}\p{M}\p{N}_]+?(?=[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}])|[\p{L}\p{M}\p{N}_]+|\s+|[^]/gu;

  const node = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const appendText = (parent, text) => {
    let end = 0;
    for (const match of text.matchAll(UNSEEN)) {
      if (match.index > end) parent.append(text.slice(end, match.index));
      const code = match[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
      parent.append(node("span", "unseen", "U+" + code));
      end = match.index + match[0].length;
    }
    if (end < text.length) parent.append(text.slice(end));
  };

  const option = (select, value, text) => {
    const made = node("option", "", text === undefined ? String(value) : text);
    made.value = String(value);
    select.append(made);
  };

  const items = data.items.map(([corpus, id, source, references, texts, cells, scores, cut], index) => ({
    corpus, id, source, references, texts, cells, scores, cut, index,
    haystack: [source, ...references, ...texts].join("\n").toLowerCase(),
  }));
  const hasScores = items.some((item) => item.scores !== null);
  const hasReferences = items.some((item) => item.references.length > 0);

  const cellOf = (arm) =>
    (Number(arm) * data.searches.length + Number(at.search.value)) * data.seeds.length + Number(at.seed.value);
  const textOf = (item, arm) => {
    const index = item.cells[cellOf(arm)];
    return index === undefined || index < 0 ? null : item.texts[index];
  };
  const scoreOf = (item, arm) => {
    const index = item.cells[cellOf(arm)];
    return item.scores === null || index === undefined || index < 0 ? null : item.scores[index];
  };
  const gainOf = (item) => {
    const mine = scoreOf(item, at.arm.value), theirs = scoreOf(item, at.base.value);
    return mine === null || theirs === null ? null : mine - theirs;
  };

  // Which tokens of `theirs` are not in a longest common subsequence with `base`, and where `base` has more.
  const difference = (base, theirs) => {
    const n = base.length, m = theirs.length;
    const fresh = new Uint8Array(m), gone = new Uint8Array(m + 1);
    let start = 0, end = 0;
    while (start < n && start < m && base[start] === theirs[start]) start++;
    while (end < n - start && end < m - start && base[n - 1 - end] === theirs[m - 1 - end]) end++;
    const a = n - start - end, b = m - start - end;
    if (a > LONGEST || b > LONGEST) {
      fresh.fill(1, start, m - end);
      return { fresh, gone };
    }
    const width = b + 1, table = new Uint16Array((a + 1) * width);
    for (let i = a - 1; i >= 0; i--)
      for (let j = b - 1; j >= 0; j--)
        table[i * width + j] = base[start + i] === theirs[start + j]
          ? table[(i + 1) * width + j + 1] + 1
          : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    let i = 0, j = 0;
    while (i < a || j < b) {
      if (i < a && j < b && base[start + i] === theirs[start + j]) { i++; j++; }
      else if (j < b && (i >= a || table[i * width + j + 1] >= table[(i + 1) * width + j])) fresh[start + j++] = 1;
      else { if (base[start + i].trim()) gone[start + j] = 1; i++; }
    }
    return { fresh, gone };
  };

  const appendMarked = (parent, text, against) => {
    const words = text.match(TOKEN) || [];
    const { fresh, gone } = difference(against.match(TOKEN) || [], words);
    let index = 0;
    while (index < words.length) {
      const marked = fresh[index] === 1;
      if (gone[index] && !marked && !(index && fresh[index - 1])) parent.append(node("span", "gone"));
      let run = words[index++];
      while (index < words.length && (fresh[index] === 1) === marked && (marked || !gone[index])) run += words[index++];
      if (marked && run.trim()) {
        const mark = node("mark");
        appendText(mark, run);
        parent.append(mark);
      } else appendText(parent, run);
    }
    if (gone[words.length] && !(words.length && fresh[words.length - 1])) parent.append(node("span", "gone"));
  };

  const row = (name, nameClass, fill, textClass, value, lang) => {
    const line = node("div", "line-of"), text = node("dd", "text " + textClass);
    text.dir = "auto";
    if (lang) text.lang = lang;
    fill(text);
    line.append(node("dt", nameClass, name), text, node("dd", "value", value === null ? "" : value.toFixed(1)));
    return line;
  };

  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(1);

  const card = (item) => {
    const entry = node("li"), head = node("div", "head"), lines = node("dl");
    entry.tabIndex = -1;
    const pair = (data.corpora[item.corpus].split(" ")[1] || "").split("-");
    head.append(node("span", "", data.corpora[item.corpus]), node("span", "", "sentence " + item.id));
    const gain = gainOf(item);
    if (gain !== null && at.arm.value !== at.base.value) {
      const said = node("span", "", "chrF of " + data.arms[at.arm.value] + " against " + data.arms[at.base.value] + " ");
      said.append(node("b", "", signed(gain)));
      head.append(said);
    }
    lines.append(row("source", "", (dd) => appendText(dd, item.source), "source", null, pair[0]));
    for (const reference of item.references)
      lines.append(row("reference", "", (dd) => appendText(dd, reference), "reference", null, pair[1]));
    const base = at.marks.value === "reference" ? item.references[0] : textOf(item, at.base.value);
    data.arms.forEach((arm, index) => {
      const text = textOf(item, index);
      const fill = (dd) => {
        if (text === null) dd.append(node("span", "empty", "not in the run folder"));
        else if (text === "") dd.append(node("span", "empty", "empty"));
        else if (base === undefined || base === null || at.marks.value === "none") appendText(dd, text);
        else appendMarked(dd, text, base);
        if (item.cut.includes(cellOf(index))) dd.append(node("span", "cut", " (ran into the length limit)"));
      };
      lines.append(row(arm, "arm " + data.styles[index], fill, "hypothesis", scoreOf(item, index), pair[1]));
    });
    entry.append(head, lines);
    return entry;
  };

  const ORDERS = {
    gain: ["largest gain", (a, b) => b.gain - a.gain],
    loss: ["largest loss", (a, b) => a.gain - b.gain],
    low: ["lowest score", (a, b) => a.score - b.score],
    order: ["as in the file", () => 0],
  };

  let found = [], shown = 0;
  const showMore = (limit) => {
    const part = document.createDocumentFragment();
    for (const end = Math.min(found.length, shown + limit); shown < end; shown++) part.append(card(found[shown].item));
    list.append(part);
    more.hidden = shown >= found.length;
    const all = items.length.toLocaleString("en-US");
    count.textContent = found.length === 0
      ? "No sentence of " + all + " fits."
      : shown.toLocaleString("en-US") + " shown of " + found.length.toLocaleString("en-US") + " that fit, " + all + " on this page.";
  };

  const update = () => {
    const wanted = at.filter.value.toLowerCase();
    found = [];
    for (const item of items) {
      if (at.corpus.value !== "" && item.corpus !== Number(at.corpus.value)) continue;
      if (wanted && !item.haystack.includes(wanted)) continue;
      if (at.differ.checked && textOf(item, at.arm.value) === textOf(item, at.base.value)) continue;
      const gain = gainOf(item), score = scoreOf(item, at.arm.value);
      found.push({ item, gain: gain === null ? 0 : gain, score: score === null ? 101 : score });
    }
    const compare = ORDERS[at.sort.value][1];
    found.sort((a, b) => compare(a, b) || a.item.index - b.item.index);
    list.replaceChildren();
    shown = 0;
    showMore(STEP);
  };

  data.arms.forEach((arm, index) => { option(at.arm, index, arm); option(at.base, index, arm); });
  at.arm.value = String(data.arms.length - 1);
  at.base.value = "0";
  data.searches.forEach((search, index) => option(at.search, index, search));
  data.seeds.forEach((seed, index) => option(at.seed, index, seed));
  byId("seed-label").hidden = data.seeds.length < 2;
  data.corpora.forEach((corpus, index) => option(at.corpus, index, corpus));
  for (const [name, [text]] of Object.entries(ORDERS)) if (hasScores || name === "order") option(at.sort, name, text);
  option(at.marks, "base", "the one compared with");
  if (hasReferences) option(at.marks, "reference", "the reference");
  option(at.marks, "none", "nothing");

  for (const id of controls) at[id].addEventListener(id === "filter" ? "input" : "change", update);
  more.addEventListener("click", () => {
    const first = shown;
    showMore(5 * STEP);
    if (list.children[first]) list.children[first].focus();
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && event.target === at.filter) { at.filter.value = ""; update(); return; }
    if (event.target.closest && event.target.closest("input, select, textarea")) return;
    if (event.key === "/") { event.preventDefault(); at.filter.focus(); return; }
    if (event.key !== "j" && event.key !== "k") return;
    const current = document.activeElement && document.activeElement.closest("#list > li");
    let next = event.key === "j" ? list.firstElementChild : null;
    if (current) next = event.key === "j" ? current.nextElementSibling : current.previousElementSibling;
    if (!next && event.key === "j" && !more.hidden) { more.click(); return; }
    if (next) { event.preventDefault(); next.focus(); next.scrollIntoView({ block: "nearest" }); }
  });
  byId("controls").hidden = false;
  update();
})();
