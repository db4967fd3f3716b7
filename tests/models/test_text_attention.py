from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from kalle.errors import UserError
from kalle.losses.latent import HEAD, TextAttention
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch, Packing
from kalle.models.speaker import SpeakerEncoderConfig

SPEAKER = SpeakerEncoderConfig(channels=16, embedding_dim=8, pooled_channels=16, attention_channels=8)
LAYER = 1


@pytest.fixture(params=[False, True], ids=["no speaker", "speaker"])
def lm_and_batch(request: Any, toy_lm_config: KalleLMConfig) -> tuple[KalleLM, LMBatch]:
    torch.manual_seed(5)
    lm = KalleLM(dataclasses.replace(toy_lm_config, speaker=SPEAKER if request.param else None)).eval()
    mels = {"speaker_mels": torch.randn(3, 80, 40), "speaker_kept": torch.tensor([True, False, True])} if request.param else {}
    ids, latents = torch.randint(0, 256, (3, 6)), torch.randn(3, 9, lm.config.latent_dim)
    return lm, LMBatch(ids, torch.tensor([6, 4, 3]), latents, torch.tensor([9, 5, 7]), **mels)


@pytest.mark.parametrize("packing", [None, Packing(40)], ids=["padded", "packed"])
def test_it_is_the_attention_of_the_backbone(lm_and_batch: tuple[KalleLM, LMBatch], packing: Packing | None) -> None:
    lm, batch = lm_and_batch
    layout = lm.layout(batch, packing)
    text_start = layout.lengths - batch.text_lengths - batch.latent_lengths
    given: list[dict[str, Any]] = []
    lm.backbone.register_forward_pre_hook(lambda module, inputs, named: given.append(named), with_kwargs=True)
    with TextAttention(lm, [LAYER]) as attention:
        lm(batch, layout)
        read = attention.weights(LAYER, batch, layout, text_start)
    reference = LlamaModel(LlamaConfig(**lm.config.backbone, attn_implementation="eager")).eval()
    reference.load_state_dict(lm.backbone.state_dict())
    with torch.no_grad():
        whole = reference(**given[0], use_cache=False, output_attentions=True).attentions[LAYER]
    for document in range(3):
        texts, frames = int(batch.text_lengths[document]), int(batch.latent_lengths[document])
        begin = int(layout.start[document] + text_start[document])
        rows = whole[layout.row[document], HEAD, begin + texts - 1 : begin + texts - 1 + frames]
        torch.testing.assert_close(read[document, :frames, :texts], rows[:, begin : begin + texts], atol=1e-6, rtol=1e-5)
        assert not read[document, :, texts:].any()


def test_the_hooks_are_gone_afterwards(lm_and_batch: tuple[KalleLM, LMBatch]) -> None:
    lm, _ = lm_and_batch
    with TextAttention(lm, [0]):
        assert lm.backbone.layers[0].self_attn.q_proj._forward_hooks
    assert not lm.backbone.layers[0].self_attn.q_proj._forward_hooks


def test_a_layer_that_is_not_there(lm_and_batch: tuple[KalleLM, LMBatch]) -> None:
    with pytest.raises(UserError, match=r"alignment_layers: got \[7\], expected layers from 0 to"):
        TextAttention(lm_and_batch[0], [7])
