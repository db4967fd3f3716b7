"""Latents to audio while they are made: both decoders in pushes, their past carried along as a value.

The paper's decoder is exact, or has less latency than its anti-aliasing filters' full look-ahead; in the inverse-STFT decoder every
layer waits for all it sees.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kalle.errors import UserError
from kalle.models.flowvae.bigvgan import BigVGANDecoder
from kalle.models.flowvae.inference import REACH, PreparedBlock, PreparedDecoder, PreparedStage
from kalle.models.flowvae.istft import MIN_ENVELOPE, ConvNeXtBlock, HarmonicsState, ISTFTDecoder, ISTFTHead
from kalle.models.flowvae.streaming_layers import (
    ActivationStream,
    CausalConvStream,
    DelayedConvStream,
    SymmetricConvStream,
    UpsampleStream,
    delayed_sum,
    join,
)

if TYPE_CHECKING:
    from kalle.models.flowvae.model import FlowVAE

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
    def __init__(self, block: PreparedBlock, delay: int) -> None:
        self.pairs = [
            (ActivationStream(first, delay), CausalConvStream(dilated), ActivationStream(second, delay), CausalConvStream(plain))
            for first, dilated, second, plain in block.pairs
        ]

    def start(self, batch: int) -> BlockState:
        """Before a signal; its residual queue is as empty as what the activation has seen."""
        return tuple(state for pair in self.pairs for state in (*(layer.start(batch) for layer in pair), pair[0].start(batch)))

    def push(self, x: Tensor, state: BlockState, hold: int, end: bool) -> tuple[Tensor, BlockState]:
        states: list[Tensor] = []
        for index, (first, dilated, second, plain) in enumerate(self.pairs):
            before_first, before_dilated, before_second, before_plain, queue = state[5 * index : 5 * index + 5]
            y, before_first = first.push(x, before_first, before_dilated, hold, end)
            y, before_dilated = dilated.push(y, hold)
            y, before_second = second.push(y, before_second, before_plain, hold, end)
            y, before_plain = plain.push(y, hold)
            x, queue = delayed_sum(queue, x, y)
            states += (before_first, before_dilated, before_second, before_plain, queue)
        return x, tuple(states)


class _StageStream:
    def __init__(self, stage: PreparedStage, delay: int) -> None:
        self.up, self.nothing = UpsampleStream(stage.up), stage.blocks[0].pairs[0][0].nothing
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
            total += y
        return total / len(self.blocks), tuple(state for _, state in results)


class BigVGANStream:
    """``BigVGANDecoder`` in pushes: latents (B, D, t) in, samples (B, n) out, ``delay_samples`` later."""

    def __init__(self, decoder: PreparedDecoder, window: Window = EXACT) -> None:
        self.window, self.finish = window, decoder.finish
        self.conv_in = DelayedConvStream(decoder.conv_in)
        self.stages = [_StageStream(stage, REACH if index >= window.stages else 0) for index, stage in enumerate(decoder.stages)]
        self.activation_out = ActivationStream(decoder.activation_out, REACH)
        self.conv_out = CausalConvStream(decoder.conv_out)
        self.dtype = decoder.conv_out.dtype
        self.delay_samples = delay_samples(decoder, window)

    def start(self, batch: int) -> BigVGANState:
        """Before the first frame of ``batch`` signals."""
        stages = tuple(stage.start(batch) for stage in self.stages)
        pending = self.stages[0].nothing(batch)
        return BigVGANState(self.conv_in.start(batch), pending, stages, self.activation_out.start(batch), self.conv_out.start(batch))

    def push(self, z: Tensor, state: BigVGANState, end: bool = False) -> tuple[Tensor, BigVGANState]:
        """Continue with ``z``; the ``end`` emits what is left."""
        x, conv_in = self.conv_in.push(z[:, :, None], state.conv_in, end)
        x, pending, windowed = self._push_window(x, state, end)
        delayed: list[StageState] = []
        for stage, before in zip(self.stages[self.window.stages :], state.stages[self.window.stages :], strict=True):
            x, after = stage.push(x, before, end)
            delayed.append(after)
        x, activation_out = self.activation_out.push(x, state.activation_out, state.conv_out, end=end)
        x, conv_out = self.conv_out.push(x)
        return self.finish(x)[:, 0, 0], BigVGANState(conv_in, pending, (*windowed, *delayed), activation_out, conv_out)

    def _push_window(self, x: Tensor, state: BigVGANState, end: bool) -> tuple[Tensor, Tensor, list[StageState]]:
        span, lag = self.window.stages, self.window.lag
        if not span:
            return x, state.pending, []
        new, up = self.stages[0].up.push(x, state.stages[0].up)
        x = join(state.pending, new)
        hold = 0 if end else min(lag, x.shape[-1])
        pending = x[..., x.shape[-1] - hold :].clone()
        if hold == x.shape[-1]:
            return self.stages[span - 1].nothing(len(x)), pending, [StageState(up, state.stages[0].blocks), *state.stages[1:span]]
        x, blocks = self.stages[0].refine(x, state.stages[0].blocks, hold, end)
        states = [StageState(up, blocks)]
        for stage, before in zip(self.stages[1:span], state.stages[1:span], strict=True):
            seen = min(hold, math.ceil(lag / stage.up.stride))
            x, after = stage.push(x[..., : x.shape[-1] - (hold - seen)], before, end, seen)
            hold = seen * stage.up.stride
            states.append(after)
        return x[..., : x.shape[-1] - hold], pending, states


class DecoderForInference(nn.Module):
    """``BigVGANDecoder`` that can only decode: latents (B, D, T) to a waveform (B, T * hop). It has no parameters."""

    def __init__(self, decoder: BigVGANDecoder, dtype: torch.dtype | None = None) -> None:
        """``dtype`` as in `PreparedDecoder`."""
        super().__init__()
        self.layers = PreparedDecoder(decoder, dtype)
        self._stream = BigVGANStream(self.layers)

    def forward(self, z: Tensor) -> Tensor:
        return self._stream.push(z, self._stream.start(len(z)), end=True)[0]


def delay_samples(decoder: PreparedDecoder, window: Window = EXACT) -> int:
    """Samples by which ``BigVGANStream`` lags behind its input with this ``window``."""
    steps = _steps(decoder)
    delay = decoder.conv_in.past // 2 * steps[0] + (window.lag * steps[1] if window.stages else 0) + REACH
    for step, stage in list(zip(steps[1:], decoder.stages, strict=True))[window.stages :]:
        delay += 2 * REACH * len(stage.blocks[0].pairs) * step
    return delay


def window_within(decoder: PreparedDecoder, delay: int) -> Window | None:
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


def _steps(decoder: PreparedDecoder) -> list[int]:
    """Output samples per sample of the latents and of each stage's output."""
    strides = [stage.up.stride for stage in decoder.stages]
    return [math.prod(strides[index:]) for index in range(len(strides) + 1)]


