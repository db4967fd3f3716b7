from __future__ import annotations

import copy

import pytest
import torch

from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.losses.latent import next_distribution_loss
from kalle.models.lm import KalleLM, KalleLMConfig, compile_layers, recompute_activations, set_attention
from kalle.models.lm_batch import LMBatch, Packing
from kalle.models.lora import LoRAConfig, add_lora

CPU = torch.device("cpu")


@pytest.fixture
def lm(toy_lm_config: KalleLMConfig) -> KalleLM:
    torch.manual_seed(0)
    return KalleLM(toy_lm_config).train()


@pytest.fixture
def batch() -> LMBatch:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(2, 6, 4, generator=generator)
    posterior = DiagGaussian(mean, torch.full_like(mean, -0.5))
    ids = torch.randint(0, 256, (2, 5), generator=generator)
    return LMBatch(ids, torch.tensor([5, 3]), posterior.sample(generator=generator), torch.tensor([6, 4]), posterior)


def gradients(lm: KalleLM, batch: LMBatch, packing: Packing | None) -> dict[str, torch.Tensor]:
    lm.zero_grad()
    torch.manual_seed(5)
    next_distribution_loss(lm(batch, lm.layout(batch, packing)), batch).total.backward()
    return {name: parameter.grad for name, parameter in lm.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("packing", [None, Packing(None)], ids=["padded", "packed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_recomputed_activations_have_equal_gradients(lm: KalleLM, batch: LMBatch, packing: Packing | None, lora: bool) -> None:
    if lora:  # whose dropout must be drawn the same a second time
        add_lora(lm, LoRAConfig(rank=2, dropout=0.5, also_train=("distribution_linear.*",)))
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if "lora_b" in name:
                    parameter.fill_(0.1)
    expected = gradients(lm, batch, packing)
    recomputed = copy.deepcopy(lm)
    recompute_activations(recomputed)
    calls = []
    recomputed.backbone.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    got = gradients(recomputed, batch, packing)
    assert len(calls) == 2, "computed forward and again on the way back"
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_attention_that_is_not_there_is_told(lm: KalleLM) -> None:
    set_attention(lm, "sdpa", CPU)
    assert not lm.backbone.flex
    with pytest.raises(UserError, match="attention: got 'xformers', expected sdpa or flex"):
        set_attention(lm, "xformers", CPU)
    with pytest.raises(UserError, match="attention=flex needs a CUDA device: the run is on 'cpu'; use attention=sdpa"):
        set_attention(lm, "flex", CPU)
    set_attention(lm, "flex", torch.device("cuda"))
    assert lm.backbone.flex


def test_saving_does_not_know_how_it_was_computed(lm: KalleLM) -> None:
    before = lm.config.to_dict()
    recompute_activations(lm)
    assert lm.config.to_dict() == before


@pytest.mark.slow
@pytest.mark.parametrize("packing", [None, Packing(None)], ids=["padded", "packed"])
def test_compiled_layers_keep_names_and_results(lm: KalleLM, batch: LMBatch, packing: Packing | None) -> None:
    expected, names = gradients(lm, batch, packing), list(lm.state_dict())
    compile_layers(lm)
    got = gradients(lm, batch, packing)
    assert list(lm.state_dict()) == names
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3)
    copied = copy.deepcopy(lm)
    assert list(copied.state_dict()) == names
