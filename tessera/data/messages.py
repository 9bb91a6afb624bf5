"""Reading one message of a conversation in a training file: what the chat endpoint accepts, and `weight`.

A key with the value null counts as absent, so that exports of other tools (`model_dump()` of OpenAI's client)
can be read unchanged. The result has the form that templates expect: role, content (one text), and name and
weight if they are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tessera.data.jsonl import Problems, kind, shown

#: Roles that have another name in chat templates: "developer" is OpenAI's newer word for "system".
TEMPLATE_ROLES = {"developer": "system"}
ROLES = ("system", "developer", "user", "assistant")
MESSAGE_KEYS = ("role", "content", "name", "weight")

#: Keys that do not affect the text.
_IGNORED = ("annotations", "cache_control", "id", "object", "created_at", "parsed", "timestamp")
_NO_TOOLS = "tool calls cannot be trained; write calls and results as text"
_THOUGHTS = "write the thoughts into content, in the form in which the model should write them"
#: Keys that are allowed only when empty, with the code of the problem and what to do instead.
_REFUSED: Mapping[str, tuple[str, str]] = {
    "tool_calls": ("unsupported_tools", _NO_TOOLS),
    "function_call": ("unsupported_tools", _NO_TOOLS),
    "tool_call_id": ("unsupported_tools", _NO_TOOLS),
    "audio": ("unsupported_content", "the model reads and writes text only; remove it"),
    "refusal": ("unsupported_content", "write the refusal as content"),
    "reasoning": ("unsupported_content", _THOUGHTS),
    "reasoning_content": ("unsupported_content", _THOUGHTS),
    "thinking": ("unsupported_content", _THOUGHTS),
}
#: Names that other tools use for our keys.
_RENAMED: Mapping[str, str] = {
    "from": "call it role, human user and gpt assistant",
    "value": "call it content",
    "text": "call it content",
    "parts": "join their texts as content",
    **dict.fromkeys(("train", "training"), "write weight 1 for true and weight 0 for false"),
}
#: Values of the key "type" that some exports add to a message.
_TYPES = ("text", "message")
_MAX_NAME_CHARS = 256
#: The same limit as in a request to the chat endpoint.
MAX_MESSAGES = 2048


def read_message(item: Any, problems: Problems, where: str, *, is_context: bool = False) -> dict[str, Any]:
    """Return role, content and, if given, name and weight. Add what is wrong to `problems`.

    where: path of the message in its line. is_context: the message is not learned, whatever its weight.
    """
    if not isinstance(item, dict):
        problems.add("wrong_type", f"{where} must be an object with role and content, not {kind(item)}")
        return {}
    item = {key: value for key, value in item.items() if value is not None}
    where += "."
    _check_keys(item, problems, where)
    role = read_text(item, "role", problems, where)
    if role in ("tool", "function", "ipython"):
        problems.add("unsupported_tools", f"{where}role {role}: {_NO_TOOLS}")
        return {}
    is_refused = any(item.get(key) for key in _REFUSED)
    content = None if is_refused and "content" not in item else _content(item, problems, where)
    if role is not None and role not in ROLES:
        problems.add("unknown_role", f"{where}role must be {', '.join(ROLES)}; got {shown(role)}")
    message: dict[str, Any] = {
        "role": role and TEMPLATE_ROLES.get(role, role),
        "content": content,
    }
    if "name" in item:
        message["name"] = _name(item, problems, where)
    if "weight" in item:
        message["weight"] = _weight(item["weight"], role, problems, where)
    is_learned = role == "assistant" and not is_context and message.get("weight", 1)
    if is_learned and content is not None and not content.strip():
        advice = "write what the assistant should say, or set weight to 0 if it should not be learned"
        problems.add("empty_assistant", f"{where}content is empty; {advice}")
    return message


def read_messages(
    value: Any, where: str, problems: Problems, *, is_context: bool = False
) -> tuple[dict[str, Any], ...] | None:
    """Return the messages of a list, or None if anything is wrong with it. is_context: none is learned.

    where: path of the list in its line.
    """
    if not isinstance(value, list):
        problems.add("wrong_type", f"{where} must be a list, not {kind(value)}")
        return None
    if not value:
        problems.add("empty_messages", f"{where} is empty; give at least one assistant message")
        return None
    if len(value) > MAX_MESSAGES:
        message = f"{where} has {len(value)} messages, the limit is {MAX_MESSAGES}; split the conversation"
        problems.add("too_many_messages", message)
        return None
    before = problems.total
    messages = [
        read_message(item, problems, f"{where}[{index}]", is_context=is_context)
        for index, item in enumerate(value)
    ]
    return tuple(messages) if problems.total == before else None


def check_learned(messages: Sequence[Mapping[str, Any]], where: str, problems: Problems) -> None:
    """Report a list of messages of which none is learned."""
    assistant = [message for message in messages if message["role"] == "assistant"]
    if not assistant:
        message = f"no message of {where} has the role assistant: there is nothing to learn"
        problems.add("no_assistant_message", message)
    elif not any(message.get("weight", 1) for message in assistant):
        problems.add("nothing_trained", "all assistant messages have weight 0: there is nothing to learn")


def check_keys(
    value: Mapping[str, Any],
    known: tuple[str, ...],
    problems: Problems,
    *,
    where: str = "",
    knows_tools: bool = False,
) -> None:
    """Report the unknown keys of an object. Beside messages, empty keys of OpenAI's for tools may stand."""
    place = f"{where[:-1]}: " if where else ""
    for key, item in value.items():
        if key in ("tools", "functions", "parallel_tool_calls") and (knows_tools or "messages" in known):
            if item and key != "parallel_tool_calls":
                message = f"{where}{key}: tool calls cannot be trained; write calls and results as text"
                problems.add("unsupported_tools", message)
        elif key not in known:
            problems.add(
                "unknown_key", f"{place}unknown key {shown(key)}; remove it (known here: {', '.join(known)})"
            )


