from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kalle.errors import UserError
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch
from kalle.models.lora import PROJECTIONS, LoRAConfig, add_lora, also_trained, lora_factors, merge_lora, remove_lora

SMALL = LoRAConfig(rank=2, alpha=4.0)


@pytest.fixture
def lm(toy_lm_config: KalleLMConfig) -> KalleLM:
    torch.manual_seed(0)
    return KalleLM(toy_lm_config).eval()


@pytest.fixture
def batch() -> LMBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (2, 5), generator=generator)
    return LMBatch(ids, torch.tensor([5, 3]), torch.randn(2, 6, 4, generator=generator), torch.tensor([6, 4]))


def train_a_little(lm: KalleLM, batch: LMBatch) -> None:
    optimizer = torch.optim.SGD([parameter for parameter in lm.parameters() if parameter.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        lm(batch).mean.square().mean().backward()
        optimizer.step()


def test_adapters_begin_as_nothing_and_alone_are_trained(lm: KalleLM, batch: LMBatch) -> None:
    before, outputs = {name: tensor.clone() for name, tensor in lm.state_dict().items()}, lm(batch).mean
    add_lora(lm, SMALL)
    assert torch.equal(lm(batch).mean, outputs)
    assert len(lora_factors(lm)) == 2 * len(PROJECTIONS)
    assert all(".lora_" in name for name, parameter in lm.named_parameters() if parameter.requires_grad)
    train_a_little(lm, batch)
    assert not torch.equal(lm(batch).mean, outputs)
    remove_lora(lm)
    after = lm.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(lm(batch).mean, outputs)


def test_merging_keeps_the_output_and_the_names(lm: KalleLM, batch: LMBatch, toy_lm_config: KalleLMConfig, tmp_path: Path) -> None:
    names, before = set(lm.state_dict()), lm(batch).mean
    add_lora(lm, SMALL)
    train_a_little(lm, batch)
    adapted = lm(batch).mean
    merge_lora(lm)
    assert set(lm.state_dict()) == names
    torch.testing.assert_close(lm(batch).mean, adapted, atol=1e-6, rtol=1e-5)
    assert (adapted - before).abs().max() > 1e-3
    lm.save_pretrained(tmp_path)
    torch.testing.assert_close(KalleLM.from_pretrained(tmp_path)(batch).mean, adapted, atol=1e-6, rtol=1e-5)


def test_what_is_trained_beside_the_factors(lm: KalleLM, batch: LMBatch) -> None:
    config = LoRAConfig(rank=2, targets=("q_proj", "backbone.layers.1.mlp.*"), also_train=("audio_linear.*", "*q_proj*"))
    add_lora(lm, config)
    before = {name: tensor.clone() for name, tensor in also_trained(lm, config).items()}
    train_a_little(lm, batch)
    trained = also_trained(lm, config)
    assert set(trained) == {"audio_linear.weight", "audio_linear.bias", *(f"backbone.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))}
    assert all(not torch.equal(trained[name], before[name]) for name in trained)
    assert len(lora_factors(lm)) == 2 + 3


def test_the_layers_compute_what_peft_does(lm: KalleLM, batch: LMBatch, toy_lm_config: KalleLMConfig) -> None:
    """An implementation that others wrote, with the same factors."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    other = KalleLM(toy_lm_config).eval()
    add_lora(lm, SMALL)
    train_a_little(lm, batch)
    settings = peft.LoraConfig(r=SMALL.rank, lora_alpha=SMALL.alpha, target_modules=list(PROJECTIONS))
    peft.inject_adapter_in_model(settings, other, "default")
    with torch.no_grad():
        for name, (lora_a, lora_b) in lora_factors(lm).items():
            layer = other.get_submodule(name)
            layer.lora_A["default"].weight.copy_(lora_a)
            layer.lora_B["default"].weight.copy_(lora_b)
    torch.testing.assert_close(lm(batch).mean, other(batch).mean, atol=1e-6, rtol=1e-5)


def test_the_start_comes_from_the_generator(lm: KalleLM) -> None:
    starts = []
    for seed in (1, 1, 2):
        add_lora(lm, SMALL, torch.Generator().manual_seed(seed))
        starts.append(torch.cat([lora_a.flatten() for lora_a, _ in lora_factors(lm).values()]))
        remove_lora(lm)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_mistakes_name_what_is_valid(lm: KalleLM) -> None:
    with pytest.raises(UserError, match=r"no linear layer is named 'qproj'; valid names: .*q_proj"):
        add_lora(lm, LoRAConfig(targets=("qproj",)))
    with pytest.raises(UserError, match=r"lora.also_train: no parameter fits 'audio'"):
        add_lora(lm, LoRAConfig(also_train=("audio",)))
    with pytest.raises(UserError, match=r"lora: got rank=0"):
        LoRAConfig(rank=0)
    with pytest.raises(UserError, match=r"lora.rank: got 'x', expected a whole number"):
        LoRAConfig(rank="x")  # type: ignore[arg-type]
    add_lora(lm, SMALL)
    with pytest.raises(UserError):
        add_lora(lm, SMALL)
