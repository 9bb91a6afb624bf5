#!/usr/bin/env bash
# OpenAI's clients send `parsed` back to the server when a message of theirs is put into the next turn's history.
#
# openai 3.57.0 (Python 3.11) and openai 6.49.0 (Node 20). Seen on 2026-11-30, the assistant message of turn two:
#   Python, message of create()                  {"role", "content"}
#   Python, message of parse()                   {"role", "content", "tool_calls": null, "parsed": {"x": 1}}
#   Node, message of parse()                     {"role", "content", "parsed": {"x": 1}}
#   Node, finalMessage() of a plain stream       {"role", "content", "refusal": null, "parsed": null}
#
# `parsed` is no field of the API. A server that refuses unknown fields of messages fails the second turn of every
# conversation whose first answer was read with parse(); one that renders whatever it is given shows it to the model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check openai==3.57.0 pydantic==2.14.3
npm install --silent --no-audit --no-fund openai@6.49.0 >/dev/null

cat > two_turns.py <<'PY'
import sys, warnings
import openai
from pydantic import BaseModel

class Answer(BaseModel):
    x: int

warnings.simplefilter("ignore")  # pydantic warns that the field `parsed` was expected to be empty
client = openai.OpenAI(base_url=sys.argv[1], api_key="k")
first = [{"role": "user", "content": "hi"}]
plain = client.chat.completions.create(model="m", messages=first).choices[0].message
read = client.chat.completions.parse(model="m", messages=first, response_format=Answer).choices[0].message
for message in (plain, read):
    client.chat.completions.create(model="m", messages=[*first, message, *first])
PY
cat > two_turns.mjs <<'JS'
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "k" });
const first = [{ role: "user", content: "hi" }];
const schema = { type: "object", properties: { x: { type: "integer" } }, required: ["x"], additionalProperties: false };
const format = { type: "json_schema", json_schema: { name: "x", schema } };
const read = (await client.chat.completions.parse({ model: "m", messages: first, response_format: format })).choices[0].message;
const streamed = await client.chat.completions.stream({ model: "m", messages: first }).finalMessage();
for (const message of [read, streamed])
  await client.chat.completions.create({ model: "m", messages: [...first, message, ...first] });
JS
cat > stub.py <<'PY'
"""Answers every chat with {"x": 1} and keeps the assistant messages of the second turns."""
import json, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

histories = []

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if len(body["messages"]) == 3:
            histories.append(body["messages"][1])
        head = {"id": "c", "created": 1, "model": "m"}
        message = {"role": "assistant", "content": '{"x": 1}'}
        if body.get("stream"):
            chunk = {**head, "object": "chat.completion.chunk"}
            chunks = [{**chunk, "choices": [{"index": 0, "delta": message, "finish_reason": None}]},
                      {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
            data = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
        else:
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            data = json.dumps({**head, "object": "chat.completion", "choices": [choice]})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if body.get("stream") else "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
subprocess.run(["venv/bin/python", "two_turns.py", url], check=True, timeout=120)
subprocess.run(["node", "two_turns.mjs", url], check=True, timeout=120)
for message in histories:
    print(json.dumps(message))
base = {"role": "assistant", "content": '{"x": 1}'}
expected = [base, {**base, "tool_calls": None, "parsed": {"x": 1}}, {**base, "parsed": {"x": 1}},
            {**base, "refusal": None, "parsed": None}]
sys.exit(0 if histories == expected else "CHANGED")
PY
python3 stub.py
