"""The server of the page: its address, the requests it refuses, and the route of its audio."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kalle.errors import UserError
from kalle.extras import require
from kalle.serving.sessions import DEFAULT_MAX_TEXT, Backend, PageJob, Sessions
from kalle.serving.several import SeveralJob
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.voice import kept_voices

if TYPE_CHECKING:
    import gradio as gr
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from kalle.serving.handlers import Handlers


LOGGER = logging.getLogger(__name__)
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
READING = frozenset({"GET", "HEAD", "OPTIONS"})
OWN_SITE = frozenset({"same-origin", "none"})
_HOST = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<address>[0-9A-Fa-f:.]+)\])(?::[0-9]{1,5})?")
FOREIGN_HOST = "refused: this page is served to this machine only, under its own name"
FOREIGN_PAGE = "refused: the request comes from another page"


class OriginCheck:
    """ASGI middleware that answers 403 to requests a foreign page sent.

    A page elsewhere can point its own name at 127.0.0.1 (DNS rebinding) and is then, to the browser, the same site: only the
    ``Host`` header tells, which must be one of ``names`` (None: any; whoever serves the network or a tunnel cannot know its names).
    Without rebinding the browser sends ``Sec-Fetch-Site`` or ``Origin`` with whatever changes something; they must be the page's own.
    ``Sec-Fetch-Site`` comes first, for it is right behind a proxy too; browsers send it over HTTPS and to this machine only.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str] | None) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        problem = self._problem(scope) if scope["type"] in ("http", "websocket") else None
        if problem is None:
            await self._app(scope, receive, send)
            return
        from starlette.responses import PlainTextResponse

        LOGGER.warning("%s", problem)
        await PlainTextResponse(problem, status_code=403)(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        from starlette.datastructures import Headers

        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._names is not None and host_name(host) not in self._names:
            return FOREIGN_HOST
        if scope["type"] == "http" and scope["method"] in READING:
            return None
        return None if _own(headers.get("sec-fetch-site"), headers.get("origin"), host) else FOREIGN_PAGE


class FieldCheck:
    """ASGI middleware that answers 422 to an event whose fields do not fit the page, which Gradio would answer with an exception.

    ``fields`` has the tests of the inputs of every event, by its number (``kalle.serving.page.field_checks``).
    """

    def __init__(self, app: ASGIApp, fields: Mapping[int, Sequence[FieldTest]]) -> None:
        self._app, self._fields = app, fields

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http" or scope["method"] != "POST" or _EVENT_PATH.search(scope["path"]) is None:
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more and len(body) <= LARGEST_EVENT_BYTES:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        problem = "the request is too large" if len(body) > LARGEST_EVENT_BYTES else self._problem(body)
        if problem is not None:
            from starlette.responses import JSONResponse

            LOGGER.warning("refused: %s", problem)
            await JSONResponse({"detail": problem}, status_code=422)(scope, receive, send)
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _problem(self, body: bytes) -> str | None:
        try:
            event = json.loads(body)
        except (ValueError, RecursionError):
            return "the request is not JSON"
        number = event.get("fn_index") if isinstance(event, dict) else None
        if type(number) is not int or number not in self._fields:
            return "the page has no such event; load it again"
        values, tests = event.get("data"), self._fields[number]
        if not isinstance(values, list) or len(values) != len(tests):
            return f"the event takes {len(tests)} fields; load the page again"
        bad = [index for index, (value, test) in enumerate(zip(values, tests, strict=True)) if not test(value)]
        return f"field {bad[0] + 1} does not fit the page; load it again" if bad else None


def loopback_names(host: str) -> frozenset[str]:
    """The names of a page that listens on the loopback address ``host``."""
    return LOOPBACK_NAMES | {host.lower().strip("[]")}


def host_name(host: str) -> str | None:
    """The name in a ``Host`` header, without its port and brackets; None for anything else, user information or a path among it."""
    match = _HOST.fullmatch(host)
    return None if match is None else (match["name"] or match["address"]).lower()


def _own(site: str | None, origin: str | None, host: str) -> bool:
    if site is not None:
        return site.lower() in OWN_SITE
    return origin is None or _authority(origin) == host.lower()


def _authority(origin: str) -> str | None:
    """Host and port of an ``Origin`` header; None for "null" and what is no address."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


LOGGER = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
PORT = 7860
GRADIO_FOLDER = "GRADIO_TEMP_DIR"
LARGEST_UPLOAD = "50mb"
LARGEST_EVENT_BYTES = 2**20
_EVENT_PATH = re.compile(r"/(?:run|api|call)/|/queue/join$")
_POLL_SECONDS = 0.02
FieldTest = Callable[[object], bool]
"""Whether a value that a client sent fits a component."""


@dataclass(frozen=True)
class WebOptions:
    """Address and limits of the page."""

    host: str = LOOPBACK
    port: int = PORT
    """0 takes a free one."""
    share: bool = False
    """Ask Gradio for a public address, through its servers."""
    voices: Path | None = None
    """Folder of kept voices; None is the weight folder's own voices/."""
    max_text: int = DEFAULT_MAX_TEXT
    open_browser: bool = False


def require_gradio() -> None:
    """A UserError that says what to install when Gradio is missing."""
    require("gradio", "serve", "the web page")


def serve(kalle: Kalle, options: WebOptions) -> None:
    """Serve the page until Ctrl-C or SIGTERM, which is its normal end.

    UserError for a missing Gradio, a port that is taken or an address that isn't ours.
    """
    require_gradio()
    voices = options.voices or kept_voices(kalle.folder)
    with Backend(kalle, voices, options.max_text) as backend, _gradio_files(backend.temporary / "page"), _ended_by_sigterm():
        page = launch(backend, options)
        try:
            # Said in here: whoever reads it may press Ctrl-C at once.
            LOGGER.info("the page is at %s (Ctrl-C ends it)", page.share_url or page.local_url)
            threading.Event().wait()
        except KeyboardInterrupt:
            LOGGER.info("the page has ended")
        finally:
            page.close(verbose=False)


@contextmanager
def _gradio_files(folder: Path) -> Iterator[None]:
    """Let Gradio keep uploads and results in ``folder``; its environment variable is the only way to say so."""
    former = os.environ.get(GRADIO_FOLDER)
    os.environ[GRADIO_FOLDER] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(GRADIO_FOLDER)
        if former is not None:
            os.environ[GRADIO_FOLDER] = former


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A polite request to end is taken like Ctrl-C, so that temporary files go."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def launch(backend: Backend, options: WebOptions) -> gr.Blocks:
    """Start the server; the result's ``local_url`` tells where it is, ``close()`` ends it."""
    from starlette.middleware import Middleware

    from kalle.serving.handlers import Handlers
    from kalle.serving.page import build, look

    if not is_loopback(options.host):
        LOGGER.warning("whoever reaches %s can use the page and keep voices here: there is no password", options.host)
    if options.share:
        LOGGER.warning(
            "--share asks Gradio for a public address: whoever knows it can use the page, and audio passes through Gradio's servers"
        )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks its own server whether it is there.
    port = listenable_port(options.host, options.port)
    handlers = Handlers(backend)
    page = build(handlers)
    page.queue(default_concurrency_limit=None)
    try:
        page.launch(
            server_name=options.host,
            server_port=port,
            share=options.share,
            inbrowser=options.open_browser,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            max_file_size=LARGEST_UPLOAD,
            app_kwargs=_app_kwargs(backend, page, handlers, Middleware(OriginCheck, names=own_names(options))),
            **look(),
        )
    except OSError:
        # Gradio's own words name its environment variables; it looks for the port on 127.0.0.1 whatever the host is.
        raise _unservable(options.host, port, "the port is taken") from None
    return page


@contextmanager
def mounted_page(app: Any, backend: Backend, path: str) -> Iterator[None]:
    """Serve the page at ``path`` of the FastAPI ``app``, which checks where requests come from, while the context lasts."""
    require_gradio()
    import gradio as gr

    from kalle.serving.handlers import Handlers
    from kalle.serving.page import build, look

    with _gradio_files(backend.temporary / "page"):
        handlers = Handlers(backend)
        page = build(handlers)
        page.queue(default_concurrency_limit=None)
        gr.mount_gradio_app(
            app,
            page,
            path,
            footer_links=[],
            run_history=False,
            show_error=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            max_file_size=LARGEST_UPLOAD,
            app_kwargs=_app_kwargs(backend, page, handlers),
            **look(),
        )
        yield


def _app_kwargs(backend: Backend, page: gr.Blocks, handlers: Handlers, *checks: Any) -> dict[str, Any]:
    """The routes of the audio, and what is checked of a request before Gradio sees it."""
    from starlette.middleware import Middleware
    from starlette.routing import Route

    from kalle.serving.page import field_checks

    uploads = Path(os.environ.get(GRADIO_FOLDER) or backend.temporary / "page")
    routes = [
        Route("/kalle/audio/{token}", audio_route(backend.sessions)),
        Route("/kalle/ahead/{token}", ahead_route(backend)),
        Route("/kalle/text/{token}/{number:int}", text_route(backend.sessions)),
    ]
    return {"routes": routes, "middleware": [*checks, Middleware(FieldCheck, fields=field_checks(page, handlers, uploads))]}


def audio_route(sessions: Sessions) -> Any:
    """The address of a job's audio: PCM16 little-endian mono, as it is being made."""
    from starlette.responses import Response as Plain
    from starlette.responses import StreamingResponse

    async def audio(request: Request) -> Response:
        job = sessions.find(request.path_params["token"])
        if job is None:
            return Plain("no such audio", status_code=404)
        return StreamingResponse(growing(job), media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    return audio


def text_route(sessions: Sessions) -> Any:
    """The address of the recording of one of several texts, a WAV file, by its number from 1."""
    from starlette.responses import FileResponse
    from starlette.responses import Response as Plain

    async def text(request: Request) -> Response:
        job, number = sessions.find(request.path_params["token"]), request.path_params["number"]
        spoken = job.spoken_texts if isinstance(job, SeveralJob) else []
        path = next((each.path for each in spoken if each.number == number), None)
        if path is None or not path.is_file():
            return Plain("no such audio", status_code=404)
        return FileResponse(path, media_type="audio/wav", headers={"Cache-Control": "no-store"})

    return text


def ahead_route(backend: Backend) -> Any:
    """The address that tells how many other jobs come before one."""
    from starlette.responses import PlainTextResponse

    async def ahead(request: Request) -> Response:
        job = backend.sessions.find(request.path_params["token"])
        return PlainTextResponse("0" if job is None else str(backend.ahead(job)), headers={"Cache-Control": "no-store"})

    return ahead


async def growing(job: PageJob) -> AsyncIterator[bytes]:
    """The pieces of ``job`` as they come, until it is finished."""
    sent = 0
    while True:
        pieces, finished = job.pieces(sent)
        for piece in pieces:
            yield piece
        sent += len(pieces)
        if finished:
            return
        await asyncio.sleep(_POLL_SECONDS)


def own_names(options: WebOptions) -> frozenset[str] | None:
    """The host names under which the page answers; None where it cannot know them, on a network or behind a tunnel."""
    return loopback_names(options.host) if is_loopback(options.host) and not options.share else None


def is_loopback(host: str) -> bool:
    """Whether ``host`` is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listenable_port(host: str, port: int) -> int:
    """``port`` if ``host`` can be listened on there, or a free one for 0; a one-line UserError otherwise."""
    address = host.strip("[]")
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            # As the server itself does: a port that was just left is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise _unservable(host, port, "the port is taken" if taken else error.strerror or str(error)) from None


def end_stalled(listening: socket.socket, seconds: float) -> bool:
    """Have the system end connections of ``listening`` whose client has taken nothing of what waits for it for ``seconds``.

    Without it a connection that was broken off stays for as long as its client keeps it, for what it still has to be sent never goes.
    False where the system has no such option (it is Linux's TCP_USER_TIMEOUT).
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is None:
        return False
    listening.setsockopt(socket.IPPROTO_TCP, option, max(1, round(1000 * seconds)))  # those who are accepted inherit it
    return True


def _unservable(host: str, port: int, reason: str) -> UserError:
    return UserError(f"cannot serve on {host}:{port}: {reason}; choose another --port (0 takes a free one) or --host")
