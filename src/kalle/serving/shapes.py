"""Requests and answers of the API: bodies, errors in OpenAI's shape, and the checks before a request reaches a route."""

# Annotations are evaluated here: FastAPI reads them.
import asyncio
import hashlib
import json
import logging
import secrets
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalle.errors import UserError
from kalle.serving.encoding import SPEEDS
from kalle.serving.engine import ClosedError, OverdueError, QueueFullError, ServingError
from kalle.synthesis.options import SEED_LIMIT

LOGGER = logging.getLogger(__name__)
OPEN_PATHS = frozenset({"/health", "/ready"})
"""Answered without a key."""
HOTTEST = 2.0
WholeNumber = Annotated[StrictInt, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)]
"""An integer as JSON Schema has it: 4.0 is one, "4" and true are none."""
FormatName = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]


class ApiError(Exception):
    """A request that is refused, in the shape of OpenAI's errors."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class ErrorDetail(BaseModel):
    """The mistake in a request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error as OpenAI's API answers it."""

    error: ErrorDetail


class VoiceId(BaseModel):
    """A voice by its id, as OpenAI's clients may write it."""

    model_config = ConfigDict(extra="forbid")
    id: StrictStr


class VoiceFields(BaseModel):
    """Whose voice speaks, and how."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    voice: StrictStr | VoiceId | None = Field(
        None, description="A name of /v1/audio/voices; `random` for the made-up voice of the seed; `default`, or none, for the model's own."
    )
    speed: float = Field(1.0, ge=SPEEDS[0], le=SPEEDS[1], description="Changes the pace after synthesis, and keeps the pitch.")
    seed: WholeNumber | None = Field(None, ge=0, lt=SEED_LIMIT, description="The same seed gives the same speech; without one it is drawn.")
    temperature: float | None = Field(None, ge=0, le=HOTTEST, description="Scale of the standard deviations; 1 is the model's own spread.")
    language: StrictStr | None = Field(None, max_length=8, description="ISO 639-1 code of the text; guessed by default.")
    ref_audio: StrictStr | None = Field(
        None, description="A recording to speak in the voice of: base64 of a file, or a data URL; addresses and paths are not opened."
    )
    ref_text: StrictStr | None = Field(None, max_length=2000, description="The words of that recording.")


class SpeechBody(VoiceFields):
    """A request for speech. An unknown field is an error."""

    model: StrictStr = Field(description="A name of /v1/models.")
    input: StrictStr = Field(min_length=1, description="The text to speak.")
    instructions: StrictStr | None = Field(None, description="Refused: this model takes no instructions.")
    response_format: FormatName = Field("mp3", description="`pcm` is 16-bit little-endian mono at X-Audio-Sample-Rate.")
    stream_format: Literal["audio", "sse"] | None = Field(
        None, description="`audio` sends the audio while it is made, `sse` as events; without it, it is sent when it is whole."
    )
    stream: StrictBool | None = Field(None, description="true is stream_format audio.")
    timestamps: Literal["sentence", "word"] | None = Field(
        None,
        description="Where each sentence is, and with `word` each of its words, which needs a speech recogniser on the server: in the last "
        "event with sse; otherwise the answer is JSON with the audio in base64.",
    )


class WordTime(BaseModel):
    """A word and where it is in the audio, in seconds."""

    word: str
    start: float
    end: float


class SentenceTime(BaseModel):
    """A sentence and where it is in the audio, in seconds; its words where they were asked for."""

    text: str
    start: float
    end: float
    words: list[WordTime] | None = None


class TimedSpeech(BaseModel):
    """Speech with the times of its sentences."""

    audio: str
    """Base64."""
    format: FormatName
    sample_rate: int
    seed: int
    stop_reason: str
    sentences: list[SentenceTime]
    warnings: list[str]


class ModelCard(BaseModel):
    """A model as OpenAI's API lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kalle"


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class VoiceCard(BaseModel):
    """A stored voice."""

    id: str
    name: str
    object: Literal["audio.voice"] = "audio.voice"
    created_at: int
    uploaded: bool
    """Whether it can be deleted."""


class VoiceList(BaseModel):
    """The voices that can be asked for by name."""

    object: Literal["list"] = "list"
    data: list[VoiceCard]


class VoiceDeleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["audio.voice"] = "audio.voice"
    deleted: bool = True


class Health(BaseModel):
    """The state of the server."""

    status: str


def error_response(error: Exception) -> JSONResponse:
    """The answer to ``error``, in OpenAI's shape; its status says whose fault it is."""
    status, param, code, headers = 500, None, None, {}
    if isinstance(error, ApiError):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, UserError):
        status = 400
    elif isinstance(error, QueueFullError):
        status, code, headers = 429, "queue_full", {"Retry-After": str(error.retry_after_s)}
    elif isinstance(error, OverdueError):
        status, code = 504, "timeout"
    elif isinstance(error, ClosedError):
        status, code, headers = 503, "shutting_down", {"Retry-After": "60"}
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    message = str(error) if isinstance(error, ApiError | UserError | ServingError) else "the server failed; its log says why"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status, headers)


def error_event(error: Exception) -> dict[str, Any]:
    """``error`` as an event of a stream that has begun."""
    return {"type": "error", **json.loads(bytes(error_response(error).body))}


class KeyCheck:
    """ASGI middleware that answers 401 to requests without one of ``keys`` as their bearer token."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app, self._keys = app, [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] in ("http", "websocket") and scope["path"] not in OPEN_PATHS and not self._holds(scope):
            error = ApiError(401, "no valid API key: send one as `Authorization: Bearer KEY`", code="invalid_api_key")
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _holds(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.decode("latin-1").partition(" ")
        # Digests have one length, and every key is compared: the time says nothing of them.
        found = [secrets.compare_digest(_digest(key.strip()), each) for each in self._keys]
        return kind.lower() == "bearer" and any(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class _StalledError(Exception):
    """A client that takes nothing of its answer."""


class StallLimit:
    """ASGI middleware that breaks off an answer of which the client takes nothing for ``seconds``."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""

        async def sent(message: Message) -> None:
            try:
                async with asyncio.timeout(self._seconds):
                    await send(message)
            except TimeoutError:
                raise _StalledError from None

        try:
            await self._app(scope, receive, sent)
        except _StalledError:  # its connection is ended by `end_stalled`; elsewhere than on Linux when the client goes
            LOGGER.warning("an answer was broken off: its client took nothing for %g s", self._seconds)


class BodyLimit:
    """ASGI middleware that answers 413 to a body of more than ``most`` bytes for the API, however it is sent."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or int(length) > self._most:
            await self._drain(receive)
            await error_response(self._too_large())(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most:
                await self._drain(receive)
                raise HTTPException(413, str(self._too_large()))
            return message

        await self._app(scope, counted, send)

    async def _drain(self, receive: Receive) -> None:
        """Read on for as much again, so that a client that is still sending gets the answer and no reset connection."""
        left, more = self._most, True
        while left > 0 and more:
            message = await receive()
            left -= len(message.get("body", b""))
            more = message.get("more_body", False)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is too large: expected at most {self._most} bytes; send a shorter recording or text")
