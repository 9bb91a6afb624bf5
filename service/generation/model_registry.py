"""The models that a caller can name: the base model, and the caller's adapters at some version.

    <base>              the base model alone
    <adapter>           the active version of the caller's adapter; also `<base>:<adapter>`
    <adapter>@<version> that version
    <adapter>:ckpt-step-<step>  an intermediate state of the adapter's last training job

Another tenant's adapter looks the same as one that does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from service.engine.client.token_engine import TokenEngine
from tessera.errors import EngineUnavailable, InvalidInput, NotFound
from tessera.formats.adapter_ref import AdapterRef, checkpoint_step, parse_version_name, version_name
from tessera.model.files import model_name, public_source
from tessera.redis.keys import ADAPTER_ID
from tessera.store.adapters import AdapterRecord, AdapterStore, AdapterVersion
from tessera.store.checkpoints import CheckpointStore
from tessera.store.ownership import PrivateBases

#: OpenAI's clients know no pages of `GET /v1/models`; `GET /v1/adapters` lists all of a tenant's adapters.
MAX_LISTED_ADAPTERS = 100


@dataclass(frozen=True)
class Target:
    """The model that a request is for."""

    tenant: str
    #: The model's name as the caller wrote it.
    name: str
    #: None: the base model alone.
    adapter: AdapterRef | None


class ModelRegistry:
    """Finds, checks and deletes models by the names that callers give them."""

    def __init__(
        self,
        base_model: str,
        adapters: AdapterStore,
        checkpoints: CheckpointStore,
        private_bases: PrivateBases,
        engine: TokenEngine,
    ) -> None:
        """base_model: directory or hub id of the base model."""
        self.base_name = model_name(base_model)
        self.base_source = public_source(base_model)
        self._adapters = adapters
        self._checkpoints = checkpoints
        self._private_bases = private_bases
        self._engine = engine

    async def resolve(
        self, tenant: str, name: str, aliases: Mapping[str, str] = MappingProxyType({})
    ) -> Target:
        """Find the model that `name` means.

        aliases: field of the request -> the model's name in that field. An alias counts if `name` is the base
        model's, and must otherwise be equal to `name`. Raises `NotFound` with the field that counted as
        param, and `InvalidInput` for an alias that contradicts `name`.
        """
        param = "model"
        for field, alias in aliases.items():
            if name == self.base_name:
                name, param = alias, field
            elif self._plain(alias) != self._plain(name):
                message = f"{field} is {alias!r}, but model is {name!r}; give one, or the base model as model"
                raise InvalidInput(message, param=field)
        if name == self.base_name:
            return Target(tenant, name, None)
        try:
            adapter_id, version = self.parse(name)
            return Target(tenant, name, await self._adapters.resolve(tenant, adapter_id, version))
        except NotFound as error:
            raise NotFound(error.message, param=param, code=error.code) from error

    def _plain(self, name: str) -> str:
        return name.removeprefix(f"{self.base_name}:")

    def parse(self, name: str) -> tuple[str, int | None]:
        """Split a name into adapter id and version. Raises `NotFound` if no adapter can have that name."""
        found = parse_version_name(name.removeprefix(f"{self.base_name}:"))
        if found is None or not ADAPTER_ID.fullmatch(found[0]):
            raise unknown_model(name)
        return found

    def check_new_id(self, adapter_id: str, *, param: str = "adapter.id") -> str:
        """Return `adapter_id` if an adapter may have this id. Raises `InvalidInput`."""
        if not ADAPTER_ID.fullmatch(adapter_id):
            raise InvalidInput(
                "an adapter id has 1 to 64 characters out of a-z, 0-9, '.', '_' and '-', and begins with a "
                f"letter or digit; got {adapter_id!r}",
                param=param,
            )
        if adapter_id == self.base_name:
            raise InvalidInput(f"{adapter_id!r} is the name of the base model", param=param)
        return adapter_id

    async def get(self, tenant: str, name: str) -> AdapterRecord | AdapterVersion | None:
        """Return what `name` means: an adapter, an intermediate state, or None for the base model.

        Raises `NotFound`.
        """
        if name == self.base_name:
            return None
        adapter_id, version = self.parse(name)
        if version is not None and checkpoint_step(version) is not None:
            states = await self._checkpoints.of_adapter(tenant, adapter_id)
            found = next((state for state in states if state.version == version), None)
            if found is None:
                raise unknown_model(name)
            return found
        record = await self._adapters.get(tenant, adapter_id)
        if version is not None and all(v.version != version for v in record.versions):
            raise unknown_model(name)
        return record

    async def delete(self, tenant: str, name: str) -> str:
        """Delete an adapter with all its versions and checkpoints, or one checkpoint; return its id or name.

        The private bases that only the adapter needed are deleted with it.

        The engine drops its copies as well. Raises `NotFound`, and `InvalidInput` for the base model and for
        a single version.
        """
        if name == self.base_name:
            raise InvalidInput("the base model cannot be deleted", param="model")
        adapter_id, version = self.parse(name)
        if version is not None and (step := checkpoint_step(version)) is not None:
            if not await self._checkpoints.drop(tenant, adapter_id, step=step):
                raise unknown_model(name)
            await self.forget(tenant, adapter_id)
            return version_name(adapter_id, version)
        if version is not None:
            raise InvalidInput("a single version cannot be deleted; delete the adapter", param="model")
        is_deleted = await self._adapters.delete(tenant, adapter_id)
        # Even if it was deleted before: that deletion may have been interrupted at this point.
        deletion_count = await self._adapters.deletion_count(tenant, adapter_id)
        await self._private_bases.release(tenant, adapter_id, deletion_count=deletion_count)
        if not is_deleted:
            raise unknown_model(name)
        await self.forget(tenant, adapter_id)
        return adapter_id

    async def forget(self, tenant: str, adapter_id: str) -> None:
        """Make the engine drop its copies. An engine that is down has none, and the store is
        authoritative."""
        try:
            await self._engine.unload(tenant, adapter_id)
        except EngineUnavailable:
            return


def unknown_model(name: str) -> NotFound:
    """Return the error for a name that no model of the caller has."""
    return NotFound(
        f"the model {name[:200]!r} does not exist, or you have no access to it",
        param="model",
        code="model_not_found",
    )
