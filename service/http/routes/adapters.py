"""/v1/adapters: the caller's adapters with all their versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from service.http.json_routes import JsonRoute
from service.http.routes.deps import AfterDep, LimitDep, ModelsDep, ServicesDep, StoresDep, TenantDep
from service.http.schemas.common import Deleted, Page, page_of
from service.http.schemas.resources import AdapterObject, AdapterPatchRequest, AdapterVersionObject
from service.jobs.heavy_work import ExportSource
from tessera.errors import NotFound
from tessera.store.adapters import AdapterRecord, AdapterVersion

router = APIRouter(prefix="/v1", tags=["adapters"], route_class=JsonRoute)


@router.get("/adapters", operation_id="list_adapters")
async def list_adapters(
    tenant: TenantDep, stores: StoresDep, after: AfterDep = None, limit: LimitDep = 20
) -> Page[AdapterObject]:
    """The caller's adapters, in a fixed order that is not alphabetical."""
    records, has_more = await stores.adapters.list(tenant, after=after, limit=limit)
    return page_of([adapter_object(record) for record in records], has_more)


@router.get("/adapters/{adapter_id}", operation_id="get_adapter")
async def get_adapter(adapter_id: str, tenant: TenantDep, stores: StoresDep) -> AdapterObject:
    """One adapter with all its versions."""
    with _named_in_the_path():
        return adapter_object(await stores.adapters.get(tenant, adapter_id))


@router.get(
    "/adapters/{adapter_id}/peft",
    operation_id="export_adapter_to_peft",
    response_class=Response,
    responses={200: {"content": {"application/zip": {}}, "description": "A PEFT adapter directory, zipped"}},
)
async def export_adapter_to_peft(
    adapter_id: str,
    tenant: TenantDep,
    services: ServicesDep,
    version: Annotated[
        int | None, Query(ge=1, le=2**31, description="The active version by default.")
    ] = None,
    peft_type: Annotated[
        Literal["LORA", "TINYLORA"],
        Query(description="TINYLORA: the numbers themselves, for an adapter that is stored as such."),
    ] = "LORA",
) -> Response:
    """The adapter as PEFT saves one: adapter_config.json and adapter_model.safetensors in a zip."""
    with _named_in_the_path():
        source = ExportSource(tenant, adapter_id, version, services.models.base_source, peft_type)
        content = await services.heavy_work.export_zip(source)
    headers = {"content-disposition": f'attachment; filename="{adapter_id}-peft.zip"'}
    return Response(content, media_type="application/zip", headers=headers)


@router.patch("/adapters/{adapter_id}", operation_id="update_adapter")
async def update_adapter(
    adapter_id: str, body: AdapterPatchRequest, tenant: TenantDep, stores: StoresDep
) -> AdapterObject:
    """Make another version the active one. Requests that name no version use it from now on."""
    with _named_in_the_path():
        return adapter_object(await stores.adapters.activate(tenant, adapter_id, body.active_version))


@router.delete("/adapters/{adapter_id}", operation_id="delete_adapter")
async def delete_adapter(adapter_id: str, tenant: TenantDep, models: ModelsDep) -> Deleted:
    """Delete an adapter with all its versions, in the store and in the engine."""
    with _named_in_the_path():
        return Deleted(id=await models.delete(tenant, adapter_id), object="adapter")


@contextmanager
def _named_in_the_path() -> Iterator[None]:
    """Let the error of a missing adapter name the path parameter: these requests have no field `model`."""
    try:
        yield
    except NotFound as error:
        param = "adapter_id" if error.param == "model" else error.param
        raise NotFound(error.message, param=param, code=error.code) from error


def adapter_object(record: AdapterRecord) -> AdapterObject:
    """Return an adapter as callers see it."""
    return AdapterObject(
        id=record.adapter_id,
        created_at=int(record.created_at),
        updated_at=int(record.updated_at),
        base_model_id=record.base_model_id,
        active_version=record.active_version,
        latest_version=record.latest_version,
        versions=[_version(version) for version in record.versions],
    )


def _version(version: AdapterVersion) -> AdapterVersionObject:
    fields = asdict(version)
    fields |= {"created_at": int(version.created_at), "basis": version.basis_id, "job": version.job_id}
    return AdapterVersionObject(**{name: fields[name] for name in AdapterVersionObject.model_fields})
