"""Write the secrets that docker-compose.yml mounts, each only if it is not there yet.

    python3 deploy/make_secrets.py [--directory deploy/secrets] [--tenant default]

Needs nothing but Python. Knows the file formats of the store's users and of the service's API keys; does not
know Docker. To renew a secret, delete its files and run this again, then restart the containers.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import sys
from pathlib import Path

#: The user name in the store URL of docker-compose.yml.
STORE_USER = "tessera"

#: Compose mounts the files as they are, for the containers' various users, so they must be readable to
#: others; on the host the folder around them keeps others out.
DIRECTORY_MODE, MOUNTED_MODE, PRIVATE_MODE = 0o700, 0o644, 0o600


def sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def store_users(password: str) -> str:
    """The store's ACL file: anyone may PING (the health check), Tessera may use its own keys only.

    No @admin and no @dangerous command (CONFIG, KEYS, FLUSHALL, SHUTDOWN …) but INFO, whose figures are on
    the dashboard. The password itself is not in the file.
    """
    return (
        "user default on nopass resetkeys resetchannels -@all +ping\n"
        f"user {STORE_USER} on #{sha256(password)} ~tessera:* resetchannels +@all -@admin -@dangerous +info\n"
    )


def make_secrets(directory: Path, *, tenant: str) -> list[Path]:
    """Create what is missing in `directory`; return the files written. Existing secrets stay as they are.

    store_users follows from store_password. api_keys holds the SHA-256 of api_key, which is for you, mounted
    nowhere, and may be moved elsewhere. hf_token is empty; a gated base model needs one of the hub.
    """
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(DIRECTORY_MODE)
    written = []

    def write(name: str, content: str, mode: int = MOUNTED_MODE) -> None:
        path = directory / name
        path.touch(mode=PRIVATE_MODE)
        path.write_text(content)
        path.chmod(mode)
        written.append(path)

    if not (directory / "store_password").exists():
        write("store_password", secrets.token_urlsafe(32) + "\n")
    users = store_users((directory / "store_password").read_text().strip())
    if not (directory / "store_users").exists() or (directory / "store_users").read_text() != users:
        write("store_users", users)
    if not (directory / "api_keys").exists():
        key = "tsk-" + secrets.token_urlsafe(32)
        write("api_key", key + "\n", PRIVATE_MODE)
        write("api_keys", f"{tenant} {sha256(key)}\n")
    if not (directory / "grafana_admin_password").exists():
        write("grafana_admin_password", secrets.token_urlsafe(24) + "\n")
    if not (directory / "hf_token").exists():
        write("hf_token", "")
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the secrets that docker-compose.yml mounts.")
    parser.add_argument("--directory", type=Path, default=Path(__file__).parent / "secrets")
    parser.add_argument("--tenant", default="default", help="whom the first API key belongs to")
    options = parser.parse_args(arguments)
    for path in make_secrets(options.directory, tenant=options.tenant):
        sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
