"""The HTTP API of `kalle serve` on a Ray cluster: replicas of the model behind gateways that repeat what a lost replica did not finish.

    serve run recipes.serve_cluster.cluster:build model=kalle-nano insecure=true        # from the root of a checkout

A replica holds one engine (`kalle.serving.engine`) and the API over it. A gateway holds no model: it passes each request to a replica,
and what comes back to the client. When the replica dies before anything was passed on, the gateway sends the request to another one.
Every answer that is not streamed is passed on whole, so it is never lost with a replica; a stream that has begun ends with an error.
"""

# Annotations are evaluated here: Ray Serve and pydantic read them.
import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayError, TaskCancelledError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Scope

from kalle.errors import UserError
from kalle.serving.engine import Engine, EngineLimits, ServingError
from kalle.serving.http import create_app
from kalle.serving.service import ServeOptions, default_voices
from kalle.serving.shapes import ApiError, error_event, error_response
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.weights import default_weights, resolve_weights

LOGGER = logging.getLogger("ray.serve")
ATTEMPTS = 4
"""Replicas that a request is sent to before it is given up."""
REPEATED = {("POST", "/v1/audio/speech")}
"""What is sent again besides GET: it changes nothing on the server."""


class Options(BaseModel):
    """The words after `serve run …:build`; each has the meaning of the flag of `kalle serve`."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    voices: str | None = None
    """Folder of uploaded voices; on several machines one that all of them see."""
    api_keys: str | None = None
    """File of keys, one a line."""
    insecure: bool = False
    """Serve without keys. A cluster listens on its network, so one of both is needed."""
    device: str = "auto"
    quantize: str = "none"
    rows: int = 16
    queue: int = 64
    timeout: float = 300.0
    max_text: int = 5000
    max_upload: int = 20
    """MiB of a recording."""
    replicas: int | None = None
    """A fixed number; otherwise between ``min_replicas`` and ``max_replicas``, as many as the requests need."""
    min_replicas: int = 1
    max_replicas: int = 4
    cpus: float = 1.0
    """CPUs that Ray reserves for a replica."""
    gpus: float = 0.0
    gateways: int = 1


def weights(options: Options) -> Path:
    """The weight folder of the options."""
    return default_weights() if options.model is None else resolve_weights(options.model)


class Model:
    """A replica: the engine, and the API over it."""

    def __init__(self, options: Options, keys: tuple[str, ...]) -> None:
        kalle = Kalle.from_pretrained(weights(options), options.device, quantize=options.quantize)
        limits = EngineLimits(options.rows, options.queue, options.timeout, frame_budget=512 * options.rows)
        self._engine = Engine(kalle, limits)
        voices = default_voices() if options.voices is None else Path(options.voices)
        # The host keeps no page of a browser away here: whoever reaches the cluster needs a key.
        served = ServeOptions(
            "0.0.0.0", voices=voices, keys=keys, max_text=options.max_text, max_upload_bytes=options.max_upload * 2**20, limits=limits
        )
        self._app = create_app(self._engine, served)

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The messages of the API's answer to a request (ASGI's ``http.response.start`` and ``http.response.body``)."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # the gateway cancels this call when its client has gone
            raise AssertionError

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                await messages.put(None)

        running = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await running
        finally:
            running.cancel()

    def check_health(self) -> None:
        """Ray replaces the replica when this raises."""
        if not self._engine.alive:
            raise RuntimeError("the engine has ended")


class Gateway:
    """Passes requests to replicas, and again to others where that is safe."""

    def __init__(self, model: serve.handle.DeploymentHandle, longest_body: int) -> None:
        self._model = model.options(method_name="answer", stream=True)
        self._longest_body = longest_body

    async def __call__(self, request: Request) -> Response:
        """The answer of a replica to ``request``."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._longest_body:
                return error_response(ApiError(413, f"the request is too large: expected at most {self._longest_body} bytes"))
        kept = ("type", "http_version", "method", "path", "raw_path", "root_path", "query_string", "scheme", "headers")
        scope = {name: request.scope[name] for name in kept if name in request.scope} | {
            "asgi": {"version": "3.0"},
            "client": None,
            "server": None,
        }
        again = request.method == "GET" or (request.method, request.url.path) in REPEATED
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._passed(scope, bytes(body))
            except TaskCancelledError:
                raise
            except RayError as error:
                LOGGER.warning("a replica was lost (%s), attempt %d of %d", type(error).__name__, attempt, ATTEMPTS)
                if not again:
                    break
                await asyncio.sleep(0.2 * attempt)
        lost = "the server was lost on the way" + (
            "; try again" if again else ", and the request may have been done; look before you repeat it"
        )
        return error_response(ApiError(503, lost, code="replica_lost"))

    async def _passed(self, scope: Scope, body: bytes) -> Response:
        """The answer, whole where its length is known. RayError where the replica was lost before anything was passed on."""
        messages = self._model.remote(scope, body)
        start = await anext(messages)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
        if "content-length" in headers:
            content = b"".join([message.get("body", b"") async for message in messages])
            return Response(content, start["status"], headers)
        first = await anext(messages)
        return StreamingResponse(self._rest(first, messages, "event-stream" in headers.get("content-type", "")), start["status"], headers)

    async def _rest(self, message: Message, messages: Any, events: bool) -> AsyncIterator[bytes]:
        """The bytes of a stream. A lost replica is an event of its own there, and a broken connection in bare audio."""
        try:
            yield message.get("body", b"")
            async for message in messages:
                yield message.get("body", b"")
        except TaskCancelledError:
            raise
        except RayError:
            if not events:
                raise
            event = error_event(ServingError("the server was lost while this was spoken; send the request again"))
            yield f"event: error\ndata: {json.dumps(event)}\n\n".encode()
        finally:
            messages.cancel()


def build(options: Options) -> serve.Application:
    """The application for `serve run`, `serve build` and ``serve.run``. UserError for options that do not go together."""
    from kalle.cli.serve import read_keys

    keys = read_keys(None if options.api_keys is None else Path(options.api_keys))
    if not keys and not options.insecure:
        raise UserError("no key for a cluster that others reach: expected api_keys=FILE or insecure=true")
    if not weights(options).is_dir():
        raise UserError(f"no weight folder: got model={options.model}, expected a folder that every machine sees, or a hub id")
    count: dict[str, Any] = {"num_replicas": options.replicas}
    if options.replicas is None:
        wanted = {
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": max(1, options.rows // 2),
        }
        count = {"autoscaling_config": wanted}
    model = serve.deployment(
        name="model",
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=options.rows + options.queue,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=options.timeout,
        **count,
    )(Model)
    gateway = serve.deployment(name="gateway", num_replicas=options.gateways, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)(
        Gateway
    )
    longest_body = options.max_upload * 2**20 * 4 // 3 + 4 * options.max_text + 2**16
    return gateway.bind(model.bind(options, keys), longest_body)
