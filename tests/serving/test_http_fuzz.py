"""Thousands of requests that nobody would write by hand: none is a failure of the server, and the next one is served."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

pytest.importorskip("fastapi")

from kalle.serving.engine import Engine, EngineLimits
from kalle.serving.http import create_app
from kalle.serving.service import ServeOptions
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import StopRule

pytestmark = pytest.mark.slow
SPEECH, VOICES = "/v1/audio/speech", "/v1/audio/voices"
GOOD = {"model": "toy", "input": "Hi.", "response_format": "pcm"}
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


def check(answers: list[httpx.Response]) -> None:
    for answer in answers:
        assert answer.status_code < 500, (answer.status_code, answer.request.content[:200], answer.text[:200])
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]


def test_bodies_with_odd_values(app: Any) -> None:
    names = [*app.openapi()["components"]["schemas"]["SpeechBody"]["properties"], "cfg"]
    bodies = [{**GOOD, name: value} for name in names for value in ODD]
    generator = random.Random(0)
    for _ in range(1000):
        bodies.append({**GOOD, **{generator.choice(names): generator.choice(ODD) for _ in range(generator.randint(1, 4))}})
    check(answered(app, [{"method": "POST", "url": SPEECH, "content": json.dumps(body)} for body in bodies]))


def test_bytes_that_are_no_body(app: Any) -> None:
    generator = random.Random(1)
    content = json.dumps(GOOD).encode()
    requests = []
    for _ in range(1200):
        broken = bytearray(content)
        for _ in range(generator.randint(1, 5)):
            place = generator.randrange(len(broken))
            broken[place : place + generator.randint(0, 3)] = generator.randbytes(generator.randint(0, 3))
        headers = {"Content-Type": generator.choice(["application/json", "text/plain", "multipart/form-data", "x"])}
        requests.append({"method": "POST", "url": generator.choice([SPEECH, VOICES]), "content": bytes(broken), "headers": headers})
    check(answered(app, requests))


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
    check(answered(app, requests))


def test_requests_from_the_description(app: Any, tmp_path: Path) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    asked = 0
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @given(case=strategy)
        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def ask(case: Any) -> None:
            nonlocal asked
            response = case.call(headers={"Host": "127.0.0.1"})
            asked += 1
            assert response.status_code != 500
            case.validate_response(response)

        ask()
    assert asked > 200
