"use strict";
// The optimum of an objective over distributions, computed as convexlm.theory computes it. No DOM here: the same block
// runs in node. Candidates have data probabilities d_i and lengths T_i; a model that gives one the probability p gives
// it the mean log-probability m = log(p) / T. Settings: {objective: "mle" | "convex" | "power", k, level,
// lengthWeighting: "token" | "sequence", mleMix}.
const ConvexTheory = (() => {
  const DEEP = -1e6, LOWEST = -700;
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
  const logAdd = (a, b) => Math.max(a, b) + (a === b ? Math.LN2 : Math.log1p(Math.exp(-Math.abs(a - b))));
  const isLikelihood = (s) => s.objective === "mle" || s.mleMix === 1 || (s.objective === "power" && s.k === 1);
  const isPureConvex = (s) => s.objective === "convex" && s.mleMix === 0;

  function logWeight(s, m) {
    if (isLikelihood(s)) return 0;
    const plain = s.objective === "convex" ? s.k * m : (s.k - 1) * Math.log(-m);
    return s.mleMix === 0 ? plain : logAdd(Math.log1p(-s.mleMix) + plain, Math.log(s.mleMix));
  }

  function value(s, m) {
    if (isLikelihood(s)) return -m;
    const plain = s.objective === "convex" ? -Math.expm1(s.k * m) / s.k : (-m) ** s.k / s.k;
    return s.mleMix === 0 ? plain : (1 - s.mleMix) * plain - s.mleMix * m;
  }

  const weight = (s, m) => Math.exp(logWeight(s, m));

  // log of the derivative in p_i of what is maximised, where log p_i = l.
  const logSlope = (s, l, logA, length) => logA + logWeight(s, l / length) - l;

  // The root of a function that goes from positive at low to negative at high.
  function bisect(positive, low, high, times = 200) {
    for (let i = 0; i < times; i++) {
      const middle = (low + high) / 2;
      if (middle === low || middle === high) break;
      if (positive(middle)) low = middle; else high = middle;
    }
    return [low, high];
  }

  // The log-probability up to which the slope falls as p grows: 0 everywhere, -Infinity nowhere.
  function lowerBranchEnd(s, length) {
    const a = s.mleMix;
    if (isLikelihood(s)) return 0;
    if (s.objective === "convex") {
      const rate = s.k / length;
      if (rate <= 1) return 0;
      return a === 0 ? -Infinity : Math.min(0, (Math.log(a) - Math.log1p(-a) - Math.log(rate - 1)) / rate);
    }
    if (a === 0) return s.k - 1;
    const share = (u) => 1 / (1 + a / (1 - a) * (u / length) ** (1 - s.k));
    return -bisect((u) => u < (1 - s.k) * share(u), 0, 1 - s.k)[0];
  }

  // log p of a candidate whose slope, on the lower branch, has this logarithm.
  function lowerBranch(s, target, logA, length, end) {
    if (isPureConvex(s)) {
      if (length < s.k) return -Infinity;
      if (length === s.k) return logA >= target ? 0 : -Infinity;
      return Math.min(0, (logA - target) * (length / (length - s.k)));
    }
    if (end === -Infinity) return -Infinity;
    if (logSlope(s, end, logA, length) >= target) return end;
    return bisect((l) => logSlope(s, l, logA, length) > target, DEEP, end, 100)[1];
  }

  function total(s, logP, logA, lengths) {
    return -sum(logP.map((l, i) => Math.exp(logA[i]) * lengths[i] * value(s, l / lengths[i])));
  }

  function commonSlope(s, logA, lengths, ends) {
    const reached = ends.map((end, i) => i).filter((i) => ends[i] > -Infinity);
    if (!reached.length) return [];
    const at = (target) => ends.map((end, i) => lowerBranch(s, target, logA[i], lengths[i], end));
    const mass = (target) => sum(at(target).map(Math.exp));
    const even = -Math.log(ends.length);
    const first = Math.min(...reached.map((i) => logSlope(s, ends[i], logA[i], lengths[i])));
    const last = Math.max(...reached.map((i) => logSlope(s, Math.min(ends[i], even), logA[i], lengths[i])));
    if (mass(first) < 1) return [];
    const [low, high] = bisect((target) => mass(target) >= 1, first, last + 1e-9);
    const more = at(low), less = at(high);
    const excess = sum(more.map(Math.exp)) - 1, gap = 1 - sum(less.map(Math.exp));
    if (excess + gap === 0) return [less];
    const share = gap / (excess + gap);
    return [less.map((l, i) => {
      const p = Math.exp(l), q = Math.exp(more[i]);
      return p === q ? l : Math.log(p + share * (q - p));
    })];
  }

  function scan(s, logA, lengths, ends, j) {
    const place = (logit) => {
      const l = -softplus(-logit), target = logSlope(s, l, logA[j], lengths[j]);
      return ends.map((end, i) => (i === j ? l : lowerBranch(s, target, logA[i], lengths[i], end)));
    };
    const excess = (logit) => {
      const logP = place(logit);
      return sum(logP.map((l, i) => (i === j ? 0 : Math.exp(l)))) + Math.expm1(logP[j]);
    };
    const start = ends[j] > LOWEST ? ends[j] - Math.log(-Math.expm1(ends[j])) : LOWEST;
    const grid = [start];
    for (let x = LOWEST; x < -20; x += 5) grid.push(x);
    for (let i = 0; i <= 310; i++) grid.push(-20 + i / 5);
    for (let x = 44; x <= 700; x += 4) grid.push(x);
    const points = grid.filter((x, i) => i === 0 || x > start);
    const values = points.map(excess);
    const found = [ends.map((end, i) => (i === j ? 0 : -Infinity))];
    for (let i = 0; i + 1 < points.length; i++) {
      if (values[i] > 0 === values[i + 1] > 0) continue;
      const rising = values[i] <= 0;
      const [, high] = bisect((x) => (rising ? excess(x) <= 0 : excess(x) > 0), points[i], points[i + 1]);
      const logP = place(high);
      if (Math.abs(sum(logP.map(Math.exp)) - 1) < 1e-9) found.push(logP);
    }
    if (values[values.length - 1] < 0) found.push(place(points[points.length - 1]));
    return found;
  }

  function solve(s, logA, lengths) {
    const ends = lengths.map((length) => lowerBranchEnd(s, length));
    const found = commonSlope(s, logA, lengths, ends).map((logP) => ({ logP, upper: -1 }));
    const concave = ends.every((end) => end === 0);
    if (!concave) {
      for (const length of new Set(lengths.filter((_, i) => ends[i] < 0))) {
        let largest = -1;
        lengths.forEach((T, i) => {
          if (T === length && (largest < 0 || logA[i] > logA[largest])) largest = i;
        });
        for (const logP of scan(s, logA, lengths, ends, largest)) found.push({ logP, upper: largest });
      }
    }
    let best = null, most = -Infinity;
    for (const entry of found) {
      const gain = total(s, entry.logP, logA, lengths);
      if (best === null || gain > most) [best, most] = [entry, gain];
    }
    return { logP: best.logP, concave, method: "solved" };
  }

  const normalised = (logs) => {
    const top = Math.max(...logs), rest = Math.log(sum(logs.map((l) => Math.exp(l - top))));
    return logs.map((l) => l - top - rest);
  };

  function closedForm(s, logA, lengths) {
    const T = lengths[0], method = "closed form";
    if (logA.length === 1) return { logP: [0], concave: true, method };
    if (isLikelihood(s)) return { logP: normalised(logA), concave: true, method };
    if (!isPureConvex(s) || lengths.some((length) => length !== T)) return null;
    const top = Math.max(...logA);
    if (s.k < T) return { logP: normalised(logA.map((a) => (a - top) * (T / (T - s.k)))), concave: true, method };
    const winners = logA.map((a, i) => (s.k > T ? i === logA.indexOf(top) : a === top));
    const each = -Math.log(winners.filter(Boolean).length);
    return { logP: winners.map((wins) => (wins ? each : -Infinity)), concave: s.k === T, method };
  }

  function entropy(p) {
    return Math.max(0, -sum(p.map((x) => (x > 0 ? x * Math.log(x) : 0))));
  }

  function temperature(s, lengths) {
    if (isLikelihood(s)) return 1;
    if (!isPureConvex(s) || lengths.some((length) => length !== lengths[0]) || s.k > lengths[0]) return null;
    return (lengths[0] - s.k) / lengths[0];
  }

  function optimum(data, lengths, settings) {
    const s = { objective: "convex", k: 1, level: "sequence", lengthWeighting: "token", mleMix: 0, ...settings };
    const mass = sum(data), d = data.map((x) => x / mass);
    const held = d.map((x, i) => i).filter((i) => d[i] > 0);
    const T = held.map((i) => (Array.isArray(lengths) ? lengths[i] : lengths));
    const logA = held.map((i, n) => Math.log(d[i]) - (s.lengthWeighting === "sequence" ? Math.log(T[n]) : 0));
    const units = s.level === "token" ? T.map(() => 1) : T;
    const solution = closedForm(s, logA, units) || solve(s, logA, units);
    const logProbabilities = d.map(() => -Infinity);
    held.forEach((i, n) => { logProbabilities[i] = solution.logP[n]; });
    const raw = logProbabilities.map(Math.exp), all = sum(raw), probabilities = raw.map((p) => p / all);
    const mode = Math.max(...d);
    return {
      probabilities, logProbabilities,
      entropy: entropy(probabilities),
      modeMass: Math.max(...probabilities.filter((_, i) => d[i] === mode)),
      temperature: temperature(s, units),
      concave: solution.concave,
      method: solution.method,
    };
  }

  return { optimum, entropy, weight, value };
})();
if (typeof module !== "undefined") module.exports = ConvexTheory;
