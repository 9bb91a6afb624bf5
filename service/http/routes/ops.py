"""/health, /metrics and /version, for machines that watch the service. They belong to no tenant."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.asyncio import Redis

from service.http.routes.deps import ModelsDep, ServicesDep
from service.http.schemas.resources import Health, Version
from service.metrics.service_metrics import DISTRIBUTION, service_version
from tessera.errors import StoreUnavailable
from tessera.redis.client import translate_errors

logger = logging.getLogger(__name__)

router = APIRouter(tags=["operations"])


@router.get("/health/live", operation_id="get_liveness")
async def live() -> Health:
    """Whether this process answers at all. If it does not, restart it."""
    return Health(status="ok")


@router.get("/health/ready", operation_id="get_readiness", responses={503: {"model": Health}})
async def ready(services: ServicesDep, response: Response) -> Health:
    """Whether requests can be answered: the engine has loaded its model, and the store answers."""
    down = {}  # part -> what is wrong, in words that reveal nothing to outsiders; the log has the reason
    if not services.engine.is_ready:
        down["engine"] = "starting or restarting"
    if not await _store_answers(services.stores.redis):
        down["store"] = "does not answer"
    response.status_code = 503 if down else 200
    return Health(status="unavailable" if down else "ok", down=down)


@router.get(
    "/metrics",
    operation_id="get_metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(services: ServicesDep) -> Response:
    """The service's metrics in Prometheus' text format."""
    return Response(generate_latest(services.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", operation_id="get_version")
async def version(models: ModelsDep) -> Version:
    """Which release runs, and on which base model."""
    return Version(name=DISTRIBUTION, version=service_version(), base_model=models.base_name)


async def _store_answers(redis: Redis) -> bool:
    """Send one PING and wait for the answer within the client's time-out."""
    try:
        with translate_errors():
            await redis.ping()
    except StoreUnavailable as error:
        logger.warning("%s", error)
        return False
    return True