@dataclass(frozen=True)
class HeadState:
    """The buffer that later frames are added to, its windows, how many samples of the beginning are to be cut, the frames so far,
    and where the harmonics are."""

    samples: Tensor
    envelope: Tensor
    to_cut: int
    frames: int
    harmonics: HarmonicsState


@dataclass(frozen=True)
class ISTFTState:
    """All that the decoder remembers of what it was given."""

    conv_in: Tensor
    blocks: tuple[tuple[Tensor, Tensor], ...]
    """Of each block: before the depthwise convolution, residual queue."""
    head: HeadState


class _HeadStream:
    def __init__(self, head: ISTFTHead) -> None:
        self.head, self.overlap = head, head.n_fft - head.hop_length

    def start(self, batch: int) -> HeadState:
        # The head works in fp32 whatever its weights are; its window says where.
        samples = torch.zeros(batch, self.overlap, device=self.head.window.device)
        return HeadState(samples, self.head.window.new_zeros(1, self.overlap), self.head.trim, 0, self.head.start(batch))

    def push(self, x: Tensor, state: HeadState, end: bool) -> tuple[Tensor, HeadState]:
        samples, envelope, count, harmonics = state.samples, state.envelope, x.shape[-1], state.harmonics
        if count:
            frames, harmonics = self.head.frames(x, state.frames, harmonics)
            samples = _add_front(self.head.overlap_add(frames), samples)
            envelope = _add_front(self.head.envelope(count), envelope)
        ready = count * self.head.hop_length
        # Of what the last frame reaches beyond its hop, as much is kept as was cut from the first.
        until = ready + self.head.trim * end
        wav = samples[:, :until] / envelope[:, :until].clamp(min=MIN_ENVELOPE)
        cut = min(state.to_cut, wav.shape[-1])
        after = HeadState(samples[:, ready:].clone(), envelope[:, ready:].clone(), state.to_cut - cut, state.frames + count, harmonics)
        return wav[:, cut:], after


