"""Rows of different lengths in one state give what each gives alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_state import LMState

DIM = 4
BACKBONE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "max_position_embeddings": 256,
    # Attention as sharp as in trained weights, so that a wrong position or an unmasked column shows.
    "initializer_range": 0.3,
    "rope_theta": 100.0,
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _language_model(**changes: float) -> KalleLM:
    torch.manual_seed(0)
    return KalleLM(KalleLMConfig(backbone=BACKBONE | changes, latent_dim=DIM)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lm() -> KalleLM:
    return _language_model()


def _prefill(lm: KalleLM, length: int, seed: int) -> LMState:
    ids = torch.randint(0, 40, (1, length), generator=torch.Generator().manual_seed(seed))
    return lm.prefill(ids)[1]


def _frames(count: int, seed: int = 9) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def _assert_steps_agree(lm: KalleLM, joined: LMState, singles: list[LMState], steps: int = 3, seed: int = 9) -> None:
    for step in range(steps):
        frames = _frames(len(singles), seed + step)
        together, _ = lm.step(frames, joined)
        for row, state in enumerate(singles):
            alone, _ = lm.step(frames[row : row + 1], state)
            torch.testing.assert_close(together.mean[row], alone.mean[0], **CLOSE)
            torch.testing.assert_close(together.log_std[row], alone.log_std[0], **CLOSE)
        assert joined.lengths == tuple(state.length for state in singles)


def test_joined_rows_step_as_they_do_alone(lm: KalleLM) -> None:
    lengths = [5, 19, 1, 19, 8]
    singles = [_prefill(lm, length, seed) for seed, length in enumerate(lengths)]
    joined = LMState.join([_prefill(lm, length, seed) for seed, length in enumerate(lengths)])
    assert (joined.rows, joined.length, joined.lengths) == (5, 19, tuple(lengths))
    _assert_steps_agree(lm, joined, singles)


def test_rows_leave_and_join_a_running_batch(lm: KalleLM) -> None:
    singles = [_prefill(lm, length, seed) for seed, length in enumerate([5, 19, 2])]
    joined = LMState.join([_prefill(lm, length, seed) for seed, length in enumerate([5, 19, 2])])
    _assert_steps_agree(lm, joined, singles)
    joined = joined.select([2, 0])
    assert (joined.lengths, joined.length) == ((5, 8), 8), "the columns that only the longest row had are gone"
    singles = [singles[2], singles[0]]
    _assert_steps_agree(lm, joined, singles, seed=20)
    joined, singles = LMState.join([joined, _prefill(lm, 30, 7)]), [*singles, _prefill(lm, 30, 7)]
    _assert_steps_agree(lm, joined, singles, seed=30)
    joined, singles = joined.select([2]), singles[2:]
    assert joined.padding is None
    _assert_steps_agree(lm, joined, singles, seed=40)


def test_a_state_of_joined_states_is_a_state(lm: KalleLM) -> None:
    left = LMState.join([_prefill(lm, 4, 0), _prefill(lm, 9, 1)])
    right = LMState.join([_prefill(lm, 15, 2), _prefill(lm, 1, 3)])
    singles = [_prefill(lm, length, seed) for seed, length in enumerate([4, 9, 15, 1])]
    _assert_steps_agree(lm, LMState.join([left, right]), singles)


def test_rows_come_in_the_order_asked_for(lm: KalleLM) -> None:
    singles = [_prefill(lm, length, seed) for seed, length in enumerate([5, 19, 2])]
    joined = LMState.join(singles).select([2, 0, 1])
    assert joined.lengths == (2, 5, 19)
    _assert_steps_agree(lm, joined, [singles[2], singles[0], singles[1]])


def test_what_lies_in_padded_columns_has_no_effect(lm: KalleLM) -> None:
    clean, dirty = (LMState.join([_prefill(lm, length, length) for length in (3, 12)]) for _ in range(2))
    for layer in dirty.cache.layers:
        assert not layer.keys[0, :, :9].any()
        layer.keys[0, :, :9] = 1e4
        layer.values[0, :, :9] = -1e4
    for step in range(3):
        expected, _ = lm.step(_frames(2, step), clean)
        got, _ = lm.step(_frames(2, step), dirty)
        assert torch.equal(got.mean, expected.mean)
        assert torch.equal(got.log_std, expected.log_std)


def test_a_later_change_of_one_row_leaves_the_others(lm: KalleLM) -> None:
    first, second = (LMState.join([_prefill(lm, length, length) for length in (3, 12)]) for _ in range(2))
    frames = _frames(2)
    changed = frames.clone()
    changed[1] += 1
    lm.step(frames, first)
    lm.step(changed, second)
    expected, got = lm.step(frames, first)[0].mean, lm.step(frames, second)[0].mean
    assert torch.equal(got[0], expected[0])
    assert not torch.allclose(got[1], expected[1], atol=1e-3)


def test_rows_of_one_length_have_no_mask_and_no_positions(lm: KalleLM) -> None:
    ids = torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    joined = LMState.join([lm.prefill(ids[row : row + 1])[1] for row in range(3)])
    assert (joined.padding, joined.attention_mask(1), joined.position_ids(1)) == (None, None, None)
    together = lm.prefill(ids)[1]
    _, one = lm.step(_frames(3), together)
    _, other = lm.step(_frames(3), joined)
    torch.testing.assert_close(other.cache.layers[1].values, one.cache.layers[1].values, **CLOSE)


def test_one_row_is_the_fast_path_bit_for_bit(lm: KalleLM) -> None:
    alone, picked = _prefill(lm, 7, 0), LMState.join([_prefill(lm, 3, 1), _prefill(lm, 7, 0)]).select([1])
    for step in range(3):
        expected, _ = lm.step(_frames(1, step), alone)
        got, _ = lm.step(_frames(1, step), picked)
        assert torch.equal(got.mean, expected.mean)


def test_join_and_select_leave_their_states_as_they_were(lm: KalleLM) -> None:
    short, long = _prefill(lm, 3, 0), _prefill(lm, 8, 1)
    keys = [layer.keys.clone() for layer in short.cache.layers]
    joined = LMState.join([short, long])
    lm.step(_frames(2), joined)
    lm.step(_frames(1), joined.select([0]))
    assert (short.length, long.length, joined.lengths) == (3, 8, (4, 9))
    assert all(torch.equal(layer.keys, before) for layer, before in zip(short.cache.layers, keys, strict=True))


def test_several_positions_at_once_extend_rows_of_different_lengths(lm: KalleLM) -> None:
    joined = LMState.join([_prefill(lm, length, length) for length in (3, 12)])
    frames = torch.stack([_frames(4, 1), _frames(4, 2)])
    together, _ = lm.backbone.advance(lm._embed_latents(frames), joined)
    for row, length in enumerate((3, 12)):
        alone, _ = lm.backbone.advance(lm._embed_latents(frames[row : row + 1]), _prefill(lm, length, length))
        torch.testing.assert_close(together[row], alone[0], **CLOSE)


def test_half_precision_rows_are_finite_and_near() -> None:
    lm = _language_model(initializer_range=0.1)
    lm.backbone.to(torch.bfloat16)
    joined, singles = LMState.join([_prefill(lm, n, n) for n in (2, 30)]), [_prefill(lm, n, n) for n in (2, 30)]
    for step in range(4):
        together, _ = lm.step(_frames(2, step), joined)
        assert together.mean.isfinite().all()
        for row in range(2):
            alone, _ = lm.step(_frames(2, step)[row : row + 1], singles[row])
            torch.testing.assert_close(together.mean[row], alone.mean[0], rtol=0.05, atol=0.05)
