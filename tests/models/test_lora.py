from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kalle.checkpoint import weights_hash
from kalle.errors import UserError
from kalle.models.batch import LMBatch
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lora import (
    PROJECTIONS,
    LoRAConfig,
    add_lora,
    load_adapter,
    load_lora,
    lora_layers,
    lora_state,
    merge_lora,
    remove_lora,
    save_adapter,
)

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
    assert len(list(lora_layers(lm))) == 2 * len(PROJECTIONS)
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


def test_an_adapter_file_makes_the_same_model(lm: KalleLM, batch: LMBatch, toy_lm_config: KalleLMConfig, tmp_path: Path) -> None:
    config = LoRAConfig(rank=2, targets=("q_proj", "backbone.layers.1.mlp.*"), also_train=("audio_linear.*",))
    base = weights_hash(lm)
    torch.manual_seed(0)
    other = KalleLM(toy_lm_config).eval()
    add_lora(lm, config)
    train_a_little(lm, batch)
    save_adapter(lm, config, tmp_path, base)
    assert load_adapter(other, tmp_path, base) == config
    assert torch.equal(other(batch).mean, lm(batch).mean)
    state = lora_state(lm, config.also_train)
    assert "backbone.layers.0.self_attn.q_proj.lora_A.weight" in state
    assert {name for name in state if "lora" not in name} == {"audio_linear.weight", "audio_linear.bias"}
    assert (tmp_path / "adapter.safetensors").stat().st_size < 20_000


def test_an_adapter_over_other_weights_is_refused(lm: KalleLM, tmp_path: Path) -> None:
    base = weights_hash(lm)
    add_lora(lm, SMALL)
    save_adapter(lm, SMALL, tmp_path, base)
    remove_lora(lm)
    with torch.no_grad():
        lm.audio_linear.bias += 1
    with pytest.raises(UserError, match="belongs to other weights"):
        load_adapter(lm, tmp_path, weights_hash(lm))
    assert not list(lora_layers(lm))


def test_tensors_that_do_not_fit_leave_no_adapter(lm: KalleLM, tmp_path: Path) -> None:
    add_lora(lm, SMALL)
    save_adapter(lm, SMALL, tmp_path)
    state = lora_state(lm)
    with pytest.raises(UserError, match="missing"):
        load_lora(lm, dict(list(state.items())[1:]), "here")
    remove_lora(lm)
    (tmp_path / "adapter.json").write_text('{"rank": 3, "alpha": 4.0}')
    with pytest.raises(UserError, match="misshapen"):
        load_adapter(lm, tmp_path)
    assert not list(lora_layers(lm))


def test_the_start_comes_from_the_generator(lm: KalleLM) -> None:
    starts = []
    for seed in (1, 1, 2):
        add_lora(lm, SMALL, torch.Generator().manual_seed(seed))
        starts.append(torch.cat([tensor.flatten() for tensor in lora_state(lm).values()]))
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
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(lm, SMALL)
