"""`kalle doctor`: what works here, what doesn't, and what to do about it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kalle.cli.doctor_findings import Finding, examined
from kalle.cli.interrupts import interruptible

CKPT = Path("ckpt")
MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


def doctor(
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Weight folder; else all under ckpt/, and kalle-nano.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Don't import the optional packages, which takes half a minute.")] = False,
) -> None:
    """Look at versions, devices, memory, weights and optional parts; exit code 0 when speaking works, 1 otherwise. Needs no network."""
    with interruptible():
        from kalle.synthesis.weights import SHIPPED, shipped_folder

        shipped = shipped_folder()
        findings, able = examine(shipped if str(model) == SHIPPED and shipped is not None else model, quick, shipped=shipped)
        typer.echo(_as_json(findings, able) if as_json else _as_text(findings, able))
    raise typer.Exit(0 if able else 1)


def examine(model: Path | None, quick: bool, ckpt: Path = CKPT, shipped: Path | None = None) -> tuple[list[Finding], bool]:
    """Everything found, and whether speaking works: the core packages, a tiny model and one weight folder.

    Without ``model`` those under ``ckpt`` are looked at, and the one that ships, ``shipped``.
    """
    from kalle.cli import doctor_machine as machine
    from kalle.cli import doctor_packages as packages
    from kalle.cli import doctor_weights as weights

    findings = examined("versions", packages.python_findings, essential=True)
    findings += examined("versions", packages.core_findings, essential=True)
    findings += examined("devices", machine.processor_findings)
    findings += examined("devices", machine.accelerator_findings)
    findings += examined("self-test", self_test, essential=True)
    findings += examined("memory and disk", machine.memory_findings)
    findings += examined("memory and disk", lambda: machine.disk_findings(model or ckpt))
    looked_at = examined("weights", lambda: weights.found_findings(ckpt, model, shipped))
    for folder in weights.weight_folders(ckpt, model, shipped):
        looked_at += examined("weights", lambda folder=folder: weights.folder_findings(folder))  # type: ignore[misc]
    findings += looked_at
    findings += examined("audio", machine.codec_findings)
    findings += examined("audio", machine.player_findings)
    findings += examined("optional parts", lambda: packages.extra_findings(quick))
    return findings, weights.speaks(looked_at) and not any(finding.stops_speaking for finding in findings)


def self_test() -> Iterator[Finding]:
    """A tiny random model speaks two frames."""
    import torch

    from kalle.models.flowvae import EncoderConfig, FlowConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
    from kalle.models.lm import KalleLM, KalleLMConfig
    from kalle.synthesis.kalle import Kalle
    from kalle.text.tokenizer import Tokenizer

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokenizer = Tokenizer.bytes()
    encoder, decoder = EncoderConfig(channels=(4,) * 7), ISTFTConfig(channels=8, blocks=1)
    config = FlowVAEConfig(latent_dim=4, encoder=encoder, flow=FlowConfig(8, 1, 3, 1), decoder=decoder)
    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        language_model = KalleLMConfig(backbone={**size, "head_dim": 8, "vocab_size": tokenizer.vocab_size}, latent_dim=4)
        lm = KalleLM(language_model, for_training=False).eval()
        flowvae = FlowVAE(config).eval()
    speech = Kalle(flowvae, lm, tokenizer).synthesize("Hi.", seed=0, max_seconds=2 / flowvae.config.frame_rate_hz, retries=0)
    value = f"a tiny random model spoke {speech.frames} frames, {len(speech.audio)} samples, in {time.perf_counter() - started:.1f} s"
    fine = speech.frames == 2 and len(speech.audio) == 2 * flowvae.config.hop_length
    yield Finding("self-test", "speaking", value, "ok" if fine else "problem", None if fine else "reinstall torch", essential=True)


def _as_text(findings: list[Finding], able: bool) -> str:
    lines: list[str] = []
    for section in dict.fromkeys(finding.section for finding in findings):
        lines += ["", section]
        lines += [f"  {MARKS[found.status]:<8} {found.name}: {found.value}" for found in findings if found.section == section]
    remedies = dict.fromkeys(f"  {found.name}: {found.remedy}" for found in findings if found.remedy is not None)
    lines += ["", "what to do", *remedies] if remedies else []
    return "\n".join([*lines[1:], "", f"speaking works: {'yes' if able else 'no'}"])


def _as_json(findings: list[Finding], able: bool) -> str:
    return json.dumps({"speaking_works": able, "findings": [asdict(finding) for finding in findings]}, indent=2, ensure_ascii=False)
