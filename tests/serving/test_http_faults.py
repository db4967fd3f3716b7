"""Clients that read slowly or not at all, clients that vanish, and the end of the server under load."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
from test_http import HELLO, SPEECH, Served, events, pcm
from test_serve_docs import serving

from kalle.serving.engine import EngineLimits
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import StopRule

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."
LONG = {**HELLO, "input": TEXT, "stream_format": "audio", "speed": 0.25}
"""Some three seconds before the change of speed."""
SMALL = 2048
"""Bytes of a connection's buffers, so that speech does not fit in them."""


@pytest.fixture(scope="module")
def lengthy(kalle_toy: Kalle) -> Kalle:
    """Untrained weights whose speech does not end before it is stopped for repeating itself."""
    config = replace(kalle_toy.config, stop=StopRule(threshold=1e9, min_index=499))
    return Kalle(kalle_toy.flowvae, kalle_toy.lm, kalle_toy.tokenizer, config)


@contextmanager
def unread(served: Served, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection that asked and took the head of its answer only."""
    content = json.dumps(body).encode()
    head = f"POST {SPEECH} HTTP/1.1\r\nHost: {served.host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    host, port = served.host.split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        connection.settimeout(600)
        connection.connect((host, int(port)))
        connection.sendall(head.encode() + content)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        yield connection


def until(met: Any, seconds: float = 120) -> None:
    """Wait for ``met``; the bound ends a test that waits for nothing, and measures nothing."""
    last = time.monotonic() + seconds
    while not met():
        if time.monotonic() > last:
            pytest.fail("what the test waits for did not come")
        time.sleep(0.02)


def test_a_slow_reader_holds_up_nobody_and_its_audio_is_bounded(lengthy: Kalle, tmp_path: Path) -> None:
    served = Served(lengthy, tmp_path, EngineLimits(rows=1, unread_seconds=1.0), send_buffer=SMALL)
    try:
        with unread(served, LONG) as slow:
            until(lambda: sum(served.engine.state.endings.values()) == 1)  # the only row is free, though nothing was read
            full = served.http.post(SPEECH, json=HELLO)
            assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
            assert int(full.headers["retry-after"]) >= 1
            assert served.http.get("/ready").status_code == 503
            content = b""
            while piece := slow.recv(2**16):  # at last it is read, to the end
                content += piece
                if content.endswith(b"\r\n0\r\n\r\n"):
                    break
            samples = round(16000 * served.engine.state.audio_seconds)
            assert sum(map(len, chunks(content))) == 2 * 4 * samples
            assert served.http.get("/ready").status_code == 200
        with unread(served, LONG):
            until(lambda: served.http.get("/ready").status_code == 503)
        until(lambda: served.http.get("/ready").status_code == 200)  # it went away
        assert served.http.post(SPEECH, json=HELLO).status_code == 200
    finally:
        served.close()


def chunks(content: bytes) -> Iterator[bytes]:
    """The chunks of a body in HTTP's chunked coding, behind a head."""
    rest = content.partition(b"\r\n\r\n")[2]
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if not int(size, 16):
            return
        yield rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]


def test_a_reader_that_takes_nothing_is_left(lengthy: Kalle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(lengthy, tmp_path, EngineLimits(rows=1, unread_seconds=1.0), send_buffer=SMALL, stall_s=0.3)
    try:
        with unread(served, LONG) as slow:
            until(lambda: sum(served.engine.state.endings.values()) == 1)  # what it does not take is kept for it, until it is left
            until(lambda: served.http.get("/ready").status_code == 200)
            assert served.http.post(SPEECH, json=HELLO).status_code == 200
            content = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := slow.recv(2**16):
                    content += piece
            assert not content.endswith(b"\r\n0\r\n\r\n"), "it looks complete"
        assert "Traceback" not in caplog.text
    finally:
        served.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system does not end such connections")
def test_the_connection_of_a_reader_that_takes_nothing_ends(lengthy: Kalle, tmp_path: Path) -> None:
    served = Served(lengthy, tmp_path, EngineLimits(rows=1, unread_seconds=1.0), send_buffer=SMALL, stall_s=0.3)
    try:
        with unread(served, LONG):
            until(lambda: sum(served.engine.state.endings.values()) == 1)
            served.http.close()  # the other connection
            until(lambda: not served.server.server_state.connections)
    finally:
        served.close()


def test_a_socket_that_vanishes_frees_its_place(lengthy: Kalle, tmp_path: Path) -> None:
    connect = pytest.importorskip("websockets.asyncio.client").connect
    served = Served(lengthy, tmp_path, EngineLimits(rows=1))

    async def hear_and_leave() -> None:
        socket = await connect(f"ws://{served.host}{SPEECH}/stream")
        for message in ({"type": "input.text", "text": TEXT}, {"type": "input.flush"}):
            await socket.send(json.dumps(message))
        while not isinstance(await socket.recv(), bytes):
            pass
        socket.transport.abort()

    try:
        asyncio.run(hear_and_leave())
        until(lambda: not served.engine._jobs)
        assert served.engine.state.endings["cancelled"] >= 1
        assert served.http.post(SPEECH, json=HELLO).status_code == 200
    finally:
        served.close()


@pytest.mark.slow
@pytest.mark.parametrize("grace", [120.0, 0.1])
def test_sigterm_under_load(tmp_path: Path, grace: float) -> None:
    """With time enough all are answered; without, each answer is whole, an error of the API, or an error at the end of its events."""
    body = {"model": "kalle-nano", "input": "It was a bright cold day. " * 6, "response_format": "pcm"}
    ways = [{}, {"stream_format": "sse"}] * 4
    answers: list[Any] = [None] * len(ways)
    begun = threading.Barrier(len(ways) + 1)

    def ask(number: int) -> None:
        asked = {**body, **ways[number], "seed": number}
        begun.wait()
        try:
            answers[number] = httpx.post(f"{address}{SPEECH}", json=asked, timeout=300)
        except httpx.HTTPError as error:
            answers[number] = error

    with serving(tmp_path, "--grace", str(grace), "--rows", "4") as (address, server):
        asking = [threading.Thread(target=ask, args=(number,)) for number in range(len(ways))]
        for each in asking:
            each.start()
        begun.wait()
        until(lambda: "kalle_rows 4.0" in httpx.get(f"{address}/metrics").text)
        server.send_signal(signal.SIGTERM)
        for each in asking:
            each.join()
    endings = []
    for way, answer in zip(ways, answers, strict=True):
        assert isinstance(answer, httpx.Response), answer
        if answer.status_code != 200:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
            endings.append("refused")
        elif way:
            *deltas, last = events(answer.text.splitlines())
            endings.append(last["type"])
            assert last["type"] != "error" or last["error"]["code"] == "shutting_down"
            assert last["type"] == "error" or b"".join(base64.b64decode(each["audio"]) for each in deltas)
        else:
            endings.append("whole")
            assert len(pcm(answer.content)) > 16000
    if grace > 1:
        assert endings == ["whole", "speech.audio.done"] * 4
    else:
        assert {"refused", "error"} & set(endings)
