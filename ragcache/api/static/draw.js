"use strict";
// Draws the answers side by side, the choice of the one shown below, and the store. A report file
// may have several questions, of which one is shown.

const page = (() => {
  const { byId, draw, make } = dom;
  let shown = null; // the run whose prompt and layers are drawn

  const swatch = () => make("i", { class: "swatch", "aria-hidden": "true" });

  /** A row for a run; its text can be added to while it streams. */
  function answerRow(mode) {
    const text = make("p", { class: "text" });
    const bar = make("div", { class: "bar" });
    const mark = make("p", { class: "mark" });
    const facts = make("p", { class: "quiet" });
    const row = make("li", { class: words.colour(mode), "aria-busy": "true", "aria-live": "polite" },
      make("div", { class: "who" }, make("p", { class: "mode" }, swatch(), mode), mark),
      make("div", { class: "what" }, text, bar, facts,
        make("p", { class: "quiet about" }, words.about(mode))));
    byId("answers").append(row);
    return { row, text, bar, facts, mark };
  }

  function drawBars(runs) {
    const longest = Math.max(...runs.map((run) => run.ragcache.ttft_s));
    for (const run of runs) {
      const r = run.ragcache;
      const share = longest ? r.ttft_s / longest : 0;
      run.view.bar.replaceChildren(
        draw("svg", { "aria-hidden": "true", viewBox: "0 0 100 14", preserveAspectRatio: "none" },
          draw("rect", { class: "track", width: 100, height: 14 }),
          draw("rect", { class: "fill", width: 100 * share, height: 14 })),
        make("span", {}, words.seconds(r.ttft_s)));
      const computed = words.foundNothing(run) ? [] : [
        `${words.percent(words.charged(r))} of the chunks’ tokens computed`,
        `${words.size(r.bytes_loaded)} loaded`,
      ];
      const facts = [words.sooner(run, runs), ...computed, `all after ${words.seconds(r.total_s)}`];
      run.view.facts.textContent = facts.filter(Boolean).join(", ");
    }
  }

  function drawMarks(runs) {
    for (const run of runs) {
      const found = words.verdict(run, runs);
      run.view.mark.className = `mark ${found?.kind ?? ""}`;
      run.view.mark.textContent = found?.text ?? "";
    }
  }

  function drawHeadline(runs) {
    const { mode, text } = words.headline(runs);
    byId("headline").replaceChildren(make("span", { class: words.colour(mode) }, mode), `: ${text}.`);
    const without = runs.find(words.foundNothing);
    if (without) sayNothing(without.ragcache.no_chunks);
  }

  /** Show, before the answer, that it uses no documents, and the reason if it is known. */
  function sayNothing(why) {
    byId("nothing-why").textContent = why ? `: ${why}` : "";
    byId("nothing").hidden = false;
  }

  function finish(run) {
    run.view.text.textContent = run.answer.trim() || "(an empty answer)";
    run.view.row.setAttribute("aria-busy", "false");
  }

  function listNotes(id, runs, of) {
    const notes = runs.flatMap((run) => of(run.ragcache).map((note) => `${run.mode}: ${note}`));
    byId(id).replaceChildren(...notes.map((note) => make("li", {}, note)));
    return notes.length;
  }

  function drawNotes(runs) {
    listNotes("notes", runs, (r) => r.fallbacks);
    byId("why").hidden = !listNotes("plan", runs, (r) => r.plan?.sentences ?? []);
  }

  function showRun(run) {
    shown = run;
    promptView.show(run.ragcache);
    layersView.show(run.ragcache.layers);
  }

  function drawSwitch(runs) {
    drawChoice("shown", runs, shown, showRun, (run) => [swatch(), run.mode],
      (run) => words.colour(run.mode));
  }

  /** Radio buttons for several items, in a fieldset that is hidden if there is only one. */
  function drawChoice(id, items, chosen, choose, label, colour = () => "") {
    const box = byId(id);
    box.hidden = items.length < 2;
    box.replaceChildren(box.querySelector("legend"), ...items.map((item) => {
      const input = make("input", { type: "radio", name: id });
      input.checked = item === chosen;
      input.addEventListener("change", () => choose(item));
      return make("label", { class: `chip ${colour(item)}` }, input, make("span", {}, ...label(item)));
    }));
  }

  function drawStore(stats) {
    const missed = Object.entries(stats.misses).filter(([, count]) => count);
    const misses = missed.reduce((sum, [, count]) => sum + count, 0);
    const tiles = [
      ["Chunks stored", stats.chunks.toLocaleString("en"), ""],
      ["KV", words.size(stats.payload_bytes), ""],
      ["Hit rate", rate(stats.hits, misses), `${stats.hits} of ${stats.hits + misses} look-ups`],
      ["Misses", String(misses), missed.map(([why, count]) => `${count} ${why}`).join(", ")],
    ];
    const tier = stats.tier;
    if (tier)
      tiles.push(["Layers from RAM", rate(tier.hits, tier.misses), `${words.size(tier.held_bytes)} held`]);
    byId("tiles").replaceChildren(...tiles.map(([name, value, more]) => make("div", {},
      make("dt", {}, name), make("dd", {}, value, ...(more ? [make("small", {}, more)] : [])))));
    byId("store").hidden = false;
  }

  const rate = (hits, misses) => (hits + misses ? words.percent(hits / (hits + misses)) : "–");

  /** Draw what all runs share, and the prompt and layers of the selected run, or of the first. */
  function drawRuns(runs) {
    drawHeadline(runs);
    drawBars(runs);
    drawMarks(runs);
    drawNotes(runs);
    if (!runs.includes(shown)) showRun(runs[0]);
    drawSwitch(runs);
  }

  function begin(question) {
    shown = null;
    byId("asked").textContent = question;
    for (const id of ["headline", "answers", "notes", "plan", "sums", "heat", "waterfall", "layers"])
      byId(id).replaceChildren();
    for (const id of ["shown", "nothing", "why"]) byId(id).hidden = true;
    byId("results").hidden = false;
  }

  new ResizeObserver(() => shown && layersView.drawWaterfall(shown.ragcache.layers))
    .observe(byId("results"));

  function showQuestion({ question, runs }) {
    begin(question);
    for (const run of runs) {
      run.view = answerRow(run.mode);
      finish(run);
    }
    drawRuns(runs);
  }

  const saved = byId("ragcache-data"); // present in a file written with --report
  if (saved) {
    const { questions, stats } = JSON.parse(saved.textContent);
    drawChoice("questions", questions, questions[0], showQuestion, (one) => [one.question]);
    showQuestion(questions[0]);
    drawStore(stats);
  }

  return { answerRow, begin, drawRuns, drawStore, finish, sayNothing };
})();
