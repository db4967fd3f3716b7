"""What the public release does differently, each thing under a name of its own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Decode = Literal["sampled", "resample", "mean"]


@dataclass(frozen=True)
class ReleaseQuirks:
    """Habits of the KALL-E release that change its output; all off by default, ``release()`` turns all on."""

    decode: Decode = "sampled"
    """What the decoder hears: "sampled", the very frames that were fed back; "resample", a second draw from each
    frame's distribution (the release); "mean", the means."""
    drop_last_frame_always: bool = False
    """Drop the last frame at the length cap too, where it is speech; the end frame is dropped in any case."""
    drop_last_prompt_frame: bool = False
    """Leave out the last latent frame of the prompt."""
    tokenise_separately: bool = False
    """Tokenise prompt and text each on its own and join the ids with no space between."""
    truncate_int16: bool = False
    """Cut samples towards zero to 16 bits instead of rounding."""

    @classmethod
    def release(cls) -> ReleaseQuirks:
        """Every habit of the release at once."""
        switches = {field.name: True for field in fields(cls) if field.name != "decode"}
        return cls(decode="resample", **switches)
