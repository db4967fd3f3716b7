"""The language model of a training run: what it starts from, what of it trains, and what is written at the end."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalle.cli.train_checks import check_latents, check_vocabulary
from kalle.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from kalle.models.batch import Packing
    from kalle.models.lm import KalleLM
    from kalle.models.lora import LoRAConfig
    from kalle.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
_LARGE_VOCABULARY = 4096
"""Tokens from which ``compact_vocabulary=auto`` looks whether a corpus leaves most of them unused."""


@dataclass(frozen=True)
class Adapters:
    """The adapters of a run and the hash of the weights below them."""

    config: LoRAConfig
    base_hash: str


def check_start(config: DictConfig) -> None:
    """A UserError for two starts at once."""
    if config.init is not None and config.init_text is not None:
        raise UserError(f"init: got init='{config.init}' and init_text='{config.init_text}', expected one of them; leave one out")


def take_model_of_init(config: DictConfig) -> None:
    """Write the model of ``init`` over ``config.lm``, which it replaces; a stop head that was asked for stays asked for.

    What refers to the model, such as the width of a voice's noise, then follows the one that trains, and the record of the run names it.
    """
    from omegaconf import OmegaConf

    from kalle.checkpoint import CONFIG_NAME, part_folder, read_json
    from kalle.models.lm import PART, KalleLMConfig
    from kalle.models.speaker import SpeakerEncoderConfig

    check_start(config)
    if config.init is None:
        return
    path = part_folder(config.init, PART) / CONFIG_NAME
    found = KalleLMConfig.from_dict(read_json(path), str(path))
    values = {"stop_head": False, **found.to_dict()}
    values["stop_head"] = bool(values["stop_head"] or config.lm.get("stop_head"))
    if found.speaker is not None:
        target = f"{SpeakerEncoderConfig.__module__}.{SpeakerEncoderConfig.__qualname__}"
        values["speaker"] = {"_target_": target, **dataclasses.asdict(found.speaker)}
    for name, value in values.items():
        OmegaConf.update(config, f"lm.{name}", value, merge=False, force_add=True)


def start_language_model(config: DictConfig, info: dict[str, Any], tokenizer: Tokenizer) -> KalleLM:
    """The model that ``config`` describes or starts from, checked against the latents of ``info``."""
    import torch
    from hydra.utils import instantiate

    from kalle.convert.llama import load_text_weights, with_text_backbone
    from kalle.models.lm import KalleLM

    if config.init is not None:
        lm = KalleLM.from_pretrained(config.init, for_training=True).train()
        if config.lm.get("stop_head") and not lm.config.stop_head:
            _add_stop_head(lm, config)
    else:
        if config.init_text is None:
            # Before its configuration is built, because transformers has something to say about token ids beyond the vocabulary.
            check_vocabulary(config.lm.backbone.get("vocab_size", tokenizer.vocab_size), tokenizer)
        wanted = instantiate(config.lm, _convert_="all")
        if config.init_text is not None:
            wanted = with_text_backbone(wanted, config.init_text, tokenizer.vocab_size)
        lm = KalleLM(wanted)
        if config.init_text is not None:
            load_text_weights(lm, config.init_text, torch.Generator().manual_seed(config.seed))
    check_vocabulary(lm.vocab_size, tokenizer)
    check_latents(lm, info, config.init)
    if config.init is None and lm.config.normalise_latents:
        lm.set_latent_statistics(torch.tensor(info["mean"]), torch.tensor(info["std"]))
    return lm


def _add_stop_head(lm: KalleLM, config: DictConfig) -> None:
    """An untrained stop head for a model that starts from weights without one."""
    import torch

    if config.get("lora") is not None:
        raise UserError(
            f"lm.stop_head: got lora and init='{config.init}' without a stop head, expected weights that have one, for an adapter belongs "
            "to the weights it was made for; train the head first (lora=null), or leave lm.stop_head out"
        )
    lm.add_stop_head(torch.Generator().manual_seed(config.seed))
    logger.info("the language model of '%s' has no stop head: it gets an untrained one", config.init)


def packing_of(config: DictConfig) -> Packing | None:
    """How the rows of a batch are packed, None for padded ones."""
    from kalle.models.batch import Packing

    if not config.packing:
        return None
    # The kernel of flash attention knows packed documents in a single row only.
    return Packing(None if config.attention == "flash" else config.row_positions)


def prepare_language_model(config: DictConfig, lm: KalleLM, data: Any) -> Adapters | None:
    """Freeze, adapt, shrink the vocabulary and choose how ``lm`` is computed, all in place; the adapters where there are any."""
    import torch
    from hydra.utils import instantiate

    from kalle.checkpoint import resolve_device
    from kalle.models.lm import compile_layers, recompute_activations, set_attention
    from kalle.models.lora import add_lora
    from kalle.synthesis.adapter import base_hash
    from kalle.training.trainable import freeze, parameter_counts

    adapters = None
    if config.get("lora") is not None:
        adapters = Adapters(instantiate(config.lora, _convert_="all"), base_hash(lm.state_dict()))
        add_lora(lm, adapters.config, torch.Generator().manual_seed(config.seed))
    freeze(lm, list(config.freeze))
    _shrink_vocabulary(config.compact_vocabulary, lm, data)
    device = resolve_device(config.device)
    half = "16" in str(config.precision) or (config.precision == "auto" and device.type == "cuda")
    set_attention(lm, config.attention, device, half)
    if config.activation_checkpointing:
        recompute_activations(lm)
    if config.compile and config.objective.alignment_weight:
        raise UserError(
            f"got compile=true and objective.alignment_weight={config.objective.alignment_weight}, expected one of them: "
            "the led attention is read by hooks, which a compiled layer need not run; leave one out"
        )
    if config.compile:
        compile_layers(lm)
    trainable, total = parameter_counts(lm)
    logger.info("the language model has %.2f M parameters, %.2f M of them train", total / 1e6, trainable / 1e6)
    return adapters


def export_language_model(lm: KalleLM, adapters: Adapters | None, weights: Path, steps: int) -> None:
    """Write ``weights``/lm, with adapters merged into it, and the adapters alone to ``weights``/adapter. Changes ``lm``."""
    from kalle.models.vocabulary import expand_vocabulary
    from kalle.training.trainable import finish

    expand_vocabulary(lm)
    if adapters is not None:
        _export_adapters(lm, adapters, weights / ADAPTER_FOLDER, steps)
    finish(lm)
    lm.save_pretrained(weights)


def _export_adapters(lm: KalleLM, adapters: Adapters, folder: Path, steps: int) -> None:
    from kalle.models.lora import also_trained, lora_factors
    from kalle.synthesis.adapter import ADAPTER_FILE, SPEAKER_PARTS, Adapter

    config = adapters.config
    factors, whole = lora_factors(lm), also_trained(lm, config)
    if any(name.startswith(SPEAKER_PARTS) for name in [*factors, *whole]):
        logger.warning("no %s/: these adapters change the speaker encoder, which voices depend on; use the merged lm/", folder)
        return
    notes = {"steps_made": steps, "lora": config.to_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    Adapter.of_factors(adapters.base_hash, factors, config.scale, notes, whole).save(folder / ADAPTER_FILE)


def _shrink_vocabulary(wanted: bool | str, lm: KalleLM, data: Any) -> None:
    from kalle.models.vocabulary import compact_vocabulary

    tokens = tokens_to_train(wanted, lm, data)
    if tokens is not None:
        logger.info("training %d of %d text tokens, those of the training texts; the others stay as they are", len(tokens), lm.vocab_size)
        compact_vocabulary(lm, tokens)


def tokens_to_train(wanted: bool | str, lm: KalleLM, data: Any) -> Tensor | None:
    """The ids (N,) int64 of the training split of ``data`` that alone are to train; None for all."""
    import torch

    if wanted not in (True, False, "auto"):
        raise UserError(f"compact_vocabulary: got {wanted!r}, expected true, false or auto; correct it")
    if wanted is False or (wanted == "auto" and lm.vocab_size < _LARGE_VOCABULARY):
        return None
    used = torch.zeros(lm.vocab_size, dtype=torch.bool)
    for ids in data.dataset("train").text_ids:
        used[ids.long()] = True
    tokens = used.nonzero().flatten()
    return None if wanted == "auto" and 2 * len(tokens) > lm.vocab_size else tokens
