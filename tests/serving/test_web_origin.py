"""What the page refuses to foreign pages in the same browser, asked of the real server."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from kalle.serving import server as serving
from kalle.serving.server import FOREIGN_HOST, FOREIGN_PAGE, OriginCheck, WebOptions, launch, loopback_names
from kalle.serving.sessions import Backend

UPLOAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture
def page(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("gradio")
    monkeypatch.setenv(serving.GRADIO_FOLDER, str(backend.temporary / "page"))
    page = launch(backend, WebOptions(port=0))
    yield page
    page.close(verbose=False)


@pytest.fixture
def port(page: Any) -> int:
    return page.server_port


def ask(port: int, method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    said = answer.status, answer.read().decode()
    connection.close()
    return said


def test_the_server_answers_its_own_page_only(port: int) -> None:
    own = f"127.0.0.1:{port}"
    evil = f"evil.example:{port}"
    join = json.dumps({"data": [], "fn_index": 0, "session_hash": "a"}).encode()
    as_json = {"Content-Type": "application/json"}
    for host in (own, f"localhost:{port}", "[::1]:1"):
        assert ask(port, "GET", "/config", {"Host": host})[0] == 200
        assert ask(port, "POST", "/gradio_api/upload", {"Host": host, "Origin": f"http://{host}", **FORM}, UPLOAD)[0] == 200
    assert ask(port, "POST", "/gradio_api/upload", {"Host": own, **FORM}, UPLOAD)[0] == 200
    for path in ("/", "/config", "/kalle/audio/x"):
        assert ask(port, "GET", path, {"Host": evil}) == (403, FOREIGN_HOST)
    rebound = {"Host": evil, "Origin": f"http://{evil}", "Sec-Fetch-Site": "same-origin"}
    assert ask(port, "POST", "/gradio_api/queue/join", {**rebound, **as_json}, join) == (403, FOREIGN_HOST)
    for foreign in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert ask(port, "POST", "/gradio_api/upload", {"Host": own, **foreign, **FORM}, UPLOAD) == (403, FOREIGN_PAGE)
        assert ask(port, "POST", "/gradio_api/queue/join", {"Host": own, **foreign, **as_json}, join) == (403, FOREIGN_PAGE)
    assert ask(port, "POST", "/gradio_api/upload", {"Host": own, "Origin": "http://127.0.0.1:1", **FORM}, UPLOAD) == (403, FOREIGN_PAGE)


def test_events_of_a_foreign_shape_are_refused_and_never_a_bug(port: int, page: Any, caplog: Any) -> None:
    """Whatever is in the fields: no exception of Gradio, whose answer would be 500."""
    headers = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json"}
    named = {getattr(event.fn, "__name__", ""): (number, len(event.inputs)) for number, event in page.fns.items()}
    events = [named[name] for name in ("begun", "listened", "kept", "uploaded")] + [(number, 3) for number in (999, -1, "x", None, [])]
    for number, inputs in events:
        for value in (5, True, 1e308, [1], {"path": "/etc/passwd"}, {"path": 5}, "\0"):
            body = json.dumps({"data": [value] * inputs, "fn_index": number, "session_hash": "a"}).encode()
            assert ask(port, "POST", "/gradio_api/run/predict", headers, body)[0] == 422, (number, value)
        for data in (5, [None] * 40, {}, None):
            body = json.dumps({"data": data, "fn_index": number, "session_hash": "a"}).encode()
            assert ask(port, "POST", "/gradio_api/queue/join", headers, body)[0] == 422, (number, data)
    assert ask(port, "POST", "/gradio_api/queue/join", headers, b"[" * 10**5)[0] == 422
    assert ask(port, "POST", "/gradio_api/queue/join", headers, b" " * 2**21)[0] == 422
    assert "Traceback" not in caplog.text
    begun = next(key for key, fn in page.fns.items() if getattr(fn.fn, "__name__", "") == "begun")
    fields = ["Hi.", "3", 1.0, "0.4", "stored", None, None, "", ""]
    body = json.dumps({"data": fields, "fn_index": begun, "session_hash": "a"}).encode()
    assert ask(port, "POST", "/gradio_api/run/predict", headers, body)[0] == 200, "the page's own events go on"


def answered(names: frozenset[str] | None, method: str, headers: dict[str, str]) -> int:
    """The status that a guarded application of no content gives."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(OriginCheck(app, names)({"type": "http", "method": method, "headers": raw}, None, send))
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.1:7860", 200),
        ("[::1]:7860", 200),
        ("127.0.0.2:7860", 200),
        ("127.0.0.3:7860", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:7860", 403),
        ("[::1", 403),
        ("evil.example@127.0.0.1", 403),
        ("localhost@evil.example", 403),
        ("localhost/evil", 403),
        ("localhost?evil", 403),
        ("localhost#evil", 403),
        ("localhost:7860:1", 403),
        ("localhost:port", 403),
        (" localhost", 403),
        ("localhost\\@evil.example", 403),
        ("", 403),
    ],
)
def test_only_names_of_this_machine_reach_the_loopback_page(host: str, status: int) -> None:
    assert answered(loopback_names("127.0.0.2"), "GET", {"Host": host}) == status
    assert answered(None, "GET", {"Host": host}) == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "https://there.example"}, 200),
        ({"Origin": "https://there.example:81"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://there.example"}, 403),
        # Behind a proxy that gives the server a name of its own.
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://public.example"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_on_a_network_only_the_page_itself_changes_something(headers: dict[str, str], status: int) -> None:
    assert answered(None, "POST", {"Host": "there.example", **headers}) == status
    assert answered(None, "GET", {"Host": "there.example", **headers}) == 200


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (WebOptions(), {"localhost", "127.0.0.1", "::1"}),
        (WebOptions("127.0.0.9"), {"localhost", "127.0.0.1", "::1", "127.0.0.9"}),
        (WebOptions("0.0.0.0"), None),
        (WebOptions(share=True), None),
    ],
)
def test_names_are_asked_for_on_the_loopback_only(options: WebOptions, names: set[str] | None) -> None:
    assert serving.own_names(options) == names
