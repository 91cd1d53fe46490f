// One answer on the page. What a model says only ever becomes text nodes, never markup.

function element(name, className, ...inside) {
  const made = document.createElement(name);
  made.className = className;
  made.append(...inside);
  return made;
}

// `by` is who says it.
export function bubble(role, text, by) {
  const body = element("div", "text", text);
  const name = element("div", "foot by", by);
  const made = element("article", `said ${role}`, name, body);
  return { made, body };
}

// 0 (unlikely) to 4 (likely).
export function shade(logprob) {
  const p = Math.exp(logprob);
  return p < 0.05 ? 0 : p < 0.25 ? 1 : p < 0.5 ? 2 : p < 0.9 ? 3 : 4;
}

export class Answer {
  constructor(talk, model) {
    const { made, body } = bubble("assistant", "", model);
    this.text = "";
    this.body = body;
    this.began = performance.now();
    this.first = null;
    this.finish = null;
    this.usage = null;
    this.thoughts = null;
    this.foot = element("div", "foot", "waiting");
    made.append(this.foot);
    made.setAttribute("aria-busy", "true");
    talk.append(made);
    this.made = made;
  }

  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    for (const choice of chunk.choices ?? []) {
      const delta = choice.delta ?? {};
      const thought = delta.reasoning_content ?? delta.reasoning;
      if (thought) this.think(thought);
      if (delta.content) this.say(delta.content, choice.logprobs?.content ?? []);
      for (const call of delta.tool_calls ?? []) this.say(`${call.function?.name ?? ""}${call.function?.arguments ?? ""}`, []);
      if (choice.finish_reason) this.finish = choice.finish_reason;
    }
  }

  started() {
    if (this.first === null) {
      this.first = performance.now();
      this.foot.textContent = "answering";
    }
  }

  think(text) {
    this.started();
    if (!this.thoughts) {
      this.thoughts = element("div", "thoughts");
      const summary = element("summary", "", "Reasoning");
      this.body.before(element("details", "", summary, this.thoughts));
    }
    this.thoughts.append(text);
  }

  // A span for each token where their texts are the text that came, else one for all of them.
  say(text, tokens) {
    this.started();
    this.text += text;
    if (!tokens.length) return this.body.append(text);
    const split = tokens.map((token) => token.token).join("") === text;
    const groups = split ? tokens.map((token) => [token.token, [token]]) : [[text, tokens]];
    for (const [part, own] of groups) {
      const span = element("span", `token p${shade(Math.min(...own.map((token) => token.logprob)))}`, part);
      span.tokens = own;
      this.body.append(span);
    }
    this.body.tabIndex = 0;
    this.body.setAttribute("aria-label", "Answer; the arrow keys go from token to token");
  }

  end(how, bad = false) {
    const parts = [how ?? this.finish ?? "ended"];
    const tokens = this.usage?.completion_tokens;
    if (tokens) parts.push(`${tokens} tokens`);
    const drafted = this.usage?.completion_tokens_details?.accepted_prediction_tokens;
    if (drafted && tokens > drafted) parts.push(`${(tokens / (tokens - drafted)).toFixed(2)} tokens a step`);
    if (this.first !== null) {
      parts.push(`first after ${((this.first - this.began) / 1000).toFixed(2)} s`);
      const rest = (performance.now() - this.first) / 1000;
      if (tokens > 1 && rest > 0) parts.push(`${((tokens - 1) / rest).toFixed(1)} tokens/s`);
    }
    this.foot.textContent = parts.join(" · ");
    this.foot.classList.toggle("bad", bad);
    this.made.removeAttribute("aria-busy");
  }
}
