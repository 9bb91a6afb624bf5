#!/usr/bin/env bash
# pydantic 2.14.3 on Python 3.11: a list with FailFast() can be no member of a union, not even an optional field.
#
# FailFast is a dataclass with an own equality and therefore without a hash, unlike the other metadata of Annotated.
# typing hashes the members of a union to find equal ones, so `Annotated[list[int], FailFast()] | None` ends in
# TypeError "unhashable type: 'FailFast'" before pydantic sees it. Field(fail_fast=True), which says the same, works.
#
# Output seen:
#   alone: [1, 2]
#   optional: TypeError unhashable type: 'FailFast'
#   Field(fail_fast=True) in an optional: [1, 2], 1 error for 3 wrong items
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet pydantic==2.14.3
cd "$folder"
timeout 120 "$folder/venv/bin/python" - <<'PYTHON'
from typing import Annotated

from pydantic import FailFast, Field, TypeAdapter, ValidationError

Numbers = Annotated[list[int], FailFast()]
print("alone:", TypeAdapter(Numbers).validate_python([1, 2]))
try:
    Numbers | None
    raise SystemExit("the behaviour has changed: FailFast() may stand in a union")
except TypeError as error:
    print("optional: TypeError", error)
optional = TypeAdapter(Annotated[list[int], Field(fail_fast=True)] | None)
try:
    optional.validate_python(["a", "b", "c"])
    raise SystemExit("the behaviour has changed: wrong items are let pass")
except ValidationError as error:
    assert error.error_count() == 1
    print("Field(fail_fast=True) in an optional:", f"{optional.validate_python([1, 2])}, 1 error for 3 wrong items")
PYTHON
