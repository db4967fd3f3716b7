"""`kalle train … --dry-run`: everything that can be said about a run without making it, and nothing written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalle.cli.train_checks import check_frames, check_latents, check_manual_optimisation, check_run, check_speaker, check_vocabulary
from kalle.cli.train_plan import Plan, make_plan

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import nn

    from kalle.models.lm import KalleLM

FLAG = "--dry-run"


def dry_run_lm(config: DictConfig) -> Plan:
    """The plan of a language-model training, printed."""
    from hydra.utils import instantiate

    from kalle.data.shards import read_info
    from kalle.training.footprint import lm_footprint, without_storage

    data = _data(config)
    info = read_info(data.latents)
    with without_storage() as storageless:
        lm = _empty_lm(config)
    check_vocabulary(lm.vocab_size, data.tokenizer)
    check_latents(lm, info, config.init)
    check_speaker(lm, data.speaker)
    instantiate(config.objective)
    dataset, batches = data.dataset("train"), data.plan("train", shuffle=True)(0)
    text, audio = dataset.text_lengths, dataset.audio_lengths
    items, longest_text, longest_audio = max(
        ((len(batch), int(text[batch].max()), int(audio[batch].max())) for batch in batches), key=lambda size: size[0] * sum(size[1:])
    )
    with storageless:
        footprint = lm_footprint(lm, items, longest_text, longest_audio)
    return _print(config, "lm", [lm], data, footprint)


def _empty_lm(config: DictConfig) -> KalleLM:
    from hydra.utils import instantiate

    from kalle.checkpoint import CONFIG_NAME, part_folder, read_json
    from kalle.models.lm import KalleLM, KalleLMConfig

    if config.init is None:
        return KalleLM(instantiate(config.lm, _convert_="all"))
    path = part_folder(config.init, "lm") / CONFIG_NAME
    return KalleLM(KalleLMConfig.from_dict(read_json(path), str(path)))


def dry_run_flowvae(config: DictConfig) -> Plan:
    """The plan of a Flow-VAE training, printed."""
    from hydra.utils import instantiate

    from kalle.models.discriminators import Discriminators
    from kalle.models.flowvae import FlowVAE
    from kalle.training.footprint import flowvae_footprint, without_storage

    check_manual_optimisation(config)
    data = _data(config)
    with without_storage() as storageless:
        flowvae = FlowVAE(instantiate(config.flowvae, _convert_="all"))
        judges = None if config.discriminators is None else Discriminators(instantiate(config.discriminators, _convert_="all"))
    check_frames(config, flowvae)
    for part in ("objective", "clip"):
        instantiate(config[part])
    modules: list[nn.Module] = [flowvae] if judges is None else [flowvae, judges]
    with storageless:
        footprint = flowvae_footprint(flowvae, judges, data.batch_size, data.segment_samples)
    return _print(config, "flowvae", modules, data, footprint)


def _data(config: DictConfig) -> Any:
    """The data module without what costs memory or processes."""
    from hydra.utils import instantiate

    check_run(config)
    return instantiate(config.data, cache=False, num_workers=0, _convert_="all")


def _print(config: DictConfig, stage: str, modules: list[nn.Module], data: Any, footprint: Any) -> Plan:
    from kalle.training.checkpoint_files import resume_path

    every = [parameter for module in modules for parameter in module.parameters()]
    count = sum(parameter.numel() for parameter in every)
    trained = sum(parameter.numel() for parameter in every if parameter.requires_grad)
    checkpoint = resume_path(config.resume, Path(config.out) / "checkpoints")
    plan = make_plan(config, stage, (count, trained), data, checkpoint, footprint)
    sys.stdout.write(f"kalle train {stage}: {count / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained, {plan.precision}\n")
    sys.stdout.write("\n".join(plan.lines()) + "\ndry run: nothing was trained or written\n")
    return plan
