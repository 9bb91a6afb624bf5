"""POST /v1/adapters/{adapter_id}/peft: an ordinary LoRA as the next version of an adapter."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, File, UploadFile

from service.http.json_routes import JsonRoute
from service.http.routes.adapters import adapter_object
from service.http.routes.deps import ServicesDep, TenantDep
from service.http.schemas.resources import AdapterObject
from service.jobs.heavy_work import ImportTarget
from service.jobs.peft_archive import read_zip
from tessera.errors import InvalidInput
from tessera.peft.config import MAX_CONFIG_BYTES
from tessera.peft.files import PeftFiles

router = APIRouter(prefix="/v1", tags=["adapters"], route_class=JsonRoute)


@router.post("/adapters/{adapter_id}/peft", operation_id="import_adapter_from_peft")
async def import_adapter_from_peft(
    adapter_id: str,
    tenant: TenantDep,
    services: ServicesDep,
    file: Annotated[UploadFile | None, File(description="A zip, such as the export returns.")] = None,
    adapter_config: Annotated[UploadFile | None, File(description="adapter_config.json")] = None,
    adapter_model: Annotated[UploadFile | None, File(description="adapter_model.safetensors")] = None,
) -> AdapterObject:
    """Import a LoRA that PEFT saved: one zip, or its two files. It becomes the active version."""
    services.models.check_new_id(adapter_id, param="adapter_id")
    target = ImportTarget(tenant, adapter_id, services.engine.info.model_id)
    max_bytes = services.settings.max_import_bytes
    if file is not None and adapter_config is None and adapter_model is None:
        files = await asyncio.to_thread(read_zip, file.file, max_bytes=max_bytes)
    elif file is None and adapter_config is not None and adapter_model is not None:
        config = await adapter_config.read(MAX_CONFIG_BYTES + 1)
        files = PeftFiles(config, await adapter_model.read())
    else:
        message = "send either file, a zip, or both adapter_config and adapter_model"
        raise InvalidInput(message, param="file", code="missing_required_parameter")
    await services.heavy_work.import_lora(target, files)
    return adapter_object(await services.stores.adapters.get(tenant, adapter_id))
