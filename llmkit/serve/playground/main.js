// The page: columns with a model and a conversation each, one message for all of them.

import { Answer, bubble } from "./answer.js";
import { chat, models } from "./client.js";
import { lay, read } from "./settings.js";
import { watch } from "./tip.js";

const by = (id) => document.getElementById(id);
const columns = [];
let running = null;

class Column {
  constructor() {
    const made = by("column").content.cloneNode(true).firstElementChild;
    this.made = made;
    this.model = made.querySelector(".model");
    this.talk = made.querySelector(".talk");
    this.said = [];
    by("columns").append(made);
  }

  name(number, several) {
    this.made.setAttribute("aria-label", several ? `Column ${number}` : "Conversation");
  }

  offer(known) {
    const before = this.model.value;
    const bases = known.filter((one) => !one.parent), adapters = known.filter((one) => one.parent);
    this.model.replaceChildren(group("Models", bases), ...(adapters.length ? [group("Adapters", adapters)] : []));
    const kept = known.some((one) => one.id === before);
    const other = columns.indexOf(this) > 0 && known.length > 1;
    this.model.value = kept ? before : (known[other ? 1 : 0]?.id ?? "");
  }

  clear() {
    this.said = [];
    this.talk.replaceChildren();
  }

  async ask(text, settings, key, signal) {
    const mine = { role: "user", content: text };
    this.talk.append(bubble("user", text, "You").made);
    const answer = new Answer(this.talk, this.model.value);
    const system = settings.system ? [{ role: "system", content: settings.system }] : [];
    const body = { ...settings.body, model: this.model.value, messages: [...system, ...this.said, mine] };
    try {
      for await (const chunk of chat(body, key, signal)) {
        const seen = answer.made.getBoundingClientRect().bottom < innerHeight + 80;
        answer.take(chunk);
        if (seen) answer.made.scrollIntoView({ block: "end" }); // whoever reads further up is left there
      }
      answer.end();
    } catch (cause) {
      if (signal.aborted) answer.end("stopped");
      else answer.end(cause.message, true);
    }
    if (answer.text) this.said.push(mine, { role: "assistant", content: answer.text });
    return answer;
  }
}

function group(title, known) {
  const made = document.createElement("optgroup");
  made.label = title;
  made.append(...known.map((one) => new Option(one.id, one.id)));
  return made;
}

function trouble(text) {
  by("trouble").textContent = text;
  by("trouble").hidden = !text;
}

async function offer() {
  try {
    const known = await models(by("key").value);
    for (const column of columns) column.offer(known);
    trouble("");
  } catch (cause) {
    trouble(`The models could not be listed: ${cause.message}`);
  }
}

function arrange() {
  const wanted = by("compare").checked ? 2 : 1;
  while (columns.length > wanted) columns.pop().made.remove();
  while (columns.length < wanted) columns.push(new Column());
  columns.forEach((column, at) => column.name(at + 1, wanted > 1));
}

function colour() {
  by("columns").classList.toggle("coloured", by("colour").checked);
}

function busy(now) {
  by("send").disabled = by("compare").disabled = by("clear").disabled = now;
  by("stop").disabled = !now;
}

async function send() {
  const text = by("prompt").value;
  if (!text.trim() || running) return;
  let settings;
  try {
    settings = read(by("fields"), by("colour").checked);
  } catch (cause) {
    by("settings").open = true;
    return trouble(cause.message);
  }
  trouble("");
  running = new AbortController();
  busy(true);
  by("prompt").value = "";
  const { signal } = running, key = by("key").value;
  const answers = await Promise.all(columns.map((column) => column.ask(text, settings, key, signal)));
  running = null;
  busy(false);
  by("told").textContent = answers.map((answer) => `${answer.text} (${answer.foot.textContent})`).join("; ");
}

by("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
by("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
by("stop").addEventListener("click", () => running?.abort());
by("clear").addEventListener("click", () => columns.forEach((column) => column.clear()));
by("compare").addEventListener("change", () => {
  arrange();
  offer();
});
by("colour").addEventListener("change", colour);
by("key").addEventListener("change", offer);
by("reset").addEventListener("click", () => by("fields").reset());
by("fields").addEventListener("submit", (event) => event.preventDefault());
by("theme").addEventListener("change", (event) => {
  document.documentElement.dataset.theme = event.target.value;
});
lay(by("fields"));
arrange();
colour();
watch(by("columns"));
offer();
