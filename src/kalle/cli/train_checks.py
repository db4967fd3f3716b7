"""What `kalle train` refuses before anything is written: values, and parts that do not belong together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalle.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kalle.models.flowvae import FlowVAE
    from kalle.models.lm import KalleLM
    from kalle.text.tokenizer import Tokenizer


def check_run(config: DictConfig) -> None:
    """A UserError for a missing value, a length no run can have, or an optimizer or schedule that cannot be built."""
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"no value for {', '.join(missing)}: expected a folder; add {missing[0]}=DIR to the command")
    steps, epochs = config.trainer.max_steps, config.trainer.max_epochs
    endless = steps == -1 and epochs in (None, -1)
    if not isinstance(steps, int) or steps == 0 or steps < -1 or endless:
        raise UserError(f"trainer.max_steps: got {steps}, expected at least 1 (or -1 with trainer.max_epochs); correct it")
    _check_optimizer(config)


def _check_optimizer(config: DictConfig) -> None:
    import torch
    from hydra.utils import instantiate

    made: Any = [torch.nn.Parameter(torch.zeros(1))]
    for name in ("optimizer", "scheduler"):
        try:
            made = instantiate(config[name])(made)
        except (TypeError, ValueError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            got = ", ".join(f"{key}={value}" for key, value in config[name].items() if not key.startswith("_"))
            raise UserError(f"{name}: got {got}, expected values it can work with ({error}); correct {name}.*") from None


def check_manual_optimisation(config: DictConfig) -> None:
    """The trainer can neither clip nor accumulate for the Flow-VAE, which steps two optimizers itself."""
    clip, batches = config.trainer.gradient_clip_val, config.trainer.accumulate_grad_batches
    if clip is not None:
        raise UserError(f"trainer.gradient_clip_val: got {clip}, expected null: the Flow-VAE clips for itself; set clip.norm={clip}")
    if batches != 1:
        raise UserError(
            f"trainer.accumulate_grad_batches: got {batches}, expected 1: the Flow-VAE steps and clips (clip.norm) at every batch; "
            f"raise data.batch_size to {batches} times itself"
        )


def check_frames(config: DictConfig, flowvae: FlowVAE) -> None:
    """The data must be cut in the frames of the Flow-VAE."""
    for ours, theirs, unit in (("hop_length", "hop_length", "samples a frame"), ("sample_rate_hz", "sample_rate", "samples a second")):
        wanted = getattr(flowvae.config, theirs)
        if config.data[ours] != wanted:
            raise UserError(f"data.{ours} is {config.data[ours]} but the Flow-VAE has {wanted} {unit}; set data.{ours}={wanted}")


def check_vocabulary(embedded: int, tokenizer: Tokenizer) -> None:
    """Every token needs one of the ``embedded`` rows."""
    if tokenizer.vocab_size > embedded:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model embeds {embedded}; "
            f"set lm.backbone.vocab_size={tokenizer.vocab_size}"
        )


def check_latents(lm: KalleLM, info: dict[str, Any], init: str | None) -> None:
    """The model must predict as many dimensions as the latents of ``info`` have."""
    got, wanted = info["latent_dim"], lm.config.latent_dim
    if got != wanted:
        where = "lm.latent_dim" if init is None else f"that of init='{init}'"
        remedy = f"set lm.latent_dim={got}" if init is None else "encode with the Flow-VAE it was trained for, or leave init out"
        raise UserError(f"the latents have {got} dimensions but {where} is {wanted}; {remedy}")


def check_encoder(flowvae: FlowVAE, folder: str, info: dict[str, Any], latents: str | Path) -> None:
    """The Flow-VAE in ``folder`` must be the one that made ``latents``: the result is told to speak through it."""
    from kalle.checkpoint import weights_hash

    ours, theirs = weights_hash(flowvae.encoder), info["encoder_hash"]
    if ours != theirs:
        raise UserError(
            f"the latents in '{latents}' come from another Flow-VAE: their encoder is {theirs[:12]}, that of flowvae='{folder}' is "
            f"{ours[:12]}; give the Flow-VAE they were encoded with, or encode the corpus again with this one"
        )


def check_speaker(lm: KalleLM, speaker: Any) -> None:
    """A speaker encoder and the data it listens to (``speaker``, data.speaker) come together or not at all."""
    if (lm.config.speaker is None) != (speaker is None):
        got = "a speaker encoder but data.speaker=null" if speaker is None else "data.speaker but no speaker encoder"
        remedy = "add data=lm_speaker" if speaker is None else "choose lm=nano_speaker or data=lm"
        raise UserError(f"speaker: got {got}, expected both or neither; {remedy}")
    if speaker is not None and speaker.latent_dim not in (None, lm.hidden_size):
        raise UserError(
            f"data.speaker.latent_dim is {speaker.latent_dim} but the model is {lm.hidden_size} wide; "
            f"set data.speaker.latent_dim={lm.hidden_size}"
        )
