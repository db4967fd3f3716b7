"""The HTTP API over the engine: speech as OpenAI's API has it, voices, a WebSocket for text that is still being written, and monitoring.

Nothing that a client sends is opened as a path or an address, and neither bodies nor keys are logged.
"""

# Annotations are evaluated here: FastAPI reads them.
import base64
import contextlib
import json
import logging
import signal
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import uvicorn
from anyio import to_thread
from fastapi import FastAPI, File, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from kalle import __version__
from kalle.errors import UserError
from kalle.serving.description import description_page
from kalle.serving.encoding import FORMATS, AudioEncoder, encode
from kalle.serving.engine import ClosedError, Engine, Job, QueueFullError, ServingError
from kalle.serving.server import OriginCheck, end_stalled, is_loopback, listenable_port, loopback_names, mounted_page
from kalle.serving.service import MODELS_OWN, ServeOptions, Service, audio_of, nothing_spoken, whole_of
from kalle.serving.sessions import Backend
from kalle.serving.shapes import (
    ApiError,
    BodyLimit,
    ErrorBody,
    Health,
    KeyCheck,
    ModelCard,
    ModelList,
    SentenceTime,
    SpeechBody,
    StallLimit,
    TimedSpeech,
    VoiceCard,
    VoiceDeleted,
    VoiceList,
    error_event,
    error_response,
)
from kalle.serving.websocket import speech_socket
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import SpeechRequest
from kalle.synthesis.speech import Speech
from kalle.synthesis.voice import composed

LOGGER = logging.getLogger(__name__)
PAGE = "/web"
STALLED_TWICE = 2
"""The answer is broken off first, and then the connection ended."""


