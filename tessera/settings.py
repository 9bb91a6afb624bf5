"""Settings that the service and the worker share, read from the environment once.

Every variable starts with TESSERA_. The service adds TESSERA_SERVICE_* and TESSERA_ENGINE_*, the worker
TESSERA_WORKER_*. A variable that nobody knows is refused, with the nearest known name: a misspelt limit must
not silently be the default.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import BeforeValidator, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tessera.defaults import BUNDLED_MODEL, LLAMA_LINEARS, SELF_BUILDING
from tessera.errors import InvalidInput
from tessera.processes.log_setup import LogFormat

PREFIX = "TESSERA_"
#: Sections owned by one process each; the others ignore them.
SECTIONS = ("TESSERA_SERVICE_", "TESSERA_ENGINE_", "TESSERA_WORKER_")

LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)]
LogFormatSetting = Annotated[LogFormat, BeforeValidator(str.lower)]


class CommonSettings(BaseSettings):
    """The settings that both processes must agree on."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    store_url: str | None = Field(
        None, description="redis://, rediss:// or unix:// URL of Redis >= 7 or Valkey >= 7.2; unset: embedded"
    )
    store_password_file: Path | None = Field(
        None, description="file with the password for store_url, so that the environment contains no secret"
    )
    store_timeout_s: float = Field(2.0, gt=0, description="connect and read time-out of one store call")
    data_dir: Path = Field(Path(".tessera"), description="embedded store, caches and sockets live here")
    base_model: str = Field(str(BUNDLED_MODEL), description="directory or hub id of the base model")
    base_model_revision: str | None = Field(None, description="commit of a hub id")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    max_model_len: int | None = Field(
        None,
        ge=1,
        description="longest text in tokens, prompt and answer, that is served or trained; unset: what the "
        "model was made for",
    )
    method: str = Field("lora_xs", description="method of the default basis")
    rank: int = Field(16, ge=1, le=512, description="rank of the default basis")
    target_modules: tuple[str, ...] = Field(LLAMA_LINEARS, description="name patterns, as a JSON list")
    adapter_dtype: str = Field("float16", description="float32, float16, bfloat16 or int8: how R is stored")
    allow_control_tokens: bool = Field(
        False, description="control tokens typed in a message act, instead of being encoded as plain text"
    )
    max_examples: int = Field(1_000_000, ge=1, description="examples of a training or calibration file")
    max_own_basis_bytes: int = Field(
        1024**3, ge=0, description="bases of one tenant's own, all factors together"
    )
    log_level: LogLevel = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")
    log_format: LogFormatSetting = Field(
        "text", description="text, or json for one JSON object per line, tracebacks included"
    )

    @field_validator("method")
    @classmethod
    def _needs_no_data(cls, method: str) -> str:
        if method not in SELF_BUILDING:
            raise ValueError(f"the default basis is built without data, by {', '.join(SELF_BUILDING)}")
        return method

    def store_url_with_password(self) -> str | None:
        """Return `store_url`, with the password from the file if it has none. Raises `InvalidInput`."""
        if self.store_url is None or self.store_password_file is None:
            return self.store_url
        parts = urlsplit(self.store_url)
        if parts.password:
            return self.store_url
        try:
            password = self.store_password_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"store password: {error}", param="TESSERA_STORE_PASSWORD_FILE") from error
        if not password:
            raise InvalidInput("store password: the file is empty", param="TESSERA_STORE_PASSWORD_FILE")
        user, _, host = parts.netloc.rpartition("@")
        netloc = f"{user.partition(':')[0]}:{quote(password, safe='')}@{host}"
        return urlunsplit(parts._replace(netloc=netloc))


def refuse_unknown_variables(*known: type[BaseSettings], sections: tuple[str, ...]) -> None:
    """Raise `InvalidInput` for a TESSERA_ variable that no field of `known` reads.

    Variables of sections other than `sections` belong to another process and are ignored.
    """
    for variable, hint in unknown_variables(*known, sections=sections):
        raise InvalidInput(f"unknown environment variable {variable}{hint}", param=variable)


def unknown_variables(*known: type[BaseSettings], sections: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield each unknown variable, with the hint "; did you mean X?" if a similar X exists, or ""."""
    names = {variable_of(cls, field) for cls in known for field in cls.model_fields}
    foreign = tuple(section for section in SECTIONS if section not in sections)
    for variable in sorted(os.environ):
        if not variable.startswith(PREFIX) or variable.startswith(foreign) or variable in names:
            continue
        nearest = difflib.get_close_matches(variable, names, n=1)
        yield variable, f"; did you mean {nearest[0]}?" if nearest else ""


def variable_of(cls: type[BaseSettings], field: str) -> str:
    """Return the environment variable that a field is read from."""
    return f"{cls.model_config.get('env_prefix', '')}{field}".upper()


def settings_parser(prog: str, description: str, *known: type[BaseSettings]) -> argparse.ArgumentParser:
    """Return a parser for a command line without arguments. Its help lists the variables of `known`."""
    lines = ["settings, read from the environment once:"]
    for cls in known:
        for name, field in cls.model_fields.items():
            default = "" if field.default is None else f" [{_short(field.default)}]"
            about = f"{field.description}{default}"
            lines.append(f"  {variable_of(cls, name)}")
            lines += textwrap.wrap(about, 94, initial_indent="      ", subsequent_indent="      ")
    return argparse.ArgumentParser(
        prog=prog,
        usage=f"[TESSERA_…=value …] {prog} [-h]",
        description=textwrap.fill(description, 94),
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _short(default: object) -> str:
    """A default as one sets it."""
    if isinstance(default, bool):
        return str(int(default))
    return json.dumps(default) if isinstance(default, tuple) else str(default)
