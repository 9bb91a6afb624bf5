"""/v1/models: the base model and the caller's adapters, in OpenAI's shape."""

from __future__ import annotations

from fastapi import APIRouter

from service.generation.model_registry import MAX_LISTED_ADAPTERS
from service.http.json_routes import JsonRoute
from service.http.routes.deps import ModelsDep, StoresDep, TenantDep
from service.http.schemas.common import Deleted, Page, page_of
from service.http.schemas.resources import Model
from tessera.store.adapters import AdapterRecord, AdapterVersion

router = APIRouter(prefix="/v1", tags=["models"], route_class=JsonRoute)


@router.get("/models", operation_id="list_models")
async def list_models(tenant: TenantDep, models: ModelsDep, stores: StoresDep) -> Page[Model]:
    """The base model and up to 100 of the caller's adapters; all of them are at /v1/adapters."""
    records, has_more = await stores.adapters.list(tenant, limit=MAX_LISTED_ADAPTERS)
    base = _base(models.base_name)
    return page_of([base, *(_adapter(record, models.base_name) for record in records)], has_more)


@router.get("/models/{model:path}", operation_id="get_model")
async def get_model(model: str, tenant: TenantDep, models: ModelsDep) -> Model:
    """The base model, one of the caller's adapters, or an intermediate state of one."""
    found = await models.get(tenant, model)
    if found is None:
        return _base(models.base_name)
    if isinstance(found, AdapterVersion):
        return _checkpoint(model, tenant, found, models.base_name)
    return _adapter(found, models.base_name)


@router.delete("/models/{model:path}", operation_id="delete_model")
async def delete_model(model: str, tenant: TenantDep, models: ModelsDep) -> Deleted:
    """Delete an adapter with all its versions and intermediate states, or one of these states."""
    return Deleted(id=await models.delete(tenant, model), object="model")


def _base(name: str) -> Model:
    return Model(id=name, created=0, owned_by="tessera", root=name, parent=None, adapter_version=None)


def _checkpoint(name: str, tenant: str, state: AdapterVersion, base_name: str) -> Model:
    return Model(
        id=name,
        created=int(state.created_at),
        owned_by=tenant,
        root=base_name,
        parent=base_name,
        adapter_version=None,
    )


def _adapter(record: AdapterRecord, base_name: str) -> Model:
    return Model(
        id=record.adapter_id,
        created=int(record.created_at),
        owned_by=record.tenant,
        root=base_name,
        parent=base_name,
        adapter_version=record.active_version,
    )
