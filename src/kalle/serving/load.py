"""Load on a server of speech: many clients at once, every answer compared with the same text spoken alone, and what it cost.

A run has three parts on one server: one client that asks for one answer after the other, many clients that each do so, and streamed
requests that come at a given rate, whether the earlier ones are done or not. Answers are kept as they come and compared afterwards, so
that the comparison takes nothing from the server.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from typing import Any, Literal

import httpx
import numpy as np

from kalle.audio import PCM16_SCALE, to_pcm16
from kalle.errors import UserError
from kalle.extras import require
from kalle.serving.encoding import FORMATS
from kalle.serving.server import is_loopback
from kalle.synthesis.generate import FloatArray
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.voice import RANDOM_VOICE

LOSSLESS = ("wav", "pcm", "flac")
TOLERANCE = 1e-4
"""Largest difference of a sample of a lossless answer from the speech alone, before both are rounded to 16 bits."""
ROUNDING = 0.01
"""Differences up to here are rounding that grew from frame to frame; other speech differs by more."""
CODEC_SECONDS = 0.15
"""The most that a lossy codec adds, by its frames and its delay."""
LEAST_CORRELATION = 0.5
"""Of a lossy answer with the speech alone, at the lag where it is largest."""
WAV_HEADER_BYTES = 44
TEXTS = (
    "Thank you.",
    "Please hold the line.",
    "The clocks were striking thirteen.",
    "Your call is important to us.",
    "It was a bright cold day in April.",
    "She had a card with her name on it.",
    "Turn left at the second light, then go on for a mile.",
    "The meeting has been moved to half past four on Thursday.",
    "Nobody said a word while the old man read the letter again.",
    "We will be closed on the first of May, and open again on the second.",
    "If you know the number of the person you are calling, you may enter it now.",
    "The train was late. Nobody at the station knew why. They waited for an hour.",
)
"""From half a second to several sentences."""
Way = Literal["whole", "audio", "sse"]
WAYS: tuple[Way, ...] = ("whole", "audio", "sse")
COUNTS = ("kalle_frames_total", "kalle_steps_total", "kalle_audio_seconds_total")
WATCH_SECONDS = 1.0
LINES_KEPT = 50
Work = Callable[[httpx.AsyncClient, "list[Answer]", float], Coroutine[Any, Any, None]]
"""Begins requests until a moment of ``time.monotonic`` and keeps the answers."""


@dataclass(frozen=True)
class LoadPlan:
    """The requests that are made of the server. UserError for a number that asks for nothing."""

    clients: int = 64
    """Clients at once, each with one request at a time."""
    seconds: float = 120.0
    """How long they begin new requests."""
    alone_seconds: float = 30.0
    """How long the one client does."""
    rate_hz: float = 2.0
    """Streamed requests a second in the third part, at random moments (a Poisson process)."""
    rate_seconds: float = 30.0
    requests: int = 72
    """Different requests, which are asked for again and again."""
    seed: int = 0
    timeout_s: float = 300.0
    """Longest that an answer may take."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and not value > 0:
                raise UserError(f"bad {name} of the load: got {value!r}, expected more than 0; raise it")
        if self.requests < 2:
            raise UserError(f"bad requests of the load: got {self.requests}, expected 2 or more, streamed and whole ones; raise it")


@dataclass(frozen=True)
class Case:
    """One request of the load, and what is expected of its answer."""

    text: str
    voice: str
    seed: int
    form: str
    """A name of ``FORMATS``."""
    way: Way
    """Whole, as chunks of audio, or as events."""

    @property
    def spoken(self) -> tuple[str, str, int, bool]:
        """All that decides the samples."""
        return self.text, self.voice, self.seed, self.way != "whole"

    def body(self, model: str) -> dict[str, Any]:
        """The body of the request to ``model``."""
        asked = {"model": model, "input": self.text, "voice": self.voice, "seed": self.seed, "response_format": self.form}
        return asked if self.way == "whole" else {**asked, "stream_format": self.way}


