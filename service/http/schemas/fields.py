"""Fields that a request may carry although nothing acts on them, and advice for those that are refused.

These three tables alone decide what happens to a name that is not a field of its schema:

    ignored   harmless with any value: no token and no number of an answer depends on it
    neutral   harmless with the values listed, which request what happens anyway; refused with any other
    advice    never accepted; the error names what to use instead

`null` means "not given" for every name. Any other name is an unknown field and is refused.
`docs/compatibility.md` shows `IGNORED` and `NEUTRAL`, and a test compares the two.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tessera.queue.hyperparameters import HYPERPARAMETERS

#: The values by which a request does not use a feature.
UNUSED: tuple[Any, ...] = ([], {}, "", False)


#: The most characters of a name that the caller chose which an error shows.
MAX_NAME_SHOWN = 64


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Return the error message for a name that is not a field."""
    similar = difflib.get_close_matches(name[:MAX_NAME_SHOWN], known, n=1)
    return "unknown field" + (f"; did you mean {similar[0]}?" if similar else "")


class Neutral(NamedTuple):
    """A field that is accepted with certain values only."""

    #: The values that change nothing, beside null.
    values: tuple[Any, ...] = UNUSED
    #: The alternative to sending another value, for the error message.
    advice: str = ""

    def allows(self, value: Any) -> bool:
        return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values)


class OtherName(NamedTuple):
    """Another tool's name of a field that means the same."""

    field: str
    #: Value of the other name -> value of the field; any other value is taken as it is.
    values: Mapping[Any, Any] = {}

    def read(self, value: Any) -> tuple[str, Any]:
        """Return the field and its value. A whole number may be written as 3.0."""
        if isinstance(value, bool | str):
            return self.field, self.values.get(value, value)
        return self.field, int(value) if isinstance(value, float) and value.is_integer() else value


_LABEL = "a label for the caller's own books"
_NO_SCHEMA = "decoding is not constrained here; ask for the form in the prompt, or train an adapter on it"
_NO_TOOLS = "tools are not supported; describe them in a message, or train an adapter on the calls"
_NO_MEDIA = "the model reads and writes text only"
_NO_BEAMS = "tokens are drawn, not searched; use n and choose among the answers"
_THINKING = "a chat template that knows such a variable takes it in chat_template_kwargs"
_TEMPLATE = "the prompt is made by the base model's own template; send a finished prompt to /v1/completions"
_ONE_ENGINE = "requests are not routed between engines by the caller"
_FILTERS = "use temperature, top_p, top_k and min_p"
_CALLER_LIMITS = "lengthen or shorten the prompt before it is sent"

#: Fields of /v1/completions and /v1/chat/completions.
GENERATION_IGNORED: Mapping[str, str] = {
    "user": _LABEL,
    "metadata": _LABEL,
    "safety_identifier": _LABEL,
    "store": "nothing is stored; an answer is never kept",
    "service_tier": "there is one tier",
    "prompt_cache_key": "the prefix cache finds equal prefixes by itself",
    "prompt_cache_options": "the prefix cache finds equal prefixes by itself",
    "prompt_cache_retention": "the prefix cache keeps what there is room for",
    "prediction": "a help for speculative decoding, which no answer depends on",
    "parallel_tool_calls": "says how tools are called; requests with tools are refused",
    "spaces_between_special_tokens": "a detail of slow tokenizers, which are not served",
}

