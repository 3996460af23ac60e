"use strict";
// Everything that is drawn, from what the API answers. Text of documents, questions and answers
// only ever becomes the text of a node.

const page = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);
  let shown = null; // the run whose prompt and layers are drawn

  /** An element with attributes and children; strings become text nodes. */
  function make(name, attributes = {}, ...children) {
    return fill(document.createElement(name), attributes, children);
  }

  function draw(name, attributes = {}, ...children) {
    return fill(document.createElementNS(SVG, name), attributes, children);
  }

  function fill(node, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  const percent = (share) => `${Math.round(100 * share)} %`;
  const ms = (seconds) => `${(1e3 * seconds).toFixed(seconds < 0.1 ? 1 : 0)} ms`;

  function size(bytes) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let at = 0;
    for (; bytes >= 1024 && at < units.length - 1; at++) bytes /= 1024;
    return `${at ? bytes.toFixed(1) : bytes} ${units[at]}`;
  }

  const chunkTokens = (r) => Math.max(1, r.chunk_tokens);

  /** Share of all chunk tokens computed, mean over layers: Report.charged_share. */
  function charged(r) {
    const reusable = r.reused_tokens + r.recomputed_tokens;
    return (r.charged_budget * reusable + r.chunk_tokens - reusable) / chunkTokens(r);
  }

  // ---- answers and their times ----

  /** A row for a run; its text can be added to while it streams. */
  function answerRow(mode) {
    const text = make("p", { class: "text" });
    const bar = make("div", { class: "bar" });
    const facts = make("p", { class: "quiet" });
    const row = make("li", { "aria-busy": "true", "aria-live": "polite" },
      make("span", { class: "mode" }, mode), bar, text, facts);
    byId("answers").append(row);
    return { row, text, bar, facts };
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
        make("span", {}, ms(r.ttft_s)));
      run.view.facts.textContent =
        `${percent(charged(r))} of the chunks’ tokens computed, ${size(r.bytes_loaded)} loaded, ` +
        `all after ${ms(r.total_s)}`;
    }
  }

  function finish(run) {
    run.view.text.textContent = run.answer.trim();
    run.view.row.setAttribute("aria-busy", "false");
  }

  function drawNotes(runs) {
    const notes = runs.flatMap((run) => {
      const said = [...run.ragcache.fallbacks, ...(run.ragcache.plan?.sentences ?? [])];
      return said.map((note) => `${run.mode}: ${note}`);
    });
    byId("notes").replaceChildren(...notes.map((note) => make("li", {}, note)));
  }

  // ---- the prompt ----

  function kindOf(part, share) {
    if (!part.loaded) return "fresh";
    return share > 0 ? "recomputed" : "reused";
  }

  function says(part, [text, share], layers) {
    const kind = kindOf(part, share);
    const where = kind === "recomputed"
      ? `recomputed at ${Math.round(share * layers * 10) / 10} of ${layers} layers`
      : { reused: "reused", fresh: "computed at every layer" }[kind];
    return `${JSON.stringify(text)}, ${where}`;
  }

  function drawSums(r) {
    const sums = { reused: 0, recomputed: 0, fresh: 0 };
    for (const part of r.prompt)
      for (const [, share] of part.tokens) sums[kindOf(part, share)] += 1;
    const all = Math.max(1, sums.reused + sums.recomputed + sums.fresh);
    const bar = draw("svg", { viewBox: `0 0 ${all} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
    let at = 0;
    for (const [kind, count] of Object.entries(sums)) {
      bar.append(draw("rect", { class: kind, x: at, width: count, height: 1 }));
      at += count;
    }
    byId("sums").replaceChildren(bar, make("p", {},
      `${all} tokens: ${sums.reused} reused, ${sums.recomputed} recomputed, ${sums.fresh} fresh`));
  }

  function drawPrompt(r) {
    drawSums(r);
    let number = 0;
    byId("heat").replaceChildren(...r.prompt.map((part) => {
      const report = part.kind === "chunk" ? r.chunks[number] : null;
      const passage = part.kind === "chunk" ? r.passages[number++] : null;
      return drawPart(part, report, passage, r.layers.length);
    }));
  }

  function drawPart(part, report, passage, layers) {
    const total = part.tokens.reduce((sum, [, share]) => sum + share, 0);
    const facts = [`${part.tokens.length} tokens`];
    if (passage && passage.score) facts.push(`score ${passage.score.toFixed(3)}`);
    if (part.loaded) facts.push(`${percent(total / Math.max(1, part.tokens.length))} computed`);
    else if (report?.cheaper) facts.push("stored, but cheaper to compute");
    else if (report?.miss) facts.push(`computed: ${report.miss}`);
    else facts.push("computed");
    const list = make("div", {
      class: "tokens", role: "listbox", "aria-orientation": "horizontal",
      "aria-label": `${part.name}: tokens`,
    });
    for (const token of part.tokens) {
      const [text, share] = token;
      const depth = share > 2 / 3 ? " s3" : share > 1 / 3 ? " s2" : "";
      const kind = kindOf(part, share);
      list.append(make("span", {
        class: `t ${kind}${kind === "recomputed" ? depth : ""}`, role: "option",
        "aria-selected": "false", tabindex: "-1", "aria-label": says(part, token, layers),
      }, shownText(text)));
    }
    if (list.firstChild) list.firstChild.tabIndex = 0;
    return make("div", { class: "part" },
      make("h3", {}, part.name, ...facts.map((fact) => make("span", {}, fact))), list);
  }

  /** Line ends are drawn as a sign: they are tokens too. */
  const shownText = (text) => text.replace(/\n/g, "⏎");

  function tell(token) {
    byId("token").textContent = token.getAttribute("aria-label");
  }

  /** One Tab stop for each part; arrows, Home and End go through its tokens. */
  function onKey(event) {
    const token = event.target.closest(".tokens .t");
    if (!token) return;
    const list = token.parentElement;
    const next = {
      ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling,
      Home: list.firstElementChild, End: list.lastElementChild,
    }[event.key];
    if (!next) return;
    event.preventDefault();
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  function onFocus(event) {
    const token = event.target.closest(".tokens .t");
    if (!token) return;
    for (const other of token.parentElement.children)
      other.setAttribute("aria-selected", String(other === token));
    tell(token);
  }

  // ---- the waterfall ----

  const ROW = 20;

  function drawWaterfall(layers) {
    const box = byId("waterfall");
    if (!layers.length) return box.replaceChildren();
    const width = Math.max(240, box.clientWidth);
    const left = 30, top = 18, right = 8;
    const last = layers[layers.length - 1];
    // Reading may begin before the walk does, whose beginning is the report's zero.
    const zero = Math.min(0, ...layers.filter((l) => l.read_s > 0).map((l) => l.read_at_s));
    const end = last.at_s + last.wait_s + last.place_s + last.compute_s - zero || 1e-9;
    const x = (sinceStart) => left + (sinceStart / end) * (width - left - right);
    const height = top + ROW * layers.length + 4;
    const svg = draw("svg", {
      viewBox: `0 0 ${width} ${height}`, role: "img", height,
      "aria-label": `${layers.length} layers in ${ms(end)}; the table below has the times`,
    });
    const step = tick(end, width < 500 ? 4 : 8);
    for (let at = 0; at <= end; at += step) {
      svg.append(
        draw("line", { class: "grid", x1: x(at), x2: x(at), y1: top - 3, y2: height }),
        draw("text", { x: x(at), y: 11, "text-anchor": at ? "middle" : "start" },
          at ? String(Number((1e3 * at).toPrecision(4))) : "0 ms"));
    }
    layers.forEach((layer, number) => {
      const y = top + number * ROW;
      svg.append(draw("text", { x: left - 6, y: y + 13, "text-anchor": "end" }, String(number)));
      const placing = layer.at_s + layer.wait_s, computing = placing + layer.place_s;
      const bars = [
        ["read", layer.read_at_s, layer.read_s, y + 1, 4],
        ["wait", layer.at_s, layer.wait_s, y + 7, 9],
        ["place", placing, layer.place_s, y + 8, 7],
        ["compute", computing, layer.compute_s, y + 6, 11],
      ];
      for (const [kind, start, took, at, tall] of bars) {
        if (took <= 0) continue;
        const from = Math.min(x(start - zero), width - right);
        const to = Math.min(x(start - zero + took), width - right);
        if (kind === "wait" && to - from < 2) continue; // narrower than its own outline
        svg.append(draw("rect", { class: kind, x: from, y: at, height: tall, width: Math.max(1, to - from) },
          draw("title", {}, `layer ${number}: ${kind} ${ms(took)}, from ${ms(start - zero)}`)));
      }
    });
    box.replaceChildren(svg);
  }

  /** The least of 1, 2, 5 times a power of ten that makes at most so many ticks. */
  function tick(end, most) {
    const power = 10 ** Math.floor(Math.log10(end / most));
    return [1, 2, 5, 10].map((n) => n * power).find((step) => end / step <= most);
  }

  function drawLayers(layers) {
    const heads = ["layer", "rows", "of chunks", "loaded", "read", "wait", "place", "compute"];
    const rows = layers.map((layer, number) => [
      number, layer.rows, layer.charged, size(layer.load_bytes),
      ...["read_s", "wait_s", "place_s", "compute_s"].map((name) => ms(layer[name])),
    ]);
    byId("layers").replaceChildren(
      make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
      make("tbody", {}, ...rows.map((row) =>
        make("tr", {}, ...row.map((cell) => make("td", {}, String(cell)))))));
  }

  // ---- which run, and the store ----

  function showRun(run) {
    shown = run;
    drawPrompt(run.ragcache);
    drawWaterfall(run.ragcache.layers);
    drawLayers(run.ragcache.layers);
  }

  function drawSwitch(runs) {
    const box = byId("shown");
    box.hidden = runs.length < 2;
    const legend = box.querySelector("legend");
    box.replaceChildren(legend, ...runs.map((run) => {
      const input = make("input", { type: "radio", name: "shown" });
      input.checked = run === shown;
      input.addEventListener("change", () => showRun(run));
      return make("label", { class: "chip" }, input, make("span", {}, run.mode));
    }));
  }

  function drawStore(stats) {
    const missed = Object.entries(stats.misses).filter(([, count]) => count);
    const misses = missed.reduce((sum, [, count]) => sum + count, 0);
    const tiles = [
      ["Chunks stored", String(stats.chunks), ""],
      ["KV", size(stats.payload_bytes), ""],
      ["Hit rate", rate(stats.hits, misses), `${stats.hits} of ${stats.hits + misses} look-ups`],
      ["Misses", String(misses), missed.map(([why, count]) => `${count} ${why}`).join(", ")],
    ];
    const tier = stats.tier;
    if (tier)
      tiles.push(["Layers from RAM", rate(tier.hits, tier.misses), `${size(tier.held_bytes)} held`]);
    byId("tiles").replaceChildren(...tiles.map(([name, value, more]) => make("div", {},
      make("dt", {}, name), make("dd", {}, value, ...(more ? [make("small", {}, more)] : [])))));
    byId("store").hidden = false;
  }

  const rate = (hits, misses) => (hits + misses ? percent(hits / (hits + misses)) : "–");

  /** Draw what all runs have in common; the first one's prompt and layers, unless one is shown. */
  function drawRuns(runs) {
    drawBars(runs);
    drawNotes(runs);
    if (!runs.includes(shown)) showRun(runs[0]);
    drawSwitch(runs);
  }

  function begin(question) {
    shown = null;
    byId("asked").textContent = question;
    for (const id of ["answers", "notes", "sums", "heat", "waterfall", "layers"])
      byId(id).replaceChildren();
    byId("shown").hidden = true;
    byId("results").hidden = false;
  }

  byId("heat").addEventListener("keydown", onKey);
  byId("heat").addEventListener("focusin", onFocus);
  byId("heat").addEventListener("pointerover", (event) => {
    const token = event.target.closest(".tokens .t");
    if (token) tell(token);
  });
  new ResizeObserver(() => shown && drawWaterfall(shown.ragcache.layers)).observe(byId("results"));

  const saved = byId("ragcache-data"); // there in a file that `ragcache query --report` has written
  if (saved) {
    const data = JSON.parse(saved.textContent);
    begin(data.question);
    for (const run of data.runs) {
      run.view = answerRow(run.mode);
      finish(run);
    }
    drawRuns(data.runs);
    drawStore(data.stats);
  }

  return { answerRow, begin, byId, drawRuns, drawStore, finish, make };
})();
