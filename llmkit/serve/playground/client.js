// Speaks the OpenAI routes, and nothing else.

export class Refused extends Error {}

function headers(key) {
  const own = { "content-type": "application/json" };
  if (key) own.authorization = `Bearer ${key}`;
  return own;
}

async function refusal(answer) {
  const text = await answer.text();
  try {
    const error = JSON.parse(text).error;
    return new Refused(`${answer.status}: ${error.message ?? error}`);
  } catch {
    return new Refused(`${answer.status}: ${text.slice(0, 300) || answer.statusText}`);
  }
}

// The names that can be asked for; adapters have names of their own.
export async function models(key) {
  const answer = await fetch("v1/models", { headers: headers(key) });
  if (!answer.ok) throw await refusal(answer);
  return (await answer.json()).data;
}

// The chunks of a streamed chat, as they come. A stream that ends without its mark broke off, which is an error.
export async function* chat(body, key, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(key), body: JSON.stringify(asked), signal,
  });
  if (!answer.ok) throw await refusal(answer);
  for await (const data of events(answer.body.getReader())) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.message ?? String(chunk.error));
    yield chunk;
  }
  throw new Refused("the stream broke off");
}

// The data of server-sent events.
async function* events(reader) {
  const decoder = new TextDecoder();
  let held = "", data = [];
  for (;;) {
    const { done, value } = await reader.read();
    held += decoder.decode(value ?? new Uint8Array(), { stream: !done });
    const lines = held.split(/\r\n|\n|\r(?=.)/s);
    held = lines.pop();
    for (const line of lines) {
      if (line === "" && data.length) yield data.join("\n"), data = [];
      else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    }
    if (done) return;
  }
}
