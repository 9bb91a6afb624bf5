"""POST /v1/classify: the class of given texts, by the head of an adapter."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter

from service.generation.classification import classify
from service.http.json_routes import CancellableRoute
from service.http.routes.deps import ServicesDep, TenantDep
from service.http.routes.replies import final_fields, usage_report
from service.http.schemas.classify import ClassifiedItem, ClassifyReport, ClassifyRequest

router = APIRouter(prefix="/v1", tags=["classification"], route_class=CancellableRoute)


@router.post("/classify", operation_id="create_classification")
async def create_classification(
    body: ClassifyRequest, tenant: TenantDep, services: ServicesDep
) -> ClassifyReport:
    """Classify each text with an adapter that was trained for it."""
    target = await services.models.resolve(tenant, body.model, body.aliases)
    texts, generation = await classify(services.generator, target, body.texts(), param="input")
    return ClassifyReport(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=target.name,
        data=[
            ClassifiedItem(index=index, label=text.label, probs=list(text.probs), num_classes=len(text.probs))
            for index, text in enumerate(texts)
        ],
        usage=usage_report(generation.usage),
        **final_fields(target, generation),
    )
