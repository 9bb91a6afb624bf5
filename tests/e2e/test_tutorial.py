"""The Python of `docs/tutorial.md`, typed into one session, says what the page says it does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.docs.test_tutorial import SERVER, blocks
from tests.e2e.conftest import DATA, Stack

pytestmark = pytest.mark.xdist_group("e2e")


def test_the_tutorial_ends_with_an_adapter_that_has_learned(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(DATA.parents[1])
    script = "".join(blocks("python")).replace(SERVER, stack.url).replace("time.sleep(10)", "time.sleep(1)")
    session: dict[str, Any] = {}
    exec(compile(script, "tutorial.md", "exec"), session)

    assert (session["job"].status, session["job"].fine_tuned_model) == ("succeeded", "anna")
    assert session["answer"].adapter == {"id": "anna", "version": 1}
    losses = dict(line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert float(losses["anna"]) < float(losses["tiny"])
