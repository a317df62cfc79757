// OpenAI's own client for Node, unmodified: whole, streamed, listed, refused. Prints one JSON object.
const OpenAI = require("openai").default;

async function main() {
  const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "x", maxRetries: 0 });
  const messages = [{ role: "user", content: "hi" }];
  const options = { model: "tiny", temperature: 0, max_tokens: 8 };
  const chat = await client.chat.completions.create({ ...options, messages });
  const completion = await client.completions.create({ ...options, prompt: "abc", logprobs: 2 });
  const stream = await client.chat.completions.create({ ...options, messages, stream: true, stream_options: { include_usage: true } });
  let text = "", usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  let refusal = null;
  try {
    await client.chat.completions.create({ ...options, messages, temperature: 9 });
  } catch (error) {
    refusal = { kind: error.constructor.name, status: error.status, param: error.param };
  }
  console.log(JSON.stringify({ chat, completion, text, usage, models, refusal }));
}

main().catch((error) => { console.error(error); process.exit(1); });
