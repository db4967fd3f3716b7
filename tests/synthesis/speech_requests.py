"""Requests for tests, below the level of texts."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor

from kalle.synthesis.generate import Request
from kalle.synthesis.options import GenerationOptions

OPTIONS = {field.name for field in fields(GenerationOptions)}


def request_of(text_ids: Tensor, max_frames: int, seed: int = 0, **values: Any) -> Request:
    """A request of ``text_ids`` with ``values`` of its own fields and of its options."""
    options = GenerationOptions(seed=seed, **{name: value for name, value in values.items() if name in OPTIONS})
    return Request(text_ids, max_frames, options, **{name: value for name, value in values.items() if name not in OPTIONS})
