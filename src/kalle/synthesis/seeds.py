"""What a seed may be, and the seeds that follow from one."""

from __future__ import annotations

import hashlib
import operator

from kalle.errors import UserError

SEED_LIMIT = 2**63
_DERIVED_BITS = 31


def check_seed(seed: object) -> int:
    """``seed`` as an int, NumPy's integers included; a UserError unless it is an integer from 0 to 2**63 - 1."""
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number < SEED_LIMIT:
        raise UserError(f"bad seed: got {seed!r}, expected an integer from 0 to 2**63 - 1; leave it out to draw one")
    return number


def derived_seed(purpose: str) -> int:
    """A seed below 2**31 that ``purpose``, words with the user's seed in them, decides.

    Noise for two purposes must not be seeded with the same number: both would draw the same values.
    """
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big") % 2**_DERIVED_BITS
