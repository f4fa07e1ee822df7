// A client's own test suite against `llamacli serve`: the server is started here, and told over HTTP what to do.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, beforeEach, test } from "node:test";

import { Client } from "./client.mjs";

const place = mkdtempSync(join(tmpdir(), "llama2-"));
let server, api;

function tell(path, body, method = "POST") {
  const headers = { "Ocp-Apim-Subscription-Key": api.key };
  return fetch(`${api.url}/simulation${path}`, { method, headers, body: body && JSON.stringify(body) });
}

before(async () => {
  const ready = join(place, "ready.json");
  const empty = join(place, "empty.jsonl");
  writeFileSync(empty, '{"format": "llamacli-recording", "version": 1, "model": "llama-2"}\n');
  const options = ["serve", "--port", "0", "--ready-file", ready, "--replay", empty, "--allow-simulation", "--until-eof"];
  const environment = { ...process.env, LLAMACLI_API_KEY: "a-key-for-tests", LLAMACLI_HOME: join(place, "home") };
  server = spawn(process.env.LLAMACLI ?? "llamacli", options, {
    env: environment,
    stdio: ["pipe", "ignore", "ignore"], // it ends with the pipe, and so with us, however we end
  });
  while (!existsSync(ready)) {
    assert.equal(server.exitCode, null, "the server has not started");
    await new Promise((done) => setTimeout(done, 10));
  }
  api = JSON.parse(readFileSync(ready, "utf8"));
});

after(async () => {
  const ended = new Promise((done) => server.on("exit", done));
  server.kill("SIGTERM");
  await ended;
  rmSync(place, { recursive: true });
});

beforeEach(() => tell("", undefined, "DELETE"));

test("an answer, and what was asked for it", async () => {
  await tell("/replies", { text: "Llama 2 is a family of models." });
  assert.equal(await new Client(api.url, api.key).ask("What is Llama 2?"), "Llama 2 is a family of models.");
  const { requests } = await (await tell("/requests", undefined, "GET")).json();
  assert.deepEqual(JSON.parse(Buffer.from(requests[0].body, "base64").toString()), { prompt: "What is Llama 2?" });
});

for (const status of [400, 500, 503]) {
  test(`${status} is told with its reason`, async () => {
    await tell("/replies", { status, message: "out of llamas" });
    await assert.rejects(new Client(api.url, api.key).ask("hi"), { status, message: "out of llamas" });
  });
}

test("a wrong key is told", async () => {
  await assert.rejects(new Client(api.url, "wrong").ask("hi"), { status: 401 });
});

test("a busy server is asked again", async () => {
  await tell("/rules", { simulate: "status=429, retry-after=0", count: 2 });
  await tell("/replies", { text: "at last" });
  assert.equal(await new Client(api.url, api.key).ask("hi"), "at last");
});

test("a stream that is cut is no answer", async () => {
  await tell("/replies", { text: "one two three four" });
  await tell("/rules", { simulate: "cut-after=2" });
  const got = [];
  await assert.rejects(async () => {
    for await (const piece of new Client(api.url, api.key).stream("hi")) got.push(piece);
  });
  assert.deepEqual(got, ["one", " two"]);
});

test("a slow stream shows its first piece before its last", async () => {
  await tell("/replies", { text: "one two three" });
  await tell("/rules", { simulate: "token-rate=20" });
  const arrivals = [];
  for await (const _ of new Client(api.url, api.key).stream("hi")) arrivals.push(performance.now());
  assert.ok(arrivals.at(-1) - arrivals[0] > 50);
});