@dataclass
class Answer:
    """The answer that a client got for a case."""

    case: Case
    content: bytes = b""
    """The bytes of the audio."""
    first_audio_s: float | None = None
    """From the request to the first byte of audio."""
    seconds: float = 0.0
    """From the request to the end."""
    waits: int = 0
    """How often the server said to come back later."""
    problem: str | None = None
    """Why it is not the speech that was asked for."""
    difference: float | None = None
    """Largest difference of a sample from the speech alone; None where the format is lossy or nothing was compared."""


@dataclass(frozen=True)
class ServerState:
    """The server at a moment."""

    seconds: float
    """Since the run began."""
    resident_bytes: float | None
    rows: float
    waiting: float


@dataclass
class Phase:
    """One part of the run. Frames, steps and audio are the server's own counts within ``seconds``, without what was begun and not done."""

    name: str
    seconds: float = 0.0
    frames: float = 0.0
    steps: float = 0.0
    audio_seconds: float = 0.0
    client_cpu_seconds: float = 0.0
    """Processor time that the clients took of the same machine."""
    answers: list[Answer] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """The numbers, by name; seconds, and rates a second."""
        problems = Counter(answer.problem for answer in self.answers if answer.problem is not None)
        differences = [answer.difference for answer in self.answers if answer.difference is not None]
        return {
            "name": self.name,
            "seconds": self.seconds,
            "answers": len(self.answers),
            "compared": len(differences),
            "problems": dict(problems),
            "max_difference": max(differences, default=None),
            "told_to_wait": sum(answer.waits for answer in self.answers),
            "frames_per_second": self.frames / self.seconds,
            "mean_rows": self.frames / self.steps if self.steps else 0.0,
            "audio_seconds_per_second": self.audio_seconds / self.seconds,
            "first_audio_seconds": spread([answer.first_audio_s for answer in self.answers if answer.case.way != "whole"]),
            "request_seconds": spread([answer.seconds for answer in self.answers]),
            "client_cpu_share": self.client_cpu_seconds / self.seconds,
        }


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median and 95th percentile of those that are there; None without one."""
    found = [value for value in values if value is not None]
    return {"p50": float(np.percentile(found, 50)), "p95": float(np.percentile(found, 95))} if found else None


@dataclass(frozen=True)
class LoadReport:
    """The result of a run."""

    phases: tuple[Phase, Phase, Phase]
    """One at a time, many clients, at a rate."""
    samples: tuple[ServerState, ...]
    """The server every second."""

    @property
    def frames_ratio(self) -> float | None:
        """Frames of the language model a second with many clients, over those one at a time; None where there was none."""
        alone, load = (phase.row()["frames_per_second"] for phase in self.phases[:2])
        return float(load / alone) if alone else None

    @property
    def audio_ratio(self) -> float | None:
        """The same for seconds of audio."""
        alone, load = (phase.row()["audio_seconds_per_second"] for phase in self.phases[:2])
        return float(load / alone) if alone else None

    @property
    def problems(self) -> Counter[str]:
        """Faults of answers, and how often each."""
        return Counter(answer.problem for phase in self.phases for answer in phase.answers if answer.problem is not None)

    @property
    def memory_bytes(self) -> tuple[float, float, float] | None:
        """Resident memory: medians of the second and of the last quarter of the run, and the most; None where the server tells none."""
        held = [sample.resident_bytes for sample in self.samples if sample.resident_bytes is not None]
        quarter = len(held) // 4
        if not quarter:
            return None
        return float(np.median(held[quarter : 2 * quarter])), float(np.median(held[-quarter:])), float(max(held))


class LoadBench:
    """Asks a server at ``url``, which must be on this machine, as ``plan`` says, and compares the answers with those of ``kalle``.

    ``kalle`` has the weights of the server, in fp32 on a CPU as they must be there for the comparison; ``compare`` False leaves it out.
    """

    def __init__(
        self, url: str, kalle: Kalle, plan: LoadPlan, told: Callable[[str], None] = lambda line: None, compare: bool = True
    ) -> None:
        """UserError where PyAV is missing, or ``url`` is elsewhere."""
        require("av", "serve", "reading the formats")
        self._url, self._kalle, self._plan, self._told, self._compare = check_loopback(url), kalle, plan, told, compare
        self._model = ""
        self._samples: list[ServerState] = []
        self._began = 0.0

    def run(self) -> LoadReport:
        """The three parts, and the comparison of each. UserError where no server answers."""
        cases = self._cases(asyncio.run(self._voices()))
        alone = self._references(cases)
        streamed = [case for case in cases if case.way != "whole"]
        self._began = time.monotonic()
        plan = self._plan
        phases = (
            asyncio.run(self._phase("one at a time", plan.alone_seconds, partial(self._clients, cases=cycle(cases), count=1))),
            asyncio.run(
                self._phase(f"{plan.clients} clients", plan.seconds, partial(self._clients, cases=cycle(cases), count=plan.clients))
            ),
            asyncio.run(self._phase(f"{plan.rate_hz:g} requests/s", plan.rate_seconds, partial(self._arrivals, cases=cycle(streamed)))),
        )
        for phase in phases:
            for answer in phase.answers:
                if answer.problem is None and alone:
                    answer.problem, answer.difference = compared(answer, alone[answer.case.spoken], self._kalle.sample_rate)
        return LoadReport(phases, tuple(self._samples))

    async def _voices(self) -> list[str]:
        async with self._client() as client:
            try:
                self._model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
                listed = (await client.get("/v1/audio/voices")).raise_for_status().json()["data"]
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                raise UserError(
                    f"no server of speech at {self._url} ({error}); start `kalle serve`, without keys, and check --url"
                ) from None
        # A voice that was uploaded may be changed by others meanwhile.
        return [RANDOM_VOICE, *(voice["id"] for voice in listed if not voice["uploaded"])]

    def _cases(self, voices: Sequence[str]) -> list[Case]:
        """Different requests; every format, way, text and voice is among them as often as the others."""
        generator = np.random.default_rng(self._plan.seed)
        numbers = range(self._plan.requests)
        columns: list[list[Any]] = [[*(values[n % len(values)] for n in numbers)] for values in (TEXTS, voices, tuple(FORMATS), WAYS)]
        for column in columns:
            generator.shuffle(column)
        return [Case(text, voice, number, form, way) for number, (text, voice, form, way) in enumerate(zip(*columns, strict=True))]

    def _references(self, cases: Sequence[Case]) -> dict[tuple[str, str, int, bool], FloatArray]:
        """The speech (S,) of each case alone, as the library gives it; none where nothing is compared."""
        if not self._compare:
            return {}
        found = {}
        began = time.monotonic()
        for case in cases:
            voice = case.voice if case.voice == RANDOM_VOICE else self._kalle.load_voice(case.voice)
            if case.way == "whole":
                found[case.spoken] = self._kalle.synthesize(case.text, voice, seed=case.seed).audio
            else:  # the same, but what was heard is neither tried again nor cut where the model got stuck
                found[case.spoken] = np.concatenate([np.zeros(0, np.float32), *self._kalle.stream(case.text, voice, seed=case.seed)])
        seconds = sum(map(len, found.values())) / self._kalle.sample_rate
        self._told(f"{len(found)} texts alone, {seconds:.0f} s of speech, in {time.monotonic() - began:.0f} s")
        return found

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self._url, timeout=self._plan.timeout_s, limits=limits, trust_env=False)

    async def _phase(self, name: str, seconds: float, work: Work) -> Phase:
        """Let ``work`` begin requests for ``seconds``, count what the server did until then, and wait for the answers that are due."""
        phase = Phase(name)
        async with self._client() as client:
            watching = asyncio.create_task(self._watch(client))
            before, began, cpu_began = await self._numbers(client), time.monotonic(), time.process_time()
            asking = asyncio.create_task(work(client, phase.answers, began + seconds))
            try:
                await asyncio.sleep(seconds)
                after = await self._numbers(client)
                phase.seconds, phase.client_cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
                phase.frames, phase.steps, phase.audio_seconds = (after[each] - before[each] for each in COUNTS)
                await asking
            finally:
                watching.cancel()
                asking.cancel()
        self._told(told_of(phase))
        return phase

    async def _clients(self, client: httpx.AsyncClient, answers: list[Answer], end: float, cases: Iterator[Case], count: int) -> None:
        """``count`` clients, each of which asks for the next of ``cases`` when it has its answer."""

        async def one() -> None:
            while time.monotonic() < end:
                answers.append(await self._ask(client, next(cases)))

        await asyncio.gather(*(one() for _ in range(count)))

    async def _arrivals(self, client: httpx.AsyncClient, answers: list[Answer], end: float, cases: Iterator[Case]) -> None:
        """Streamed ``cases`` at random moments, whether the earlier ones are done or not."""
        generator = np.random.default_rng(self._plan.seed)

        async def one(case: Case) -> None:
            answers.append(await self._ask(client, case))

        async with asyncio.TaskGroup() as group:
            due = time.monotonic()
            while (due := due + generator.exponential(1 / self._plan.rate_hz)) < end:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(one(next(cases)))

    async def _ask(self, client: httpx.AsyncClient, case: Case) -> Answer:
        """The answer to ``case``; where the queue is full, the one after the time that the server says."""
        answer = Answer(case)
        while True:
            began = time.monotonic()
            try:
                async with client.stream("POST", "/v1/audio/speech", json=case.body(self._model)) as response:
                    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
                        answer.waits += 1
                        await asyncio.sleep(float(response.headers["retry-after"]))
                        continue
                    await self._read(response, answer, began)
            except (httpx.HTTPError, OSError, ValueError, LookupError) as error:
                answer.problem = f"broken off: {type(error).__name__}"
            answer.seconds = time.monotonic() - began
            return answer

    async def _read(self, response: httpx.Response, answer: Answer, began: float) -> None:
        case, parts = answer.case, list[bytes]()
        if response.status_code != httpx.codes.OK:
            answer.problem = f"status {response.status_code}"
            return
        if response.headers["x-seed"] != str(case.seed):
            answer.problem = "another seed"
        pieces = _audio_of_events(response, answer) if case.way == "sse" else response.aiter_bytes()
        async for piece in pieces:
            if answer.first_audio_s is None:
                answer.first_audio_s = time.monotonic() - began
            parts.append(piece)
        answer.content = b"".join(parts)

    async def _numbers(self, client: httpx.AsyncClient) -> dict[str, float]:
        """The numbers of the server for Prometheus."""
        try:
            lines = (await client.get("/metrics")).raise_for_status().text.splitlines()
        except httpx.HTTPError as error:
            raise UserError(f"the server tells nothing at /metrics ({type(error).__name__}); see its log, and start it again") from None
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))}

    async def _watch(self, client: httpx.AsyncClient) -> None:
        while True:
            with suppress(UserError):
                numbers = await self._numbers(client)
                resident = numbers.get("process_resident_memory_bytes")
                moment = time.monotonic() - self._began
                self._samples.append(ServerState(moment, resident, numbers["kalle_rows"], numbers["kalle_requests_waiting"]))
            await asyncio.sleep(WATCH_SECONDS)


async def _audio_of_events(response: httpx.Response, answer: Answer) -> AsyncIterator[bytes]:
    """The audio of server-sent events; without their last one, or with an error among them, ``answer`` has a problem."""
    last = ""
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        event = json.loads(line.removeprefix("data: "))
        last = event["type"]
        if last == "speech.audio.delta":
            yield base64.b64decode(event["audio"])
    if last != "speech.audio.done":
        answer.problem = f"the last event is {last or 'none'}"


def compared(answer: Answer, alone: FloatArray, rate_hz: int) -> tuple[str | None, float | None]:
    """Why ``answer`` is not the speech ``alone`` (S,), and the largest difference of a sample where the format is lossless."""
    form = answer.case.form
    try:
        heard = decoded(answer.content, form, rate_hz)
    except (OSError, ValueError, EOFError) as error:
        return f"{form} that cannot be decoded: {type(error).__name__}", None
    wanted = to_pcm16(alone)
    if form in LOSSLESS:
        if len(heard) != len(wanted):
            return f"another length as {form}", None
        difference = float(np.abs(heard.astype(np.int32) - wanted).max(initial=0)) / PCM16_SCALE
        # Both are rounded: numbers that differ by less than a step may be one step apart.
        if difference <= TOLERANCE + 1 / PCM16_SCALE:
            return None, difference
        return f"samples as {form} that {'differ by more than the tolerance' if difference < ROUNDING else 'are others'}", difference
    if abs(len(heard) - len(wanted)) > CODEC_SECONDS * rate_hz:
        return f"another length as {form}", None
    return (None if _correlation(heard, wanted, int(CODEC_SECONDS * rate_hz)) >= LEAST_CORRELATION else f"other speech as {form}"), None


def decoded(content: bytes, form: str, rate_hz: int) -> np.ndarray:
    """The samples (S,) int16 at ``rate_hz`` of a whole or streamed answer. ValueError, OSError and EOFError for what is none."""
    if form in ("pcm", "wav"):
        samples = content if form == "pcm" else content[WAV_HEADER_BYTES:]
        if form == "wav" and content[:4] != b"RIFF":
            raise ValueError("no header")
        return np.frombuffer(samples, "<i2")
    import av

    with av.open(io.BytesIO(content), "r", format=FORMATS[form].container) as container:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=rate_hz)
        frames = [each for frame in container.decode(audio=0) for each in resampler.resample(frame)]
        frames += resampler.resample(None)
        return np.concatenate([np.zeros(0, np.int16), *(frame.to_ndarray()[0] for frame in frames)])


def _correlation(first: np.ndarray, second: np.ndarray, most: int) -> float:
    """The correlation coefficient of two signals at the lag of at most ``most`` samples where it is largest."""
    size = len(first) + len(second)
    spectra = [np.fft.rfft(signal - signal.mean(), size) for signal in (first.astype(np.float64), second.astype(np.float64))]
    products = np.fft.irfft(spectra[0] * spectra[1].conj(), size)
    scale = np.sqrt(np.mean(np.abs(first - first.mean()) ** 2) * len(first) * np.mean(np.abs(second - second.mean()) ** 2) * len(second))
    return float(max(products[: most + 1].max(), products[-most:].max()) / max(scale, 1e-9))


def told_of(phase: Phase) -> str:
    """A line for whoever waits."""
    row = phase.row()
    first = row["first_audio_seconds"]
    heard = "" if first is None else f", first audio {first['p50']:.2f} s, p95 {first['p95']:.2f} s"
    return (
        f"{row['name']}: {row['answers']} answers, {row['frames_per_second']:.0f} frames/s in {row['mean_rows']:.1f} rows, "
        f"{row['audio_seconds_per_second']:.2f} s of audio a second{heard}"
    )


def check_loopback(url: str) -> str:
    """``url`` without its end; UserError where it is not on this machine: a load is no way to treat others."""
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL:
        host = ""
    if not host:
        raise UserError(f"no address of a server: got '{url}', expected one such as http://127.0.0.1:8000; correct it")
    if host != "localhost" and not is_loopback(host):
        raise UserError(f"a load on another machine: got {url}, expected an address such as http://127.0.0.1:8000; run it there")
    return url.rstrip("/").removesuffix("/v1")


@contextmanager
def server_process(arguments: Sequence[str]) -> Iterator[str]:
    """The address of ``kalle serve`` with ``arguments`` in a process of its own, on a free port. UserError where it does not start."""
    command = [sys.executable, "-m", "kalle", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = deque[str](maxlen=LINES_KEPT)
        try:
            for line in server.stderr:
                said.append(line.rstrip())
                if found := re.search(r"at (http://\S+)/v1", line):
                    break
            else:
                raise UserError(f"the server did not start: {said[-1] if said else 'it said nothing'}")
            # Read on, or the server would wait for somebody who does.
            reading = threading.Thread(target=lambda: said.extend(line.rstrip() for line in server.stderr or ()), daemon=True)
            reading.start()
            yield found[1]
        finally:
            server.terminate()
    if server.returncode:
        raise UserError(f"the server ended with {server.returncode}: {said[-1] if said else 'it said nothing'}")
