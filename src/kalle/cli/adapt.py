"""`kalle adapt`: learn one voice at test time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalle.cli.main import interruptible
from kalle.cli.speaking import ModelOption, load_model, renamed
from kalle.errors import UserError
from kalle.files import check_writable

if TYPE_CHECKING:
    from kalle.adaptation.adapt import Adaptation, AdaptOptions
    from kalle.evaluation.similarity import SpeakerEmbedder

SUFFIX = ".safetensors"
FLAGS = {
    "(text)": "--text",
    "expected a text": "expected a --text",
    "learning_rate": "--lr",
    "learning rate:": "--lr:",
    "bad seconds:": "bad --seconds:",
    "bad rank:": "bad --lora:",
    "bad steps:": "bad --steps:",
}
"""Parameters that the library's messages name, and the flags they have here."""
LINES = 10
"""Lines of progress where there is no terminal for a bar."""


def adapt(
    audio: Annotated[list[Path], typer.Argument(metavar="RECORDING...", help="Of one speaker, best 2 to 20 seconds each.")],
    text: Annotated[list[str], typer.Option(help="What is said in it, word for word; once for each recording, in their order.")],
    model: ModelOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Adapter file; by default RECORDING.adapter.safetensors here.")
    ] = None,
    voice: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a voice with the adapter inside, for `kalle say --voice`.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates, each on one recording with fresh noise.")] = 200,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default what fits the mode and the model's width.")] = None,
    lora: Annotated[int | None, typer.Option(metavar="RANK", help="Learn factors of this rank; the default, with rank 8.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Learn all weights, as the paper does; a large file.")] = False,
    seconds: Annotated[float | None, typer.Option(help="Begin no further step after this wall time.")] = None,
    target_text: Annotated[str | None, typer.Option(help="Learn for this one text alone, as the paper does.")] = None,
    validate: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Another recording of the speaker, to measure on.")] = None,
    validate_text: Annotated[list[str] | None, typer.Option(help="What is said in that one.")] = None,
    sim_texts: Annotated[int, typer.Option(min=0, help="Texts to speak for the similarity before and after; 0 leaves it out.")] = 3,
    weight_decay: Annotated[float, typer.Option(help="Decoupled from the gradient.")] = 0.01,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.2,
    language: Annotated[str | None, typer.Option(help="ISO 639-1 code of what is said.")] = None,
    release_exact: Annotated[bool, typer.Option("--release-exact", help="For speaking with --release-exact: the same context.")] = False,
    seed: Annotated[int, typer.Option(help="Of all noise; the same seed gives the same adapter.")] = 0,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything that was measured as JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there already.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16 or float16; what learns is float32.")] = "auto",
) -> None:
    """Learn one voice from a recording and its transcript (test-time training), and keep what changed as a small file.

    The weights stay as they are. Prints the KL divergence of the recording, and how similar the voice is, before and after.
    """
    with interruptible(), renamed(FLAGS):
        options = _options(lora, full, steps=steps, lr=lr, seconds=seconds, weight_decay=weight_decay, warmup_share=warmup, seed=seed)
        from kalle.synthesis.options import checked_language

        language = checked_language(language)
        held_out = _paired(validate or [], validate_text or [])
        _check_audio([*audio, *(path for path, _ in held_out)])
        adapter_path = None if voice is not None and output is None else output or Path(f"{audio[0].stem}.adapter{SUFFIX}")
        _check_new([path for path in (adapter_path, voice) if path is not None], force)
        for path in (adapter_path, voice, report):
            if path is not None:
                check_writable(path)
        embedder = _embedder(sim_texts)
        from kalle.adaptation.adapt import adapt as learn
        from kalle.evaluation.similarity import CHECK_TEXTS
        from kalle.synthesis.release_compat import OURS, ReleaseCompatibility

        kalle = load_model(model, device, dtype)
        spoken = CHECK_TEXTS.get(language or kalle.config.language or "en", CHECK_TEXTS["en"])[:sim_texts]
        with _Progress() as progress:
            result = learn(
                kalle, list(audio), text, options=options, target_text=target_text, validate=held_out, language=language,
                compatibility=ReleaseCompatibility.release() if release_exact else OURS,
                embedder=embedder, texts=spoken, report=progress.report,
            )  # fmt: skip
        typer.echo("\n".join([*summary(result, len(spoken)), *_write(result, adapter_path, voice, report)]))


