"""A step on buffers of fixed sizes against the reference's on a cache that grows; on CUDA the step is a recorded graph."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kalle.models import static_cache
from kalle.models.backbone import BackboneConfig
from kalle.models.lm import KalleLM, KalleLMConfig, NextFrame
from kalle.models.lm_state import LMState
from kalle.models.static_cache import StaticBackbone, columns_of, rows_of

cuda = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])
TOLERANCE = {"cpu": {"rtol": 1e-4, "atol": 1e-5}, "cuda": {"rtol": 1e-3, "atol": 1e-4}}
BACKBONE = {
    "vocab_size": 20, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
PROMPTS = (3, 9, 6)


@pytest.fixture(params=["cpu", cuda])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With buffers so small that some steps outgrow them, without gradients, and with full fp32 products."""
    monkeypatch.setattr(static_cache, "LEAST_COLUMNS", 8)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    with torch.no_grad():
        yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def models(device: str) -> tuple[KalleLM, KalleLM]:
    """The reference, and the same weights on fixed buffers; on CUDA with graphs."""
    torch.manual_seed(0)
    reference = KalleLM(KalleLMConfig(BACKBONE, latent_dim=4, normalise_latents=True, stop_head=True)).to(device).eval()
    static = KalleLM(reference.config, StaticBackbone(BackboneConfig.of(BACKBONE), graph=device == "cuda"))
    static.load_state_dict(reference.state_dict())
    return reference, static.to(device).eval()


def frames(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def prompt(lm: KalleLM, width: int) -> tuple[NextFrame, LMState]:
    return lm.prefill(torch.arange(width, device=lm.device)[None])


def same(got: NextFrame, expected: NextFrame) -> None:
    tolerance = TOLERANCE[expected.mean.device.type]
    torch.testing.assert_close(got.mean, expected.mean, **tolerance)
    torch.testing.assert_close(got.log_std, expected.log_std, **tolerance)
    torch.testing.assert_close(got.stop_logit, expected.stop_logit, **tolerance)


def test_sizes_of_buffers() -> None:
    assert [rows_of(rows) for rows in (1, 2, 3, 4, 5, 64)] == [1, 2, 4, 4, 8, 64]
    assert [columns_of(positions) for positions in (1, 256, 257, 512, 513, 1024)] == [256, 256, 512, 512, 1024, 1024]


def test_rows_of_their_own_lengths_that_come_and_go(models: tuple[KalleLM, KalleLM]) -> None:
    """Three rows in a buffer of four, from 8 columns to 32; one leaves, another joins."""
    states = []
    for lm in models:
        started = [prompt(lm, width) for width in PROMPTS]
        states.append(LMState.join([state for _, state in started]))
    for index in range(12):
        predictions = []
        for number, lm in enumerate(models):
            prediction, states[number] = lm.step(frames(3, index).to(lm.device), states[number])
            predictions.append(prediction)
        same(predictions[1], predictions[0])
    assert states[1].lengths == states[0].lengths == tuple(width + 12 for width in PROMPTS)
    for number, lm in enumerate(models):
        states[number] = LMState.join([states[number].select([2, 0]), prompt(lm, 5)[1]])
    for index in range(3):
        (expected, states[0]), (got, states[1]) = (
            lm.step(frames(3, 100 + index).to(lm.device), state) for lm, state in zip(models, states, strict=True)
        )
        same(got, expected)
    assert states[1].lengths == (21, 18, 8)


def test_two_states_do_not_disturb_each_other(models: tuple[KalleLM, KalleLM]) -> None:
    """Both in buffers of one size, and results that were given before stay as they are."""
    reference, static = models
    expected, got = [], []
    for lm, found in ((reference, expected), (static, got)):
        states = [prompt(lm, width)[1] for width in (4, 6)]
        for index in range(5):
            for number in range(2):
                prediction, states[number] = lm.step(frames(1, 10 * index + number).to(lm.device), states[number])
                found.append(prediction)
    for one, other in zip(got, expected, strict=True):
        same(one, other)


def test_hidden_states_and_several_positions(models: tuple[KalleLM, KalleLM]) -> None:
    results = []
    for lm in models:
        hidden, state = lm.read(torch.arange(5, device=lm.device)[None])
        hidden, state = lm.append(frames(1, 1).to(lm.device), state)
        more, state = lm.backbone.advance(lm.backbone.embed_tokens(torch.arange(6, device=lm.device)[None]), state)
        results.append(torch.cat([hidden, more]))
        assert state.lengths == (12,)
    torch.testing.assert_close(results[1], results[0], **TOLERANCE[models[0].device.type])


def test_a_buffer_is_used_again_and_what_it_held_is_not_seen(models: tuple[KalleLM, KalleLM]) -> None:
    reference, static = models
    buffers = set()
    for width in (7, 2):  # the second is shorter than what the first leaves behind
        (_, before), (_, state) = prompt(reference, width), prompt(static, width)
        expected, before = reference.step(frames(1, width).to(reference.device), before)
        got, state = static.step(frames(1, width).to(static.device), state)
        same(got, expected)
        buffers.add(state.lease.cache.keys.data_ptr())
        del state
        gc.collect()
    assert len(buffers) == 1


def test_a_copy_of_the_model_has_buffers_of_its_own(models: tuple[KalleLM, KalleLM]) -> None:
    _, static = models
    _, state = static.step(frames(1, 0).to(static.device), prompt(static, 3)[1])
    other = copy.deepcopy(static)
    other.backbone.layers[0].mlp.down_proj.weight.mul_(3)
    changed, _ = other.step(frames(1, 0).to(static.device), prompt(other, 3)[1])
    again, _ = static.step(frames(1, 0).to(static.device), prompt(static, 3)[1])
    assert not torch.allclose(changed.mean, again.mean)
    assert state.lengths == (4,)