GENERATION_NEUTRAL: Mapping[str, Neutral] = {
    # OpenAI's
    "response_format": Neutral(({"type": "text"},), _NO_SCHEMA),
    "moderation": Neutral(advice="nothing is moderated"),
    # vLLM's
    "structured_outputs": Neutral(advice=_NO_SCHEMA),
    "structural_tag": Neutral(advice=_NO_SCHEMA),
    "guided_json": Neutral(advice=_NO_SCHEMA),
    "guided_regex": Neutral(advice=_NO_SCHEMA),
    "guided_choice": Neutral(advice=_NO_SCHEMA),
    "guided_grammar": Neutral(advice=_NO_SCHEMA),
    "guided_decoding_backend": Neutral(advice=_NO_SCHEMA),
    "guided_whitespace_pattern": Neutral(advice=_NO_SCHEMA),
    "use_beam_search": Neutral(advice=_NO_BEAMS),
    "length_penalty": Neutral((1,), _NO_BEAMS),
    "early_stopping": Neutral(advice=_NO_BEAMS),
    "allowed_token_ids": Neutral(advice="use logit_bias"),
    "bad_words": Neutral(advice="use logit_bias"),
    "logits_processors": Neutral(advice="use logit_bias"),
    "logprob_token_ids": Neutral(advice="use logprobs, or /v1/score for a given text"),
    "prompt_logprobs": Neutral(advice="use echo and logprobs of /v1/completions, or /v1/score"),
    "prompt_embeds": Neutral(advice="send text or token ids"),
    "truncate_prompt_tokens": Neutral(advice=_CALLER_LIMITS),
    "truncation_side": Neutral(advice=_CALLER_LIMITS),
    "repetition_detection": Neutral(advice="use repetition_penalty"),
    "thinking_token_budget": Neutral((-1,), _THINKING),
    "watermarking": Neutral(),
    "priority": Neutral((0,), "requests of all tenants are served in fair turns"),
    "request_id": Neutral(advice="send the header x-request-id"),
    "session_id": Neutral(advice="there are no sessions; send the whole prompt"),
    "cache_salt": Neutral(advice="the prefix cache is separate for each tenant; use one key per user"),
    "stream_interval": Neutral((1,), "a chunk carries the tokens of a step"),
    "vllm_xargs": Neutral(),
    "kv_transfer_params": Neutral(advice=_ONE_ENGINE),
    "ec_transfer_params": Neutral(advice=_ONE_ENGINE),
    # SGLang's
    "regex": Neutral(advice=_NO_SCHEMA),
    "ebnf": Neutral(advice=_NO_SCHEMA),
    "json_schema": Neutral(advice=_NO_SCHEMA),
    "stop_regex": Neutral(advice="use stop"),
    "no_stop_trim": Neutral(advice="use include_stop_str_in_output"),
    "return_hidden_states": Neutral(),
    "return_routed_experts": Neutral(),
    "return_cached_tokens_details": Neutral(advice="usage.prompt_tokens_details is always sent"),
    "session_params": Neutral(advice="there are no sessions; send the whole prompt"),
    "custom_params": Neutral(),
    "custom_logit_processor": Neutral(advice="use logit_bias"),
    "custom_labels": Neutral(),
    "rid": Neutral(advice="send the header x-request-id"),
    "extra_key": Neutral(advice="the prefix cache is separate for each tenant; use one key per user"),
    "data_parallel_rank": Neutral((), _ONE_ENGINE),
    "routed_dp_rank": Neutral((), _ONE_ENGINE),
    # of LoRAX, text-generation-inference and transformers
    "adapter_source": Neutral(advice="adapters come from this service's own store; see /v1/adapters"),
    "adapter_parameters": Neutral(advice="adapters are not merged"),
    "merged_adapters": Neutral(advice="adapters are not merged"),
    "api_token": Neutral(advice="send the header authorization"),
    "grammar": Neutral(advice=_NO_SCHEMA),
    "typical_p": Neutral((1,), _FILTERS),
    "no_repeat_ngram_size": Neutral((0,), "use repetition_penalty, presence_penalty or frequency_penalty"),
    "num_beams": Neutral((1,), _NO_BEAMS),
    "penalty_alpha": Neutral((0,), _FILTERS),
    "epsilon_cutoff": Neutral((0,), _FILTERS),
    "eta_cutoff": Neutral((0,), _FILTERS),
    "top_a": Neutral((0,), _FILTERS),
    "tfs_z": Neutral((1,), _FILTERS),
    "mirostat": Neutral((0,), _FILTERS),
    "guidance_scale": Neutral((1,)),
    "watermark": Neutral(),
    "details": Neutral(advice="use logprobs and return_token_ids"),
    "decoder_input_details": Neutral(advice="use echo and logprobs of /v1/completions, or /v1/score"),
    "return_full_text": Neutral(advice="use echo of /v1/completions"),
}

COMPLETION_NEUTRAL: Mapping[str, Neutral] = {
    **GENERATION_NEUTRAL,
    "suffix": Neutral(advice="filling in the middle is not supported"),
    "add_special_tokens": Neutral((True,), "send token ids"),
    "top_logprobs": Neutral((0,), "say in logprobs how many"),
}

CHAT_NEUTRAL: Mapping[str, Neutral] = {
    **GENERATION_NEUTRAL,
    "tools": Neutral(advice=_NO_TOOLS),
    "tool_choice": Neutral(("none", "auto"), _NO_TOOLS),
    "functions": Neutral(advice=_NO_TOOLS),
    "function_call": Neutral(("none", "auto"), _NO_TOOLS),
    "web_search_options": Neutral(advice=_NO_TOOLS),
    "modalities": Neutral((["text"],), _NO_MEDIA),
    "audio": Neutral(advice=_NO_MEDIA),
    "media_io_kwargs": Neutral(advice=_NO_MEDIA),
    "mm_processor_kwargs": Neutral(advice=_NO_MEDIA),
    "verbosity": Neutral(("medium",), "ask for it in a message"),
    "documents": Neutral(advice="put them into a message"),
    "chat_template": Neutral(advice=_TEMPLATE),
    "echo": Neutral(advice="only /v1/completions echoes"),
    "add_generation_prompt": Neutral((True,), _TEMPLATE),
    "continue_final_message": Neutral(advice=_TEMPLATE),
    "add_special_tokens": Neutral((False,), "the template writes the special tokens"),
    "return_prompt_text": Neutral(advice="use return_token_ids"),
    "include_reasoning": Neutral((True,), "thoughts are a part of the text"),
    "separate_reasoning": Neutral((False,), "thoughts are a part of the text"),
    "stream_reasoning": Neutral((True,), "thoughts are a part of the text"),
    "thinking": Neutral(advice=_THINKING),
    "reasoning": Neutral(advice=_THINKING),
}

