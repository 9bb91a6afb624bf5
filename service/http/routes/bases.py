"""/v1/bases: the bases that adapters are trained in, shared ones and the caller's private ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from service.http.json_routes import JsonRoute
from service.http.routes.deps import Services, ServicesDep, TenantDep
from service.http.schemas.bases import BasisDetail, BasisMethods, BasisObject, ModuleObject
from service.http.schemas.common import Deleted, Page, page_of
from tessera.errors import NotFound
from tessera.formats.manifest import BasisManifest
from tessera.methods.catalogue import CATALOGUE

router = APIRouter(prefix="/v1", tags=["bases"], route_class=JsonRoute)


@router.get("/bases", operation_id="list_bases")
async def list_bases(tenant: TenantDep, services: ServicesDep) -> Page[BasisObject]:
    """The shared bases, then the caller's private ones."""
    stores = services.stores
    own = await stores.private_bases.of_tenant(tenant)
    found = [basis for basis in await stores.bases.list() if basis.basis_id not in own]
    objects = [BasisObject(**_fields(manifest, services, is_own=False)) for manifest in found]
    for basis_id in sorted(own):
        try:
            manifest = await stores.bases.manifest(basis_id)
        except NotFound:
            continue  # the basis is being written or deleted
        objects.append(BasisObject(**_fields(manifest, services, is_own=True)))
    return page_of(objects, has_more=False)


@router.get("/bases/methods", operation_id="list_basis_methods")
async def list_methods(tenant: TenantDep) -> BasisMethods:
    """All methods, inits and presets, with their options."""
    return BasisMethods(**CATALOGUE)


@router.get("/bases/{basis_id}", operation_id="get_basis")
async def get_basis(basis_id: str, tenant: TenantDep, services: ServicesDep) -> BasisDetail:
    """One basis, with its target modules and the recipe that built it."""
    stores = services.stores
    await stores.private_bases.check_access(tenant, basis_id)
    manifest = await stores.bases.manifest(basis_id)
    is_own = basis_id in await stores.private_bases.of_tenant(tenant)
    modules = [ModuleObject(**asdict(module)) for module in manifest.modules]
    return BasisDetail(**_fields(manifest, services, is_own=is_own), modules=modules, recipe=manifest.recipe)


@router.delete("/bases/{basis_id}", operation_id="delete_basis")
async def delete_basis(basis_id: str, tenant: TenantDep, services: ServicesDep) -> Deleted:
    """Delete one of the caller's private bases, unless adapters or running jobs need it."""
    await services.holds.delete(tenant, basis_id)
    return Deleted(id=basis_id, object="basis")


def _fields(manifest: BasisManifest, services: Services, *, is_own: bool) -> dict[str, Any]:
    engine = services.engine
    return {
        "id": manifest.basis_id,
        "base_model_id": manifest.model_id,
        "method": manifest.method,
        "rank": manifest.rank,
        "dtype": manifest.dtype,
        "num_modules": len(manifest.modules),
        "bytes": manifest.stored_bytes,
        "is_default": manifest.basis_id == engine.info.default_basis_id if engine.is_ready else None,
        "is_own": is_own,
    }
