"""The paper's decoder in pushes: exact, or with less latency than its anti-aliasing filters' full look-ahead."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from kalle.models.flowvae.bigvgan import AMPBlock, BigVGANDecoder, BigVGANStage
from kalle.models.flowvae.streaming_layers import (
    REACH,
    ActivationStream,
    CausalConvStream,
    SymmetricConvStream,
    UpsampleStream,
    delayed_sum,
    join,
)

BlockState = tuple[Tensor, ...]
"""For each pair of convolutions: activation, convolution, activation, convolution, residual queue."""


@dataclass(frozen=True)
class StageState:
    """Before the upsampler; before each block."""

    up: Tensor
    blocks: tuple[BlockState, ...]


@dataclass(frozen=True)
class BigVGANState:
    """All that the decoder remembers of what it was given."""

    conv_in: Tensor
    pending: Tensor
    """Provisional samples of the window, at the first stage's rate; given to it again with the next push."""
    stages: tuple[StageState, ...]
    activation_out: Tensor
    conv_out: Tensor


@dataclass(frozen=True)
class Window:
    """How the first ``stages`` stages save latency.

    The first is run to the edge of its input as if the signal ended there, but its last ``lag`` samples are provisional: computed
    again at the next push, and until then only what the next stage looks ahead into. That one does the same, ``lag`` being counted
    at each stage's own rate, so later stages cost next to nothing. What is sent on has seen ``lag`` samples ahead in all of them at
    once, where otherwise each stage waits for the full reach of its activations, one stage after the other.
    """

    stages: int = 0
    """0: no window, every layer waits for all it sees."""
    lag: int = 0


EXACT = Window()
SAFE_LAG = 9
"""Measured: the shortest that keeps errors below 1e-4 (docs/results/streaming.md)."""
ENOUGH_LAG = 15
"""Measured: from here on errors are those of rounding."""


class _BlockStream:
    def __init__(self, block: nn.Module, delay: int) -> None:
        assert isinstance(block, AMPBlock), type(block)
        activations = [ActivationStream(activation, delay) for activation in block.activations]
        dilated = [CausalConvStream(conv) for conv in block.dilated]
        plain = [CausalConvStream(conv) for conv in block.plain]
        self.pairs = tuple(zip(activations[::2], dilated, activations[1::2], plain, strict=True))
        self.channels = plain[-1].weight.shape[0]

    def start(self, batch: int) -> BlockState:
        queue = self.pairs[0][1].bias.new_zeros(batch, self.channels, 0)
        return tuple(state for pair in self.pairs for state in (*(layer.start(batch) for layer in pair), queue))

    def push(self, x: Tensor, state: BlockState, hold: int, end: bool) -> tuple[Tensor, BlockState]:
        states: list[Tensor] = []
        for index, (first, dilated, second, plain) in enumerate(self.pairs):
            before_first, before_dilated, before_second, before_plain, queue = state[5 * index : 5 * index + 5]
            y, before_first = first.push(x, before_first, hold, end)
            y, before_dilated = dilated.push(y, before_dilated, hold)
            y, before_second = second.push(y, before_second, hold, end)
            y, before_plain = plain.push(y, before_plain, hold)
            x, queue = delayed_sum(queue, x, y)
            states += (before_first, before_dilated, before_second, before_plain, queue)
        return x, tuple(states)


class _StageStream:
    def __init__(self, stage: BigVGANStage, delay: int) -> None:
        self.up = UpsampleStream(stage.up)
        self.blocks = [_BlockStream(block, delay) for block in stage.blocks]

    def start(self, batch: int) -> StageState:
        return StageState(self.up.start(batch), tuple(block.start(batch) for block in self.blocks))

    def push(self, x: Tensor, state: StageState, end: bool = False, hold: int = 0) -> tuple[Tensor, StageState]:
        """``hold`` counts provisional samples of the input."""
        x, up = self.up.push(x, state.up, hold)
        y, blocks = self.refine(x, state.blocks, hold * self.up.stride, end)
        return y, StageState(up, blocks)

    def refine(self, x: Tensor, states: tuple[BlockState, ...], hold: int, end: bool) -> tuple[Tensor, tuple[BlockState, ...]]:
        """The mean of the blocks; the upsampler is done."""
        results = [block.push(x, state, hold, end) for block, state in zip(self.blocks, states, strict=True)]
        total = results[0][0]
        for y, _ in results[1:]:
            total = total + y
        return total / len(self.blocks), tuple(state for _, state in results)


