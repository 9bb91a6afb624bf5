#!/usr/bin/env bash
# Inspect's `top_k` does not reach a vLLM-compatible server, although its documentation names vLLM.
#
# inspect-ai 0.3.285, openai 3.57.0 (Python 3.11). GenerateConfig documents top_k as for "Google, HuggingFace, vLLM, and
# SGLang only". Seen on 2026-11-30 with GenerateConfig(max_tokens=5, top_k=3, logprobs=True), the fields of the body:
#   vllm/m (VLLM_BASE_URL)             logprobs, max_tokens, messages, model
#   openai-api/mine/m (MINE_BASE_URL)  logprobs, max_tokens, messages, model
# No warning is given, so an evaluation that asks for top-k sampling measures plain sampling. extra_body carries it:
#   GenerateConfig(extra_body={"top_k": 3})
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check inspect-ai==0.3.285 openai==3.57.0

cat > check.py <<'PY'
import asyncio, json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

bodies = []

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer({"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "x"}]})

    def do_POST(self):
        bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        self.answer({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
os.environ.update(VLLM_BASE_URL=url, VLLM_API_KEY="k", MINE_BASE_URL=url, MINE_API_KEY="k")
from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model

async def ask(name, **config):
    bodies.clear()
    await get_model(name, config=GenerateConfig(max_tokens=5, **config)).generate([ChatMessageUser(content="hi")])
    print(name, config, json.dumps(bodies))
    return bodies[-1]

async def main():
    dropped = [await ask(name, top_k=3, logprobs=True) for name in ("vllm/m", "openai-api/mine/m")]
    carried = await ask("vllm/m", extra_body={"top_k": 3})
    return all("top_k" not in body for body in dropped) and carried.get("top_k") == 3

sys.exit(0 if asyncio.run(main()) else "CHANGED")
PY
venv/bin/python check.py