def _add_front(x: Tensor, front: Tensor) -> Tensor:
    return torch.cat((front + x[:, : front.shape[-1]], x[:, front.shape[-1] :]), dim=-1)


class ISTFTStream:
    """``ISTFTDecoder`` in pushes: latents (B, D, t) in, samples (B, n) out, ``delay_samples`` later."""

    def __init__(self, decoder: ISTFTDecoder) -> None:
        self.decoder = _frozen(decoder)
        self.conv_in = SymmetricConvStream(self.decoder.conv_in)
        self.dtype = self.conv_in.weight.dtype
        self.blocks = [block for block in self.decoder.blocks if isinstance(block, ConvNeXtBlock)]
        self.depthwise = [SymmetricConvStream(block.depthwise) for block in self.blocks]
        self.head = _HeadStream(self.decoder.head)
        blocks = sum(block.depthwise.kernel_size[0] // 2 for block in self.blocks)
        self.delay_samples = (decoder.conv_in.kernel_size[0] // 2 * decoder.upsample + blocks) * decoder.head.hop_length + decoder.head.trim

    def start(self, batch: int) -> ISTFTState:
        """Before the first frame of ``batch`` signals."""
        queue = self.conv_in.weight.new_zeros(batch, self.conv_in.weight.shape[0], 0)
        return ISTFTState(self.conv_in.start(batch), tuple((conv.start(batch), queue) for conv in self.depthwise), self.head.start(batch))

    def push(self, z: Tensor, state: ISTFTState, end: bool = False) -> tuple[Tensor, ISTFTState]:
        """Continue with ``z``; the ``end`` emits what is left."""
        x, conv_in = self.conv_in.push(z, state.conv_in, end)
        # The linear layer that follows works on (B, t, C); laid out so, few rows need no slower product.
        x = self.decoder.widen(x.transpose(1, 2).contiguous().transpose(1, 2))
        states = []
        for block, depthwise, (before, queue) in zip(self.blocks, self.depthwise, state.blocks, strict=True):
            y, before = depthwise.push(x, before, end)
            x, queue = delayed_sum(queue, x, block.mix(y))
            states.append((before, queue))
        wav, head = self.head.push(self.decoder.normalise(x), state.head, end)
        return wav, ISTFTState(conv_in, tuple(states), head)


def _frozen(decoder: ISTFTDecoder) -> ISTFTDecoder:
    """The same weights in a module that asks for no gradients of them: shared, but for the linear layers'.

    Those are kept transposed, which a product with few rows reads faster (half the time with the rows of one frame).
    """
    shared: dict[int, object] = {id(tensor): nn.Parameter(tensor.detach(), requires_grad=False) for tensor in decoder.parameters()}
    shared |= {id(tensor): tensor for tensor in decoder.buffers()}
    frozen = copy.deepcopy(decoder, shared)
    for module in frozen.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.t().contiguous().t(), requires_grad=False)
    return frozen


@dataclass(frozen=True)
class DecoderState:
    """Everything that a stream remembers. A value: no push changes it, and it can be continued any number of times."""

    frames: int
    """Latent frames pushed."""
    emitted: int
    """Samples returned."""
    held: Tensor
    """Samples (B, n) that are decoded but not yet due, before clipping."""
    layers: BigVGANState | ISTFTState

    @property
    def nbytes(self) -> int:
        """Bytes that all its tensors keep in memory."""
        return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(self))


