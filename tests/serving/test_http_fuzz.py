"""Thousands of requests that nobody would write by hand: none is a failure of the server, and the next one is served."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import soundfile

pytest.importorskip("fastapi")

from kalle.audio import wav_header
from kalle.serving.engine import Engine, EngineLimits
from kalle.serving.http import create_app
from kalle.serving.service import ServeOptions
from kalle.serving.websocket import SocketConfig
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import StopRule

pytestmark = pytest.mark.slow
SPEECH, VOICES = "/v1/audio/speech", "/v1/audio/voices"
JSON = {"Content-Type": "application/json"}
GOOD = {"model": "toy", "input": "Hi.", "response_format": "pcm"}
VALID = {
    "voice": "random",
    "speed": 1.5,
    "seed": 5,
    "temperature": 0.5,
    "language": "en",
    "response_format": "flac",
    "stream_format": "sse",
}
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1e308,
    2**70,
    "",
    " ",
    "\0",
    "é" * 300,
    "../../x",
    "http://127.0.0.1",
    [],
    [[]],
    {},
    {"id": 1},
    "NaN",
    "1.0",
]

WAV = wav_header(16000, 32000) + (8000 * np.sin(np.arange(16000) / 10)).astype("<i2").tobytes()


@pytest.fixture(scope="module")
def app(kalle_toy: Kalle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    config = replace(kalle_toy.config, stop=StopRule(threshold=1e9, min_index=4))
    kalle = Kalle(kalle_toy.flowvae, kalle_toy.lm, kalle_toy.tokenizer, config)
    with Engine(kalle, EngineLimits(seconds=60.0)) as engine:
        yield create_app(
            engine, ServeOptions(voices=tmp_path_factory.mktemp("voices"), names=("toy",), max_text=200, max_upload_bytes=2**16)
        )


def answered(app: Any, requests: list[dict[str, Any]]) -> list[httpx.Response]:
    """The answers to ``requests``, and at the end to a good one."""

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=120) as client:
            return [await client.request(**each) for each in [*requests, {"method": "POST", "url": SPEECH, "json": GOOD}]]

    *answers, last = asyncio.run(ask())
    assert last.status_code == 200
    return answers


def check(answers: list[httpx.Response], least: int, words: set[str]) -> None:
    """Each is an answer or a refusal of the client's; at least ``least`` were answered, and all of ``words`` are among the refusals.

    Without the latter two, requests that are all refused at the door would pass.
    """
    refusals = []
    for answer in answers:
        assert answer.status_code < 500, (answer.status_code, answer.request.url, answer.text[:200])
        if answer.status_code >= 400:
            refusals.append(answer.json()["error"]["message"])
            assert refusals[-1].strip()
            assert "\n" not in refusals[-1]
    assert len(answers) - len(refusals) >= least
    assert not [each for each in words if not any(each in said for said in refusals)]


def test_bodies_with_odd_values(app: Any) -> None:
    names = [*app.openapi()["components"]["schemas"]["SpeechBody"]["properties"], "cfg"]
    bodies = [{**GOOD, name: value} for name in names for value in ODD]
    generator = random.Random(0)
    for _ in range(1000):
        fields = {generator.choice(names): generator.choice(ODD) for _ in range(generator.randint(1, 2))}
        bodies.append({**GOOD, **{name: value for name, value in VALID.items() if generator.random() < 0.5}, **fields})
    for _ in range(200):
        bodies.append({**GOOD, **{name: value for name, value in VALID.items() if generator.random() < 0.5}})
    requests = [{"method": "POST", "url": SPEECH, "content": json.dumps(body), "headers": JSON} for body in bodies]
    check(answered(app, requests), 100, {f"bad {name}" for name in names if name != "instructions"} | {"no such voice", "instructions"})


def test_bytes_that_are_no_body(app: Any) -> None:
    generator = random.Random(1)
    content = json.dumps(GOOD).encode()
    requests = []
    for number in range(1200):
        broken = bytearray(content)
        for _ in range(generator.randint(1, 5)):
            place = generator.randrange(len(broken))
            broken[place : place + generator.randint(0, 3)] = generator.randbytes(generator.randint(0, 3))
        kind = "application/json" if number % 2 else generator.choice(["text/plain", "multipart/form-data", "x"])
        url = SPEECH if number % 4 else VOICES
        requests.append({"method": "POST", "url": url, "content": bytes(broken), "headers": {"Content-Type": kind}})
    check(answered(app, requests), 1, {"JSON decode error", "no such field", "boundary", "no such model"})


def test_forms_that_are_odd(app: Any) -> None:
    generator = random.Random(3)
    requests: list[dict[str, Any]] = []
    fields = ["name", "consent", "ref_text", "audio_sample", "other"]
    values = [str(value) for value in ODD]
    for _ in range(300):
        data = {name: generator.choice(values) for name in generator.sample(fields, generator.randint(0, 5))}
        form = (
            {"data": data, "files": {"audio_sample": (generator.choice(values) or "a", WAV)}}
            if generator.random() < 0.7
            else {"data": data}
        )
        requests.append({"method": "POST", "url": VOICES, **form})
    body, kind = _multipart()
    for _ in range(300):
        broken = bytearray(body)
        for _ in range(generator.randint(1, 5)):
            place = generator.randrange(min(400, len(broken)))
            broken[place : place + generator.randint(0, 3)] = generator.randbytes(generator.randint(0, 3))
        requests.append({"method": "POST", "url": VOICES, "content": bytes(broken), "headers": {"Content-Type": kind}})
    check(answered(app, requests), 1, {"bad name", "bad consent", "bad audio_sample: expected a file", "multipart"})


def _multipart() -> tuple[bytes, str]:
    files = {"audio_sample": ("a.wav", WAV)}
    made = httpx.Request("POST", "http://x", data={"name": "Anna", "consent": "me", "ref_text": "A tone."}, files=files)
    return made.read(), made.headers["content-type"]


def test_paths_that_are_odd(app: Any) -> None:
    generator = random.Random(4)
    requests: list[dict[str, Any]] = []
    for _ in range(300):
        name = "".join(generator.choice("abc./%\\?#é\0 \n") for _ in range(generator.randint(0, 12)))
        path = (
            generator.choice([VOICES, "/v1/models", "/v1", "", SPEECH])
            + "/"
            + (quote(name, safe="") if generator.random() < 0.7 else "a" * 50)
        )
        requests.append({"method": generator.choice(["GET", "DELETE", "POST", "PUT", "OPTIONS"]), "url": path})
    check(answered(app, requests), 0, {"no such voice", "no such model", "Not Found", "Method Not Allowed"})


def test_messages_of_a_socket(app: Any) -> None:
    """Odd messages: each connection ends with an error or the end of the session, and the next one is served."""
    from starlette.testclient import TestClient

    generator = random.Random(5)
    names = [*SocketConfig.model_fields, "text", "cfg"]
    kinds = ["session.config", "input.text", "input.flush", "input.done", "x", None]
    ended = Counter[str]()
    client = TestClient(app, base_url="http://127.0.0.1")  # without its lifespan, whose end removes the folder of uploads
    for _ in range(300):
        messages = [
            {
                **{generator.choice(names): generator.choice(ODD) for _ in range(generator.randint(0, 2))},
                "type": generator.choice(kinds),
            }
            for _ in range(generator.randint(1, 3))
        ]
        texts = [json.dumps(each) if generator.random() < 0.9 else json.dumps(each)[: generator.randint(0, 20)] for each in messages]
        ended[_last_of(client, [*texts, json.dumps({"type": "input.done"})])] += 1
    hello = [json.dumps({"type": "input.text", "text": "Hi."}), json.dumps({"type": "input.done"})]
    assert _last_of(client, hello) == "session.done"
    assert set(ended) == {"error", "session.done"}


def _last_of(client: Any, messages: list[str]) -> str:
    from starlette.websockets import WebSocketDisconnect

    last: dict[str, Any] = {}
    with client.websocket_connect("/v1/audio/speech/stream", headers={"Host": "127.0.0.1"}) as socket:
        with contextlib.suppress(WebSocketDisconnect):
            for text in messages:
                socket.send_text(text)
        while (message := socket.receive())["type"] != "websocket.close":
            if text := message.get("text"):
                last = json.loads(text)
                assert last["type"] != "error" or last["error"]["type"] == "invalid_request_error", last
    return str(last.get("type"))


def test_recordings_that_are_damaged_or_none(app: Any) -> None:
    generator = random.Random(2)
    tone = 0.3 * np.sin(np.arange(16000) / 10)
    files = []
    for kind, subtype in (("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")):
        file = io.BytesIO()
        soundfile.write(file, tone, 16000, format=kind, subtype=subtype)
        files.append(file.getvalue())
    requests: list[dict[str, Any]] = []
    for number in range(300):
        broken = bytearray(generator.choice(files))
        for _ in range(generator.randint(1, 30)):
            broken[generator.randrange(len(broken))] = generator.randrange(256)
        broken = broken[: generator.randint(1, len(broken))]
        if number % 2:
            reference = {"ref_audio": base64.b64encode(broken).decode(), "ref_text": "A tone."}
            requests.append({"method": "POST", "url": SPEECH, "json": {**GOOD, **reference}})
        else:
            data = {"name": f"v{number}", "consent": "me", "ref_text": "A tone."}
            requests.append({"method": "POST", "url": VOICES, "data": data, "files": {"audio_sample": ("a", bytes(broken))}})
    check(answered(app, requests), 20, {"unreadable audio"})


def test_requests_from_the_description(app: Any) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "127.0.0.1"})
    asked = Counter[GenerationMode]()
    for operation in schema.get_all_operations():
        for mode in GenerationMode:
            strategy = operation.ok().as_strategy(generation_mode=mode)

            @given(case=strategy)
            @settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
            def ask(case: Any) -> None:
                response = case.call(headers={"Host": "127.0.0.1"})
                asked[case.meta.generation.mode] += 1
                # A schema cannot say which voices there are, nor that a text must have words: such a request may be refused.
                case.validate_response(response, excluded_checks=[positive_data_acceptance])

            with contextlib.suppress(Unsatisfiable):  # a route without parameters has no bad request
                ask()
    assert sum(asked.values()) > 500, asked
    assert min(asked.values()) > 100, asked
