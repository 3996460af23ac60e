"use strict";
// The live page. It uses these routes of the service that serves it at /demo:
//
// Every request has `Authorization: Bearer KEY` if a key was entered. Any other status than
// 2xx comes with {"error": {"message", ...}}.
// POST /v1/query      {"question", "mode", "top_k"?, "stream": true, "trace": true}
//                     -> server-sent events, each a line `data: ...` and a blank one:
//                     {"delta": "text"} ..., the first with "no_chunks", the reason, if the prompt
//                     has no chunks; {"answer": "text", "ragcache": report_json, ...},
//                     [DONE]; or {"error": {"message"}} if it fails while streaming
// GET /v1/documents   -> {"data": [{"id", "chunks", "pinned", "expires"}, ...]}; expires in seconds
//                     since 1970, or null
//                     by id, those after ?after=ID; "has_more" says whether there are more
// POST /v1/documents  {"documents": [{"id", "text"}]} -> {"documents", "unchanged", "chunks"}
// GET /v1/examples    -> {"data": [{"question"}]}: example questions about this store
// GET /version        -> {"model", "body_bytes"}: the limit of a request's body
// GET /v1/stats       -> {"chunks", "payload_bytes", "hits", "misses": {reason: count},
//                     "tier": {"hits", "misses", "held_bytes", ...} | null,
//                     "index": {"kind", "vectors", "recall", ...}}

(() => {
  const { byId, make } = dom;
  if (byId("ragcache-data")) return; // a report file: there is no service
  const KEY = "ragcache-key";
  let asking = null; // an AbortController while a request is running
  let most = 0; // limit of a body in bytes; 0 until it is known

  async function call(path, options = {}) {
    const headers = { "Content-Type": "application/json" };
    const key = byId("key").value.trim();
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    const body = await response.json().catch(() => ({}));
    if (response.status === 401) byId("options").open = true;
    throw new Error(body.error?.message ?? `the service answered ${response.status}`);
  }

  const send = (path, body, signal) => call(path, { method: "POST", body, signal });
  const post = (path, body, signal) => send(path, JSON.stringify(body), signal);
  const get = async (path) => (await call(path)).json();

  /** The JSON objects of a stream of server-sent events, until [DONE]. */
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
        if (event.no_chunks) page.sayNothing(event.no_chunks);
        if (event.delta) run.view.text.append(event.delta);
        if (event.ragcache) Object.assign(run, { answer: event.answer, ragcache: event.ragcache });
      }
      if (!run.ragcache) throw new Error("the answer was cut off: ask again");
      page.finish(run);
      return run;
    } catch (error) {
      run.view.row.remove();
      throw error;
    }
  }

  async function ask(question) {
    const modes = chosenModes();
    if (!modes.length) return fail(new Error("no mode is selected: select one"));
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
        await new Promise((drawn) => setTimeout(drawn, 60)); // the service may run on this machine, too
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

  /** Update the store's figures and documents. */
  async function look() {
    try {
      page.drawStore(await get("/v1/stats"));
      byId("documents").replaceChildren();
      await list("");
      await suggest();
    } catch (error) {
      if (byId("error").hidden) fail(error);
    }
  }

  /** List the documents after one, and show a button if there are more. */
  async function list(after) {
    const found = await get(`/v1/documents?after=${encodeURIComponent(after)}`);
    byId("documents").append(...found.data.map((entry) => {
      const facts = [words.count(entry.chunks, "chunk")];
      if (entry.pinned) facts.push("pinned");
      if (entry.expires) facts.push(`until ${new Date(1e3 * entry.expires).toLocaleString()}`);
      return make("li", {}, `${entry.id} `, make("span", {}, facts.join(", ")));
    }));
    byId("empty").hidden = byId("documents").childElementCount > 0;
    const more = byId("more-documents");
    more.hidden = !found.has_more;
    more.onclick = () => list(found.data.at(-1).id).catch(fail);
  }

  /** Load example questions, the model's name and the body limit. */
  async function suggest() {
    const [examples, version] = await Promise.all([get("/v1/examples"), get("/version")]);
    most = version.body_bytes;
    byId("most").textContent = `up to ${words.size(most)} each`;
    byId("model").textContent = `Model: ${version.model.split("/").at(-1)}`;
    byId("examples").replaceChildren(...examples.data.map(({ question }) => {
      const button = make("button", { type: "button", class: "small" }, question);
      button.addEventListener("click", () => {
        byId("question").value = question;
        if (!asking) ask(question);
      });
      return button;
    }));
    byId("try").hidden = !examples.data.length;
  }

  function explainModes() {
    const offered = [...document.querySelectorAll("input[name=mode]")].map((box) => box.value);
    const others = Object.keys(words.MODES).filter((mode) => !offered.includes(mode));
    byId("about-modes").replaceChildren(...[...offered, ...others].flatMap((mode) => [
      make("dt", { class: words.colour(mode) }, mode), make("dd", {}, words.about(mode)),
    ]));
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

  files.begin(
    async (body, signal) => (await send("/v1/documents", body, signal)).json(),
    () => most,
    (added) => {
      byId("status").textContent = added ? `${words.count(added, "document")} added.` : "";
      look();
    },
  );

  explainModes();
  byId("key").value = sessionStorage.getItem(KEY) ?? "";
  look();
})();
