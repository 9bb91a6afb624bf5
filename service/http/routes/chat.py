"""POST /v1/chat/completions: continue a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Response

from service.generation.sequences import Piece, Token
from service.http.event_stream import IN_OPENAPI, EventStream
from service.http.json_routes import CancellableRoute
from service.http.routes.deps import ServicesDep, TenantDep
from service.http.routes.replies import Reply, final_fields, json_logprob, options_of, usage_report
from service.http.schemas.answers import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    TokenLogprob,
    TopLogprob,
)
from service.http.schemas.generation import ChatCompletionRequest

router = APIRouter(prefix="/v1", tags=["generation"], route_class=CancellableRoute)


@router.post(
    "/chat/completions",
    operation_id="create_chat_completion",
    response_model=ChatCompletion,
    responses=IN_OPENAPI,
)
async def create_chat_completion(
    body: ChatCompletionRequest,
    tenant: TenantDep,
    services: ServicesDep,
) -> ChatCompletion | Response:
    """Continue a conversation with the base model, or with the adapter named in `model`."""
    generator = services.generator
    target = await services.models.resolve(tenant, body.model, body.aliases)
    variables = body.template_variables(generator.codec.chat.template_variables)
    messages = [message.to_template() for message in body.messages]
    prompt = await generator.chat_prompt(target.tenant, messages, variables)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    options = options_of(body, max_tokens=max_tokens, logprobs=logprobs)
    generation = generator.prepare(target, [prompt], options, param="messages")
    # A stream keeps its reply for as long as it runs; without this it would keep the conversation as well.
    reply = ChatReply(body.model_copy(update={"messages": []}), target, generation, generator.codec)
    if not body.stream:
        return await reply.to_response()
    return await EventStream(reply.events(), ping_interval_s=services.settings.ping_interval_s).begin()


class ChatReply(Reply):
    """A chat completion in OpenAI's shape."""

    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    body: ChatCompletionRequest

    async def to_response(self) -> ChatCompletion:
        finished = await self.generation.collect()
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=sequence.text),
                logprobs=self._logprobs(sequence.tokens) if self.body.logprobs else None,
                finish_reason=sequence.finish_reason,
                **self.token_ids(sequence.token_ids),
            )
            for index, sequence in enumerate(finished)
        ]
        usage = usage_report(self.generation.usage)
        return ChatCompletion(
            **self.common_fields,
            choices=choices,
            usage=usage,
            **self.prompt_token_ids(0),
            **final_fields(self.target, self.generation),
        )

    def opening_fields(self, index: int) -> dict[str, Any]:
        return self.prompt_token_ids(index)

    def choices(self, piece: Piece, is_first: bool) -> list[dict[str, Any]]:
        chosen = []
        if piece.text or piece.tokens:
            logprobs = self._logprobs(piece.tokens) if self.body.logprobs else None
            chosen.append(_chunk_choice(piece.index, {"content": piece.text}, logprobs))
        if piece.finish_reason:
            chosen.append(_chunk_choice(piece.index, {}, None, piece.finish_reason))
        if chosen and self.body.return_token_ids:
            chosen[0]["token_ids"] = list(piece.token_ids)
        if is_first:
            chosen.insert(0, _chunk_choice(piece.index, {"role": "assistant", "content": ""}))
        return chosen

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs:
        return ChatLogprobs(content=[self._logprob(token) for token in tokens if not token.is_end])

    def _logprob(self, token: Token) -> TokenLogprob:
        chosen = token.logprobs
        top = [self._top_logprob(token_id, logprob, token) for token_id, logprob in chosen.top]
        own = self._top_logprob(chosen.token_id, chosen.logprob, token)
        return TokenLogprob(**own.model_dump(), top_logprobs=top)

    def _top_logprob(self, token_id: int, logprob: float, at: Token) -> TopLogprob:
        """Return the log-probability of a token in the place of the token `at`."""
        raw = self.codec.token_bytes(
            token_id, is_first=at.is_first, skip_special_tokens=self.generation.skip_special_tokens
        )
        text = self.token_text(token_id, is_first=at.is_first)
        return TopLogprob(token=text, logprob=json_logprob(logprob), bytes=list(raw))


def _chunk_choice(
    index: int,
    delta: dict[str, Any],
    logprobs: ChatLogprobs | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": None if logprobs is None else logprobs.model_dump(),
        "finish_reason": finish_reason,
    }
