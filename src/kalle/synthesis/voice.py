"""A voice to speak in, as one small file that knows which encoder it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kalle.disk import write_whole
from kalle.errors import UserError

FORMAT = "kalle-voice-1"
FLOWVAE_ENCODER = "flowvae_encoder"
SPEAKER_ENCODER = "speaker_encoder"
_TENSORS = ("prompt_latents", "speaker_latent")
_NOTES = ("text", "language", "licence", "consent")


@dataclass(frozen=True)
class Voice:
    """Prompt latents with their transcript, a speaker latent, or both. P frames, D latent_dim, H hidden size."""

    bound_to: Mapping[str, str]
    """Hashes (``kalle.checkpoint.weights_hash``) of what the tensors came from: "flowvae_encoder" for prompt latents, "speaker_encoder"
    for a speaker latent. Another language model over the same encoders accepts the voice."""
    prompt_latents: Tensor | None = None
    """(P, D) fp32, on the CPU."""
    speaker_latent: Tensor | None = None
    """(H,) fp32, on the CPU."""
    text: str | None = None
    """Transcript of the prompt."""
    language: str | None = None
    licence: str | None = None
    """Licence of the recording."""
    consent: str | None = None
    """What the speaker agreed to."""

    def __post_init__(self) -> None:
        if self.prompt_latents is None and self.speaker_latent is None:
            raise UserError("an empty voice: got no prompt latents and no speaker latent, expected at least one; make it from audio")
        if self.prompt_latents is not None and not (self.text and self.text.strip()):
            raise UserError("a prompt without its transcript: got latents and no text, expected the words spoken; give the prompt text")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file atomically; a UserError when the disk refuses."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS if getattr(self, name) is not None}
        metadata = {name: getattr(self, name) for name in _NOTES if getattr(self, name) is not None}
        metadata |= {"format": FORMAT} | {f"bound_to.{name}": value for name, value in self.bound_to.items()}
        write_whole(Path(path), save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Voice:
        """Read a file that ``save`` wrote; a UserError when it is missing, torn or something else."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"voice file not found: got '{path}', expected a .safetensors voice; check the path")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys() if name in _TENSORS}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise UserError(f"not a voice file: '{path}' ({error}); make the voice again") from None
        if metadata.get("format") != FORMAT:
            raise UserError(f"not a voice file: '{path}' has format {metadata.get('format')!r}, expected {FORMAT!r}; make the voice again")
        prefix = "bound_to."
        bound = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
        return cls(bound_to=bound, **tensors, **{name: metadata[name] for name in _NOTES if name in metadata})

    def check_fits(self, hashes: Mapping[str, str]) -> None:
        """UserError unless every encoder this voice came from is among the model's own ``hashes``."""
        for name, wanted in self.bound_to.items():
            if name not in hashes:
                raise UserError(f"the voice does not fit: it needs a {spoken_name(name)}, which this model lacks; make one with this model")
            if hashes[name] != wanted:
                raise UserError(
                    f"the voice does not fit: it was made with the {spoken_name(name)} {wanted[:12]}, this model has "
                    f"{hashes[name][:12]}; make the voice again with this model"
                )


def spoken_name(name: str) -> str:
    """The name of an encoder as people read it."""
    return {FLOWVAE_ENCODER: "Flow-VAE encoder", SPEAKER_ENCODER: "speaker encoder"}.get(name, name)
