"""The `tessera` command: start what this machine can run, and say what keeps it from running.

    app.py            the commands and their options
    applications.py   where the service and the worker are, and how they are started
    doctor/           the checks of `tessera doctor`, one subject per file

It loads no torch and starts nothing before a command needs it.
"""

from __future__ import annotations


def main() -> None:
    """Run the `tessera` command. Ends the process with an exit status."""
    from tessera.cli.app import app

    app(prog_name="tessera")