class StreamingDecoder:
    """``FlowVAE.decode`` in pushes of any number of frames: what they return, joined, is what it returns for all frames at once.

    After f frames max(0, f - ``latency_frames``) * hop_length samples have been returned; ``finish`` returns the rest.
    From ``exact_latency_frames`` on nothing is approximated. The paper's decoder accepts less, and its default is
    the smallest latency measured to stay within 1e-4; the inverse-STFT decoder is always exact.

    Takes the weights as they are now: after a change of ``flowvae``'s weights, device or precision make a new one. The paper's decoder is
    kept here a second time, ready to use, unless ``flowvae`` is already so (``FlowVAE.prepare_inference``). Wrap pushes in
    ``torch.inference_mode()`` unless gradients with respect to the latents are wanted. One decoder serves any number of streams.
    """

    def __init__(self, flowvae: FlowVAE, latency_frames: int | None = None) -> None:
        """UserError when ``latency_frames`` is no integer, or shorter than this decoder can do; longer than it needs is allowed."""
        if latency_frames is not None and not hasattr(latency_frames, "__index__"):
            raise UserError(f"bad latency: got {latency_frames!r}, expected an integer number of frames; round it up")
        self.hop_length, self.latent_dim = flowvae.config.hop_length, flowvae.config.latent_dim
        decoder = flowvae.decoder
        self._stream: Any
        if isinstance(decoder, BigVGANDecoder | DecoderForInference):
            layers = decoder.layers if isinstance(decoder, DecoderForInference) else PreparedDecoder(decoder)
            self.exact_latency_frames = self._frames(delay_samples(layers))
            self.latency_frames = self._shortest(layers, SAFE_LAG) if latency_frames is None else latency_frames
            window = window_within(layers, self.latency_frames * self.hop_length)
            if window is None:
                raise _too_short(latency_frames, self._shortest(layers, 1))
            self._stream = BigVGANStream(layers, window)
        else:
            assert isinstance(decoder, ISTFTDecoder), type(decoder)
            self._stream = ISTFTStream(decoder)
            self.exact_latency_frames = self._frames(self._stream.delay_samples)
            self.latency_frames = self.exact_latency_frames if latency_frames is None else latency_frames
            if self.latency_frames < self.exact_latency_frames:
                raise _too_short(latency_frames, self.exact_latency_frames)

    def start(self, batch: int = 1) -> DecoderState:
        """The state before the first frame of ``batch`` signals that are pushed together."""
        layers = self._stream.start(batch)
        return DecoderState(0, 0, layers.conv_in.new_zeros(batch, 0, dtype=self._stream.dtype), layers)

    def push(self, z: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Samples (B, n) in [-1, 1] that are due after the next latents ``z`` (B, t, D), t >= 0, and the state to continue from."""
        if z.dim() != 3 or z.shape[-1] != self.latent_dim or z.shape[0] != state.held.shape[0]:
            raise UserError(
                f"latents do not fit the stream: got shape {tuple(z.shape)}, expected ({state.held.shape[0]}, frames, {self.latent_dim}); "
                "push (batch, frames, latent_dim) with the batch the stream was started with"
            )
        if not z.shape[1]:
            return state.held[:, :0], state
        wav, layers = self._stream.push(z.transpose(1, 2), state.layers)
        held, frames = join(state.held, wav), state.frames + z.shape[1]
        due = max(0, frames - self.latency_frames) * self.hop_length - state.emitted
        assert due <= held.shape[-1], (due, held.shape)
        return held[:, :due].clamp(-1, 1), DecoderState(frames, state.emitted + due, held[:, due:].clone(), layers)

    def finish(self, state: DecoderState) -> Tensor:
        """The samples (B, rest) still owed when no frame follows; ``state`` itself may still be continued with more frames."""
        if not state.frames:
            return state.held
        wav, _ = self._stream.push(state.layers.conv_in.new_zeros(state.held.shape[0], self.latent_dim, 0), state.layers, end=True)
        rest = join(state.held, wav).clamp(-1, 1)
        assert state.emitted + rest.shape[-1] == state.frames * self.hop_length, (state.emitted, rest.shape, state.frames)
        return rest

    def _frames(self, samples: int) -> int:
        return -(-samples // self.hop_length)

    def _shortest(self, decoder: PreparedDecoder, lag: int) -> int:
        """The fewest frames of latency with which a window looks ``lag`` samples ahead, or none is needed."""
        for frames in range(self.exact_latency_frames):
            window = window_within(decoder, frames * self.hop_length)
            if window is not None and window.lag >= lag:
                return frames
        return self.exact_latency_frames


def _too_short(latency_frames: int | None, shortest: int) -> UserError:
    return UserError(
        f"latency is too short for this decoder: got {latency_frames} frames, expected at least {shortest}; "
        "ask for more, or leave it out for the default"
    )


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
