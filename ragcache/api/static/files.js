"use strict";
// Adds the user's files as documents. They are read in the browser, as text, and sent one by one once
// the user submits them. `send` posts a document and throws the service's error message.

const files = (() => {
  const { byId, make } = dom;
  const MARKUP = /\.(html?|pdf|docx?|xlsx?|pptx?|odt|rtf|epub|zip|gz|png|jpe?g|gif|webp)$/i;
  let chosen = []; // {file, row, name, told, done}
  let sending = null; // an AbortController

  /** The text of a file; throws if it is not plain text. */
  async function read(file) {
    if (MARKUP.test(file.name))
      throw new Error("only plain text and Markdown can be added here: use `ragcache index` for HTML, PDF and other files");
    if (!file.size) throw new Error("the file is empty");
    const bytes = await file.arrayBuffer();
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
      if (!text.includes("\0")) return text;
    } catch {
      // reported below
    }
    throw new Error("the file is not UTF-8 text: save it as UTF-8");
  }

  function say(one, text, bad = false) {
    one.told.textContent = text;
    one.row.classList.toggle("bad", bad);
  }

  function choose(given) {
    for (const file of given) {
      const name = make("input", { type: "text", "aria-label": `Name of ${file.name}`, maxlength: "1000", spellcheck: "false" });
      name.value = file.webkitRelativePath || file.name;
      const told = make("span", { class: "quiet" }, "");
      const drop = make("button", { type: "button", class: "small", "aria-label": `Leave out ${file.name}` }, "✕");
      const row = make("li", {}, name, make("span", { class: "quiet" }, words.size(file.size)), drop, told);
      const one = { file, row, name, drop, told, done: false };
      drop.addEventListener("click", () => {
        chosen = chosen.filter((other) => other !== one);
        row.remove();
        draw();
      });
      chosen.push(one);
      byId("chosen").append(row);
    }
    draw();
  }

  const left = () => chosen.filter((one) => !one.done);

  function draw() {
    byId("send").hidden = !left().length && !sending;
    byId("send").disabled = Boolean(sending);
    byId("send").textContent = `Add ${words.count(left().length, "file")}`;
    byId("halt").hidden = !sending;
    byId("sent").hidden = !sending;
  }

  async function sendAll(send, most) {
    sending = new AbortController();
    const todo = left();
    byId("sent").max = todo.length;
    byId("sent").value = 0;
    draw();
    let added = 0;
    for (const one of todo) {
      if (sending.signal.aborted) break;
      try {
        const id = one.name.value.trim();
        if (!id) throw new Error("the document has no name: enter one");
        say(one, "reading …");
        const text = await read(one.file);
        if (!text.trim()) throw new Error("the file has no text");
        const body = JSON.stringify({ documents: [{ id, text }] });
        const bytes = new Blob([body]).size;
        if (most && bytes > most)
          throw new Error(`the request would be ${words.size(bytes)}, more than the limit of ${words.size(most)}: split the file, or use \`ragcache index\``);
        say(one, "splitting, embedding and computing …");
        const made = await send(body, sending.signal);
        one.done = true;
        one.name.readOnly = true;
        one.drop.hidden = true;
        added += 1;
        say(one, made.documents ? `added: ${words.count(made.chunks, "chunk")}` : "unchanged: already stored");
      } catch (error) {
        const stopped = sending.signal.aborted;
        say(one, stopped ? "stopped" : error.message, !stopped);
      }
      byId("sent").value += 1;
    }
    sending = null;
    draw();
    return added;
  }

  /** Handle the form; `added` is called with the number of new documents. */
  function begin(send, most, added) {
    const box = byId("drop");
    byId("files").addEventListener("change", (event) => {
      choose(event.target.files);
      event.target.value = "";
    });
    for (const kind of ["dragover", "dragleave", "drop"])
      box.addEventListener(kind, (event) => {
        event.preventDefault();
        box.classList.toggle("over", kind === "dragover");
        if (kind === "drop") choose(event.dataTransfer.files);
      });
    byId("upload").addEventListener("submit", async (event) => {
      event.preventDefault();
      if (!sending) added(await sendAll(send, most()));
    });
    byId("halt").addEventListener("click", () => sending?.abort());
    draw();
  }

  return { begin };
})();
