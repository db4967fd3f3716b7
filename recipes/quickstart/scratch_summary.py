"""The one table of scratch.py: where each number started, where it ended, and what a model that learnt nothing would have."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kalle.checkpoint import read_json, write_json
from kalle.data.corpus.cuts import load_cuts
from kalle.data.loading.datamodules import LMDataModule
from kalle.evaluation.probe import LMProbe, probe
from kalle.losses.waveform import LogMel, MelConfig, mel_l1
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.text.tokenizer import Tokenizer

TEST = "test"
MIN_WORDS = 4
PROBE_POSITIONS = 2000

MEL_TARGET, CONSTANT_TARGET, SHUFFLE_TARGET = 0.9, 0.5, 0.15


def mel_start_and_constant(corpus: Path, flowvae: Path, seed: int) -> tuple[float, float]:
    """Log-mel L1 on the test split of the untrained Flow-VAE, and of the best constant spectrum (the median of every mel band)."""
    torch.manual_seed(seed)
    model = FlowVAE(FlowVAE.from_pretrained(flowvae).config).eval()
    log_mel = LogMel(MelConfig())
    cuts = [cut for cut in load_cuts(corpus, TEST) if len(cut.supervisions[0].text.split()) >= MIN_WORDS]
    untrained, mels = [], []
    with torch.no_grad():
        for cut in cuts:
            wav = torch.from_numpy(cut.load_audio())
            heard = model.decode(model.encode(wav).mean)
            samples = min(wav.shape[1], heard.shape[1])
            mels.append(log_mel(wav[:, :samples]))
            untrained.append(mel_l1(mels[-1], log_mel(heard[:, :samples])).item())
    median = torch.cat(mels, dim=2).median(dim=2, keepdim=True).values
    constant = [mel_l1(mel, median.expand_as(mel)).item() for mel in mels]
    return sum(untrained) / len(untrained), sum(constant) / len(constant)


def lm_probes(latents: Path, weights: Path, seed: int) -> tuple[LMProbe, LMProbe]:
    """The untrained and the trained language model on the test split."""
    trained = KalleLM.from_pretrained(weights)
    torch.manual_seed(seed)
    untrained = KalleLM(trained.config).eval()
    if trained.config.normalise_latents:
        untrained.set_latent_statistics(trained.latent_mean, trained.latent_std)
    data = LMDataModule(latents, Tokenizer.load(weights / "tokenizer"), PROBE_POSITIONS, seed=seed, cache=True)
    batches = list(data.test_dataloader())
    return probe(untrained, batches, seed=seed), probe(trained, batches, seed=seed)


def write_summary(out: Path, seed: int, seconds: Mapping[str, float]) -> str:
    """Write ``out``/summary.json and summary.md; returns the Markdown. ``seconds`` is the wall time of every stage before this."""
    started = time.monotonic()
    mel_start, mel_constant = mel_start_and_constant(out / "corpus", out / "flowvae/weights", seed)
    before, after = lm_probes(out / "latents", out / "lm/weights", seed)
    scores = {kind: read_json(out / kind / "results.json")["summary"] for kind in ("reconstruction", "synthesis")}
    mel_end = _value(scores, "reconstruction", "reconstruction", "mel_l1")
    rows = [
        ("log-mel L1, unseen recordings", mel_start, mel_end, mel_constant, f"<= {MEL_TARGET}"),
        ("LM KL per dimension (nats), unseen texts", before.frame_kl, after.frame_kl, after.constant_frame_kl, "-"),
        ("... as a share of the best constant's", before.share_of_constant, after.share_of_constant, 1.0, f"<= {CONSTANT_TARGET}"),
        ("... rise with shuffled texts", before.shuffled_rise, after.shuffled_rise, 0.0, f">= {SHUFFLE_TARGET}"),
        ("LM end KL per dimension (nats)", before.end_kl, after.end_kl, None, "-"),
    ]
    systems = [
        ("recordings", "reconstruction", "recording"),
        ("reconstructions", "reconstruction", "reconstruction"),
        ("synthesis", "synthesis", "synthesis"),
    ]
    seconds = {**seconds, "summary": round(time.monotonic() - started, 1)}
    text = "\n".join([*_learning_table(rows), "", *_speech_table(scores, systems), "", *_footer(out, seconds)])
    learning = [dict(zip(("number", "start", "end", "constant", "target"), row, strict=True)) for row in rows]
    write_json(out / "summary.json", {"learning": learning, "speech": scores, "seconds": seconds})
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    return text


def _value(scores: Mapping[str, Any], kind: str, system: str, name: str) -> float | None:
    found = scores[kind].get(system, {}).get(name)
    return None if found is None else float(found["value"])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _learning_table(rows: list[tuple[str, float, float | None, float | None, str]]) -> list[str]:
    head = ["| learnt, on the test split | start | end | constant | target |", "|---|---|---|---|---|"]
    return head + [
        f"| {name} | {_cell(start)} | {_cell(end)} | {_cell(constant)} | {target} |" for name, start, end, constant, target in rows
    ]


def _speech_table(scores: Mapping[str, Any], systems: list[tuple[str, str, str]]) -> list[str]:
    names = ["wer_corpus", "wer_utt_mean", "sim", "stoi", "pesq_wb", "mel_l1", "duration_ratio"]
    head = ["| speech, test texts of four words or more | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    rows = [
        f"| {label} | " + " | ".join(_cell(_value(scores, kind, system, name)) for name in names) + " |" for label, kind, system in systems
    ]
    return head + rows


def _footer(out: Path, seconds: Mapping[str, float]) -> list[str]:
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    folders = {"speech": "sentences", "synthesis": "spoken test texts, figure.png", "reconstruction": "reconstructions, figure.png"}
    places = [f"- {out / name}: {what}" for name, what in folders.items()]
    logs = f"- logs: tensorboard --logdir {out}"
    return [
        f"Wall time {sum(seconds.values()) / 60:.1f} min (seconds: {stages}).",
        "",
        *places,
        logs,
        f"- weights that speak: {out / 'lm/weights'}",
    ]


if __name__ == "__main__":
    raise SystemExit("scratch.py writes the summary")
