#!/usr/bin/env bash
# openai 3.54.0: the stream helper throws away plain text that `max_tokens` cut off.
#
# `client.chat.completions.stream(…)` without response_format or tools hands out every event of the stream, the last
# `content.done` too; but get_final_completion() ends in LengthFinishReasonError "Could not
# parse response content as the length limit was reached" when finish_reason is "length", although there is nothing to
# parse. `create(…)` with the same answer returns it. The text is in the exception's `completion` only.
#
# Output seen:
#   events: ['chunk', 'content.delta', 'chunk', 'content.done']
#   get_final_completion: LengthFinishReasonError, which carries 'Once upon'
#   create: 'Once upon' length
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet openai==3.54.0
cd "$folder"
timeout 120 "$folder/venv/bin/python" - <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai

BASE = {"id": "c", "created": 1, "model": "m"}


class Handler(BaseHTTPRequestHandler):
    """Answers every chat with "Once upon", cut off."""

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        message = {"role": "assistant", "content": "Once upon"}
        if body.get("stream"):
            choices = [{"index": 0, "delta": message, "finish_reason": None}], [
                {"index": 0, "delta": {}, "finish_reason": "length"}
            ]
            chunks = [json.dumps({**BASE, "object": "chat.completion.chunk", "choices": each}) for each in choices]
            data = "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"]).encode()
        else:
            choice = {"index": 0, "message": message, "finish_reason": "length"}
            data = json.dumps({**BASE, "object": "chat.completion", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if body.get("stream") else "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
request = {"model": "m", "messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": 2}
with client.chat.completions.stream(**request) as stream:
    print("events:", [event.type for event in stream])
    try:
        stream.get_final_completion()
        raise SystemExit("the behaviour has changed: the answer is returned")
    except openai.LengthFinishReasonError as error:
        carried = error.completion.choices[0].message.content
        print(f"get_final_completion: {type(error).__name__}, which carries {carried!r}")
whole = client.chat.completions.create(**request).choices[0]
print(f"create: {whole.message.content!r} {whole.finish_reason}")
assert carried == whole.message.content == "Once upon" and whole.finish_reason == "length"
PYTHON
