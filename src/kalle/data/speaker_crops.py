"""Random crops of log-mels for the speaker encoder."""

from __future__ import annotations

import numpy as np

from kalle.data.sampling import numpy_generator


def speaker_crop(mels: np.ndarray, frames: int, *seed_parts: int | str) -> np.ndarray:
    """``frames`` frames of ``mels`` (80, F) from a random place, (80, frames); shorter ones are repeated from their beginning.

    The place is a function of ``seed_parts``. The mels are those of the whole utterance, so its level is normalised before the crop
    and only the frames at the edges of a crop differ from the mels of cropped audio, which would be reflected there.
    """
    length = mels.shape[1]
    assert length > 0, mels.shape
    if length < frames:
        return np.tile(mels, (1, -(-frames // length)))[:, :frames]
    start = int(numpy_generator("speaker-crop", *seed_parts).integers(0, length - frames + 1))
    return mels[:, start : start + frames]