STREAM_NEUTRAL: Mapping[str, Neutral] = {
    "include_obfuscation": Neutral((False,), "chunks are not padded"),
}

MESSAGE_IGNORED: Mapping[str, str] = {
    "annotations": "they stand beside a text, and no template shows them",
    "cache_control": "the prefix cache finds equal prefixes by itself",
    "parsed": "OpenAI's clients read it out of the content and send it along",
}

MESSAGE_NEUTRAL: Mapping[str, Neutral] = {
    "type": Neutral(("text", "message"), "a message has a role and a content"),
    "tool_calls": Neutral(advice=_NO_TOOLS),
    "function_call": Neutral(advice=_NO_TOOLS),
    "tool_call_id": Neutral(advice=_NO_TOOLS),
    "audio": Neutral(advice=_NO_MEDIA),
    "refusal": Neutral(advice="put it into content"),
    "reasoning": Neutral(advice="put the thoughts into content, as the model wrote them"),
    "reasoning_content": Neutral(advice="put the thoughts into content, as the model wrote them"),
}

FINE_TUNING_NEUTRAL: Mapping[str, Neutral] = {
    "integrations": Neutral(advice="metrics are in the job's events"),
}

METHOD_NEUTRAL: Mapping[str, Neutral] = {
    "reinforcement": Neutral(advice="the methods are supervised, dpo and classification"),
}

HYPERPARAMETER_NEUTRAL: Mapping[str, Neutral] = {
    "beta": Neutral(("auto",), "it belongs into method.dpo.hyperparameters"),
    "packing": Neutral(advice="every example has a row of its own"),
}

#: Names of hyperparameters in transformers, TRL, Axolotl, LLaMA-Factory and Together's API.
HYPERPARAMETER_NAMES: Mapping[str, OtherName] = {
    **dict.fromkeys(("num_train_epochs", "num_epochs", "epochs"), OtherName("n_epochs")),
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "train_batch_size"), OtherName("batch_size")
    ),
    "lr": OtherName("learning_rate"),
    **dict.fromkeys(("lr_scheduler", "scheduler"), OtherName("lr_scheduler_type")),
    "cosine_min_lr_ratio": OtherName("min_lr_ratio"),
    "num_warmup_steps": OtherName("warmup_steps"),
    "optim": OtherName("optimizer"),
    "sgd_momentum": OtherName("momentum"),
    "adam_eps": OtherName("adam_epsilon"),
    **dict.fromkeys(("max_gradient_norm", "gradient_clipping"), OtherName("max_grad_norm")),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "context_length"),
        OtherName("max_length"),
    ),
    **dict.fromkeys(("validation_ratio", "val_set_size", "val_size"), OtherName("validation_split")),
    "load_best_model_at_end": OtherName("publish", {True: "best", False: "last"}),
}
#: Other tools' words for a value of a hyperparameter.
HYPERPARAMETER_WORDS: Mapping[str, Mapping[str, str]] = {
    "optimizer": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw"},
    "lr_scheduler_type": {"constant_with_warmup": "constant"},
}

#: Names of options of an adapter in PEFT, Axolotl, LLaMA-Factory and Together's API.
ADAPTER_NAMES: Mapping[str, OtherName] = {
    **dict.fromkeys(("r", "lora_r", "lora_rank"), OtherName("rank")),
    "lora_alpha": OtherName("alpha"),
    **dict.fromkeys(("peft_use_rslora", "lora_use_rslora"), OtherName("use_rslora")),
    **dict.fromkeys(
        ("lora_target_modules", "lora_target", "lora_trainable_modules"), OtherName("target_modules")
    ),
}
ADAPTER_ADVICE: Mapping[str, str] = {
    **dict.fromkeys(("lora_dropout", "dropout"), "there is no dropout"),
    "init_lora_weights": "use init",
    "modules_to_save": "only linear layers are adapted",
    "bias": "biases of the base model stay frozen",
    "use_dora": "a row of W cannot be scaled in a shared basis",
}

