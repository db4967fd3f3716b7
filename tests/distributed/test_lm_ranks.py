"""The language model's loss and gradients over two ranks, against one process that holds both batches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from kalle.gaussian import DiagGaussian
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch
from kalle.training.lm import KalleLMTraining, LMObjective
from training.distributed import on_ranks

pytestmark = pytest.mark.slow
LENGTHS = [[(5, 9), (3, 4)], [(4, 2)]]
"""(text, latents) of the utterances of each rank: other numbers of frames and of utterances."""


def language_model() -> KalleLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    backbone = {**size, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64}
    return KalleLM(KalleLMConfig(backbone=backbone, latent_dim=4, stop_head=True))


def batch_of(lengths: list[tuple[int, int]]) -> LMBatch:
    """Utterances that are a function of their lengths alone, padded together."""
    rows, longest = [], [max(pair[side] for pair in lengths) for side in (0, 1)]
    for text, frames in lengths:
        generator = torch.Generator().manual_seed(100 * text + frames)
        ids = torch.randint(1, 32, (text,), generator=generator)
        values = torch.randn(3, frames, 4, generator=generator)
        rows.append(
            (
                torch.nn.functional.pad(ids, (0, longest[0] - text)),
                torch.nn.functional.pad(values, (0, 0, 0, longest[1] - frames)),
            )
        )
    latents = torch.stack([row[1] for row in rows])
    return LMBatch(
        text_ids=torch.stack([row[0] for row in rows]),
        text_lengths=torch.tensor([pair[0] for pair in lengths]),
        latents=latents[:, 0],
        latent_lengths=torch.tensor([pair[1] for pair in lengths]),
        posterior=DiagGaussian(latents[:, 1], 0.1 * latents[:, 2]),
    )


def training_loss(lm: KalleLM, batch: LMBatch, reduction: str) -> Tensor:
    nothing = partial(torch.optim.AdamW, lr=1e-3)
    objective = LMObjective(end_weight=0.5, stop_weight=0.3, stop_positive_weight=5.0, reduction=reduction)  # type: ignore[arg-type]
    module = KalleLMTraining(lm, nothing, nothing, objective)  # type: ignore[arg-type]
    losses = module.losses(batch)
    return losses["total"] if reduction == "rank" else module._over_ranks(losses, batch)


def gradients(lm: KalleLM) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in lm.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def both_reductions() -> list[dict[str, Tensor]]:
    """The averaged gradients of the global and of the rank reduction."""
    return [averaged("global"), averaged("rank")]


def averaged(reduction: str) -> dict[str, Tensor]:
    """What DDP computes: every rank's gradient, averaged over ranks."""
    lm, world_size = language_model(), torch.distributed.get_world_size()
    training_loss(lm, batch_of(LENGTHS[torch.distributed.get_rank()]), reduction).backward()
    found = gradients(lm)
    for gradient in found.values():
        torch.distributed.all_reduce(gradient)
    return {name: gradient / world_size for name, gradient in found.items()}


def sharded() -> tuple[dict[str, Tensor], dict[str, Tensor], bool, int]:
    """Gradients, the state after one update, whether weights are split, and the values that this rank holds."""
    from torch.distributed.device_mesh import init_device_mesh

    from kalle.training.distributed import is_sharded, shard_language_model, whole_state

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("data_parallel",))
    lm = shard_language_model(language_model(), mesh)
    held = sum(parameter.to_local().numel() for parameter in lm.parameters())  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.5)
    training_loss(lm, batch_of(LENGTHS[torch.distributed.get_rank()]), "global").backward()
    found = gradients(lm)
    optimizer.step()
    return found, whole_state(lm), is_sharded(lm), held


def on_one(reduction: str = "global") -> KalleLM:
    lm = language_model()
    training_loss(lm, batch_of([pair for lengths in LENGTHS for pair in lengths]), reduction).backward()
    return lm


def test_two_ranks_make_the_update_of_one_process_on_both_batches() -> None:
    alone = gradients(on_one())
    ranks = on_ranks(both_reductions)
    for found, _ in ranks:
        assert found.keys() == alone.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, alone[name], atol=1e-6, rtol=1e-4, msg=name)
    by_rank = ranks[0][1]
    assert {"stop_head.weight", "stop_head.bias"} <= alone.keys()
    assert any((by_rank[name] - gradient).abs().max() > 1e-3 for name, gradient in alone.items()), "the other reduction differs"


def test_a_sharded_model_makes_the_update_of_a_whole_one() -> None:
    lm = on_one()
    alone = gradients(lm)
    torch.optim.SGD(lm.parameters(), lr=0.5).step()
    parameters = sum(parameter.numel() for parameter in lm.parameters())
    ranks = on_ranks(sharded)
    for found, state, split, held in ranks:
        assert split
        assert held < 0.6 * parameters
        assert found.keys() == alone.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, alone[name], atol=1e-6, rtol=1e-4, msg=name)
        assert state.keys() == lm.state_dict().keys()
        for name, tensor in lm.state_dict().items():
            torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-4, msg=name)
    assert sum(held for *_, held in ranks) >= parameters


def test_one_process_needs_no_weights() -> None:
    lm, both = language_model(), batch_of([pair for lengths in LENGTHS for pair in lengths])
    torch.testing.assert_close(training_loss(lm, both, "global"), training_loss(lm, both, "rank"))
