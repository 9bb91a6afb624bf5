"""/v1/bases: the frozen factors that adapters share."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from adapter_core.basis import BasisManifest
from service.routes.deps import ServicesDep, StoresDep, TenantDep
from service.routes.json_routes import JsonRoute
from service.routes.schemas import Page, page_of
from service.routes.schemas_resources import BasisDetail, BasisObject, ModuleObject
from service.token_engine import TokenEngine

router = APIRouter(prefix="/v1", tags=["bases"], route_class=JsonRoute)


@router.get("/bases", operation_id="list_bases")
async def list_bases(tenant: TenantDep, services: ServicesDep) -> Page[BasisObject]:
    """All bases; they belong to no tenant."""
    manifests = await services.stores.bases.list()
    return page_of([BasisObject(**_fields(m, services.engine)) for m in manifests], has_more=False)


@router.get("/bases/{basis_id}", operation_id="get_basis")
async def get_basis(
    basis_id: str, tenant: TenantDep, services: ServicesDep, stores: StoresDep
) -> BasisDetail:
    """One basis with its target modules and how it was built."""
    manifest = await stores.bases.manifest(basis_id)
    modules = [ModuleObject(**asdict(module)) for module in manifest.modules]
    return BasisDetail(**_fields(manifest, services.engine), modules=modules, recipe=manifest.recipe)


def _fields(manifest: BasisManifest, engine: TokenEngine) -> dict[str, Any]:
    return {
        "id": manifest.basis_id,
        "base_model_id": manifest.model_id,
        "method": manifest.method,
        "rank": manifest.rank,
        "dtype": manifest.dtype,
        "num_modules": len(manifest.modules),
        "bytes": manifest.factor_bytes,
        "is_default": manifest.basis_id == engine.info.default_basis_id if engine.is_ready else None,
    }
