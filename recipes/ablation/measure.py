"""Yardsticks that can be compared across latent spaces, and the table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalle.checkpoint import read_json
from kalle.data.corpus.cuts import load_cuts
from kalle.data.loading.datamodules import LMDataModule
from kalle.evaluation.probe import probe
from kalle.losses.waveform import LogMel, MelConfig, mel_l1
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.text.tokenizer import Tokenizer

TEST = "test"
MIN_WORDS = 4
POSITIONS = 4000
COLUMNS = ("share_of_constant", "shuffled_rise", "end_kl", "sigma_ratio", "predicted_mel_l1")


@torch.no_grad()
def measure_lm(weights: Path, latents: Path, corpus: Path, direction: str, seed: int) -> dict[str, float]:
    """What the language model in ``weights`` learnt, on the test split of ``latents``.

    ``share_of_constant``, ``shuffled_rise`` and ``end_kl`` as in `kalle.evaluation.probe`; ``sigma_ratio`` is the predicted over the
    posterior's standard deviation, averaged; ``predicted_mel_l1`` is the log-mel L1 between a recording and the decoded means that the
    model predicts for each next frame when it is told all true ones before: audible, so it means the same in every latent space.
    """
    lm, flowvae = KalleLM.from_pretrained(weights), FlowVAE.from_pretrained(weights)
    data = LMDataModule(latents, Tokenizer.load(weights / "tokenizer"), POSITIONS, seed=seed, cache=True)
    batches = list(data.test_dataloader())
    found = probe(lm, batches, direction, seed)  # type: ignore[arg-type]
    recordings = {cut.id: cut for cut in load_cuts(corpus, TEST) if len(cut.supervisions[0].text.split()) >= MIN_WORDS}
    log_mel = LogMel(MelConfig(sample_rate=flowvae.config.sample_rate))
    distances: list[float] = []
    ratios: list[float] = []
    for batch in batches:
        prediction, posterior = lm(batch), batch.posterior
        assert posterior is not None
        for row, name in enumerate(batch.cut_ids):
            frames = int(batch.latent_lengths[row])
            ratios.append(float((prediction[row].std[:frames] / posterior[row].std[:frames]).mean()))
            if name in recordings:
                wav = torch.from_numpy(recordings[name].load_audio())
                distances.append(_distance(log_mel, wav, flowvae.decode(prediction.mean[row : row + 1, :frames])))
    return {
        "share_of_constant": found.share_of_constant,
        "shuffled_rise": found.shuffled_rise,
        "end_kl": found.end_kl,
        "sigma_ratio": sum(ratios) / len(ratios),
        "predicted_mel_l1": sum(distances) / len(distances),
    }


def _distance(log_mel: LogMel, recording: Tensor, heard: Tensor) -> float:
    samples = min(recording.shape[1], heard.shape[1])
    return mel_l1(log_mel(recording[:, :samples]), log_mel(heard[:, :samples])).item()


def reconstruction_row(folder: Path) -> dict[str, float]:
    """The Flow-VAE's scores that `kalle evaluate kind=reconstruction` left in ``folder``."""
    results = read_json(folder / "results.json")
    scores = {name: results["summary"]["reconstruction"][name]["value"] for name in ("mel_l1", "stoi", "pesq_wb")}
    health = results["extra"]["latent_health"]
    return scores | {name: health[name] for name in ("kl_per_frame", "active_dimensions", "mean_std")}


def speaking_row(folder: Path) -> dict[str, Any]:
    """What free running gave: recognised words, voice, length, and how the utterances ended."""
    results = read_json(folder / "results.json")
    summary = results["summary"]["synthesis"]
    names = ("wer_corpus", "sim", "duration_ratio")
    counts = results["counts"]["synthesis"]
    return {name: summary[name]["value"] for name in names if name in summary} | {"ends": counts.get("stop_reasons", {})}


def tables(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    return "\n".join(
        [*_codec_table(results["codecs"]), "", *_model_table(results["models"]), "", *_temperature_table(results["temperatures"])]
    )


def _codec_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = ("mel_l1", "stoi", "pesq_wb", "kl_per_frame", "active_dimensions", "mean_std")
    head = ["| Flow-VAE | varied | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    return head + [f"| {name} | {row['question']} | " + " | ".join(_cell(row[key]) for key in names) + " |" for name, row in rows.items()]


def _model_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = (*COLUMNS, "duration_ratio", "sim", "wer_corpus")
    head = ["| language model | varied | " + " | ".join(names) + " | ended by itself |", "|---" * (len(names) + 3) + "|"]
    return head + [
        f"| {name} | {row['question']} | " + " | ".join(_cell(row.get(key)) for key in names) + f" | {_ended(row['ends'])} |"
        for name, row in rows.items()
    ]


def _temperature_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = ("duration_ratio", "sim", "wer_corpus")
    head = ["| temperature | " + " | ".join(names) + " | ended by itself |", "|---" * (len(names) + 2) + "|"]
    return head + [
        f"| {name} | " + " | ".join(_cell(row.get(key)) for key in names) + f" | {_ended(row['ends'])} |" for name, row in rows.items()
    ]


def _ended(reasons: Mapping[str, int]) -> str:
    return f"{reasons.get('end', 0)} of {sum(reasons.values())}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
