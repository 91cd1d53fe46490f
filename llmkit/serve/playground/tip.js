// How likely a token was, and what else it could have been: by the mouse, or from token to token by the arrow keys.

const tip = document.getElementById("tip");
const told = document.getElementById("told");

function percent(logprob) {
  const p = Math.exp(logprob) * 100;
  return p >= 0.1 ? `${p.toFixed(1)} %` : p > 0 ? `${p.toExponential(1)} %` : "0 %";
}

function shown(text) {
  return text.replace(/\n/g, "\\n").replace(/\t/g, "\\t").replace(/^ | $/g, "\u00b7");
}

function row(token, chosen) {
  const made = document.createElement("tr");
  made.className = chosen ? "chosen" : "";
  for (const text of [shown(token.token), percent(token.logprob)]) {
    const cell = document.createElement("td");
    cell.textContent = text;
    made.append(cell);
  }
  return made;
}

function rows(tokens) {
  return tokens.flatMap((token) => {
    const others = (token.top_logprobs ?? []).filter((other) => other.token !== token.token);
    return [row(token, true), ...others.map((other) => row(other, false))];
  });
}

function show(span) {
  hide();
  if (!span.closest(".coloured")) return;
  const table = document.createElement("table");
  table.append(...rows(span.tokens));
  tip.replaceChildren(table);
  tip.hidden = false;
  span.classList.add("here");
  const at = span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const above = at.bottom + size.height + 8 > innerHeight;
  tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 4))}px`;
  tip.style.top = `${above ? Math.max(4, at.top - size.height - 4) : at.bottom + 4}px`;
}

function hide() {
  tip.hidden = true;
  for (const span of document.querySelectorAll(".token.here")) span.classList.remove("here");
}

function step(body, by) {
  const spans = [...body.querySelectorAll(".token")];
  const here = spans.findIndex((span) => span.classList.contains("here"));
  const next = spans[Math.max(0, Math.min(spans.length - 1, here < 0 ? 0 : here + by))];
  if (!next) return;
  next.scrollIntoView({ block: "nearest" });
  show(next);
  told.textContent = [...tip.querySelectorAll("tr")].map((line) => line.innerText.replace(/\t/g, " ")).join(", ");
}

export function watch(columns) {
  columns.addEventListener("mouseover", (event) => {
    if (event.target.classList.contains("token")) show(event.target);
    else hide();
  });
  columns.addEventListener("mouseleave", hide);
  columns.addEventListener("focusout", hide);
  columns.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by || !event.target.classList.contains("text")) return;
    event.preventDefault();
    step(event.target, by);
  });
}