def _write(result: Adaptation, adapter: Path | None, voice: Path | None, report: Path | None) -> list[str]:
    """Write the requested files; returns a line for each."""
    from kalle.checkpoint import write_json

    written = []
    if adapter is not None:
        result.adapter.save(adapter)
        written.append(f"wrote {adapter}: {result.adapter.description}")
    if voice is not None:
        result.voice.save(voice)
        written.append(f"wrote {voice} ({result.voice.kind})")
    if report is not None:
        write_json(report, result.report)
        written.append(f"report: {report}")
    return written


def summary(result: Adaptation, texts: int) -> list[str]:
    """The printed result of a run, one fact a line."""
    notes = result.adapter.notes
    lines = [f"{len(result.losses)} of {notes['steps']} steps in {result.seconds:.1f} s, peak learning rate {notes['lr']:g}"]
    named = {
        "KL of the recording, nats per dimension": result.kl,
        "KL of another recording of the speaker": result.held_out_kl,
        f"speaker similarity of {texts} texts to the recording": result.similarity,
        "speaker similarity to another recording": result.held_out_similarity,
    }
    lines += [f"{name}: {pair.before:.3f} before, {pair.after:.3f} after" for name, pair in named.items() if pair is not None]
    if result.held_out_kl is not None and result.held_out_kl.after > result.held_out_kl.before:
        lines.append("warning: another recording of the speaker is predicted worse than before; learn fewer --steps, or a lower --lr")
    if notes["rounding"]:
        lines.append(f"storing the change in fp16 lost {notes['rounding']:.2g} of its norm; what is measured has lost it")
    return lines


class _Progress:
    """A bar on a terminal, some lines elsewhere, on standard error."""

    def __enter__(self) -> _Progress:
        import sys

        from kalle.progress import progress_bar

        self._bar = progress_bar().__enter__()
        self._task: Any = None
        self._plain = not sys.stderr.isatty()
        return self

    def report(self, step: int, steps: int, loss: float, seconds: float) -> None:
        """See ``kalle.adaptation.adapt.Reporter``."""
        if self._task is None:
            self._task = self._bar.add_task("adapt", total=steps)
        self._bar.update(self._task, completed=step, description=f"adapt, loss {loss:.3f}")
        if self._plain and (step % max(1, steps // LINES) == 0 or step == steps):
            typer.echo(f"step {step}/{steps}, loss {loss:.3f}, {seconds:.1f} s", err=True)

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)


def _options(lora: int | None, full: bool, **values: Any) -> AdaptOptions:
    from kalle.adaptation.adapt import DEFAULT_RANK, AdaptOptions

    if full and lora is not None:
        raise UserError(f"two ways to learn: got --full and --lora {lora}, expected one of them; leave one out")
    return AdaptOptions(mode="full" if full else "lora", rank=DEFAULT_RANK if lora is None else lora, **values)


def _paired(audio: list[Path], texts: list[str]) -> list[tuple[Path, str]]:
    if len(audio) != len(texts):
        raise UserError(f"--validate and --validate-text don't pair: got {len(audio)} and {len(texts)}, expected as many; give both")
    return list(zip(audio, texts, strict=True))


def _check_audio(paths: list[Path]) -> None:
    for path in paths:
        if not path.is_file():
            raise UserError(f"audio file not found: got '{path}', expected a recording; check the path")


def _check_new(paths: list[Path], force: bool) -> None:
    for path in paths:
        if path.suffix != SUFFIX:
            raise UserError(f"cannot write '{path}': got the suffix '{path.suffix}', expected {SUFFIX}; rename the output")
        if path.exists() and not force:
            raise UserError(f"'{path}' exists: expected a new file; choose another, or overwrite it with --force")


def _embedder(texts: int) -> SpeakerEmbedder | None:
    """GE2E, or None and a line that says why not."""
    from kalle.evaluation.similarity import speaker_embedder

    if not texts:
        return None
    try:
        return speaker_embedder("ge2e")
    except UserError as error:
        typer.echo(f"no speaker similarity: {error}", err=True)
        return None
