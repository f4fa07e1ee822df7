// The API page: tabs, copy buttons, and the form that asks the server. What the model writes is only ever text.

const at = (id) => document.getElementById(id);

function say(what) {
  at("said").textContent = what;
}

// -- tabs: https://www.w3.org/WAI/ARIA/apg/patterns/tabs/ --

function tabbed(list) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const select = (chosen) => {
    for (const tab of tabs) {
      const isChosen = tab === chosen;
      tab.setAttribute("aria-selected", isChosen);
      tab.tabIndex = isChosen ? 0 : -1;
      at(tab.getAttribute("aria-controls")).hidden = !isChosen;
    }
  };
  for (const tab of tabs) {
    const panel = at(tab.getAttribute("aria-controls"));
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", () => select(tab));
  }
  list.addEventListener("keydown", (event) => {
    const here = tabs.indexOf(document.activeElement);
    const step = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (here < 0 || step === undefined) return;
    event.preventDefault();
    const next = tabs[(step + tabs.length) % tabs.length];
    next.focus();
    select(next);
  });
  list.hidden = false;
  list.parentElement.classList.add("has-tabs");
  select(tabs[0]);
}

// -- copy buttons --

async function copy(source) {
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    // Browsers have no clipboard for pages that came by plain http from another machine.
    const selection = window.getSelection();
    selection.selectAllChildren(source);
    const isCopied = document.execCommand("copy");
    selection.removeAllRanges();
    return isCopied;
  }
  return true;
}

function copies(button) {
  const source = button.dataset.copies ? at(button.dataset.copies) : button.parentElement.querySelector("code");
  button.hidden = false;
  button.addEventListener("click", async () => {
    const said = (await copy(source)) ? "Copied" : "Not copied";
    say(said);
    button.textContent = said;
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

// -- the form --

class Refused extends Error {
  constructor(failure, status) {
    super(failure.message ?? `the server has answered with status ${status}`);
    this.code = failure.code ?? status;
    this.traceId = failure.traceId ?? "";
  }
}

function asked() {
  const body = { prompt: at("prompt").value, stream: true };
  if (at("system").value.trim()) body["system prompt"] = at("system").value;
  // The server judges what is in the number fields, so that its own message is seen.
  for (const [name, id] of [["max_tokens", "max-tokens"], ["temperature", "temperature"]]) {
    const field = at(id);
    if (field.value !== "") body[name] = Number(field.value);
  }
  return body;
}

// The JSON objects of an event stream. Throws when it ends before [DONE].
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection was closed before the answer was whole");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

async function answer(signal, onPiece) {
  const headers = { "Content-Type": "application/json", "Cache-Control": "no-cache" };
  const key = at("key").value.trim();
  if (key) headers["Ocp-Apim-Subscription-Key"] = key;
  const reply = await fetch("v1/getData", { method: "POST", headers, body: JSON.stringify(asked()), signal });
  if (!reply.ok) throw new Refused(await reply.json().catch(() => ({})), reply.status);
  let last = {};
  for await (const event of events(reply)) {
    if (event.code) throw new Refused(event, event.code);
    onPiece(event.response);
    last = event;
  }
  return last;
}

function list(place, pairs) {
  place.replaceChildren(
    ...pairs.map(([name, what]) => {
      const row = document.createElement("div");
      const [term, value] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      value.textContent = what;
      row.append(term, value);
      return row;
    }),
  );
}

function showError(error) {
  const place = at("error");
  const title = document.createElement("strong");
  title.textContent = error.code ? `Error ${error.code}` : "No answer";
  const message = document.createElement("p");
  message.textContent = error.message;
  place.replaceChildren(title, message);
  if (error.traceId) {
    const trace = document.createElement("p");
    trace.className = "trace";
    trace.textContent = `traceId ${error.traceId}`;
    place.append(trace);
  }
  place.hidden = false;
}

const seconds = (since) => `${((performance.now() - since) / 1000).toFixed(2)} s`;

function figures(end, started, first) {
  const used = end.usage;
  const passed = (performance.now() - (first ?? started)) / 1000;
  const speed = used.completion_tokens > 1 && passed > 0 ? `${Math.round((used.completion_tokens - 1) / passed)} tokens/s` : "–";
  return [
    ["Ended by", end.finish_reason === "length" ? "length (cut)" : end.finish_reason],
    ["Prompt", `${used.prompt_tokens} tokens`],
    ["Answer", `${used.completion_tokens} tokens`],
    ["Total", `${used.total_tokens} tokens`],
    ["Speed", speed],
    ["Trace id", end.traceId],
  ];
}

function form() {
  const [send, stop, written, progress] = ["send", "stop", "written", "progress"].map(at);
  let running = null;

  async function ask() {
    if (running) return;
    running = new AbortController();
    const started = performance.now();
    let first = null;
    at("error").hidden = true;
    at("outcome").hidden = false;
    written.textContent = "";
    list(at("figures"), []);
    written.setAttribute("aria-busy", "true");
    progress.textContent = "Waiting for the first word …";
    send.disabled = true;
    stop.disabled = false;
    try {
      const end = await answer(running.signal, (piece) => {
        if (first === null) {
          first = performance.now();
          progress.textContent = "Writing …";
        }
        written.append(piece); // a text node
      });
      progress.textContent = `Done in ${seconds(started)}.`;
      list(at("figures"), figures(end, started, first));
    } catch (error) {
      if (error.name === "AbortError") {
        progress.textContent = `Stopped after ${seconds(started)}; the server has stopped too.`;
      } else {
        progress.textContent = "";
        at("outcome").hidden = written.textContent === "";
        showError(error);
      }
    }
    written.removeAttribute("aria-busy");
    const hadFocus = document.activeElement === stop;
    running = null;
    stop.disabled = true;
    send.disabled = false;
    if (hadFocus) send.focus();
  }

  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  at("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
  });
  stop.addEventListener("click", () => running?.abort());
}

// -- a model that is loading --

async function watch() {
  const badge = at("state");
  while (badge.dataset.state === "loading") {
    await new Promise((resolve) => setTimeout(resolve, 1500));
    const now = await fetch("ready")
      .then((reply) => reply.json())
      .catch(() => ({ status: "failed" }));
    badge.dataset.state = badge.textContent = now.status;
  }
}

document.querySelectorAll("[role=tablist]").forEach(tabbed);
document.querySelectorAll("button.copy").forEach(copies);
form();
watch();
