"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  const PRESETS = {
    "four answers: .4 .3 .2 .1": [0.4, 0.3, 0.2, 0.1],
    "two, nearly even: .52 .48": [0.52, 0.48],
    "one good, many rare": [0.5, 0.1, 0.1, 0.1, 0.1, 0.1],
    "long tail": [0.36, 0.22, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02],
    "a clear answer and noise: .9 .05 .05": [0.9, 0.05, 0.05],
    "all alike": [0.25, 0.25, 0.25, 0.25],
  };
  // What k may be, by objective, and its value when that is chosen.
  const RANGES = { convex: { low: 0.01, high: 100, first: 5 }, power: { low: 0.05, high: 1, first: 0.5 } };
  const MOST = LETTERS.length;
  const state = JSON.parse($("state").textContent);

  const kind = () => (state.choice === "token" ? "convex" : state.choice);
  const settings = () => ({
    objective: kind(), k: state.k, mleMix: state.mix, lengthWeighting: state.weighting,
    level: state.choice === "token" ? "token" : "sequence",
  });
  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
  const show = (x) => (x > 0 && x < 0.0005 ? "<.001" : x.toFixed(3));
  const text = (parent, tag, content, name) => {
    const element = parent.appendChild(document.createElement(tag));
    if (content !== undefined) element.textContent = content;
    if (name) element.className = name;
    return element;
  };

  // One probability is set and the others share the rest in the proportions they have.
  function setProbability(i, wanted) {
    $("preset").value = "";
    const d = state.d, p = d.length === 1 ? 1 : clamp(wanted, 0, 1), others = 1 - d[i];
    state.d = d.map((x, j) => (j === i ? p : others > 1e-12 ? x / others * (1 - p) : (1 - p) / (d.length - 1)));
  }

  function resize(count) {
    $("preset").value = "";
    const d = state.d.slice(0, count), T = state.T.slice(0, count);
    while (d.length < count) { d.push(1 / count); T.push(state.T[0]); }
    const total = d.reduce((a, b) => a + b, 0);
    state.d = total > 0 ? d.map((x) => x / total) : d.map(() => 1 / count);
    state.T = T;
  }

  function buildBars() {
    const box = $("bars");
    box.replaceChildren();
    state.d.forEach((_, i) => {
      const answer = text(box, "div", undefined, "answer");
      const pair = text(answer, "div", undefined, "pair");
      const data = text(pair, "div", undefined, "track data");
      Object.entries({ role: "slider", tabindex: "0", "aria-label": `data probability of answer ${LETTERS[i]}`,
        "aria-orientation": "vertical", "aria-valuemin": "0", "aria-valuemax": "1" })
        .forEach(([name, value]) => data.setAttribute(name, value));
      const best = text(pair, "div", undefined, "track best");
      for (const track of [data, best]) { text(track, "div", undefined, "fill"); text(track, "span", "", "figure"); }
      text(answer, "div", LETTERS[i], "name");
      const length = text(answer, "input");
      Object.assign(length, { type: "number", min: 1, max: 10000, step: "any" });
      length.setAttribute("aria-label", `tokens of answer ${LETTERS[i]}`);
      length.addEventListener("input", () => {
        if (length.value > 0 && length.value <= 10000) { state.T[i] = Number(length.value); update(); }
      });
      length.addEventListener("change", update);
      data.addEventListener("pointerdown", (event) => {
        data.setPointerCapture(event.pointerId);
        data.focus();
        drag(event);
        event.preventDefault();
      });
      const drag = (event) => {
        if (!data.hasPointerCapture(event.pointerId)) return;
        const box = data.getBoundingClientRect();
        setProbability(i, Math.round((box.bottom - event.clientY) / box.height * 1000) / 1000);
        update();
      };
      data.addEventListener("pointermove", drag);
      data.addEventListener("keydown", (event) => {
        const p = state.d[i];
        const wanted = { ArrowUp: p + 0.01, ArrowRight: p + 0.01, ArrowDown: p - 0.01, ArrowLeft: p - 0.01,
          PageUp: p + 0.1, PageDown: p - 0.1, Home: 0, End: 1 }[event.key];
        if (wanted === undefined) return;
        event.preventDefault();
        setProbability(i, wanted);
        update();
      });
    });
  }

  function paintTrack(track, p) {
    const [fill, figure] = track.children;
    fill.style.height = `${100 * p}%`;
    figure.textContent = show(p);
    figure.style.bottom = `calc(${100 * p}% + ${p > 0.93 ? -22 : 2}px)`;
    figure.style.color = p > 0.93 ? "var(--paper)" : "";
  }

  function sentence(result, equal) {
    const T = equal ? (state.choice === "token" ? 1 : state.T[0]) : null, percent = (x) => `${(100 * x).toFixed(1)} %`;
    const top = result.probabilities.indexOf(Math.max(...result.probabilities));
    if (result.method === "closed form" && result.temperature === 1) {
      return state.weighting === "sequence" && !equal
        ? "Maximum likelihood, with sequences weighed alike: the optimum is the data divided by the lengths."
        : "Maximum likelihood: the optimum is the data itself.";
    }
    if (result.temperature !== null && result.temperature > 0) {
      const exponent = 1 / result.temperature;
      return `The data at temperature ${Number(result.temperature.toPrecision(4))}: p is proportional to d to the power of `
        + `${exponent > 1e6 ? exponent.toExponential(2) : Number(exponent.toPrecision(4))}.`
        + (exponent < 1.05 ? " Nobody would notice the difference to maximum likelihood." : "");
    }
    if (kind() === "convex" && state.mix === 0 && T !== null && state.k >= T) {
      const tied = result.probabilities.filter((p) => p === result.probabilities[top]).length > 1;
      return `k is ${state.k > T ? "above" : "equal to"} T = ${T}: ` + (tied
        ? "the likeliest answers tie, and any split between them is an optimum."
        : `everything on ${LETTERS[top]}.`
          + (state.k > T ? " Each single answer is a local optimum here, so training may end at a wrong one." : ""));
    }
    return `The largest share, ${percent(result.probabilities[top])}, goes to ${LETTERS[top]}.`
      + (result.concave ? "" : " The problem is not concave: this is the best optimum, and training may end at another.");
  }

  function drawCurve(result) {
    const svg = $("curve"), width = Math.max(260, svg.clientWidth || 600), height = 280;
    const left = 34, right = 10, top = 16, bottom = 34;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    const put = (tag, attributes, content) => {
      const element = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", tag));
      Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
      if (content !== undefined) element.textContent = content;
    };
    const s = settings(), tallest = kind() === "power" ? 4 : 1.1;
    const x = (p) => left + p * (width - left - right), y = (w) => height - bottom - w / tallest * (height - top - bottom);
    const weight = (p) => (p === 0 ? (kind() === "mle" ? 1 : s.mleMix) : ConvexTheory.weight(s, Math.log(p)));
    for (const w of kind() === "power" ? [0, 1, 2, 3, 4] : [0, 0.25, 0.5, 0.75, 1]) {
      put("line", { class: "grid", x1: left, x2: width - right, y1: y(w), y2: y(w) });
      put("text", { x: left - 6, y: y(w) + 4, "text-anchor": "end" }, w);
    }
    for (const p of [0, 0.25, 0.5, 0.75, 1]) put("text", { x: x(p), y: height - 16, "text-anchor": "middle" }, p);
    put("text", { x: (left + width) / 2, y: height - 1, "text-anchor": "middle" }, s.level === "token" ? "p" : "p̄");
    put("text", { x: left, y: 10 }, "weight (dashed: maximum likelihood)");
    put("line", { class: "axis", x1: left, x2: width - right, y1: y(0), y2: y(0) });
    put("line", { class: "one", x1: left, x2: width - right, y1: y(1), y2: y(1) });
    const points = [];
    for (let i = 0; i <= 400; i++) {
      // Dense towards both ends, where the curves bend.
      const p = (1 - Math.cos(Math.PI * i / 400)) / 2, w = weight(p);
      if (w <= tallest) points.push(`${x(p).toFixed(2)},${y(w).toFixed(2)}`);
    }
    put("polyline", { class: "line", points: points.join(" ") });
    let before = -Infinity, level = 0;
    state.d.map((d, i) => [d > 0 ? Math.exp(Math.log(d) / (s.level === "token" ? 1 : state.T[i])) : 0, i])
      .sort((a, b) => a[0] - b[0]).forEach(([p, i]) => {
        const w = Math.min(weight(p), tallest);
        // Letters that would cover each other go up in steps.
        level = x(p) - before < 12 ? level + 1 : 0;
        before = x(p);
        put("circle", { class: "mark", cx: x(p), cy: y(w), r: 4.5 });
        put("text", { class: "letter", x: x(p), y: y(w) + 19 + 13 * level, "text-anchor": "middle" }, LETTERS[i]);
      });
    const described = result.probabilities.map((_, i) => `${LETTERS[i]} ${show(weightAtData(i))}`).join(", ");
    svg.setAttribute("aria-label", `Weights where the model equals the data: ${described}`);
  }

  function weightAtData(i) {
    const s = settings();
    if (kind() === "mle") return 1;
    if (state.d[i] === 0) return s.mleMix;
    return ConvexTheory.weight(s, Math.log(state.d[i]) / (s.level === "token" ? 1 : state.T[i]));
  }

  // Slider positions: T from 1 to 1000 on a logarithmic scale, k of `convex` from 0.01 to 100 likewise.
  const tokensAt = (position) => Math.round(10 ** (position / 400 * 3));
  const kAt = (position) => (kind() === "power" ? position : Number((10 ** position).toPrecision(3)));

  function paintControls(equal) {
    const active = document.activeElement;
    const set = (id, value) => { if ($(id) !== active || active.type === "range") $(id).value = value; };
    document.querySelectorAll("input[name=objective]").forEach((radio) => { radio.checked = radio.value === state.choice; });
    const hasK = kind() !== "mle", range = RANGES[kind()];
    $("k").closest(".slider").hidden = $("mix").closest(".slider").hidden = !hasK;
    if (hasK) {
      const power = kind() === "power";
      Object.assign($("k"), power ? { min: range.low, max: range.high, step: 0.01 } : { min: -2, max: 2, step: 0.01 });
      Object.assign($("k-number"), { min: power ? range.low : 0.000001, max: power ? 1 : 10000, step: "any" });
      $("k").value = power ? state.k : Math.log10(state.k);
      $("k").setAttribute("aria-valuetext", `k = ${state.k}`);
      set("k-number", state.k);
    }
    $("T").value = 400 * Math.log10(state.T[0]) / 3;
    $("T").setAttribute("aria-valuetext", equal ? `${state.T[0]} tokens` : "lengths differ");
    if (equal) set("T-number", state.T[0]);
    else if ($("T-number") !== active) $("T-number").value = "";
    $("mix").value = state.mix;
    set("mix-number", state.mix);
    $("weighting").value = state.weighting;
    $("weighting-label").hidden = equal;
    $("add").disabled = state.d.length >= MOST;
    $("remove").disabled = state.d.length <= 1;
    document.querySelectorAll(".answer input").forEach((input, i) => { if (input !== active) input.value = state.T[i]; });
  }

  function update() {
    if ($("bars").children.length !== state.d.length) buildBars();
    const equal = state.T.every((T) => T === state.T[0]);
    paintControls(equal);
    const result = ConvexTheory.optimum(state.d, state.T, settings());
    [...$("bars").children].forEach((answer, i) => {
      const [data, best] = answer.querySelectorAll(".track");
      paintTrack(data, state.d[i]);
      paintTrack(best, result.probabilities[i]);
      data.setAttribute("aria-valuenow", state.d[i].toFixed(3));
      data.setAttribute("aria-valuetext", `${show(state.d[i])}, optimum ${show(result.probabilities[i])}`);
    });
    $("said").textContent = sentence(result, equal);
    $("entropy-data").textContent = `${ConvexTheory.entropy(state.d).toFixed(3)} nats`;
    $("entropy-best").textContent = `${result.entropy.toFixed(3)} nats`;
    $("temperature").textContent = result.temperature === null ? "none applies" : Number(result.temperature.toPrecision(4));
    $("mode").textContent = show(result.modeMass);
    $("method").textContent = result.method;
    $("numbers").replaceChildren();
    state.d.forEach((d, i) => {
      const row = text($("numbers"), "tr");
      text(row, "th", LETTERS[i]).scope = "row";
      [state.T[i], d, result.probabilities[i], weightAtData(i)].forEach((value) => text(row, "td", Number(value.toPrecision(6))));
    });
    drawCurve(result);
    state.result = result;
    remember();
  }

  let timer = 0;
  function remember() {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const parts = { objective: state.choice, k: state.k, mix: state.mix, weighting: state.weighting,
        T: state.T.join(","), d: state.d.map((x) => Number(x.toPrecision(8))).join(",") };
      try { history.replaceState(null, "", `#${new URLSearchParams(parts)}`); } catch { /* not allowed in some frames */ }
    }, 200);
  }

  // Settings from the address; anything that is not sound there is passed over.
  function recall() {
    const given = new URLSearchParams(location.hash.slice(1));
    const numbers = (name) => (given.get(name) || "").split(",").filter(Boolean).map(Number);
    const d = numbers("d"), T = numbers("T"), total = d.reduce((a, b) => a + b, 0);
    const sound = d.length > 0 && d.length <= MOST && d.every((x) => x >= 0 && x <= 1) && Math.abs(total - 1) < 1e-4;
    const lengths = T.every((x) => x > 0 && x <= 10000) && (T.length === 1 || T.length === (sound ? d : state.d).length);
    if (sound) { state.d = d.map((x) => x / total); state.T = d.map(() => state.T[0]); }
    if (lengths) state.T = state.d.map((_, i) => T[T.length === 1 ? 0 : i]);
    if (["mle", "convex", "power", "token"].includes(given.get("objective"))) state.choice = given.get("objective");
    if (["token", "sequence"].includes(given.get("weighting"))) state.weighting = given.get("weighting");
    const k = Number(given.get("k")), mix = Number(given.get("mix"));
    if (k > 0 && k <= 10000) state.k = k;
    if (kind() === "power" && !(state.k >= 0.01 && state.k <= 1)) state.k = RANGES.power.first;
    if (given.get("mix") !== null && mix >= 0 && mix <= 1) state.mix = mix;
  }

  function listen() {
    Object.keys(PRESETS).forEach((name) => { text($("preset"), "option", name).value = name; });
    const own = text($("preset"), "option", "as drawn");
    own.value = "";
    $("preset").value = "";
    $("preset").addEventListener("change", () => {
      const d = PRESETS[$("preset").value];
      if (!d) return;
      state.d = [...d];
      state.T = d.map(() => state.T[0]);
      update();
    });
    document.querySelectorAll("input[name=objective]").forEach((radio) => radio.addEventListener("change", () => {
      const before = kind();
      state.choice = radio.value;
      if (kind() !== "mle" && (kind() !== before || radio.value === "token")) {
        state.k = radio.value === "token" ? 0.5 : RANGES[kind()].first;
      }
      update();
    }));
    $("k").addEventListener("input", () => { state.k = kAt(Number($("k").value)); update(); });
    $("T").addEventListener("input", () => { const T = tokensAt(Number($("T").value)); state.T = state.T.map(() => T); update(); });
    $("mix").addEventListener("input", () => { state.mix = Number($("mix").value); update(); });
    const typed = (id, take) => {
      $(id).addEventListener("input", () => { if ($(id).value !== "" && $(id).validity.valid) { take(Number($(id).value)); update(); } });
      $(id).addEventListener("blur", () => setTimeout(update));
    };
    typed("k-number", (value) => { state.k = value; });
    typed("T-number", (value) => { state.T = state.T.map(() => value); });
    typed("mix-number", (value) => { state.mix = value; });
    $("weighting").addEventListener("change", () => { state.weighting = $("weighting").value; update(); });
    $("add").addEventListener("click", () => { resize(state.d.length + 1); update(); });
    $("remove").addEventListener("click", () => { resize(state.d.length - 1); update(); });
    addEventListener("hashchange", () => { recall(); update(); });
    addEventListener("resize", () => drawCurve(state.result));
  }

  recall();
  listen();
  update();
})();
