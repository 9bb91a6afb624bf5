"""Read the two files of a PEFT adapter from an uploaded zip, with bounded memory and without trusting its
index.

Only the last part of a name counts, so a folder inside the zip is fine. A path that leads out of it is
harmless, because nothing is ever written to disk. Does not interpret the files.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from typing import IO, NoReturn

from tessera.errors import InvalidInput
from tessera.peft.config import CODE, CONFIG_NAME, MAX_CONFIG_BYTES, MLX_ADVICE, MODEL_NAME
from tessera.peft.files import PeftFiles

#: Python makes an object for each entry of the index: an index of 256 MB would take 3 GB.
MAX_INDEX_BYTES = 1024**2
_END = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR_BYTES = 20
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors|adapter_model\.safetensors\.index\.json")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_zip(file: IO[bytes], *, max_bytes: int) -> PeftFiles:
    """Read and unpack the files. max_bytes: limit of the unpacked tensors. Raises `InvalidInput`."""
    _check_index(file)
    try:
        with zipfile.ZipFile(file) as archive:
            found = _members(archive)
            return PeftFiles(
                adapter_config=_read(archive, found[CONFIG_NAME], MAX_CONFIG_BYTES),
                adapter_model=_read(archive, found[MODEL_NAME], max_bytes),
            )
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, OSError) as error:
        raise InvalidInput(f"the zip cannot be read: {error}", param="file", code=CODE) from error


def _check_index(file: IO[bytes]) -> None:
    """Refuse a large index before `zipfile` reads it whole. The end of a zip gives the size of its index."""
    size = file.seek(0, 2)
    tail_bytes = min(size, _END.size + _ZIP64_LOCATOR_BYTES)
    file.seek(size - tail_bytes)
    tail = file.read(tail_bytes)
    file.seek(0)
    end = tail[-_END.size :]
    if len(end) < _END.size or not end.startswith(b"PK\5\6"):
        _refuse("it is not a zip, or it has a comment at its end")
    index_bytes = _END.unpack(end)[5]
    if tail.startswith(b"PK\6\7") or index_bytes > MAX_INDEX_BYTES:
        _refuse(f"its index is larger than {MAX_INDEX_BYTES} bytes")


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = _last_part(info)
        if name not in (CONFIG_NAME, MODEL_NAME):
            continue
        if name in found:
            _refuse(f"it holds {name} more than once; zip the folder of one adapter")
        if info.flag_bits & 1 or info.compress_type not in _METHODS:
            _refuse(f"{name} is encrypted, or not compressed with deflate")
        found[name] = info
    for name in (CONFIG_NAME, MODEL_NAME):
        if name not in found:
            _refuse(f"it holds no {name}; {_instead({_last_part(info) for info in archive.infolist()})}")
    return found


def _last_part(info: zipfile.ZipInfo) -> str:
    return info.filename.replace("\\", "/").split("/")[-1]


def _instead(names: set[str]) -> str:
    """Return what a folder without the two files probably is, and what to do with it."""
    if "adapters.safetensors" in names:
        return f"it is an adapter of mlx-lm; {MLX_ADVICE}"
    if any(_SHARD.fullmatch(name) for name in names):
        return f"its tensors are in several files, which PEFT does not load; save them in one {MODEL_NAME}"
    if "model.safetensors" in names or "model.safetensors.index.json" in names:
        return "it is a whole model, not a LoRA; serve it as a base model"
    return (
        "pickled adapters (.bin, .pt) are never opened; zip the folder that PEFT's "
        "save_pretrained(folder, safe_serialization=True) wrote"
    )


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int) -> bytes:
    with archive.open(info) as member:
        content = member.read(max_bytes + 1)
    if len(content) > max_bytes:
        _refuse(f"a file in it unpacks to more than {max_bytes} bytes")
    return content


def _refuse(reason: str) -> NoReturn:
    raise InvalidInput(f"the zip cannot be imported: {reason}", param="file", code=CODE)
