"""Settings of the HTTP service, read once from TESSERA_SERVICE_*."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from tessera.errors import InvalidInput

KIB, MIB = 1024, 1024 * 1024


class ServiceSettings(BaseSettings):
    """The address of the service, who may use it, and its limits."""

    model_config = SettingsConfigDict(env_prefix="TESSERA_SERVICE_", frozen=True, extra="ignore")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_keys_file: Path | None = Field(None, description="lines `<tenant> <sha256 hex of the key>`, or JSON")
    allow_anonymous: bool = Field(False, description="accept other machines although no API keys are set")
    workers: int = Field(1, ge=1, le=64, description="API processes that share the engine")
    max_body_bytes: int = Field(4 * MIB, ge=KIB, description="largest JSON body (128 k token ids are 0.8 MB)")
    max_upload_bytes: int = Field(
        256 * MIB, ge=KIB, le=512 * MIB, description="largest multipart upload, framing included"
    )
    max_import_bytes: int = Field(512 * MIB, ge=KIB, description="largest LoRA to import, framing included")
    max_body_memory_bytes: int = Field(
        256 * MIB,
        ge=MIB,
        description="memory for all bodies, three copies of each, imports excluded; half for a tenant",
    )
    body_timeout_s: float = Field(30.0, gt=0, description="a request's body must arrive within this time")
    request_timeout_s: float = Field(
        600.0, gt=0, description="the engine gives up on a request after this time"
    )
    ping_interval_s: float = Field(
        10.0, gt=0, description="time between two SSE comments in a waiting stream"
    )
    sample_interval_s: float = Field(
        10.0, gt=0, description="time between two reads of the store's and queue's figures"
    )
    shutdown_timeout_s: float = Field(10.0, ge=0, description="running requests may finish within this time")
    max_concurrent_requests: int = Field(
        10_000, ge=1, description="requests answered at the same time; others get 503"
    )


def refuse_open_door(settings: ServiceSettings) -> None:
    """Check that other machines cannot reach a service that checks no API keys. Raises `InvalidInput`."""
    if settings.api_keys_file is not None or settings.allow_anonymous or _is_loopback(settings.host):
        return
    raise InvalidInput(
        f"refusing to listen on {settings.host} without API keys: set TESSERA_SERVICE_API_KEYS_FILE, "
        "or TESSERA_SERVICE_ALLOW_ANONYMOUS=1 if something in front of the service checks who calls",
        param="TESSERA_SERVICE_HOST",
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
