#!/usr/bin/env bash
# safetensors 0.8.0 writes files that only their owner can read, and calls a file that it may not read absent.
#
# Versions: safetensors 0.8.0, numpy 2.4.6. Under umask 022 `save_file` gives mode 0600 (every earlier guess: 0644), and
# so do save_pretrained of transformers and PEFT, whose JSON files beside it are 0644. Overwriting a file of mode 0664
# leaves 0600, and a symbolic link is replaced by a file instead of being followed. Another user, such as the one of a
# container with the folder mounted, then gets FileNotFoundError "No such file or directory", not PermissionError, from
# safe_open for a file that is there.
#
# Output seen:
#   new file: 0o600, beside one by open(): 0o644
#   overwritten, was 0o664: 0o600
#   symbolic link: replaced by a file
#   another user: FileNotFoundError No such file or directory; the file exists: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet safetensors==0.8.0 numpy==2.4.6
chmod 755 "$folder"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
import stat

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

mode = lambda path: stat.S_IMODE(os.lstat(path).st_mode)
os.umask(0o022)
tensors = {"a": np.zeros(3, "float32")}
save_file(tensors, "new.safetensors")
open("plain", "w").close()
print(f"new file: {oct(mode('new.safetensors'))}, beside one by open(): {oct(mode('plain'))}")
open("old.safetensors", "w").close()
os.chmod("old.safetensors", 0o664)
save_file(tensors, "old.safetensors")
print("overwritten, was 0o664:", oct(mode("old.safetensors")))
os.symlink("plain", "link.safetensors")
save_file(tensors, "link.safetensors")
print("symbolic link:", "still a link" if os.path.islink("link.safetensors") else "replaced by a file")
assert mode("new.safetensors") == mode("old.safetensors") == 0o600 and mode("plain") == 0o644
assert not os.path.islink("link.safetensors")
if os.getuid() == 0:  # only root can become another user
    os.setuid(65534)
    try:
        safe_open("new.safetensors", "numpy")
        raise SystemExit("the behaviour has changed: another user can read it")
    except OSError as error:
        present = os.path.exists("new.safetensors")
        print("another user:", type(error).__name__, f"{str(error).split(':')[0]}; the file exists: {present}")
        assert isinstance(error, FileNotFoundError) and present
PYTHON
