"""`kalle calibrate`: choose the stop threshold of a weight folder on held-out speech."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kalle.cli.main import interruptible
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.data.loading.datasets import LatentDataset
    from kalle.evaluation.calibration import Calibration, EndScores
    from kalle.models.lm import KalleLM


def calibrate(
    model: Annotated[Path, typer.Argument(help="Weight folder, or kalle-nano; its config.json gets the stop rule.")],
    latents: Annotated[Path, typer.Option(help="Latent folder that `kalle encode` wrote with the same Flow-VAE.")],
    split: Annotated[str, typer.Option(help="Split of the latent folder that was not trained on.")] = "valid",
    min_index: Annotated[int, typer.Option(min=-1, help="No stop at this 0-based frame or before it.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the draw of the latents.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the histogram of both kinds of positions into this image file.")] = None,
    free_running: Annotated[int, typer.Option(min=0, help="Also speak this many of the texts with the new rule and say how they end.")] = 0,
    confidence: Annotated[
        int, typer.Option(min=0, help="Also speak this many of the texts, well and badly, and store which confidence is low.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Store nothing.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_positions: Annotated[int, typer.Option(min=1, help="Positions in a batch, padding included.")] = 4000,
) -> None:
    """Choose the stop threshold that makes the fewest false and missed stops on held-out speech, and store it with the weights."""
    from kalle.checkpoint import in_package, resolve_device
    from kalle.evaluation.calibration import calibrate as choose
    from kalle.evaluation.calibration import held_out, save_histogram
    from kalle.evaluation.figures import check_image_path
    from kalle.models.lm import KalleLM
    from kalle.synthesis.weights import read_weight_folder, resolve_weights, write_stop

    with interruptible():
        if plot is not None:
            check_image_path(plot)
        model = resolve_weights(model)
        read_weight_folder(model)
        if in_package(model) and not dry_run:
            raise UserError(
                f"'{model}' is part of the installed package: expected a weight folder of yours; copy it with "
                "`kalle export kalle-nano --out DIR`, or give --dry-run"
            )
        lm = KalleLM.from_pretrained(model, resolve_device(device))
        dataset = held_out(model, lm, latents, split, seed)
        scores = _score(lm, dataset, max_positions)
        calibration = choose(scores, min_index)
        for line in calibration_lines(calibration):
            typer.echo(line)
        if plot is not None:
            save_histogram(scores, calibration, plot)
            typer.echo(f"histogram: {plot}")
        if not dry_run:
            check_usable(calibration)
            write_stop(model, calibration.to_stored())
            typer.echo(f"stored in {model / 'config.json'}")
        if confidence:
            _calibrate_confidence(model, [item.text for item in dataset.items[:confidence]], device, dry_run)
        if free_running:
            typer.echo(_speak_freely(model, dataset, calibration, free_running, device))


def calibration_lines(calibration: Calibration) -> list[str]:
    """The printed report: a table of thresholds, the chosen one, and a warning where none is good."""
    chosen = calibration.rates
    lines = [f"{'threshold':>10}  {'false stops':>11}  {'missed stops':>12}  {'sum':>7}"]
    for rates in calibration.table:
        mark = "  <- chosen" if rates.threshold == chosen.threshold else ""
        lines.append(f"{rates.threshold:10.4g}  {rates.false_stop:11.1%}  {rates.missed_stop:12.1%}  {rates.total:7.1%}{mark}")
    lines.append(
        f"threshold {chosen.threshold:.4g} nats per dimension, above frame index {calibration.min_index}: "
        f"false stops in {chosen.false_stop:.1%}, missed stops in {chosen.missed_stop:.1%} of {calibration.utterances} utterances"
    )
    if not calibration.separates:
        lines.append(
            f"warning: no threshold separates the ends from the rest: the best still errs in {chosen.total:.0%} of the utterances; "
            "train longer, or with a larger end weight"
        )
    return lines


def check_usable(calibration: Calibration) -> None:
    """A UserError for a rule that is not to be stored, being no better than none."""
    if calibration.usable:
        return
    rates = calibration.rates
    raise UserError(
        f"no stop rule was stored: got {rates.false_stop:.1%} false and {rates.missed_stop:.1%} missed stops with the best threshold, "
        "expected less than 100% together, which never to stop has too; train longer, or look at the table alone with --dry-run"
    )


def _calibrate_confidence(model: Path, texts: list[str], device: str, dry_run: bool) -> None:
    from kalle.evaluation.calibration import calibrate_confidence
    from kalle.synthesis.kalle import Kalle
    from kalle.synthesis.weights import write_confidence

    result = calibrate_confidence(Kalle.from_pretrained(model, device), texts)
    stored = result.to_stored()
    alarms, found = f"{stored.false_alarm_rate:.1%} of {stored.utterances} texts", f"{stored.detected_rate:.1%} of as many with random ids"
    typer.echo(f"confidence: {stored.usual:.3f} on average, low below {stored.low:.3f}, as in {alarms} and in {found}")
    if not result.separates:
        typer.echo("warning: that tells good speech from bad too rarely, so nothing is stored: train longer")
    elif not dry_run:
        write_confidence(model, stored)


def _score(lm: KalleLM, dataset: LatentDataset, max_positions: int) -> EndScores:
    from kalle.evaluation.calibration import batches_of, end_scores
    from kalle.progress import progress_bar

    batches = batches_of(dataset, max_positions)
    with progress_bar() as bar:
        return end_scores(lm, (batch() for batch in bar.track(batches, description="calibrate")))


def _speak_freely(model: Path, dataset: LatentDataset, calibration: Calibration, count: int, device: str) -> str:
    from kalle.evaluation.calibration import speak_freely
    from kalle.synthesis.kalle import Kalle

    items = dataset.items[:count]
    kalle, rule = Kalle.from_pretrained(model, device), calibration.to_stored()
    spoken = speak_freely(kalle, [item.text for item in items], [item.frames for item in items], rule)
    reasons = ", ".join(f"{reason} {number}" for reason, number in spoken.stop_reasons.most_common())
    return (
        f"spoken freely: {spoken.no_end_rate:.1%} of {len(items)} texts did not end by themselves ({reasons}); "
        f"median length {spoken.duration_ratio:.2f} of the recording"
    )
