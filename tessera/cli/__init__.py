"""The `tessera` command: start what this machine can run, and say what keeps it from running.

    app.py            the commands and their options
    applications.py   where the service and the worker are, and how they are started
    doctor/           what `tessera doctor` looks at, one subject a file

Loads no torch and starts nothing before a command asks for it.
"""

from __future__ import annotations


def main() -> None:
    """The entry point of the `tessera` command; ends the process with an exit status."""
    from tessera.cli.app import app

    app(prog_name="tessera")
