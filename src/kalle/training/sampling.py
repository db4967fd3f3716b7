"""Speech from a model in training, for the logger."""

from __future__ import annotations

import torch
from torch import Tensor

from kalle.models.flowvae import FlowVAE
from kalle.synthesis.row import StopRule, default_stop
from kalle.synthesis.sampling import generate
from kalle.text.prompt import prompt_ids
from kalle.text.tokenizer import Tokenizer
from kalle.training.lm import KalleLMTraining
from kalle.training.media import Sampler


def speech_sampler(flowvae: FlowVAE, tokenizer: Tokenizer, seed: int, max_frames: int = 100, stop: StopRule | None = None) -> Sampler:
    """A sampler that speaks with the module's current weights and always the same noise."""

    def sample(module: KalleLMTraining, text: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = prompt_ids(tokenizer, text).to(module.device)
        rule = stop or default_stop(module.lm.config.stop_head)
        frames = list(generate(module.lm, ids, generator=generator, stop=rule, max_frames=max_frames))
        if not frames:
            return torch.zeros(0)
        z = torch.stack([frame.z for frame in frames])[None].cpu()
        return flowvae.decode(z)[0]

    return sample
