"""What several latent folders have in common, and the statistics of their mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kalle.errors import UserError

COMMON = ("encoder_hash", "latent_dim", "sample_rate_hz", "hop_length", "frame_rate_hz")
TRAIN = "train"


def check_common(infos: Mapping[str, Mapping[str, Any]]) -> None:
    """A UserError unless all folders, given with their info.json, hold latents of one encoder."""
    (first, reference), *others = infos.items()
    for path, info in others:
        for key in COMMON:
            if info[key] != reference[key]:
                raise UserError(
                    f"latents that do not mix: {key} is {str(reference[key])[:12]} in '{first}' but {str(info[key])[:12]} in '{path}'; "
                    "encode both with the same Flow-VAE"
                )


def mixed_info(infos: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """The info.json that a folder of the mix would have, as far as training asks.

    ``weights`` are visits an epoch for each training item. "mean" and "std" are those of a training frame drawn from the mix: with f_i
    frames of weight w_i, mean = sum p_i mean_i and std^2 = sum p_i (std_i^2 + mean_i^2) - mean^2, where p_i = w_i f_i / sum w_j f_j.
    """
    if len(infos) == 1:
        return dict(infos[0])
    frames = np.array([weight * info["splits"][TRAIN]["frames"] for weight, info in zip(weights, infos, strict=True)])
    parts = (frames / frames.sum())[:, None]
    means, stds = (np.array([info[key] for info in infos], dtype=np.float64) for key in ("mean", "std"))
    mean = (parts * means).sum(0)
    variance = (parts * (stds**2 + means**2)).sum(0) - mean**2
    return {
        **{key: infos[0][key] for key in COMMON},
        "speaker_mels": all(info["speaker_mels"] for info in infos),
        "total_frames": sum(info["total_frames"] for info in infos),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
    }
