"""Who is answered by the page of `overpaint ui`: the visitors of this machine, and no site that they look at."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

import overpaint
from tests.ui.conftest import GRADIO

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'overpaint[ui]'")

from overpaint.ui import PageUnavailable, served

pytestmark = GRADIO
JOIN = "gradio_api/queue/join"
CLICK = {"data": [None, 0, 0], "fn_index": 0, "session_hash": "abc", "event_data": None, "trigger_id": None}


def test_no_other_site_reaches_the_page_of_this_machine(tmp_path: Path) -> None:
    with served(overpaint.open(tmp_path / "registry"), device="cpu") as address:
        port = address.rstrip("/").rpartition(":")[2]
        own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
        assert httpx.get(f"{address}config", headers=own).status_code == 200
        assert httpx.post(address + JOIN, json=CLICK, headers=own).status_code == 200
        for name in (f"evil.example:{port}", "localhost.evil.example"):
            rebound = {"Host": name, "Origin": f"http://{name}"}
            assert httpx.get(f"{address}config", headers=rebound).status_code == 400
            assert httpx.post(address + JOIN, json=CLICK, headers=rebound).status_code == 400
        across = httpx.post(address + JOIN, json=CLICK, headers={"Origin": "http://evil.example"})
        assert across.status_code == 403
        assert "a page of 'http://evil.example'" in across.json()["error"]["message"]


def test_behind_a_password_any_host_is_answered_and_other_sites_are_not(tmp_path: Path) -> None:
    workspace = overpaint.open(tmp_path / "registry")
    with pytest.raises(PageUnavailable, match="needs a password"), served(workspace, host="0.0.0.0"):
        pass
    with served(workspace, password="a long one", device="cpu") as address:
        named = {"Host": "page.example"}
        assert httpx.get(address, headers=named).status_code == 200
        assert httpx.post(address + JOIN, json=CLICK, headers=named).status_code == 401
        words = {"username": "Vera", "password": "a long one"}
        across = httpx.post(f"{address}login", data=words, headers={**named, "Origin": "http://evil.example"})
        assert across.status_code == 403
