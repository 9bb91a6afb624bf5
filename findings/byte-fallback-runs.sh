#!/usr/bin/env bash
# One invalid byte makes `tokenizers` forget valid text beside it.
#
# tokenizers 0.23.3, a byte-fallback decoder as in Llama 2, Mistral and Gemma. The expected reading of the byte
# tokens 41 0A FF and the word "x" is "A", a line break, U+FFFD and "x", as SentencePiece has it. What comes instead:
#
#   whole: '���x'                          the letter and the line break, each a valid token, are gone
#   stream: ['A', '\n', None]
#   stream: Exception Invalid prefix encountered while decoding stream. Token ID:
#
# So the text that DecodeStream has handed out is no prefix of what decode returns, and the stream cannot go on:
# a model that samples one stray byte after a line break (a byte token in Llama 2) ends its request.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet --no-deps tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
from tokenizers import Tokenizer, decoders, models

vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"x": 256}
tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

whole = tokenizer.decode([0x41, 0x0A, 0xFF, 256])
print("whole:", repr(whole))
assert whole == "\ufffd" * 3 + "x"

stream = decoders.DecodeStream()
pieces = [stream.step(tokenizer, token) for token in (0x41, 0x0A, 0xFF)]
print("stream:", pieces)
assert pieces == ["A", "\n", None]
try:
    print("stream:", repr(stream.step(tokenizer, 256)))
except Exception as error:
    print("stream:", type(error).__name__, str(error)[:60])
    assert "Invalid prefix" in str(error)
else:
    raise SystemExit("the stream goes on now")
PYTHON
