"""POST /v1/completions: continue a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Response

from service.engine.wire.messages import TokenLogprobs
from service.generation.generator import Generator
from service.generation.model_registry import Target
from service.generation.sequences import Finished, Generation, Piece, Token
from service.generation.text import Echo, TextCodec
from service.http.event_stream import IN_OPENAPI, EventStream
from service.http.json_routes import CancellableRoute
from service.http.routes.deps import ServicesDep, TenantDep
from service.http.routes.replies import Reply, final_fields, json_logprob, options_of, usage_report
from service.http.schemas.answers import Completion, CompletionChoice, CompletionLogprobs
from service.http.schemas.generation import CompletionRequest
from tessera.errors import RequestFailed

#: An estimate of the text of an echoed prompt, for `Generator.off_loop`.
_CHARACTERS_PER_TOKEN = 4

router = APIRouter(prefix="/v1", tags=["generation"], route_class=CancellableRoute)


@router.post(
    "/completions",
    operation_id="create_completion",
    response_model=Completion,
    responses=IN_OPENAPI,
)
async def create_completion(
    body: CompletionRequest,
    tenant: TenantDep,
    services: ServicesDep,
) -> Completion | Response:
    """Continue one or several prompts with the base model, or with the adapter named in `model`."""
    generator = services.generator
    target = await services.models.resolve(tenant, body.model, body.aliases)
    texts = body.texts
    prompts = (
        body.token_lists
        if texts is None
        else await generator.text_prompts(target.tenant, texts, param="prompt")
    )
    prompt_logprobs = body.logprobs if body.echo else None
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    options = options_of(body, max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
    options = replace(options, is_prompt_shown=not body.echo or texts is not None)
    generation = generator.prepare(target, prompts, options, param="prompt")
    echoes = await _echoes(prompts, texts, generation, generator, target.tenant) if body.echo else None
    # A stream keeps its reply for as long as it runs; without this it would keep the prompts as well.
    body = body.model_copy(update={"prompt": ""})
    reply = CompletionReply(body, target, generation, generator.codec, echoes)
    if not body.stream:
        return await reply.to_response()
    return await EventStream(reply.events(), ping_interval_s=services.settings.ping_interval_s).begin()


async def _echoes(
    prompts: Sequence[list[int]],
    texts: Sequence[str | None] | None,
    generation: Generation,
    generator: Generator,
    tenant: str,
) -> list[Echo]:
    given = zip(prompts, texts or [None] * len(prompts), strict=True)
    size, skip = _CHARACTERS_PER_TOKEN * sum(map(len, prompts)), generation.skip_special_tokens
    codec = generator.codec
    return await generator.off_loop(
        tenant, size, lambda: [codec.echo(ids, text, skip_special_tokens=skip) for ids, text in given]
    )


class CompletionReply(Reply):
    """A completion in OpenAI's legacy shape. echoes: the prompts, if the response repeats them."""

    id_prefix = "cmpl"
    chunk_object = "text_completion"
    body: CompletionRequest

    def __init__(
        self,
        body: CompletionRequest,
        target: Target,
        generation: Generation,
        codec: TextCodec,
        echoes: list[Echo] | None,
    ) -> None:
        super().__init__(body, target, generation, codec)
        self._echoes = echoes

    async def to_response(self) -> Completion:
        finished = await self.generation.collect()
        choices = [self._choice(index, sequence) for index, sequence in enumerate(finished)]
        usage = usage_report(self.generation.usage)
        return Completion(
            **self.common_fields, choices=choices, usage=usage, **final_fields(self.target, self.generation)
        )

    def choices(self, piece: Piece, is_first: bool) -> list[dict[str, Any]]:
        text = self._echo(piece.index) + piece.text if is_first else piece.text
        chosen = []
        logprobs = self._logprobs(piece.index, piece.tokens, piece.prompt_logprobs or (), is_first)
        if text or (logprobs and logprobs.tokens) or not piece.finish_reason:
            chosen.append(_chunk_choice(piece.index, text, logprobs))
        if piece.finish_reason:
            chosen.append(_chunk_choice(piece.index, "", None, piece.finish_reason))
        if self.body.return_token_ids:
            if is_first:
                chosen[0] |= self.prompt_token_ids(piece.index)
            chosen[0]["token_ids"] = list(piece.token_ids)
        return chosen

    def _choice(self, index: int, sequence: Finished) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=self._echo(index) + sequence.text,
            logprobs=self._logprobs(index, sequence.tokens, sequence.prompt_logprobs, is_first=True),
            finish_reason=sequence.finish_reason,
            **self.prompt_token_ids(index),
            **self.token_ids(sequence.token_ids),
        )

    def _echo(self, index: int) -> str:
        return "" if self._echoes is None else self._echoes[index // self.generation.n].text

    def _logprobs(
        self, index: int, tokens: Sequence[Token], prompt: Sequence[TokenLogprobs], is_first: bool
    ) -> CompletionLogprobs | None:
        """Return the log-probabilities of the generated tokens; in the first chunk of an echo, the prompt's
        come first."""
        if self.body.logprobs is None:
            return None
        report = _LogprobsReport(self, with_top=self.body.logprobs > 0)
        if self._echoes is not None and is_first:
            echo = self._echoes[index // self.generation.n]
            report.add_prompt(self.generation.sequences[index].request.token_ids, prompt, echo)
        for token in tokens:
            report.add(token.logprobs, len(self._echo(index)) + token.offset, is_first=token.is_first)
        return report.done()


class _LogprobsReport:
    """Collects OpenAI's legacy log-probabilities: four lists of equal length."""

    def __init__(self, reply: Reply, *, with_top: bool) -> None:
        self._text_of = reply.token_text
        self._with_top = with_top
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add_prompt(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], echo: Echo) -> None:
        """Add a prompt. Its first token has no log-probability, because nothing predicts it."""
        if len(logprobs) != len(token_ids) - 1:
            raise RequestFailed("the engine did not report every token of the prompt")
        self._append(self._text_of(token_ids[0], is_first=True), None, None, 0)
        for position, token in enumerate(logprobs, start=1):
            self.add(token, echo.offsets[position], is_first=position < echo.num_first)

    def add(self, token: TokenLogprobs, offset: int, *, is_first: bool) -> None:
        """Add a token with its alternatives, by their text; of several with the same text, the most
        likely."""
        text, logprob = self._text_of(token.token_id, is_first=is_first), json_logprob(token.logprob)
        top: dict[str, float] = {}
        if self._with_top:
            for token_id, value in token.top:
                top.setdefault(self._text_of(token_id, is_first=is_first), json_logprob(value))
            top.setdefault(text, logprob)
        self._append(text, logprob, top, offset)

    def done(self) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=self._tokens,
            token_logprobs=self._logprobs,
            top_logprobs=self._top if self._with_top else None,
            text_offset=self._offsets,
        )

    def _append(self, text: str, logprob: float | None, top: dict[str, float] | None, offset: int) -> None:
        self._tokens.append(text)
        self._logprobs.append(logprob)
        self._top.append(top)
        self._offsets.append(offset)


def _chunk_choice(
    index: int, text: str, logprobs: CompletionLogprobs | None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": None if logprobs is None else logprobs.model_dump(),
        "finish_reason": finish_reason,
    }
