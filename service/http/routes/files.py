"""/v1/files: files of examples, to train on or to build a basis from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, File, Form, Query, Response, UploadFile
from fastapi.responses import StreamingResponse

from service.http.json_routes import JsonRoute
from service.http.routes.deps import AfterDep, LimitDep, ServicesDep, StoresDep, TenantDep
from service.http.schemas.common import Deleted, Page, page_of
from service.http.schemas.training import FileObject
from service.jobs.uploads import keep_training_file
from tessera.errors import InvalidInput
from tessera.store.files import RESULTS, FileRecord

router = APIRouter(prefix="/v1", tags=["files"], route_class=JsonRoute)

UPLOADED = "application/jsonl"
#: What a file is sent as. Only files that a job has made are sent as anything but JSONL.
MEDIA_TYPES = {".jsonl": UPLOADED, ".csv": "text/csv", ".html": "text/html"}
#: OpenAI's limits: an hour and thirty days.
MIN_LIFETIME_S, MAX_LIFETIME_S = 3600, 30 * 24 * 3600


@router.post("/files", operation_id="create_file")
async def create_file(
    file: Annotated[UploadFile, File(description="JSONL, one example per line.")],
    purpose: Annotated[str, Form(description="`fine-tune` or `calibration`.")],
    tenant: TenantDep,
    stores: StoresDep,
    services: ServicesDep,
    expires_from: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
    lifetime_s: Annotated[
        int | None, Form(alias="expires_after[seconds]", ge=MIN_LIFETIME_S, le=MAX_LIFETIME_S)
    ] = None,
) -> FileObject:
    """Upload a file of examples. It is checked at once, and an error lists every problem with its line."""
    if (expires_from is None) != (lifetime_s is None):
        missing = "expires_after.anchor" if expires_from is None else "expires_after.seconds"
        message = f"{missing} is missing: expires_after has an anchor and seconds"
        raise InvalidInput(message, param=missing, code="missing_required_parameter")
    record = await keep_training_file(
        stores.files,
        services.upload_check,
        tenant,
        filename=file.filename,
        purpose=purpose,
        content=file.file,
        lifetime_s=lifetime_s,
    )
    return _object(record)


@router.get("/files", operation_id="list_files")
async def list_files(
    tenant: TenantDep,
    stores: StoresDep,
    after: AfterDep = None,
    limit: LimitDep = 20,
    purpose: str | None = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of upload.")] = "desc",
) -> Page[FileObject]:
    """The caller's files, newest first. `purpose` selects those of one purpose."""
    records, has_more = await stores.files.list(
        tenant, after=after, limit=limit, purpose=purpose, order=order
    )
    return page_of([_object(record) for record in records], has_more)


@router.get("/files/{file_id}", operation_id="get_file")
async def get_file(file_id: str, tenant: TenantDep, stores: StoresDep) -> FileObject:
    """One file's record."""
    return _object(await stores.files.get(tenant, file_id))


@router.get(
    "/files/{file_id}/content",
    operation_id="get_file_content",
    response_class=Response,
    responses={200: {"content": {kind: {"schema": {"type": "string"}} for kind in MEDIA_TYPES.values()}}},
)
async def get_file_content(file_id: str, tenant: TenantDep, stores: StoresDep) -> Response:
    """The file as it was uploaded, or as a job has made it."""
    record = await stores.files.get(tenant, file_id)
    pieces = await stores.files.verified_pieces(tenant, file_id)
    disposition = f'attachment; filename="{record.filename.encode("ascii", "replace").decode()}"'
    headers = {
        "content-disposition": disposition,
        "content-length": str(record.bytes),
        "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'",
        "x-content-type-options": "nosniff",
    }
    is_made = record.purpose == RESULTS
    kind = MEDIA_TYPES.get(Path(record.filename).suffix, UPLOADED) if is_made else UPLOADED
    return StreamingResponse(pieces, media_type=kind, headers=headers)


@router.delete("/files/{file_id}", operation_id="delete_file")
async def delete_file(file_id: str, tenant: TenantDep, stores: StoresDep) -> Deleted:
    """Delete a file. Jobs that have not read it yet will fail."""
    await stores.files.get(tenant, file_id)
    await stores.files.delete(tenant, file_id)
    return Deleted(id=file_id, object="file")


def _object(record: FileRecord) -> FileObject:
    return FileObject(
        id=record.file_id,
        bytes=record.bytes,
        created_at=int(record.created_at),
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
        num_examples=record.num_examples,
        sha256=record.sha256,
    )
