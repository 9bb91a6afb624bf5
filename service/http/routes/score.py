"""POST /v1/score: the log-probabilities of given texts."""

from __future__ import annotations

from fastapi import APIRouter

from service.generation.scoring import ScoredText, score
from service.generation.text import TextCodec
from service.http.json_routes import CancellableRoute
from service.http.routes.deps import ServicesDep, TenantDep
from service.http.routes.replies import final_fields, json_logprob, usage_report
from service.http.schemas.score import Score, ScoredToken, ScoreReport, ScoreRequest

router = APIRouter(prefix="/v1", tags=["scoring"], route_class=CancellableRoute)


@router.post("/score", operation_id="create_score")
async def create_score(body: ScoreRequest, tenant: TenantDep, services: ServicesDep) -> ScoreReport:
    """Score each text by its log-probability, the measure by which adapters are compared."""
    generator = services.generator
    target = await services.models.resolve(tenant, body.model, body.aliases)
    texts, generation = await score(generator, target, body.examples())
    codec = generator.codec if body.return_tokens else None
    return ScoreReport(
        model=target.name,
        data=[_score(index, text, codec) for index, text in enumerate(texts)],
        loss=_loss(texts),
        usage=usage_report(generation.usage),
        **final_fields(target, generation),
    )


def _loss(texts: list[ScoredText]) -> float:
    return json_logprob(-sum(t.sum_logprob for t in texts) / sum(t.num_counted for t in texts))


def _score(index: int, text: ScoredText, codec: TextCodec | None) -> Score:
    return Score(
        index=index,
        num_tokens=text.num_counted,
        sum_logprob=json_logprob(text.sum_logprob),
        loss=json_logprob(text.loss),
        tokens=None if codec is None else _tokens(text, codec),
    )


def _tokens(text: ScoredText, codec: TextCodec) -> list[ScoredToken]:
    is_first: list[bool] = []
    for row in text.rows:
        num_first = codec.echo(row).num_first
        is_first += [position < num_first for position in range(1, len(row))]
    return [
        ScoredToken(
            token=codec.token_text(token.token_id, is_first=first),
            token_id=token.token_id,
            logprob=json_logprob(token.logprob),
            is_counted=is_counted,
        )
        for token, is_counted, first in zip(text.logprobs, text.is_counted, is_first, strict=True)
    ]
