"""Ways to damage a document or a file, as hypothesis strategies: what comes out is nearly right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = st.sampled_from(
    [
        "",
        " ",
        "\0",
        "a\0b",
        "\ud800",
        "..",
        "../..",
        "/",
        "/dev/zero",
        "nan",
        "inf",
        "-1",
        "1e999",
        "é" * 300,
        "a\nb",
        "\u2028",
        "‮",
        "0x10",
        "٣",
        "²",
    ]
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70_000),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")]),
    st.floats(),
    ODD_TEXTS,
    st.text(max_size=8),
    st.lists(st.none() | st.integers(-2, 5) | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.none() | st.integers(-2, 5), max_size=2),
)
"""Values of any type that JSON has."""
RAW = st.sampled_from(["9" * 5000, "1e999", "NaN", "[" * 50_000, '{"a":' * 20_000, "\\ud800", "'", ",,", "\ufeff", "/*x*/", "truе"])


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of the document with each of its keys."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in list(items):
        found += [(value, key), *_places(one)]
    return found


def _changed(document: Any, edits: list[tuple[int, str, Any]]) -> Any:
    document = copy.deepcopy(document)
    for number, kind, odd in edits:
        places = _places(document)
        if not places:
            return odd
        container, key = places[number % len(places)]
        if kind == "drop":
            del container[key]
        elif kind == "whole":
            return odd
        elif kind == "rename" and isinstance(container, dict):
            container[str(odd)] = container.pop(key)
        else:
            container[key] = [container[key]] if kind == "wrap" else odd
    return document


_KINDS = st.sampled_from(["set"] * 9 + ["drop"] * 3 + ["rename", "wrap"] + ["whole"])


def documents(*originals: Any) -> st.SearchStrategy[Any]:
    """One of the JSON values ``originals`` with one to three of its values changed, renamed or left out."""
    return st.builds(_changed, st.sampled_from(originals), st.lists(st.tuples(st.integers(0, 2**16), _KINDS, ODD), min_size=1, max_size=3))


def _written(document: Any, raw: tuple[int, str] | None) -> bytes:
    content = json.dumps(document)
    if raw is not None:
        place = raw[0] % (len(content) + 1)
        content = content[:place] + raw[1] + content[place:]
    return content.encode("utf-8", "surrogatepass")


def json_files(*originals: Any) -> st.SearchStrategy[bytes]:
    """``documents`` as bytes, sometimes with something between that is no JSON."""
    raw = st.none() | st.none() | st.none() | st.tuples(st.integers(0, 2**16), RAW)
    return st.builds(_written, documents(*originals), raw)


def _hit(content: bytes, edits: list[tuple[float, bytes]], cut: float | None, head_bytes: int | None) -> bytes:
    changed = bytearray(content)
    for share, new in edits:
        place = int(share * (min(head_bytes, len(changed)) if head_bytes else len(changed)))
        changed[place : place + len(new)] = new
    return bytes(changed if cut is None else changed[: int(cut * len(changed))])


def files(head_bytes: int | None, *originals: bytes) -> st.SearchStrategy[bytes]:
    """One of ``originals`` with some bytes overwritten, perhaps only among the first ``head_bytes``, and sometimes cut off."""
    new = st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"])
    edits = st.lists(st.tuples(st.floats(0, 0.999), new), min_size=1, max_size=4)
    cut = st.none() | st.none() | st.none() | st.floats(0, 1)
    return st.builds(_hit, st.sampled_from(originals), edits, cut, st.just(head_bytes) | st.none() if head_bytes else st.none())


def ends_well(read: Callable[[], object], user_error: type[Exception]) -> bool:
    """Whether ``read`` gives a result; False for one line that says why not. Anything else is raised."""
    message = None
    try:
        read()
    except user_error as error:
        message = str(error)
    assert message is None or (10 < len(message) < 4000 and "\n" not in message), (message or "")[:4000]
    return message is None
