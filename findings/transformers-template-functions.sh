#!/usr/bin/env bash
# A function that is passed to apply_chat_template as a template variable does not reach the template.
#
# transformers 5.23.0, jinja2 3.1.6, tokenizers 0.23.3.
# `apply_chat_template(messages, **kwargs)` makes its keyword arguments variables of the template, and one goes
# before a global of the same name. One would fix the date of a template that calls `strftime_now` by passing
# one's own `strftime_now`. But every value is rebuilt from plain JSON types first, and anything else is replaced
# by a text that says what it was: the template finds the string "<function>", and fails only when it calls it.
#
# Output seen:
#     as a variable: '<function>'
#     strftime_now of one's own: TypeError: 'str' object is not callable
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cat > "$folder/show.py" <<'PY'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

model = models.WordLevel({"a": 0}, unk_token="a")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
messages = [{"role": "user", "content": "x"}]
tokenizer.chat_template = "{{ mine }}"
shown = tokenizer.apply_chat_template(messages, tokenize=False, mine=lambda form: "1999")
print("as a variable:", repr(shown))
tokenizer.chat_template = "{{ strftime_now('%Y') }}"
try:
    tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=lambda form: "1999")
except TypeError as error:
    print("strftime_now of one's own: TypeError:", error)
    raise SystemExit(0 if shown == "<function>" else 1)
raise SystemExit(1)
PY
"$folder/venv/bin/python" "$folder/show.py" 2> /dev/null
