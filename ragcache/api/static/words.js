"use strict";
// Texts: numbers with units, descriptions of modes, and comparisons of answers.
// A run is {mode, answer, ragcache: report_json}.

const words = (() => {
  const MODES = {
    full: "Computes the whole prompt and loads nothing: the reference for the other modes.",
    prefix: "Loads the longest prefix that the prompt shares with an earlier one, and computes the rest.",
    reuse: "Loads every chunk as it was stored and computes only the question: fastest, but wrong if a chunk refers to another.",
    fused: "Loads every chunk and recomputes the tokens that depend most on the text before their chunk, and those that the question and the answer look at.",
    cacheblend: "Loads every chunk, compares the first layers with full prefill, and recomputes the tokens that differ most.",
    prophet: "Loads every chunk and recomputes the tokens that the question attends to most.",
    infoflow: "Loads every chunk and recomputes the tokens to which most of the question’s attention flows.",
    qcfuse: "Loads every chunk and recomputes the tokens that the question attends to, judged by the chunks’ anchor tokens.",
    kvshare: "Loads every chunk and recomputes the tokens that are attended to and whose values deviate.",
    epic: "Loads every chunk and recomputes the first tokens of every chunk after the first.",
    cachecraft: "Loads for every chunk the stored variant that was computed in the most similar context.",
    ape: "Loads every chunk, places all at the same positions and adjusts the temperature of attention to them.",
    random: "Loads every chunk and recomputes random tokens: the baseline for every selection.",
  };
  const COLOURED = ["fused", "reuse", "full", "prefix", "cacheblend", "random"];
  const ALIKE = 1.05; // times within this factor count as equal

  const family = (mode) => mode.split(/[:+]/, 1)[0];
  const about = (mode) => MODES[family(mode)] ?? "";

  /** The class that gives a mode its colour. */
  const colour = (mode) => `mode-${COLOURED.includes(family(mode)) ? family(mode) : "other"}`;

  const percent = (share) => `${Math.round(100 * share)} %`;
  const count = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : "s"}`;

  /** Milliseconds below one second, seconds otherwise. */
  function seconds(s) {
    if (s < 0.09995) return `${(1e3 * s).toFixed(1)} ms`;
    if (s < 0.9995) return `${(1e3 * s).toFixed(0)} ms`;
    if (s < 59.95) return `${s.toFixed(s < 9.995 ? 2 : 1)} s`;
    const whole = Math.round(s);
    return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  }

  function size(bytes) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let at = 0;
    for (; bytes >= 1024 && at < units.length - 1; at++) bytes /= 1024;
    return `${at ? Number(bytes.toFixed(1)) : bytes} ${units[at]}`;
  }

  /** Share of all chunk tokens computed, mean over layers: Report.charged_share. */
  function charged(r) {
    const reusable = r.reused_tokens + r.recomputed_tokens;
    const missed = (r.chunk_tokens - reusable) * (r.certificate?.escalated ? 2 : 1);
    return (r.charged_budget * reusable + missed) / Math.max(1, r.chunk_tokens);
  }

  const foundNothing = (run) => run.ragcache.chunks.length === 0;
  const full = (runs) => runs.find((run) => run.mode === "full" && run.ragcache);
  const same = (run, other) => run.answer.trim() === other.answer.trim();

  /** How a run's answer compares with full prefill's; null if there is nothing to compare. */
  function verdict(run, runs) {
    const whole = full(runs);
    if (!whole || runs.length < 2) return null;
    if (run === whole) return { kind: "reference", text: "the reference answer" };
    return same(run, whole)
      ? { kind: "agrees", text: "✓ same answer as full" }
      : { kind: "differs", text: "✗ differs from full" };
  }

  function compared(run, whole) {
    const times = whole.ragcache.ttft_s / run.ragcache.ttft_s;
    const factor = Math.max(times, 1 / times);
    if (!(factor >= ALIKE)) return "as soon as full prefill";
    const ratio = factor < 10 ? factor.toFixed(1) : Math.round(factor).toLocaleString("en");
    return `${ratio} times ${times > 1 ? "sooner" : "later"} than full prefill`;
  }

  /** How much sooner a run's first token came than full prefill's; null if that is not known. */
  function sooner(run, runs) {
    const whole = full(runs);
    return whole && run !== whole ? compared(run, whole) : null;
  }

  /** The first mode that is not full, in one sentence. */
  function headline(runs) {
    const whole = full(runs);
    const run = runs.find((one) => one !== whole) ?? whole;
    const parts = [];
    if (whole && run !== whole) parts.push(compared(run, whole));
    else parts.push(`first token after ${seconds(run.ragcache.ttft_s)}`);
    if (!foundNothing(run)) parts.push(`${percent(charged(run.ragcache))} computed`);
    if (whole && run !== whole) parts.push(same(run, whole) ? "same answer" : "different answer");
    return { mode: run.mode, text: parts.join("; ") };
  }

  return {
    MODES, about, charged, colour, count, foundNothing, headline, percent, seconds, size,
    sooner, verdict,
  };
})();
