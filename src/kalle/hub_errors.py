"""What the hub's library and its HTTP client say, put plainly."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from kalle.errors import UserError


@contextmanager
def quiet_http() -> Iterator[None]:
    """The HTTP client logs every request as news; inside, it does not."""
    loggers = [logging.getLogger(name) for name in ("httpx", "httpx2")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def plain_errors(repository: str, revision: str | None, endpoint: str | None) -> Iterator[None]:
    """What the hub's library raises, as one line that says what to do."""
    from huggingface_hub import constants, errors

    hub = endpoint or constants.ENDPOINT
    by_hand = "or put the released files into the folder by hand"
    try:
        yield
    except errors.HFValidationError:
        raise UserError(f"not a hub id: got '{repository}', expected OWNER/NAME, such as kxxia/KALL-E") from None
    except errors.OfflineModeIsEnabled:
        raise UserError(f"offline: HF_HUB_OFFLINE is set, so '{repository}' cannot be fetched; unset it, {by_hand}") from None
    except errors.GatedRepoError:
        raise UserError(
            f"not allowed: '{repository}' asks its users to accept terms; accept them at {hub}/{repository} and log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"no such revision: '{repository}' has no '{revision}', expected a branch, tag or commit; check --revision"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"no such repository on {hub}, or no access to it: got '{repository}'; check the id, or log in with `hf auth login`"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "check the id, and log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise UserError(f"the hub {hub} refuses '{repository}' with status {status}: {first_line(error)}; {remedy}") from None
    except json.JSONDecodeError:
        raise UserError(f"not a hub: '{hub}' answers with something else; check HF_ENDPOINT and the network's login page") from None
    except Exception as error:
        if not is_connection_error(error):
            raise
        raise UserError(f"cannot reach the hub {hub} ({first_line(error)}); check the connection, {by_hand}") from None


def is_connection_error(error: BaseException) -> bool:
    """Whether ``error`` means a connection that cannot be made or broke, as opposed to an answer."""
    # The hub's library has changed its HTTP client more than once; each has a TransportError for a connection that fails.
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def first_line(error: BaseException) -> str:
    """What ``error`` says, without the lines that follow the first; its kind when it says nothing."""
    return (str(error).strip().splitlines() or [""])[0].strip() or type(error).__name__
