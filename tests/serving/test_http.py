"""The API as its clients see it: over a real server on the loopback, with OpenAI's own client where there is one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from page_calls import Gate

pytest.importorskip("fastapi")
import uvicorn

from kalle.audio import to_pcm16
from kalle.errors import UserError
from kalle.evaluation import asr
from kalle.evaluation.alignment import WordAligner
from kalle.serving.engine import Engine, EngineLimits
from kalle.serving.http import STALLED_TWICE, create_app
from kalle.serving.server import end_stalled
from kalle.serving.service import ServeOptions
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import SpeechRequest, StopRule

KEY = "k-123"
SPEECH = "/v1/audio/speech"
HELLO = {"model": "toy", "input": "Hi.", "voice": "default", "seed": 3, "response_format": "pcm"}


class Served:
    """A server in a thread."""

    def __init__(
        self, kalle: Kalle, voices: Path, limits: EngineLimits | None = None, send_buffer: int | None = None, **options: Any
    ) -> None:
        self.engine = Engine(kalle, limits)
        made = ServeOptions(voices=voices, names=("toy",), max_text=200, max_upload_bytes=2**18, **options)
        self.app = create_app(self.engine, made)
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=5))
        listening = socket.create_server(("127.0.0.1", 0))
        if send_buffer is not None:  # those who are accepted inherit it
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        end_stalled(listening, STALLED_TWICE * made.stall_s)
        self._thread = threading.Thread(target=self.server.run, args=([listening],))
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.host = f"127.0.0.1:{listening.getsockname()[1]}"
        self.url = f"http://{self.host}"
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=900)

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self._thread.join()
        self.engine.close()


@pytest.fixture(scope="module")
def brief(kalle_toy: Kalle) -> Kalle:
    """Untrained weights whose speech ends after 40 frames."""
    config = replace(kalle_toy.config, stop=StopRule(threshold=1e9, min_index=39))
    return Kalle(kalle_toy.flowvae, kalle_toy.lm, kalle_toy.tokenizer, config)


@pytest.fixture(scope="module")
def served(brief: Kalle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(brief, tmp_path_factory.mktemp("voices"), keys=("other", KEY))
    yield made
    made.close()


@pytest.fixture(scope="module")
def offline(brief: Kalle) -> np.ndarray:
    return to_pcm16(brief.synthesize("Hi.", seed=3).audio).astype(int)


def recording(seconds: float = 2.0, level: float = 0.3, kind: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, level * np.sin(2 * np.pi * 220 * np.arange(int(seconds * 16000)) / 16000), 16000, format=kind)
    return file.getvalue()


CUT = recording(kind="WAV")[:-30_000]


def pcm(content: bytes) -> np.ndarray:
    return np.frombuffer(content, "<i2").astype(int)


def close_to(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, atol=1e-4 * 32768)


def events(lines: Any) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def test_the_client_of_openai_works_unchanged(served: Served, offline: np.ndarray) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)
    arguments = {"model": "toy", "voice": "default", "input": "Hi.", "response_format": "pcm", "extra_body": {"seed": 3}}
    answer = client.audio.speech.create(**arguments)
    close_to(pcm(answer.content), offline)
    headers = answer.response.headers
    assert (headers["x-audio-sample-rate"], headers["x-seed"], headers["x-stop-reason"]) == ("16000", "3", "end")
    with client.audio.speech.with_streaming_response.create(**arguments, stream_format="audio") as stream:
        pieces = list(stream.iter_bytes())
    assert len(pieces) > 1
    close_to(pcm(b"".join(pieces)), offline)
    with client.audio.speech.with_streaming_response.create(**arguments, stream_format="sse") as stream:
        *deltas, done = events(stream.iter_lines())
    assert {each["type"] for each in deltas} == {"speech.audio.delta"}
    close_to(pcm(b"".join(base64.b64decode(each["audio"]) for each in deltas)), offline)
    assert (done["type"], done["seed"], done["stop_reason"]) == ("speech.audio.done", 3, "end")
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"]
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.BadRequestError) as refused:
        client.audio.speech.create(**{**arguments, "input": "x" * 201})
    assert refused.value.body["param"] == "input"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong").audio.speech.create(**arguments)


def test_many_at_once_through_the_asynchronous_client(
    served: Served, brief: Kalle, offline: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = pytest.importorskip("openai")
    arguments = {"model": "toy", "voice": "default", "input": "Hi.", "response_format": "pcm", "extra_body": {"seed": 3}}

    async def streamed(client: Any) -> bytes:
        async with client.audio.speech.with_streaming_response.create(**arguments, stream_format="audio") as stream:
            return b"".join([piece async for piece in stream.iter_bytes()])

    async def ask() -> list[bytes]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
            whole = [client.audio.speech.create(**arguments) for _ in range(3)]
            got = await asyncio.gather(*whole, *(streamed(client) for _ in range(3)))
            return [each if isinstance(each, bytes) else each.content for each in got]

    gate = Gate(brief, monkeypatch)
    gate.hold(1)

    def let_go() -> None:
        while len(served.engine._jobs) < 6:
            time.sleep(0.01)
        gate.go_on.set()

    letting = threading.Thread(target=let_go)
    letting.start()
    for content in asyncio.run(ask()):
        close_to(pcm(content), offline)
    letting.join()
    assert gate.most_rows == 6, "they were not batched"


@pytest.mark.parametrize(
    ("change", "status", "param", "word"),
    [
        ({"model": "gpt"}, 404, "model", "toy"),
        ({"voice": "alloy"}, 404, "voice", "default"),
        ({"voice": "../../etc/passwd"}, 404, "voice", "default"),
        ({"input": ""}, 400, "input", ""),
        ({"input": " \n"}, 400, None, "empty"),
        ({"input": "x" * 201}, 400, "input", "200"),
        ({"input": 5}, 400, "input", ""),
        ({"instructions": "Whisper."}, 400, "instructions", "voice"),
        ({"response_format": "ogg"}, 400, "response_format", "mp3"),
        ({"speed": 5}, 400, "speed", "4"),
        ({"speed": "fast"}, 400, "speed", ""),
        ({"seed": -1}, 400, "seed", ""),
        ({"seed": 1.5}, 400, "seed", ""),
        ({"seed": "3"}, 400, "seed", ""),
        ({"seed": True}, 400, "seed", ""),
        ({"temperature": 3}, 400, "temperature", ""),
        ({"language": "klingon"}, 400, None, "ISO 639"),
        ({"cfg_scale": 2}, 400, "cfg_scale", "no such field"),
        ({"stream": False, "stream_format": "sse"}, 400, "stream", ""),
        ({"stream_format": "audio", "timestamps": "sentence"}, 400, "timestamps", "sse"),
        ({"timestamps": "letter"}, 400, "timestamps", "sentence"),
        ({"ref_text": "Words."}, 400, "ref_text", "ref_audio"),
        ({"ref_audio": "/etc/passwd", "ref_text": "Words."}, 400, "ref_audio", "base64"),
        ({"ref_audio": "http://127.0.0.1/a.wav", "ref_text": "Words."}, 400, "ref_audio", "base64"),
        ({"ref_audio": base64.b64encode(b"no audio").decode(), "ref_text": "Words."}, 400, None, "unreadable audio: the recording ("),
        ({"ref_audio": base64.b64encode(CUT).decode(), "ref_text": "Words."}, 400, None, "cut short: got 1.06 s of the recording"),
        ({"ref_audio": base64.b64encode(recording()).decode()}, 400, "ref_text", "transcript"),
        ({"ref_audio": base64.b64encode(recording()).decode(), "ref_text": "Words.", "voice": "random"}, 400, "voice", "one of them"),
        ({"ref_audio": "A" * 360_000, "ref_text": "Words."}, 413, "ref_audio", "shorter"),
        ({"ref_audio": "A" * 600_000}, 413, None, "shorter"),
    ],
)
def test_what_is_wrong_is_said_in_the_shape_of_openai(
    served: Served, change: dict[str, Any], status: int, param: str | None, word: str
) -> None:
    answer = served.http.post(SPEECH, json={**HELLO, **change})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert word in error["message"]
    assert str(served.app.state.service.voices.temporary) not in answer.text


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"input": "\\ud800"}', b"[" * 20000, b'{"seed": ' + b"9" * 5000]
)
def test_garbage_is_refused(served: Served, content: bytes) -> None:
    answer = served.http.post(SPEECH, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_no_json_is_called_that(served: Served) -> None:
    error = served.http.post(SPEECH, content=b'{"input": "hi",}', headers={"Content-Type": "application/json"}).json()["error"]
    assert error["message"].startswith("bad request: the body is not JSON")
    assert error["param"] is None


def test_other_paths_and_methods_are_refused_in_the_same_shape(served: Served) -> None:
    assert served.http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert served.http.get(SPEECH).status_code == 405
    assert served.http.get(SPEECH).json()["error"]["message"]


def test_a_body_without_a_length_is_limited_too(served: Served) -> None:
    answer = served.http.post(SPEECH, content=iter([b"x" * 100_000] * 8), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_only_holders_of_a_key_are_served(served: Served) -> None:
    for header in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"):
        answer = httpx.post(served.url + SPEECH, json=HELLO, headers={"Authorization": header.encode()})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/ready").json() == {"status": "ready"}


def test_other_pages_and_names_are_refused(served: Served) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert served.http.post(SPEECH, json=HELLO, headers=headers).status_code == 403


def test_speed_reference_and_times(served: Served, brief: Kalle, offline: np.ndarray) -> None:
    fast = served.http.post(SPEECH, json={**HELLO, "speed": 2.0})
    assert len(pcm(fast.content)) == round(len(offline) / 2)
    reference = {"ref_audio": f"data:audio/flac;base64,{base64.b64encode(recording()).decode()}", "ref_text": "A tone."}
    spoken = served.http.post(SPEECH, json={**HELLO, **reference, "timestamps": "sentence", "speed": 0.5}).json()
    assert len(spoken["sentences"]) == 1
    assert spoken["sentences"][0]["end"] == pytest.approx(2 * len(offline) / 16000, abs=1e-3)
    assert len(pcm(base64.b64decode(spoken["audio"]))) == 2 * len(offline)
    slow = served.http.post(SPEECH, json={**HELLO, **reference})
    file = served.app.state.service.voices.temporary / "ours.flac"
    file.write_bytes(recording())
    close_to(pcm(slow.content), to_pcm16(brief.synthesize("Hi.", brief.voice(file, "A tone."), seed=3).audio).astype(int))
    whole = served.http.post(SPEECH, json={**HELLO, "response_format": "wav"})
    assert soundfile.info(io.BytesIO(whole.content)).frames == len(offline)
    assert whole.headers["content-type"] == "audio/wav"
    assert served.http.post(SPEECH, json={**HELLO, "seed": 3.0}).headers["x-seed"] == "3"  # JSON has one kind of number


def test_voices_are_kept_listed_spoken_and_deleted(served: Served) -> None:
    fields = {"name": "Anna", "consent": "Anna, for tests", "ref_text": "A tone."}
    files = {"audio_sample": ("../../evil.g722", recording(), "audio/flac")}
    for change, status in (
        ({"consent": " "}, 400),
        ({"consent": ""}, 400),
        ({"name": "../x"}, 400),
        ({"name": "random"}, 400),
        ({"name": "default"}, 409),
        ({"ref_text": ""}, 400),
    ):
        assert served.http.post("/v1/audio/voices", data={**fields, **change}, files=files).status_code == status, change
    refused = [(content, 400) for content in (b"", b"no audio", CUT, recording(61, 0.0))]
    for content, status in (*refused, (b"x" * 300_000, 413), (b"x" * 600_000, 413)):
        answer = served.http.post("/v1/audio/voices", data=fields, files={"audio_sample": ("a.wav", content)})
        assert answer.status_code == status, answer.text
    kept = served.http.post("/v1/audio/voices", data=fields, files=files)
    assert kept.status_code == 201, kept.text
    assert (kept.json()["id"], kept.json()["uploaded"]) == ("Anna", True)
    assert served.http.post("/v1/audio/voices", data=fields, files=files).status_code == 409
    assert [voice["id"] for voice in served.http.get("/v1/audio/voices").json()["data"]] == ["Anna"]
    assert [path.name for path in served.app.state.service.voices.folder.iterdir()] == ["Anna.safetensors"]
    assert not list(served.app.state.service.voices.temporary.glob("upload*"))
    said = served.http.post(SPEECH, json={**HELLO, "voice": {"id": "Anna"}})
    assert said.status_code == 200
    accents = served.http.post("/v1/audio/voices", data={**fields, "name": "Zoe\u0308"}, files=files)
    assert accents.json()["id"] == "Zo\u00eb"
    for name in ("Zo\u00eb", "Zoe\u0308"):
        assert served.http.post("/v1/audio/voices", data={**fields, "name": name}, files=files).status_code == 409
        assert served.http.post(SPEECH, json={**HELLO, "voice": name}).status_code == 200
    assert served.http.delete("/v1/audio/voices/Zoe\u0308").json()["deleted"]
    assert served.http.delete("/v1/audio/voices/Anna").json()["deleted"]
    assert served.http.delete("/v1/audio/voices/Anna").status_code == 404
    assert served.http.post(SPEECH, json={**HELLO, "voice": "Anna"}).status_code == 404


def test_a_client_that_vanishes_frees_its_place(brief: Kalle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(brief, monkeypatch)
    served = Served(brief, tmp_path, EngineLimits(rows=1))
    try:
        for wanted in ({}, {"stream_format": "audio"}):
            gate.steps = 0
            gate.held.clear()
            gate.go_on.clear()
            gate.hold(20)
            asked = threading.Thread(target=_ask_and_leave, args=(served.host, {**HELLO, **wanted}, gate.held))
            asked.start()
            assert gate.held.wait(600)
            asked.join()
            while not all(job.cancelled for job in served.engine._jobs):
                time.sleep(0.02)
            gate.go_on.set()
            assert served.http.post(SPEECH, json=HELLO).status_code == 200
        assert served.engine.state.endings["cancelled"] == 2
    finally:
        gate.go_on.set()
        served.close()


def _ask_and_leave(host: str, body: dict[str, Any], held: threading.Event) -> None:
    name, port = host.split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((name, int(port))) as connection:
        head = f"POST {SPEECH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        held.wait(600)


def test_a_full_queue_is_429_and_a_failed_engine_500(brief: Kalle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(brief, monkeypatch)
    gate.hold(1)
    served = Served(brief, tmp_path, EngineLimits(rows=1, queue=1))
    answers: list[httpx.Response] = []
    try:
        runs = [threading.Thread(target=lambda: answers.append(served.http.post(SPEECH, json=HELLO))) for _ in range(2)]
        runs[0].start()
        assert gate.held.wait(600)
        runs[1].start()
        while served.engine.state.waiting < 1:
            time.sleep(0.01)
        full = served.http.post(SPEECH, json=HELLO)
        assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(full.headers["retry-after"]) >= 1
        assert served.http.get("/ready").status_code == 503
        gate.go_on.set()
        for run in runs:
            run.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        gate.before = lambda number: 1 / 0
        failed = served.http.post(SPEECH, json=HELLO)
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        count = gate.steps

        def later(number: int) -> None:
            if number == count + 25:
                raise RuntimeError("out of luck")

        gate.before = later
        with served.http.stream("POST", SPEECH, json={**HELLO, "stream_format": "sse"}) as stream:
            *_, last = events(stream.iter_lines())
        assert (last["type"], last["error"]["type"]) == ("error", "server_error")
        count = gate.steps
        with pytest.raises(httpx.RemoteProtocolError), served.http.stream("POST", SPEECH, json={**HELLO, "stream": True}) as stream:
            list(stream.iter_bytes())
        gate.before = lambda number: None
        assert served.http.post(SPEECH, json=HELLO).status_code == 200
    finally:
        gate.go_on.set()
        served.close()


def test_numbers_for_prometheus(served: Served) -> None:
    served.http.post(SPEECH, json={**HELLO, "stream_format": "audio"})
    lines = served.http.get("/metrics").text.splitlines()
    numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(numbers["kalle_frames_total"]) > 0
    assert float(numbers["kalle_first_audio_seconds_count"]) >= 1
    assert float(numbers['kalle_requests_total{ending="end"}']) >= 1


def test_neither_texts_nor_keys_are_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    served.http.post(SPEECH, json={**HELLO, "input": "Secret words."})
    served.http.post(SPEECH, json={**HELLO, "input": "Secret words.", "cfg": "Secret words."})
    assert "Secret" not in caplog.text
    assert KEY not in caplog.text


async def _socket(served: Served, messages: list[object], **options: Any) -> list[Any]:
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosedError

    got: list[Any] = []
    url = f"ws://{served.host}/v1/audio/speech/stream"
    async with connect(url, additional_headers={"Authorization": f"Bearer {KEY}"}, **options) as socket:
        for message in messages:
            await socket.send(message if isinstance(message, str) else json.dumps(message))
        with contextlib.suppress(ConnectionClosedError):
            async for answer in socket:
                got.append(answer if isinstance(answer, bytes) else json.loads(answer))
    return got


def test_sentences_are_spoken_while_the_text_is_still_written(served: Served, brief: Kalle) -> None:
    pytest.importorskip("websockets")
    reference = base64.b64encode(recording()).decode()
    pieces = ["It was a bri", "ght cold day. The clocks were strik", "ing thirteen. Nobody said", " a word."]
    messages = [
        {"type": "session.config", "seed": 5, "response_format": "pcm", "ref_audio": reference, "ref_text": "A tone."},
        *({"type": "input.text", "text": piece} for piece in pieces),
        {"type": "input.done"},
    ]
    got = asyncio.run(_socket(served, messages))
    starts = [each for each in got if isinstance(each, dict) and each["type"] == "audio.start"]
    assert [start["sentence_text"] for start in starts] == [
        "It was a bright cold day.",
        "The clocks were striking thirteen.",
        "Nobody said a word.",
    ]
    assert got[-1] == {"type": "session.done", "total_sentences": 3, "seed": 5}
    audio = b"".join(each for each in got[: got.index(starts[1])] if isinstance(each, bytes))
    file = served.app.state.service.voices.temporary / "socket.flac"
    file.write_bytes(recording())
    alone = brief.synthesize("It was a bright cold day.", brief.voice(file, "A tone."), seed=5, retries=0)
    close_to(pcm(audio), to_pcm16(alone.audio).astype(int))


@pytest.mark.parametrize(
    "message",
    [
        "no json",
        {"type": "dance"},
        [],
        {"type": "session.config", "voice": "nobody"},
        {"type": "session.config", "cfg": 1},
        {"type": "input.text"},
    ],
)
def test_a_socket_that_talks_nonsense_is_told_and_closed(served: Served, message: object) -> None:
    pytest.importorskip("websockets")
    got = asyncio.run(_socket(served, [message]))
    assert [each["type"] for each in got] == ["error"]
    assert got[0]["error"]["message"]


def test_a_socket_needs_a_key_too(served: Served) -> None:
    connect = pytest.importorskip("websockets.sync.client").connect
    with pytest.raises(Exception, match="401"):
        connect(f"ws://{served.host}/v1/audio/speech/stream")


def test_the_description_is_complete(served: Served) -> None:
    schema = served.http.get("/openapi.json").json()
    assert {SPEECH, "/v1/audio/voices", "/v1/models", "/health", "/ready", "/metrics"} <= set(schema["paths"])
    body = schema["components"]["schemas"]["SpeechBody"]
    assert body["additionalProperties"] is False
    assert all("description" in body["properties"][name] for name in body["properties"])
    assert "422" not in json.dumps(schema)


def test_the_page_of_the_description_needs_nothing_else(served: Served) -> None:
    page = served.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    for word in ("src=", "<script", "http://", "https://", "@import", "url("):
        assert word not in page.text
    schema = served.http.get("/openapi.json").json()
    for path, operations in schema["paths"].items():
        assert all(f"{method.upper()} {path}</code>" in page.text for method in operations)
    fields = [name for each in schema["components"]["schemas"].values() if "Body" in each["title"] for name in each["properties"]]
    assert {"ref_audio", "consent", "stream_format"} < set(fields)
    assert all(f"<code>{name}</code>" in page.text for name in fields if name != "error")
    assert served.http.get("/redoc").status_code == 404


def test_the_command_refuses_an_open_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kalle.cli.main import main

    keys = tmp_path / "keys"
    for content, flags, words in (
        ("", ["--host", "0.0.0.0"], "--api-keys"),
        ("# none\n", ["--api-keys", str(keys)], "no key"),
        ("a b\n", ["--api-keys", str(keys)], "a bad key"),
        ("good\n", ["--api-keys", str(keys), "--web"], "--web"),
    ):
        keys.write_text(content)
        assert main(["serve", *flags]) == 2
        assert words in capsys.readouterr().err


def test_the_engine_of_several_servers_is_one(brief: Kalle, tmp_path: Path) -> None:
    with Engine(brief) as engine:
        apps = [create_app(engine, replace(ServeOptions(), voices=tmp_path)) for _ in range(2)]
        assert apps[0].state.service.engine is apps[1].state.service.engine
        assert engine.submit(SpeechRequest("Hi.", seed=3, max_seconds=0.2)).result().frames == 20


def test_times_of_words(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {**HELLO, "input": "Hi there. You too.", "timestamps": "word"}
    try:
        WordAligner().check("en")
    except UserError:
        pytest.skip("no speech recogniser is installed")
    whole = served.http.post(SPEECH, json=asked).json()
    *_, streamed = events(served.http.post(SPEECH, json={**asked, "stream_format": "sse"}).text.splitlines())
    slow = served.http.post(SPEECH, json={**asked, "speed": 0.5}).json()
    for answer in (whole, streamed, slow):
        said = [word["word"] for sentence in answer["sentences"] for word in sentence["words"]]
        assert said == ["Hi", "there.", "You", "too."]
        for sentence in answer["sentences"]:
            assert all(sentence["start"] <= word["start"] <= word["end"] <= sentence["end"] + 1e-3 for word in sentence["words"])
    ends = [[word["end"] for sentence in answer["sentences"] for word in sentence["words"]] for answer in (whole, slow)]
    assert ends[1] == pytest.approx([2 * end for end in ends[0]], abs=2e-3)
    sentences = served.http.post(SPEECH, json={**asked, "timestamps": "sentence"}).json()["sentences"]
    assert all("words" not in sentence for sentence in sentences)
    monkeypatch.setattr(asr, "_installed_folders", lambda packaged: None)
    before = served.engine.state.frames
    refused = served.http.post(SPEECH, json=asked)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "aligner_missing")
    assert "pip install" in refused.json()["error"]["message"]
    assert served.engine.state.frames == before, "it was spoken all the same"
