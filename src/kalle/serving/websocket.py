"""The WebSocket of the API, for text that is still being written: its sentences are spoken as they complete."""

# Annotations are evaluated here: FastAPI reads them.
import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from kalle.errors import UserError
from kalle.seeds import sentence_seed
from kalle.serving.encoding import AudioEncoder
from kalle.serving.engine import Job, ServingError
from kalle.serving.service import Service, audio_of
from kalle.serving.shapes import (
    ApiError,
    FormatName,
    VoiceFields,
    error_event,
)
from kalle.synthesis.options import GenerationOptions, SpeechRequest
from kalle.synthesis.voice import GivenVoice, Voice
from kalle.text.languages import split_sentences

SENTENCES_AHEAD = 4
"""Sentences that are being spoken or wait to be; more text is not read until one is done."""
IDLE_SECONDS = 120.0
"""A client that says nothing for so long is told so, and the connection is closed."""


class SocketConfig(VoiceFields):
    """The first message of a WebSocket."""

    type: Literal["session.config"]
    response_format: FormatName = "pcm"


def speech_socket(service: Service) -> Callable[[WebSocket], Any]:
    """The WebSocket: text comes in pieces, its sentences are spoken as they complete.

    The client sends ``session.config`` (or not), any number of ``input.text`` and ``input.flush`` (speak what there is), then
    ``input.done``. For each sentence it gets ``audio.start``, binary messages that make one file of the format, and ``audio.done``;
    at the end ``session.done``; after an ``error`` nothing more.
    """

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        session = _Session(service, websocket)
        try:
            await session.run()
        except WebSocketDisconnect:
            pass
        except (ApiError, UserError, ServingError) as error:
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await websocket.send_json(error_event(error))
                await websocket.close(1011 if isinstance(error, ServingError) else 1008)
        finally:
            session.cancel()

    return socket


class _Session:
    """One WebSocket."""

    def __init__(self, service: Service, websocket: WebSocket) -> None:
        self._service, self._websocket = service, websocket
        self._config = SocketConfig.model_validate({"type": "session.config"})
        self._voice: GivenVoice = None
        self._options = GenerationOptions()
        self._begun = False
        self._text = ""
        self._count = 0
        self._jobs: asyncio.Queue[tuple[int, str, Job] | None] = asyncio.Queue(SENTENCES_AHEAD)
        self._running: list[Job] = []

    async def run(self) -> None:
        """Read and speak until the client is done."""
        speaking = asyncio.create_task(self._speak())
        reading = asyncio.create_task(self._read())
        try:
            done, _ = await asyncio.wait({speaking, reading}, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in (speaking, reading):
                task.cancel()
            await asyncio.gather(speaking, reading, return_exceptions=True)
        await self._websocket.send_json({"type": "session.done", "total_sentences": self._count, "seed": self._options.seed})
        await self._websocket.close()

    def cancel(self) -> None:
        """End what is still being spoken."""
        for job in self._running:
            job.cancel()

    async def _read(self) -> None:
        while True:
            try:
                message = json.loads(await asyncio.wait_for(self._websocket.receive_text(), IDLE_SECONDS))
            except TimeoutError:
                raise ApiError(408, f"nothing came for {IDLE_SECONDS:g} s; connect again", code="timeout") from None
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ApiError(400, "a message is not JSON text") from None
            kind = message.get("type") if isinstance(message, dict) else None
            if kind == "session.config":
                await self._configure(message)
            elif kind == "input.text" and isinstance(message.get("text"), str):
                await self._take(message["text"])
            elif kind in ("input.flush", "input.done"):
                await self._submit(self._text)
                self._text = ""
                if kind == "input.done":
                    await self._jobs.put(None)
                    return
            else:
                raise ApiError(
                    400, "unknown message: expected type session.config, input.text with a text, input.flush or input.done", "type"
                )

    async def _configure(self, message: object) -> None:
        if self._begun:
            raise ApiError(400, "session.config comes first, and once", "type")
        try:
            self._config = SocketConfig.model_validate(message)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ApiError(400, f"bad {place}: {first['msg']}", place) from None
        await self._begin()

    async def _begin(self) -> None:
        """Settle voice and seed, which hold for all sentences."""
        self._begun = True
        AudioEncoder(self._config.response_format, self._service.kalle.sample_rate, self._config.speed)
        wanted = await self._service.request(self._config, "")
        self._options, kalle = wanted.options, self._service.kalle

        def settled() -> Voice | None:
            voice = kalle.default_voice if wanted.voice is None else wanted.voice
            assert self._options.seed is not None
            return kalle.random_voice(self._options.seed) if voice is None or isinstance(voice, str) else voice

        self._voice = await self._service.in_thread(settled)

    async def _take(self, text: str) -> None:
        self._text += text
        if len(self._text) > self._service.options.max_text:
            raise ApiError(400, f"too much text without the end of a sentence: expected at most {self._service.options.max_text}", "text")
        sentences = split_sentences(self._text, self._config.language)
        for sentence in sentences[:-1]:  # the last one may go on
            await self._submit(sentence.text)
        if len(sentences) > 1:
            self._text = self._text[sentences[-1].start :]

    async def _submit(self, text: str) -> None:
        if not any(character.isalnum() for character in text):
            return
        if not self._begun:
            await self._begin()
        assert self._options.seed is not None
        index, self._count = self._count, self._count + 1
        options = self._options.changed(seed=sentence_seed(self._options.seed, index))
        job = await self._service.submit(SpeechRequest(" ".join(text.split()), self._voice, options), True)
        self._running.append(job)
        await self._jobs.put((index, text, job))

    async def _speak(self) -> None:
        rate_hz = self._service.kalle.sample_rate
        while (following := await self._jobs.get()) is not None:
            index, text, job = following
            encoder = AudioEncoder(self._config.response_format, rate_hz, self._config.speed)
            start = {"sentence_index": index, "sentence_text": " ".join(text.split()), "format": self._config.response_format}
            await self._websocket.send_json({"type": "audio.start", **start, "sample_rate": rate_hz})
            if index:  # a pause before it
                await self._send(encoder.push(np.zeros(round(self._options.pause_s * rate_hz), np.float32)))
            try:
                async for piece in audio_of(job):
                    await self._send(encoder.push(piece))
            finally:
                self._service.metrics.ended(job)
            await self._send(encoder.finish())
            self._running.remove(job)
            await self._websocket.send_json({"type": "audio.done", "sentence_index": index, "stop_reason": job.speech.stop_reason})

    async def _send(self, content: bytes) -> None:
        if content:
            await self._websocket.send_bytes(content)
