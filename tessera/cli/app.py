"""The commands of `tessera` and their options. The help of each names its TESSERA_ setting."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, NoReturn

import typer

from tessera.cli import applications
from tessera.cli.applications import ApplicationMissing

#: Exit status for a command that cannot be carried out as it was typed. Typer uses the same status for an
#: unknown option.
EXIT_USAGE = 2

app = typer.Typer(
    name="tessera",
    help="One base language model and millions of tiny personal adapters: served in one batch, trained on "
    "demand.",
    epilog="Settings that have no option are environment variables, TESSERA_*: `python -m service --help` "
    "and `python -m trainer_worker --help` list them with their defaults.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Base model: a directory in transformers' format, a hub id (owner/name), or in a checkout "
        "`tiny` or `smollm2` (TESSERA_BASE_MODEL, default the bundled tiny model).",
    ),
]
DataDir = Annotated[
    str | None,
    typer.Option(
        "--data-dir",
        metavar="FOLDER",
        help="Where the embedded store, caches and sockets live (TESSERA_DATA_DIR, default .tessera).",
    ),
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store-url",
        metavar="URL",
        help="redis://, rediss:// or unix:// URL of a Redis or Valkey server (TESSERA_STORE_URL, default an "
        "embedded one).",
    ),
]
Host = Annotated[
    str | None,
    typer.Option(
        "--host",
        metavar="ADDRESS",
        help="Address to listen on; any but loopback needs API keys (TESSERA_SERVICE_HOST, default "
        "127.0.0.1).",
    ),
]
Port = Annotated[
    int | None,
    typer.Option(
        "--port",
        metavar="PORT",
        min=1,
        max=65535,
        help="Port to listen on (TESSERA_SERVICE_PORT, default 8000).",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="NUMBER",
        min=1,
        max=64,
        help="API processes over the one engine (TESSERA_SERVICE_WORKERS, default 1).",
    ),
]


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    model: Model = None,
    workers: Workers = None,
    data_dir: DataDir = None,
    store_url: StoreUrl = None,
) -> None:
    """Run store, service and trainer worker on this machine until Ctrl-C.

    The OpenAI-compatible API is at http://ADDRESS:PORT/v1, its reference at /docs.
    """
    settings = common_settings(model, data_dir, store_url)
    settings |= {
        "TESSERA_SERVICE_HOST": host,
        "TESSERA_SERVICE_PORT": as_text(port),
        "TESSERA_SERVICE_WORKERS": as_text(workers),
    }
    start("serve", "service.local", [], settings)


@app.command()
def worker(model: Model = None, data_dir: DataDir = None, store_url: StoreUrl = None) -> None:
    """Run one trainer worker: it trains queued jobs until Ctrl-C, then hands unfinished ones back.

    It works for the service that uses the same store and the same base model. Any number may run.
    """
    start("worker", "trainer_worker", [], common_settings(model, data_dir, store_url))


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="tiny, smollm2 (a small model that chats, fetched once), a directory or a hub id; default "
            "TESSERA_BASE_MODEL, else tiny.",
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url",
            metavar="URL",
            help="A running service, such as http://127.0.0.1:8000/v1; default: start one and end it again.",
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help="For --base-url; default OPENAI_API_KEY.")
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Where the measured figures are written; default demo-report.json.",
        ),
    ] = None,
) -> None:
    """Train adapters for two users, then answer both and the base model in one batch.

    Takes a few minutes, needs no network with the bundled model, and leaves nothing but its report.
    """
    given = {"--model": model, "--base-url": base_url, "--api-key": api_key, "--report": report}
    arguments = [f"{option}={value}" for option, value in given.items() if value is not None]
    start("demo", "examples.demo", arguments, {})


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Base model: a directory in transformers' format or a hub id (TESSERA_BASE_MODEL, default "
            "the bundled tiny model).",
        ),
    ] = None,
    data_dir: DataDir = None,
    store_url: StoreUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check settings, store, base model, GPU and this machine, and say what to do about each problem.

    Starts nothing and writes nothing. Exit status 1 if `serve` or `worker` would fail or lose data.
    """
    from tessera.cli.doctor import diagnose, report

    settings = {"TESSERA_BASE_MODEL": model, "TESSERA_DATA_DIR": data_dir, "TESSERA_STORE_URL": store_url}
    findings = diagnose({name: value for name, value in settings.items() if value is not None})
    raise typer.Exit(report.show(findings, as_json=as_json))


@app.command("version")
def show_version() -> None:
    """Print the versions of Tessera, of what it is built on, and of Python."""
    for name, distribution in (
        ("tessera", applications.DISTRIBUTION),
        ("torch", "torch"),
        ("transformers", "transformers"),
    ):
        try:
            typer.echo(f"{name} {version(distribution)}")
        except PackageNotFoundError:
            typer.echo(f"{name} (not installed)")
    typer.echo(f"python {platform.python_version()}")


def common_settings(model: str | None, data_dir: str | None, store_url: str | None) -> dict[str, str | None]:
    """Return the variables for the options that several commands share."""
    return {
        "TESSERA_BASE_MODEL": None if model is None else applications.resolve_model(model),
        "TESSERA_DATA_DIR": data_dir,
        "TESSERA_STORE_URL": store_url,
    }


def start(command: str, module: str, arguments: list[str], settings: dict[str, str | None]) -> NoReturn:
    """Replace this process by an application, or end it with a sentence that says why that cannot be."""
    try:
        applications.run(f"tessera {command}", module, arguments, settings)
    except ApplicationMissing as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(EXIT_USAGE) from error


def as_text(number: int | None) -> str | None:
    return None if number is None else str(number)