def _check_keys(item: Mapping[str, Any], problems: Problems, where: str) -> None:
    for key, value in item.items():
        if key in _REFUSED:
            code, advice = _REFUSED[key]
            if value not in ([], {}, "", False):
                problems.add(code, f"{where}{key}: {advice}")
        elif key == "type" and value in ("", *_TYPES):
            continue
        elif key not in MESSAGE_KEYS and key not in _IGNORED:
            hint = f"known here: {', '.join(MESSAGE_KEYS)}"
            advice = _RENAMED.get(key, "remove it")
            problems.add("unknown_key", f"{where[:-1]}: unknown key {shown(key)}; {advice} ({hint})")


def _content(item: Mapping[str, Any], problems: Problems, where: str) -> str | None:
    """Return the text of a message, with its parts joined."""
    parts = item.get("content")
    if not isinstance(parts, list):
        return read_text(item, "content", problems, where)
    if not parts:
        problems.add("wrong_type", f"{where}content is an empty list; give a text")
        return None
    texts = [_part(part, problems, f"{where}content[{index}]") for index, part in enumerate(parts)]
    return None if None in texts else "".join(text for text in texts if text is not None)


def _part(part: Any, problems: Problems, where: str) -> str | None:
    if not isinstance(part, dict):
        problems.add("wrong_type", f'{where} must be {{"type": "text", "text": "…"}}, not {kind(part)}')
        return None
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") != "text":
        given = shown(part["type"]) if isinstance(part.get("type"), str) else kind(part.get("type"))
        problems.add("unsupported_content", f'{where}: only parts of type "text" are supported, not {given}')
        return None
    for key in part:
        if key not in ("type", "text", "annotations", "cache_control"):
            problems.add(
                "unknown_key", f"{where}: unknown key {shown(key)}; remove it (known here: type, text)"
            )
    return read_text(part, "text", problems, f"{where}.")


def _name(item: Mapping[str, Any], problems: Problems, where: str) -> str | None:
    name = read_text(item, "name", problems, where)
    if name is not None and len(name) > _MAX_NAME_CHARS:
        problems.add("invalid_name", f"{where}name may have {_MAX_NAME_CHARS} characters, not {len(name)}")
    return name


def _weight(weight: Any, role: str | None, problems: Problems, where: str) -> int:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        problems.add("invalid_weight", f"{where}weight must be 0 (do not learn) or 1 (learn)")
        return 0
    if weight == 1 and role is not None and role != "assistant":
        problems.add("invalid_weight", f"{where}weight 1 is for assistant messages; remove it here")
    return int(weight)


def read_text(item: Mapping[str, Any], key: str, problems: Problems, where: str = "") -> str | None:
    """Return the string at `key`. If it is missing or cannot be encoded, add the problem and return None."""
    if key not in item:
        problems.add("missing_key", f"{where}{key} is missing")
        return None
    text = item[key]
    if not isinstance(text, str):
        problems.add("wrong_type", f"{where}{key} must be a string, not {kind(text)}")
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        problems.add("lone_surrogate", f"{where}{key} contains half of a surrogate pair; remove it")
        return None
    return text
