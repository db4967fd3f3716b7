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

    from kalle.data.loading.datamodules import LMDataModule
    from kalle.models.batch import Packing
    from kalle.models.flowvae import FlowVAE
    from kalle.models.lm import KalleLM
    from kalle.models.lora import LoRAConfig

FLAG = "--dry-run"


def dry_run_lm(config: DictConfig) -> Plan:
    """The plan of a language-model training, printed."""
    from hydra.utils import instantiate

    from kalle.cli.train_lm_model import packing_of, take_model_of_init, tokens_to_train
    from kalle.training.footprint import lm_footprint, without_storage

    take_model_of_init(config)
    data = _data(config)
    info = data.info()
    with without_storage() as storageless:
        lm = _empty_lm(config, data.tokenizer.vocab_size)
        check_vocabulary(lm.vocab_size, data.tokenizer)
        check_latents(lm, info, config.init)
        check_speaker(lm, data.speaker)
        lm = _choose_parts(config, lm)
    instantiate(config.objective)
    rows, text, frames = largest_rows(data, packing_of(config))
    unit = "packed rows" if config.packing else "utterances"
    with storageless:
        footprint = lm_footprint(lm, rows, text, frames, unit)
    tokens = tokens_to_train(config.compact_vocabulary, lm, data)
    unused = 0 if tokens is None else (lm.vocab_size - len(tokens)) * lm.hidden_size
    return _print(config, "lm", [lm], data, footprint, unused if lm.backbone.embed_tokens.weight.requires_grad else 0)


def _empty_lm(config: DictConfig, tokens: int) -> KalleLM:
    from hydra.utils import instantiate

    from kalle.checkpoint import CONFIG_NAME, part_folder, read_json
    from kalle.convert.llama import with_text_backbone
    from kalle.models.lm import KalleLM, KalleLMConfig

    if config.init is not None:
        path = part_folder(config.init, "lm") / CONFIG_NAME
        return KalleLM(KalleLMConfig.from_dict(read_json(path), str(path)))
    wanted = instantiate(config.lm, _convert_="all")
    return KalleLM(wanted if config.init_text is None else with_text_backbone(wanted, config.init_text, tokens))


def _choose_parts(config: DictConfig, lm: KalleLM) -> KalleLM:
    """``lm`` with what of it trains, and the activations it keeps."""
    from hydra.utils import instantiate

    from kalle.models.lm import recompute_activations
    from kalle.training.trainable import freeze

    if config.get("lora") is not None:
        lm = _with_adapters(lm, instantiate(config.lora, _convert_="all"))
    freeze(lm, list(config.freeze))
    if config.activation_checkpointing:
        recompute_activations(lm)
    return lm


def _with_adapters(lm: KalleLM, config: LoRAConfig) -> KalleLM:
    """What ``add_lora`` makes, in shapes alone."""
    import torch

    from kalle.models.lora import FACTORS, matching_parameters, new_factors, target_layers, with_low_rank

    also = matching_parameters(lm, config.also_train, "lora.also_train")
    adapted = with_low_rank(lm, new_factors(target_layers(lm, config.targets), config.rank, torch.Generator()), config.scale)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(name.endswith(FACTORS) or name in also)
    return adapted


def largest_rows(data: LMDataModule, packing: Packing | None) -> tuple[int, int, int]:
    """Rows, text positions and frames of the batch of the first epoch that computes most; in packed rows text and frames are shares."""
    import torch

    from kalle.models.batch import packed_layout

    dataset, found = data.dataset("train"), []
    texts, audios = dataset.text_lengths, dataset.audio_lengths
    for batch in data.plan("train", shuffle=True)(0):
        items = [visit % len(dataset) for visit in batch]
        text, audio = texts[items], audios[items]
        if packing is None:
            found.append((len(items), int(text.max()), int(audio.max())))
        else:
            layout = packed_layout(torch.from_numpy(text + audio), packing)
            read = max(1, round(layout.width * int(text.sum()) / int((text + audio).sum())))
            found.append((layout.rows, read, layout.width - read))
    return max(found, key=lambda size: size[0] * sum(size[1:]))


def dry_run_flowvae(config: DictConfig) -> Plan:
    """The plan of a Flow-VAE training, printed."""
    from hydra.utils import instantiate

    from kalle.models.discriminators import Discriminators
    from kalle.training.footprint import flowvae_footprint, without_storage
    from kalle.training.trainable import freeze

    check_manual_optimisation(config)
    data = _data(config)
    with without_storage() as storageless:
        flowvae = _empty_flowvae(config)
        freeze(flowvae, list(config.freeze))
        judges = None if config.discriminators is None else Discriminators(instantiate(config.discriminators, _convert_="all"))
    check_frames(config, flowvae)
    for part in ("objective", "clip"):
        instantiate(config[part])
    modules: list[nn.Module] = [flowvae] if judges is None else [flowvae, judges]
    with storageless:
        footprint = flowvae_footprint(flowvae, judges, data.batch_size, data.segment_samples)
    return _print(config, "flowvae", modules, data, footprint)


def _empty_flowvae(config: DictConfig) -> FlowVAE:
    from hydra.utils import instantiate

    from kalle.checkpoint import CONFIG_NAME, part_folder, read_json
    from kalle.models.flowvae import FlowVAE, FlowVAEConfig

    if config.init is None:
        return FlowVAE(instantiate(config.flowvae, _convert_="all"))
    path = part_folder(config.init, "flowvae") / CONFIG_NAME
    return FlowVAE(FlowVAEConfig.from_dict(read_json(path), str(path)))


def _data(config: DictConfig) -> Any:
    """The data module without what costs memory or processes."""
    from hydra.utils import instantiate

    check_run(config)
    return instantiate(config.data, cache=False, num_workers=0, _convert_="all")


def _print(config: DictConfig, stage: str, modules: list[nn.Module], data: Any, footprint: Any, unused: int = 0) -> Plan:
    """``unused`` parameters are neither trained nor kept with the model."""
    from kalle.training.checkpoint_files import resume_path

    every = [parameter for module in modules for parameter in module.parameters()]
    count = sum(parameter.numel() for parameter in every) - unused
    trained = sum(parameter.numel() for parameter in every if parameter.requires_grad) - unused
    checkpoint = resume_path(config.resume, Path(config.out) / "checkpoints")
    plan = make_plan(config, stage, (count, trained), data, checkpoint, footprint)
    sys.stdout.write(f"kalle train {stage}: {count / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained, {plan.precision}\n")
    sys.stdout.write("\n".join(plan.lines()) + "\ndry run: nothing was trained or written\n")
    return plan
