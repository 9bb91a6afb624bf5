#!/usr/bin/env bash
# LlamaIndex' structured output for OpenAI-compatible servers sends tool_choice without tools, and doubled braces.
#
# llama-index-llms-openai-like 0.8.1 with llama-index-core as it pins it (Python 3.11); OpenAILike(is_chat_model=True)
# with as_structured_llm(Model).complete("hi"). Seen on 2026-11-30, the body that arrives:
#   tool_choice "required", no field `tools`, no response_format
#   the user's message ends in a schema that was escaped for a format string and never filled in:
#   {{"properties": {{"x": {{"title": "X", "type": "integer"}}}}, ...
#
# OpenAI's API and vLLM answer tool_choice without tools with 400. A server that ignores it lets the model see "{{",
# which small models copy into their answer, so that the JSON cannot be parsed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check llama-index-llms-openai-like==0.8.1

cat > check.py <<'PY'
import json, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

class Answer(BaseModel):
    x: int

bodies = []

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        choice = {"index": 0, "message": {"role": "assistant", "content": '{"x": 1}'}, "finish_reason": "stop"}
        answer = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
model = OpenAILike(model="m", api_base=url, api_key="k", is_chat_model=True)
print(model.as_structured_llm(Answer).complete("hi"))
[body] = bodies
print(json.dumps(body))
prompt = body["messages"][-1]["content"]
same = body.get("tool_choice") == "required" and "tools" not in body and "response_format" not in body
sys.exit(0 if same and '{{"x": {{"title": "X", "type": "integer"}}}}' in prompt else "CHANGED")
PY
venv/bin/python check.py
