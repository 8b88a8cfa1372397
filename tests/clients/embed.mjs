// Ask the proxy with the official OpenAI client for Node; test_openai_node.py judges the answers.
//
// Standard input:  {"baseURL": "...", "socketPath": "..." or null, "requests": [a body for embeddings.create, ...]}
// Standard output: {"models": [id, ...], "answers": [one per request, ...]}
//   an answer:     {"model", "vectors", "onWire"} or {"error", "status", "code"}
//
// onWire is the JavaScript type of a vector as it came over the wire: "string" for base64, "object" for an array.

import { text } from 'node:stream/consumers';
import OpenAI from 'openai';
import * as undici from 'undici';

const { baseURL, socketPath, requests } = JSON.parse(await text(process.stdin));

// Without a socket: Node's own fetch, as the SDK uses it. With one: an undici Agent, and the fetch of the same undici,
// since an Agent and a fetch of different versions need not fit (the SDK's README asks for a matching pair).
const { send, fetchOptions } = socketPath
  ? { send: undici.fetch, fetchOptions: { dispatcher: new undici.Agent({ connect: { socketPath } }) } }
  : { send: fetch };

let lastReply;
const client = new OpenAI({
  baseURL,
  apiKey: 'any',
  maxRetries: 0, // a retry would hide a failure
  timeout: 30_000,
  fetchOptions,
  fetch: async (url, init) => {
    const reply = await send(url, init);
    lastReply = reply.clone();
    return reply;
  },
});

async function ask(body) {
  try {
    const answer = await client.embeddings.create(body);
    const onWire = typeof (await lastReply.json()).data[0].embedding;
    return { model: answer.model, vectors: answer.data.map((item) => item.embedding), onWire };
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    return { error: error.constructor.name, status: error.status, code: error.code };
  }
}

const answers = [];
for (const body of requests) answers.push(await ask(body));

const models = [];
for await (const model of client.models.list()) models.push(model.id);

process.stdout.write(JSON.stringify({ models, answers }));
