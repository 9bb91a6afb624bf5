#!/usr/bin/env bash
# What /v1/completions receives when a client is given chat messages for a model that it takes for a plain one.
#
# litellm 1.110.2, llama-index-llms-openai-like 0.8.1, dspy 3.4.1 (Python 3.11); the messages are
# [system "s", user "hi"] each time. Seen on 2026-11-30, the field `prompt` as it arrives:
#   litellm, "text-completion-openai/m"      ["s", "hi"]
#   llama-index, OpenAILike as it comes      "system: s\nuser: hi\nassistant: "
#   dspy, model_type="text"                  "s\n\nhi\n\nBEGIN RESPONSE:"
#
# So LiteLLM asks for one completion per message, and hands its caller choice 0: the continuation of the system
# message alone. It happens without a warning. OpenAILike posts chats to /completions unless is_chat_model=True is set,
# so the model's chat template is never used. A trained adapter, which has seen the template, answers these badly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for package in litellm==1.110.2 llama-index-llms-openai-like==0.8.1 dspy==3.4.1; do
    python3 -m venv "${package%%==*}"
    "${package%%==*}/bin/python" -m pip install --quiet --disable-pip-version-check "$package"
done

cat > stub.py <<'PY'
"""A server that answers any completion with its prompts' number of choices and writes down what it was sent."""
import json, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

seen = []

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        seen.append((self.path, body.get("prompt")))
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        choices = [{"index": i, "text": f"after {p!r}", "finish_reason": "stop"} for i, p in enumerate(prompts)]
        answer = {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": choices}
        data = json.dumps({**answer, "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
MESSAGES = '[{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]'
CLIENTS = {
    "litellm": f"""
import litellm
answer = litellm.completion(model="text-completion-openai/m", api_base="{url}", api_key="k", messages={MESSAGES})
print(answer.choices[0].message.content)
""",
    "llama-index-llms-openai-like": f"""
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
model = OpenAILike(model="m", api_base="{url}", api_key="k")
print(model.chat([ChatMessage(**message) for message in {MESSAGES}]).message.content)
""",
    "dspy": f"""
import dspy
print(dspy.LM("openai/m", api_base="{url}", api_key="k", cache=False, model_type="text")(messages={MESSAGES})[0])
""",
}
EXPECTED = {
    "litellm": (["s", "hi"], "after 's'"),
    "llama-index-llms-openai-like": ("system: s\nuser: hi\nassistant: ", "after"),
    "dspy": ("s\n\nhi\n\nBEGIN RESPONSE:", "after"),
}
failed = False
for name, code in CLIENTS.items():
    seen.clear()
    run = subprocess.run([f"{name}/bin/python", "-c", code], capture_output=True, text=True, timeout=120,
                         env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HOME": ".", "PATH": ""})
    prompt, answer = EXPECTED[name]
    print(name, seen, run.stdout.strip())
    if seen != [("/v1/completions", prompt)] or not run.stdout.strip().startswith(answer):
        print("CHANGED:", name, run.stderr[-500:])
        failed = True
sys.exit(failed)
PY
python3 stub.py