_EXTRA_BODY = "extra_body is an argument of OpenAI's Python client; in JSON its fields stand at the top level"

GENERATION_ADVICE: Mapping[str, str] = {
    "extra_body": _EXTRA_BODY,
    "extra_headers": "send them as headers",
    "parameters": "the parameters stand at the top level",
    "sampling_params": "the parameters stand at the top level",
    "options": "the parameters stand at the top level",
    "max_new_tokens": "use max_tokens",
    "max_output_tokens": "use max_tokens",
    "max_gen_toks": "use max_tokens",
    "max_length": "use max_tokens",
    "n_predict": "use max_tokens",
    "num_predict": "use max_tokens",
    "min_new_tokens": "use min_tokens",
    "min_length": "use min_tokens",
    "repeat_penalty": "use repetition_penalty",
    "stop_sequences": "use stop",
    "until": "use stop",
    "do_sample": "temperature 0 is greedy",
    "num_return_sequences": "use n",
    "inputs": "use prompt or messages",
    "input": "use prompt or messages",
    "prompt_token_ids": "send token ids as the prompt of /v1/completions",
    "input_ids": "send token ids as the prompt of /v1/completions",
    "messages": "use /v1/chat/completions",
    "chat_template_kwargs": "only /v1/chat/completions has a template",
    "reasoning_effort": "only /v1/chat/completions has a template",
    "max_completion_tokens": "use max_tokens",
    "prompt": "use /v1/completions",
    "system": "send a message with the role system",
    "instructions": "send a message with the role system",
    "enable_thinking": _THINKING,
    "thinking_budget": _THINKING,
    "format": _NO_SCHEMA,
    **dict.fromkeys(
        ("lora", "loras", "lora_name", "lora_request", "adapter"), "use model, lora_path or adapter_id"
    ),
}

FINE_TUNING_ADVICE: Mapping[str, str] = {
    **dict.fromkeys((*HYPERPARAMETERS, *HYPERPARAMETER_NAMES), "it belongs into hyperparameters"),
    "extra_body": _EXTRA_BODY,
    **{name: f"use adapter.{other.field}" for name, other in ADAPTER_NAMES.items()},
    **{name: f"use adapter.{name}" for name in ("rank", "alpha", "scale", "use_rslora", "target_modules")},
    "adapter_id": "use adapter.id",
    "basis": "use adapter.basis",
    "dry_run": "nothing can be tried without being done; files are checked at their upload",
    "webhook": "follow the job's events, with stream=true if it should be at once",
}

HYPERPARAMETER_ADVICE: Mapping[str, str] = {
    "warmup": "use warmup_ratio or warmup_steps",
    "max_steps": "use n_epochs",
    "seed": "it stands beside hyperparameters",
    **{
        name: f"use adapter.{field}, beside hyperparameters"
        for name, field in (
            *((name, other.field) for name, other in ADAPTER_NAMES.items()),
            *((name, name) for name in ("rank", "alpha", "scale", "use_rslora", "target_modules")),
        )
    },
    "lora_dropout": "there is no dropout",
    "eval_steps": "a run is evaluated nine times",
    "eval_strategy": "a run is evaluated nine times",
    "prompt_loss_weight": "the weight of a message says whether it is learned",
    "train_on_inputs": "the weight of a message says whether it is learned",
    "fp16": "the worker's TESSERA_DTYPE decides",
    "bf16": "the worker's TESSERA_DTYPE decides",
}

#: The tables that `docs/compatibility.md` shows, by the place of the fields.
IGNORED: Mapping[str, Mapping[str, str]] = {
    "completions, chat": GENERATION_IGNORED,
    "chat, in a message": MESSAGE_IGNORED,
}
NEUTRAL: Mapping[str, Mapping[str, Neutral]] = {
    "completions, chat": GENERATION_NEUTRAL,
    "completions": {n: f for n, f in COMPLETION_NEUTRAL.items() if n not in GENERATION_NEUTRAL},
    "chat": {n: f for n, f in CHAT_NEUTRAL.items() if n not in GENERATION_NEUTRAL},
    "both, `stream_options`": STREAM_NEUTRAL,
    "chat, in a message": MESSAGE_NEUTRAL,
    "fine-tuning": FINE_TUNING_NEUTRAL,
    "fine-tuning, `method`": METHOD_NEUTRAL,
    "fine-tuning, `hyperparameters`": HYPERPARAMETER_NEUTRAL,
}
OTHER_NAMES: Mapping[str, Mapping[str, OtherName]] = {
    "fine-tuning, `hyperparameters`": HYPERPARAMETER_NAMES,
    "fine-tuning, `adapter`": ADAPTER_NAMES,
}
