"""Who the page answers: foreign pages in the same browser are refused, whatever name they gave this machine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOGGER = logging.getLogger(__name__)
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
READING = frozenset({"GET", "HEAD", "OPTIONS"})
OWN_SITE = frozenset({"same-origin", "none"})
FOREIGN_HOST = "refused: this page is served to this machine only, under its own name"
FOREIGN_PAGE = "refused: the request comes from another page"


class Guard:
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


def loopback_names(host: str) -> frozenset[str]:
    """The names of a page that listens on the loopback address ``host``."""
    return LOOPBACK_NAMES | {host.lower().strip("[]")}


def host_name(host: str) -> str | None:
    """The name in a ``Host`` header, without its port and brackets; None where there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


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
