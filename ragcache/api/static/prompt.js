"use strict";
// Draws the prompt token by token, in parts that fold: the instructions, each chunk, the question.

const promptView = (() => {
  const { byId, draw, make } = dom;
  const OPEN = 1200; // tokens in the parts that are unfolded initially
  const AT_ONCE = 1000; // tokens of a part that are drawn at a time

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
      `${words.count(all, "token")}: ${sums.reused} reused, ${sums.recomputed} recomputed, ${sums.fresh} fresh`));
  }

  function show(r) {
    drawSums(r);
    let number = 0, drawn = 0;
    byId("heat").replaceChildren(...r.prompt.map((part) => {
      const report = part.kind === "chunk" ? r.chunks[number] : null;
      const passage = part.kind === "chunk" ? r.passages[number++] : null;
      drawn += part.tokens.length;
      const open = drawn <= OPEN || part.kind === "question" && part.tokens.length <= AT_ONCE;
      return drawPart(part, report, passage, r.layers.length, open);
    }));
    relabel();
  }

  function factsOf(part, report, passage) {
    const total = part.tokens.reduce((sum, [, share]) => sum + share, 0);
    const facts = [words.count(part.tokens.length, "token")];
    if (passage && passage.score) facts.push(`score ${passage.score.toFixed(3)}`);
    if (part.loaded) facts.push(`${words.percent(total / Math.max(1, part.tokens.length))} computed`);
    else if (report?.cheaper) facts.push("stored, but cheaper to compute");
    else if (report?.miss) facts.push(`computed: ${report.miss}`);
    else facts.push("computed");
    return facts;
  }

  function drawPart(part, report, passage, layers, open) {
    const list = make("div", {
      class: "tokens", role: "listbox", "aria-orientation": "horizontal",
      "aria-label": `${part.name}: tokens`,
    });
    const more = make("button", { type: "button", class: "small" });
    more.hidden = true;
    let drawn = 0;
    function drawMore() {
      const next = part.tokens.slice(drawn, drawn + AT_ONCE);
      list.append(...next.map((token) => drawToken(part, token, layers)));
      if (!drawn && list.firstChild) list.firstChild.tabIndex = 0;
      drawn += next.length;
      const left = part.tokens.length - drawn;
      more.hidden = !left;
      more.textContent = `Show ${words.count(Math.min(left, AT_ONCE), "more token")} of ${left.toLocaleString("en")}`;
    }
    more.addEventListener("click", drawMore);
    const facts = factsOf(part, report, passage);
    const box = make("details", { class: "part" },
      make("summary", {}, make("h3", {}, part.name), " ",
        ...facts.flatMap((fact) => [make("span", {}, fact), " "])),
      list, more);
    box.addEventListener("toggle", () => {
      if (box.open && !drawn) drawMore();
      relabel();
    });
    if (open) drawMore();
    box.open = open;
    return box;
  }

  function drawToken(part, token, layers) {
    const [text, share] = token;
    const depth = share > 2 / 3 ? " s3" : share > 1 / 3 ? " s2" : "";
    const kind = kindOf(part, share);
    return make("span", {
      class: `t ${kind}${kind === "recomputed" ? depth : ""}`, role: "option",
      "aria-selected": "false", tabindex: "-1", "aria-label": says(part, token, layers),
    }, text.replace(/\n/g, "⏎")); // line ends are tokens too
  }

  const parts = () => [...byId("heat").querySelectorAll(".part")];

  function relabel() {
    byId("fold").textContent = parts().every((part) => part.open) ? "Fold all" : "Unfold all";
  }

  function foldAll() {
    const open = !parts().every((part) => part.open);
    for (const part of parts()) part.open = open;
  }

  function tell(token) {
    byId("token").textContent = token.getAttribute("aria-label");
  }

  /** One Tab stop per part; the arrow keys, Home and End move between its tokens. */
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

  byId("fold").addEventListener("click", foldAll);
  byId("heat").addEventListener("keydown", onKey);
  byId("heat").addEventListener("focusin", onFocus);
  byId("heat").addEventListener("pointerover", (event) => {
    const token = event.target.closest(".tokens .t");
    if (token) tell(token);
  });

  return { show };
})();
