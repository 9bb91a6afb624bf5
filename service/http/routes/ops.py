"""/health, /metrics, /version: for machines that watch the service. They belong to no tenant."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.http.routes.deps import ModelsDep, ServicesDep
from service.http.schemas.resources import Health, Version
from service.metrics.health import parts_down
from service.metrics.service_metrics import DISTRIBUTION, service_version

router = APIRouter(tags=["operations"])


@router.get("/health/live", operation_id="get_liveness")
async def live() -> Health:
    """Whether this process answers at all: if not, start it again."""
    return Health(status="ok")


@router.get("/health/ready", operation_id="get_readiness", responses={503: {"model": Health}})
async def ready(services: ServicesDep, response: Response) -> Health:
    """Whether requests can be answered: the engine has loaded its model, the store answers."""
    down = await parts_down(services.engine, services.stores.redis)
    response.status_code = 503 if down else 200
    return Health(status="unavailable" if down else "ok", down=down)


@router.get(
    "/metrics",
    operation_id="get_metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(services: ServicesDep) -> Response:
    """Prometheus' text format."""
    return Response(generate_latest(services.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", operation_id="get_version")
async def version(models: ModelsDep) -> Version:
    """Which release runs, on which base model."""
    return Version(name=DISTRIBUTION, version=service_version(), base_model=models.base_name)
