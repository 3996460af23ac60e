"use strict";
// Files of one's own as documents. They are read here, as text, and sent one by one; nothing is sent
// before one says so. `send` posts a document, and raises what the service says against it.

const files = (() => {
  const { byId, make } = dom;
  const MARKUP = /\.(html?|pdf|docx?|xlsx?|pptx?|odt|rtf|epub|zip|gz|png|jpe?g|gif|webp)$/i;
  let chosen = []; // {file, row, name, told, done}
  let sending = null; // an AbortController

  /** The text of a file. Raises what it is instead. */
  async function read(file) {
    if (MARKUP.test(file.name))
      throw new Error("only plain text and Markdown can be added here: `ragcache index` reads HTML, PDF and others");
    if (!file.size) throw new Error("the file is empty");
    const bytes = await file.arrayBuffer();
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
      if (!text.includes("\0")) return text;
    } catch {
      // it is told below
    }
    throw new Error("this is no text in UTF-8: save it as such");
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
        if (!id) throw new Error("it has no name: give it one");
        say(one, "reading …");
        const text = await read(one.file);
        if (!text.trim()) throw new Error("there is no text in it");
        const body = JSON.stringify({ documents: [{ id, text }] });
        const bytes = new Blob([body]).size;
        if (most && bytes > most)
          throw new Error(`it is ${words.size(bytes)} as it is sent, and the service takes ${words.size(most)}: split it, or use \`ragcache index\``);
        say(one, "splitting, embedding and computing …");
        const made = await send(body, sending.signal);
        one.done = true;
        one.name.readOnly = true;
        one.drop.hidden = true;
        added += 1;
        say(one, made.documents ? `added: ${words.count(made.chunks, "chunk")}` : "was there already, unchanged");
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

  /** Listen to the form; `added` is called with how many documents came. */
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