def create_app(engine: Engine, options: ServeOptions | None = None) -> FastAPI:
    """The API over ``engine``; whoever runs it closes the engine. Without ``keys`` of the options everybody may use it."""
    options = options or ServeOptions()
    temporary = tempfile.TemporaryDirectory(prefix="kalle-serve-")
    service = Service(engine, options, Path(temporary.name))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with temporary:
            yield

    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": words}
        for status, words in {400: "refused", 401: "no valid key", 404: "not found", 413: "too large", 429: "queue full"}.items()
    }
    errors |= {status: {"model": ErrorBody, "description": "failed"} for status in (500, 503, 504)}
    # The pages of FastAPI load scripts from another host.
    app = FastAPI(title="kalle", version=__version__, lifespan=lifespan, responses=errors, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(BodyLimit, most=options.max_upload_bytes * 4 // 3 + 4 * options.max_text + 2**16)
    if options.keys:
        app.add_middleware(KeyCheck, keys=options.keys)
    if is_loopback(options.host):
        app.add_middleware(cast("Any", OriginCheck), names=loopback_names(options.host))
    app.add_middleware(StallLimit, seconds=options.stall_s)
    _add_errors(app)
    _add_speech(app, service)
    _add_voices(app, service)
    _add_state(app, service)
    app.websocket("/v1/audio/speech/stream")(speech_socket(service))
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(description_page(app.openapi()))

    return app


def _add_errors(app: FastAPI) -> None:
    async def shaped(_: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        first = cast("RequestValidationError", error).errors()[0]
        if first["type"] == "json_invalid":
            reason = f"{first['ctx']['error']} at character {first['loc'][-1]}"
            return error_response(ApiError(400, f"bad request: the body is not JSON ({reason}); correct it", None, "json_invalid"))
        place = ".".join(str(part) for part in first["loc"] if part not in ("body", "path", "query"))
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else first["type"]
        # The message of the check alone: the value may be anything, a recording among it.
        said = "there is no such field" if first["type"] == "extra_forbidden" else first["msg"]
        if "UploadFile" in said:
            said = "expected a file"
        return error_response(ApiError(400, f"bad {place or 'request'}: {said}", place or None, code))

    async def refused(_: Request, error: Exception) -> JSONResponse:
        told = cast("StarletteHTTPException", error)
        answer = error_response(ApiError(told.status_code, str(told.detail)))
        answer.headers.update(told.headers or {})
        return answer

    for kind in (ApiError, UserError, ServingError, Exception):
        app.add_exception_handler(kind, shaped)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, refused)


def _add_speech(app: FastAPI, service: Service) -> None:
    binary = {"schema": {"type": "string", "format": "binary"}}
    contents = {form.media_type: binary for form in FORMATS.values()} | {"text/event-stream": {"schema": {"type": "string"}}}

    @app.post(
        "/v1/audio/speech",
        response_class=Response,
        responses={200: {"description": "Audio, events, or with timestamps JSON", "content": contents, "model": TimedSpeech}},
    )
    async def speech(body: SpeechBody, request: Request) -> Response:
        """Speak a text. Headers: X-Audio-Sample-Rate, X-Seed, and X-Stop-Reason where the audio is sent whole."""
        service.check_model(body.model)
        if body.instructions and body.instructions.strip():
            raise ApiError(
                400, "this model takes no instructions: it follows the voice; choose another voice or ref_audio, or leave them out",
                "instructions", "unsupported_parameter",
            )  # fmt: skip
        events = body.stream_format == "sse"
        streamed = events or body.stream_format == "audio" or bool(body.stream)
        if body.stream is False and body.stream_format is not None:
            raise ApiError(400, f"two answers: got stream false and stream_format {body.stream_format}; leave one out", "stream")
        if streamed and not events and body.timestamps:
            raise ApiError(400, "timestamps have no place in chunked audio: use stream_format sse, or none", "timestamps")
        await service.check_times(body)
        wanted = await service.request(body, body.input)
        encoder = AudioEncoder(body.response_format, service.kalle.sample_rate, body.speed) if streamed else None
        job = await service.submit(wanted, streamed)
        headers = {"X-Audio-Sample-Rate": str(service.kalle.sample_rate), "X-Seed": str(job.seed), "Cache-Control": "no-store"}
        media_type = FORMATS[body.response_format].media_type
        if encoder is None:
            try:
                spoken = await whole_of(job, request)
            finally:
                service.metrics.ended(job)
            if not spoken.frames:
                raise nothing_spoken(job.seed)
            audio = await to_thread.run_sync(lambda: encode(spoken.audio, body.response_format, spoken.sample_rate, body.speed))
            headers["X-Stop-Reason"] = spoken.stop_reason
            if body.timestamps:
                return _timed(body, spoken, audio, headers, *await service.times(body, spoken, request))
            return Response(audio, media_type=media_type, headers=headers)
        pieces = audio_of(job)
        try:
            first = await anext(pieces)  # what fails before it is an answer with a status
        except BaseException as error:
            service.metrics.ended(job)
            if isinstance(error, StopAsyncIteration):
                raise nothing_spoken(job.seed) from None
            raise
        content = _encoded(service, job, encoder, first, pieces)
        if not events:
            return _Streamed([content], media_type, headers)
        tokens = len(service.kalle.tokenizer.encode(body.input))
        return _Streamed([_events(service, body, job, content, tokens, request), content], "text/event-stream", headers)


def _timed(
    body: SpeechBody, spoken: Speech, audio: bytes, headers: Mapping[str, str], times: list[SentenceTime], warnings: list[str]
) -> JSONResponse:
    timed = TimedSpeech(
        audio=base64.b64encode(audio).decode(),
        format=body.response_format,
        sample_rate=spoken.sample_rate,
        seed=spoken.seed,
        stop_reason=spoken.stop_reason,
        sentences=times,
        warnings=[*spoken.warnings, *warnings],
    )
    return JSONResponse(timed.model_dump(exclude_none=True), headers=dict(headers))


class _Streamed(StreamingResponse):
    """The answer of the first of ``generators``. All of them are closed with it, however it ends.

    A generator that is left to the garbage collector keeps its job, whose audio then counts as waiting for a client.
    """

    def __init__(self, generators: Sequence[AsyncGenerator[Any, None]], media_type: str, headers: Mapping[str, str]) -> None:
        super().__init__(generators[0], media_type=media_type, headers=headers)
        self._generators = generators

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generator in self._generators:
                await generator.aclose()


async def _encoded(
    service: Service, job: Job, encoder: AudioEncoder, first: np.ndarray, pieces: AsyncIterator[np.ndarray]
) -> AsyncGenerator[bytes, None]:
    """The bytes of ``first`` and all ``pieces`` after it. An error of the job breaks the connection off, which the client sees."""
    try:
        if content := encoder.push(first):
            yield content
        async for piece in pieces:
            if content := encoder.push(piece):
                yield content
        if content := encoder.finish():
            yield content
    finally:
        job.cancel()
        service.metrics.ended(job)


async def _events(
    service: Service, body: SpeechBody, job: Job, content: AsyncIterator[bytes], tokens: int, request: Request
) -> AsyncGenerator[str, None]:
    """Server-sent events of OpenAI's shape; the last one has what else is known of the speech."""
    try:
        async for part in content:
            yield _event({"type": "speech.audio.delta", "audio": base64.b64encode(part).decode()})
        spoken = job.speech
        times, warnings = await service.times(body, spoken, request) if body.timestamps else (None, [])
    except (ServingError, UserError) as error:
        yield _event(error_event(error), "error")
        return
    usage = {"input_tokens": tokens, "output_tokens": spoken.frames, "total_tokens": tokens + spoken.frames}
    done = {"type": "speech.audio.done", "usage": usage, "seed": job.seed, "stop_reason": spoken.stop_reason}
    done["warnings"] = [*spoken.warnings, *warnings]
    if times is not None:
        done["sentences"] = [each.model_dump(exclude_none=True) for each in times]
    yield _event(done)


def _event(value: Mapping[str, Any], name: str | None = None) -> str:
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(value)}\n\n"


def _add_voices(app: FastAPI, service: Service) -> None:
    @app.get("/v1/audio/voices")
    async def voices() -> VoiceList:
        """The voices that can be asked for by name."""
        return VoiceList(data=await service.in_thread(lambda: [_card(service, name) for name in service.voices.names()]))

    @app.post("/v1/audio/voices", status_code=201, responses={409: {"model": ErrorBody, "description": "The name is taken"}})
    async def create_voice(
        name: Annotated[str, Form(min_length=1, max_length=80, description="Letters, digits, spaces, dots and hyphens.")],
        consent: Annotated[str, Form(min_length=1, max_length=2000, description="Who spoke, and what they agreed to; kept with it.")],
        audio_sample: Annotated[UploadFile, File(description="A recording of the voice, 60 seconds at most.")],
        ref_text: Annotated[str | None, Form(max_length=2000, description="The words of the recording.")] = None,
    ) -> VoiceCard:
        """Keep a voice made from a recording, with the speaker's consent."""
        if not consent.strip():
            raise ApiError(400, "no consent: got an empty text, expected who spoke and what they agreed to", "consent")
        service.check_transcript(ref_text)
        content = await audio_sample.read(service.options.max_upload_bytes + 1)
        if len(content) > service.options.max_upload_bytes:
            raise ApiError(413, f"the recording is too large: expected at most {service.options.max_upload_bytes} bytes", "audio_sample")

        def keep() -> VoiceCard:
            if composed(name.strip()).casefold() in (each.casefold() for each in (*service.voices.names(), MODELS_OWN)):
                raise ApiError(409, f"there is a voice of that name: got {name!r}, expected a new one; choose another name", "name")
            return _card(service, service.voices.keep_bytes(content, ref_text, name, consent))

        card: VoiceCard = await service.in_thread(keep, service._voice_work)
        LOGGER.info("kept an uploaded voice in %s", service.options.voices)
        return card

    @app.delete("/v1/audio/voices/{name}", responses={403: {"model": ErrorBody, "description": "Part of the model"}})
    async def delete_voice(name: str) -> VoiceDeleted:
        """Delete an uploaded voice."""

        def delete() -> None:
            if composed(name) not in service.voices.names():
                raise ApiError(404, f"no such voice: got {name!r:.60}; see /v1/audio/voices", "name", "voice_not_found")
            if not service.voices.delete(name):
                raise ApiError(403, f"the voice {name!r} belongs to the model and stays", "name")

        await service.in_thread(delete)
        return VoiceDeleted(id=name)


def _card(service: Service, name: str) -> VoiceCard:
    path = service.voices.path(name)
    return VoiceCard(id=name, name=name, created_at=int(path.stat().st_mtime), uploaded=path.parent == service.voices.folder)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> ModelList:
        """The model that is served, under each of its names."""
        return ModelList(data=[ModelCard(id=name, created=service.began) for name in service.names])

    @app.get("/v1/models/{name}")
    async def model(name: str) -> ModelCard:
        """Describe the one model that is served."""
        service.check_model(name)
        return ModelCard(id=name, created=service.began)

    @app.get("/health")
    async def health() -> Health:
        """Whether the server works; 503 once the engine has ended."""
        if not service.engine.alive:
            raise ClosedError("the engine has ended")
        return Health(status="ok")

    @app.get("/ready")
    async def ready() -> Health:
        """Whether a request would be taken now; 503 while the queue is full or the server shuts down."""
        if not service.engine.alive:
            raise ClosedError("the engine has ended")
        try:
            service.engine.check_room()
        except QueueFullError as error:
            raise ApiError(503, str(error), code="queue_full") from None
        return Health(status="ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _description(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, without the answers 422 that FastAPI adds and this API never gives."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes, description=__doc__)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema


class _Server(uvicorn.Server):
    """uvicorn, for which a signal is the ordinary end: requests finish, or end with an error when the grace is over."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_s: float, told: str) -> None:
        super().__init__(config)
        self._engine, self._grace_s, self._told = engine, grace_s, told

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM, and do not raise them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say so only then."""
        await super().startup(sockets)
        if self.started:
            LOGGER.info("%s (Ctrl-C ends it)", self._told)

    async def shutdown(self, sockets: Any = None) -> None:
        """Take no more requests; the engine ends those that are left, each with its error, when the grace is over."""
        closing = threading.Thread(target=self._engine.close, args=(0.0 if self.force_exit else self._grace_s,), daemon=True)
        closing.start()
        await super().shutdown(sockets)


def serve_api(kalle: Kalle, options: ServeOptions) -> None:
    """Serve ``kalle`` until Ctrl-C or SIGTERM. UserError for a port that is taken, or an address that isn't ours."""
    port = listenable_port(options.host, options.port)
    with Engine(kalle, options.limits) as engine, contextlib.ExitStack() as stack:
        engine.submit(SpeechRequest("Ready.", seed=0, max_seconds=0.5)).result()  # what is made once is made now
        app = create_app(engine, options)
        if options.web:
            backend = stack.enter_context(Backend(kalle, options.voices, options.max_text, engine))
            stack.enter_context(mounted_page(app, backend, PAGE))
        config = uvicorn.Config(
            app,
            host=options.host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(options.grace_s) + 5,
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        with config.bind_socket() as listening:
            end_stalled(listening, STALLED_TWICE * options.stall_s)
            told = f"serving {kalle.folder or 'a model'} at http://{options.host}:{port}/v1"
            _Server(config, engine, options.grace_s, told).run([listening])
    LOGGER.info("the server has ended")
