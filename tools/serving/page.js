// The page: a conversation in memory, sent whole with each message and shown as it comes. Everything that anybody said
// is put on the page as text, never as HTML. It asks its own server and nobody else.
"use strict";

const at = (id) => document.getElementById(id);
const talk = [];           // {role, content} as they are sent
let running = null;        // the AbortController of the answer that is coming

function key() { return sessionStorage.getItem("token") || ""; }

async function ask(path, body, signal) {
  const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.ok) return answer;
  let message = `${answer.status} ${answer.statusText}`;
  try { message = (await answer.json()).error.message; } catch { /* the status says enough */ }
  throw new Error(answer.status === 401 ? `${message} (Settings, Token)` : message);
}

// The bodies of server-sent events, one by one, until [DONE].
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer was cut off");
    held += value;
    const lines = held.split(/\r?\n/);
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function show(kind, text) {
  const shown = document.createElement("p");
  shown.className = kind;
  shown.textContent = text;
  at("talk").append(shown);
  at("talk").scrollTop = at("talk").scrollHeight;
  return shown;
}

function number(id) {
  const text = at(id).value.trim();
  return text === "" ? undefined : Number(text);
}

function busy(controller) {
  running = controller;
  at("send").hidden = Boolean(controller);
  at("stop").hidden = !controller;
  at("retry").disabled = Boolean(controller) || !talk.some((message) => message.role === "user");
  at("new").disabled = Boolean(controller);
}

async function answer() {
  const controller = new AbortController();
  busy(controller);
  at("status").textContent = "";
  const shown = show("said assistant", "");
  const system = at("system").value.trim();
  const began = performance.now();
  let said = "", last = {}, note = "";
  try {
    const body = {
      model: at("model").value,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...talk],
      temperature: number("temperature"), top_p: number("top_p"), max_tokens: number("max_tokens"), seed: number("seed"),
      truncation: "auto", stream: true, stream_options: { include_usage: true },
    };
    for await (const event of events(await ask("v1/chat/completions", body, controller.signal))) {
      last = event;
      const choice = event.choices[0];
      if (choice && choice.delta.content) {
        const below = at("talk").scrollHeight - at("talk").scrollTop - at("talk").clientHeight < 40;
        said += choice.delta.content;
        shown.textContent = said;
        if (below) at("talk").scrollTop = at("talk").scrollHeight;
      }
      if (choice && choice.finish_reason === "length") note = "the answer reached its most tokens";
    }
    const seconds = (performance.now() - began) / 1000, tokens = last.usage ? last.usage.completion_tokens : 0;
    at("status").textContent = `${last.model}: ${tokens} tokens, ${(tokens / seconds).toFixed(0)} a second`;
  } catch (error) {
    if (error.name === "AbortError") note = "stopped";
    else show("note error", `Error: ${error.message}`);
  }
  if (last.dropped_messages) show("note", `The oldest part of the conversation did not fit and was left out.`);
  if (note) show("note", note);
  if (said) talk.push({ role: "assistant", content: said });
  else shown.remove();
  busy(null);
  models();
}

function send(event) {
  event.preventDefault();
  const text = at("text").value;
  if (running || !text.trim()) return;
  at("text").value = "";
  talk.push({ role: "user", content: text });
  show("said user", text);
  answer();
}

// The last message of the user is answered again; what was said since is taken back.
function retry() {
  if (running) return;
  while (talk.length && talk[talk.length - 1].role !== "user") talk.pop();
  const shown = at("talk");
  while (shown.lastElementChild && !shown.lastElementChild.classList.contains("user")) shown.lastElementChild.remove();
  if (talk.length) answer();
}

function restart() {
  if (running) return;
  talk.length = 0;
  at("talk").replaceChildren();
  at("status").textContent = "";
  busy(null);
  at("text").focus();
}

// Which checkpoints there are now: a run may go on training.
async function models() {
  const select = at("model"), chosen = select.value;
  try {
    const listed = (await (await ask("v1/models")).json()).data;
    select.replaceChildren(...listed.map((model) => {
      const loss = model.val_loss === null ? "" : `, loss ${model.val_loss.toFixed(3)}`;
      const of = model.id === model.checkpoint ? "" : ` (${model.checkpoint})`;
      return new Option(`${model.id}${of}${loss}`, model.id);
    }));
    if (listed.some((model) => model.id === chosen)) select.value = chosen;
  } catch (error) {
    at("status").textContent = `Error: ${error.message}`;
    if (!key()) at("settings").open = true;
  }
}

at("form").addEventListener("submit", send);
at("fields").addEventListener("submit", (event) => event.preventDefault());
at("stop").addEventListener("click", () => running && running.abort());
at("retry").addEventListener("click", retry);
at("new").addEventListener("click", restart);
at("token").value = key();
at("token").addEventListener("change", () => { sessionStorage.setItem("token", at("token").value.trim()); models(); });
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
models();
