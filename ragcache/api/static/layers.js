"use strict";
// Draws loading and computing per layer: a timeline, and the same data as a table.

const layersView = (() => {
  const { byId, draw, make } = dom;
  const ROW = 20;

  function show(layers) {
    drawWaterfall(layers);
    drawTable(layers);
  }

  function drawWaterfall(layers) {
    const box = byId("waterfall");
    if (!layers.length) return box.replaceChildren();
    const width = Math.max(240, box.clientWidth);
    const left = 30, top = 18, right = 8;
    const last = layers[layers.length - 1];
    // Reading may begin before the forward pass, whose start is the report's time zero.
    const zero = Math.min(0, ...layers.filter((l) => l.read_s > 0).map((l) => l.read_at_s));
    const end = last.at_s + last.wait_s + last.place_s + last.compute_s - zero || 1e-9;
    const x = (sinceStart) => left + (sinceStart / end) * (width - left - right);
    const height = top + ROW * layers.length + 4;
    const svg = draw("svg", {
      viewBox: `0 0 ${width} ${height}`, role: "img", height,
      "aria-label": `${layers.length} layers in ${words.seconds(end)}; the table below has the times`,
    });
    const [unit, each] = end < 1 ? ["ms", 1e3] : ["s", 1];
    const step = tick(end, width < 500 ? 4 : 8);
    for (let at = 0; at <= end; at += step) {
      svg.append(
        draw("line", { class: "grid", x1: x(at), x2: x(at), y1: top - 3, y2: height }),
        draw("text", { x: x(at), y: 11, "text-anchor": at ? "middle" : "start" },
          at ? String(Number((each * at).toPrecision(4))) : `0 ${unit}`));
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
        const told = `layer ${number}: ${kind} ${words.seconds(took)}, from ${words.seconds(start - zero)}`;
        svg.append(draw("rect", { class: kind, x: from, y: at, height: tall, width: Math.max(1, to - from) },
          draw("title", {}, told)));
      }
    });
    box.replaceChildren(svg);
  }

  /** The smallest step of 1, 2 or 5 times a power of ten that gives at most `most` ticks. */
  function tick(end, most) {
    const power = 10 ** Math.floor(Math.log10(end / most));
    return [1, 2, 5, 10].map((n) => n * power).find((step) => end / step <= most);
  }

  function drawTable(layers) {
    const heads = ["layer", "rows", "of chunks", "loaded", "read", "wait", "place", "compute"];
    const rows = layers.map((layer, number) => [
      number, layer.rows, layer.charged, words.size(layer.load_bytes),
      ...["read_s", "wait_s", "place_s", "compute_s"].map((name) => words.seconds(layer[name])),
    ]);
    byId("layers").replaceChildren(
      make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
      make("tbody", {}, ...rows.map((row) =>
        make("tr", {}, ...row.map((cell) => make("td", {}, String(cell)))))));
  }

  return { drawWaterfall, show };
})();
