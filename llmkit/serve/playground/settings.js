// All that can be set of how an answer is sampled. What is left empty is not sent: the server has its own defaults.

const NUMBER = "number", LINES = "lines", JSON_TEXT = "json", FLAG = "flag", TEXT = "text";

const FIELDS = [
  ["system", "System message", TEXT],
  ["temperature", "Temperature", NUMBER, 0, 2, 0.1],
  ["top_p", "Top p", NUMBER, 0, 1, 0.05],
  ["top_k", "Top k", NUMBER, 0, null, 1],
  ["min_p", "Min p", NUMBER, 0, 1, 0.05],
  ["max_tokens", "Most tokens", NUMBER, 1, null, 1],
  ["min_tokens", "Fewest tokens", NUMBER, 0, null, 1],
  ["seed", "Seed", NUMBER, 0, null, 1],
  ["repetition_penalty", "Repetition penalty", NUMBER, 0.01, 10, 0.05],
  ["presence_penalty", "Presence penalty", NUMBER, -2, 2, 0.1],
  ["frequency_penalty", "Frequency penalty", NUMBER, -2, 2, 0.1],
  ["stop", "Stop texts, one a line", LINES],
  ["bad_words", "Texts that are not made, one a line", LINES],
  ["logit_bias", "Logit bias, JSON by token id", JSON_TEXT],
  ["response_format", "Response format, JSON", JSON_TEXT],
  ["top_logprobs", "Alternatives shown", NUMBER, 0, 20, 1],
  ["ignore_eos", "Go on past the end", FLAG],
];

function input([name, title, kind, least, most, step]) {
  const long = kind === LINES || kind === JSON_TEXT || kind === TEXT;
  const made = document.createElement(long ? "textarea" : "input");
  made.id = `set-${name}`;
  made.name = name;
  if (long) made.rows = 2;
  if (kind === FLAG) made.type = "checkbox";
  if (kind === NUMBER) {
    made.type = "number";
    made.min = least;
    made.step = step === 1 ? 1 : "any";
    if (most !== null) made.max = most;
    made.placeholder = "default";
  }
  const label = document.createElement("label");
  label.className = long ? "tall" : "";
  label.append(title, made);
  return label;
}

export function lay(form) {
  form.replaceChildren(...FIELDS.map(input));
}

// What is set, by the names of the OpenAI routes; the system message is apart. Throws what to tell the user.
export function read(form, coloured) {
  const body = {};
  let system = "";
  for (const [name, title, kind] of FIELDS) {
    const field = form.elements.namedItem(name);
    const text = field.value.trim();
    if (kind === FLAG ? !field.checked : text === "" && field.validity.valid) continue;
    if (!field.validity.valid) throw new Error(`${title}: ${field.validationMessage}`);
    if (kind === TEXT) system = field.value;
    else if (kind === FLAG) body[name] = true;
    else if (kind === NUMBER) body[name] = Number(text);
    else if (kind === LINES) body[name] = field.value.split("\n").filter((line) => line !== "");
    else body[name] = parsed(title, text);
  }
  if (coloured) Object.assign(body, { logprobs: true, top_logprobs: body.top_logprobs ?? 5 });
  else delete body.top_logprobs;
  return { body, system };
}

function parsed(title, text) {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new Error(`${title}: ${cause.message}`);
  }
}
