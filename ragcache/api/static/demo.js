"use strict";
// The live page. What it expects of the service that serves it at /demo, and these files below it:
//
// Every request carries `Authorization: Bearer KEY` where a key was given. Any other status than
// 2xx comes with {"error": {"message", ...}}.
// POST /v1/query      {"question", "mode", "top_k"?, "stream": true, "trace": true}
//                     -> server-sent events, each a line `data: ...` and a blank one:
//                     {"delta": "text"} ..., {"answer": "text", "ragcache": report_json, ...},
//                     [DONE]; or {"error": {"message"}} where it fails on the way
// GET /v1/documents   -> {"data": [{"id", "chunks", "pinned", "expires"}, ...]}; expires in seconds
//                     since 1970, or null
// POST /v1/documents  {"documents": [{"id", "text"}]}
// GET /v1/stats       -> {"chunks", "payload_bytes", "hits", "misses": {reason: count},
//                     "tier": {"hits", "misses", "held_bytes", ...} | null}

(() => {
  const { byId, make } = page;
  if (byId("ragcache-data")) return; // a file: there is nobody to ask
  const KEY = "ragcache-key";
  let asking = null; // an AbortController while a question is under way

  async function call(path, options = {}) {
    const headers = { "Content-Type": "application/json" };
    const key = byId("key").value.trim();
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    const said = await response.json().catch(() => ({}));
    if (response.status === 401) byId("options").open = true;
    throw new Error(said.error?.message ?? `the service answered ${response.status}`);
  }

  const post = (path, body, signal) =>
    call(path, { method: "POST", body: JSON.stringify(body), signal });

  /** The objects of a stream of server-sent events, until [DONE]. */
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { value, done } = await reader.read();
      held += value ?? "";
      const lines = held.split(/\r?\n/);
      held = done ? "" : lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
      if (done) return;
    }
  }

  function chosenModes() {
    const ticked = [...document.querySelectorAll("input[name=mode]:checked")].map((c) => c.value);
    const more = byId("more").value.split(/\s+/).filter(Boolean);
    return [...new Set([...ticked, ...more])];
  }

  async function askIn(mode, question, signal) {
    const run = { mode, view: page.answerRow(mode) };
    try {
      const body = { question, mode, stream: true, trace: true };
      if (byId("top_k").value) body.top_k = Number(byId("top_k").value);
      for await (const event of events(await post("/v1/query", body, signal))) {
        if (event.error) throw new Error(event.error.message);
        if (event.delta) run.view.text.append(event.delta);
        if (event.ragcache) Object.assign(run, { answer: event.answer, ragcache: event.ragcache });
      }
      if (!run.ragcache) throw new Error("the answer broke off: ask again");
      page.finish(run);
      return run;
    } catch (error) {
      run.view.row.remove();
      throw error;
    }
  }

  async function ask(question) {
    const modes = chosenModes();
    if (!modes.length) return fail(new Error("no mode is chosen: tick one"));
    asking = new AbortController();
    busy(true);
    fail(null);
    page.begin(question);
    const runs = [];
    try {
      for (const mode of modes) {
        byId("status").textContent = `Asking in mode ${mode} (${runs.length + 1} of ${modes.length}) …`;
        runs.push(await askIn(mode, question, asking.signal));
        page.drawRuns(runs);
        await new Promise((drawn) => setTimeout(drawn, 60)); // this may be the service's own machine
      }
      byId("status").textContent = "";
    } catch (error) {
      const stopped = asking.signal.aborted;
      byId("status").textContent = stopped ? "Stopped." : "";
      if (!stopped) fail(error);
      byId("results").hidden = !runs.length;
    }
    asking = null;
    busy(false);
    await look();
  }

  function busy(is) {
    byId("go").disabled = is;
    byId("stop").hidden = !is;
  }

  function fail(error) {
    byId("error").hidden = !error;
    byId("error").textContent = error ? error.message : "";
  }

  /** What the store holds now. */
  async function look() {
    try {
      page.drawStore(await (await call("/v1/stats")).json());
      const documents = (await (await call("/v1/documents")).json()).data;
      byId("documents").replaceChildren(...documents.map((entry) => {
        const facts = [`${entry.chunks} chunk${entry.chunks === 1 ? "" : "s"}`];
        if (entry.pinned) facts.push("pinned");
        if (entry.expires) facts.push(`until ${new Date(1e3 * entry.expires).toLocaleString()}`);
        return make("li", {}, `${entry.id} `, make("span", {}, facts.join(", ")));
      }));
    } catch (error) {
      if (byId("error").hidden) fail(error);
    }
  }

  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!asking) ask(byId("question").value);
  });
  byId("stop").addEventListener("click", () => {
    asking?.abort();
    byId("question").focus();
  });
  byId("key").addEventListener("change", () => {
    sessionStorage.setItem(KEY, byId("key").value.trim());
    fail(null);
    look();
  });
  byId("add").addEventListener("submit", async (event) => {
    event.preventDefault();
    const document_ = { id: byId("doc-id").value, text: byId("doc-text").value };
    try {
      fail(null);
      await post("/v1/documents", { documents: [document_] });
      byId("status").textContent = `${document_.id} added.`;
      event.target.reset();
      await look();
    } catch (error) {
      fail(error);
    }
  });

  byId("key").value = sessionStorage.getItem(KEY) ?? "";
  look();
})();
