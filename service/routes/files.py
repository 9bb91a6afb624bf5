"""/v1/files: files of examples, to train on or to build a basis of."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, File, Form, Response, UploadFile

from adapter_core.file_store import FileRecord
from service.routes.deps import AfterDep, LimitDep, StoresDep, TenantDep
from service.routes.json_routes import JsonRoute
from service.routes.schemas import Deleted, Page, page_of
from service.routes.schemas_training import FileObject
from service.uploads import keep_training_file

router = APIRouter(prefix="/v1", tags=["files"], route_class=JsonRoute)


@router.post("/files", operation_id="create_file")
async def create_file(
    file: Annotated[UploadFile, File(description="JSONL, one example per line")],
    purpose: Annotated[str, Form(description="fine-tune or calibration")],
    tenant: TenantDep,
    stores: StoresDep,
) -> FileObject:
    """Upload a file of examples. It is checked now: an answer names every problem with its line."""
    content = await file.read()
    record = await keep_training_file(
        stores.files, tenant, filename=file.filename, purpose=purpose, content=content
    )
    return _object(record)


@router.get("/files", operation_id="list_files")
async def list_files(
    tenant: TenantDep,
    stores: StoresDep,
    after: AfterDep = None,
    limit: LimitDep = 20,
    purpose: str | None = None,
) -> Page[FileObject]:
    """The caller's files, newest first; of one purpose, if it is named."""
    records, has_more = await stores.files.list(tenant, after=after, limit=limit)
    wanted = [record for record in records if purpose in (None, record.purpose)]
    return page_of([_object(record) for record in wanted], has_more and bool(wanted))


@router.get("/files/{file_id}", operation_id="get_file")
async def get_file(file_id: str, tenant: TenantDep, stores: StoresDep) -> FileObject:
    """One file's record."""
    return _object(await stores.files.get(tenant, file_id))


@router.get(
    "/files/{file_id}/content",
    operation_id="get_file_content",
    response_class=Response,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}},
)
async def get_file_content(file_id: str, tenant: TenantDep, stores: StoresDep) -> Response:
    """The file as it was uploaded."""
    record = await stores.files.get(tenant, file_id)
    content = await stores.files.content(tenant, file_id)
    disposition = f'attachment; filename="{record.filename.encode("ascii", "replace").decode()}"'
    return Response(content, media_type="application/jsonl", headers={"content-disposition": disposition})


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
        filename=record.filename,
        purpose=record.purpose,
        num_examples=record.num_examples,
        sha256=record.sha256,
    )