class BigVGANStream:
    """``BigVGANDecoder`` in pushes: latents (B, D, t) in, samples (B, n) out, ``delay_samples`` later.

    Takes the decoder's weights as they are now (weight-normed ones are computed once and kept).
    """

    def __init__(self, decoder: BigVGANDecoder, window: Window = EXACT) -> None:
        self.window = window
        self.conv_in = SymmetricConvStream(decoder.conv_in)
        self.stages = [_StageStream(stage, REACH if index >= window.stages else 0) for index, stage in enumerate(_stages(decoder))]
        self.activation_out = ActivationStream(decoder.activation_out, REACH)
        self.conv_out = CausalConvStream(decoder.conv_out)
        self.finish = decoder.finish
        self.delay_samples = delay_samples(decoder, window)

    def start(self, batch: int) -> BigVGANState:
        """Before the first frame of ``batch`` signals."""
        stages = tuple(stage.start(batch) for stage in self.stages)
        pending = stages[0].up.new_zeros(batch, self.stages[0].blocks[0].channels, 0)
        return BigVGANState(self.conv_in.start(batch), pending, stages, self.activation_out.start(batch), self.conv_out.start(batch))

    def push(self, z: Tensor, state: BigVGANState, end: bool = False) -> tuple[Tensor, BigVGANState]:
        """Continue with ``z``; the ``end`` emits what is left."""
        x, conv_in = self.conv_in.push(z, state.conv_in, end)
        x, pending, windowed = self._push_window(x, state, end)
        delayed: list[StageState] = []
        for stage, before in zip(self.stages[self.window.stages :], state.stages[self.window.stages :], strict=True):
            x, after = stage.push(x, before, end)
            delayed.append(after)
        x, activation_out = self.activation_out.push(x, state.activation_out, end=end)
        x, conv_out = self.conv_out.push(x, state.conv_out)
        return self.finish(x)[:, 0], BigVGANState(conv_in, pending, (*windowed, *delayed), activation_out, conv_out)

    def _push_window(self, x: Tensor, state: BigVGANState, end: bool) -> tuple[Tensor, Tensor, list[StageState]]:
        span, lag = self.window.stages, self.window.lag
        if not span:
            return x, state.pending, []
        new, up = self.stages[0].up.push(x, state.stages[0].up)
        x = join(state.pending, new)
        hold = 0 if end else min(lag, x.shape[-1])
        pending = x[..., x.shape[-1] - hold :].clone()
        if hold == x.shape[-1]:
            nothing = x.new_zeros(x.shape[0], self.stages[span - 1].blocks[0].channels, 0)
            return nothing, pending, [StageState(up, state.stages[0].blocks), *state.stages[1:span]]
        x, blocks = self.stages[0].refine(x, state.stages[0].blocks, hold, end)
        states = [StageState(up, blocks)]
        for stage, before in zip(self.stages[1:span], state.stages[1:span], strict=True):
            seen = min(hold, math.ceil(lag / stage.up.stride))
            x, after = stage.push(x[..., : x.shape[-1] - (hold - seen)], before, end, seen)
            hold = seen * stage.up.stride
            states.append(after)
        return x[..., : x.shape[-1] - hold], pending, states


def delay_samples(decoder: BigVGANDecoder, window: Window = EXACT) -> int:
    """Samples by which ``BigVGANStream`` lags behind its input with this ``window``."""
    assert isinstance(decoder.conv_in, nn.Conv1d)
    steps = _steps(decoder)
    delay = decoder.conv_in.kernel_size[0] // 2 * steps[0] + (window.lag * steps[1] if window.stages else 0) + REACH
    for step, stage in list(zip(steps[1:], _stages(decoder), strict=True))[window.stages :]:
        block = stage.blocks[0]
        assert isinstance(block, AMPBlock), type(block)
        delay += REACH * len(block.activations) * step
    return delay


def window_within(decoder: BigVGANDecoder, delay: int) -> Window | None:
    """The most accurate way to lag behind by at most ``delay`` samples; None when there is none.

    A window looks ahead further the more stages it spans; from ``ENOUGH_LAG`` on it takes the fewest that give as much.
    """
    if delay_samples(decoder) <= delay:
        return EXACT
    step = _steps(decoder)[1]
    spans = range(1, len(decoder.stages) + 1)
    windows = [Window(stages, (delay - delay_samples(decoder, Window(stages, 0))) // step) for stages in spans]
    # max() takes the first of equals: the fewest stages.
    best = max(windows, key=lambda window: min(window.lag, ENOUGH_LAG))
    return best if best.lag > 0 else None


def _stages(decoder: BigVGANDecoder) -> list[BigVGANStage]:
    return [stage for stage in decoder.stages if isinstance(stage, BigVGANStage)]


def _steps(decoder: BigVGANDecoder) -> list[int]:
    """Output samples per sample of the latents and of each stage's output."""
    strides = [stage.up.stride for stage in _stages(decoder)]
    return [math.prod(strides[index:]) for index in range(len(strides) + 1)]
