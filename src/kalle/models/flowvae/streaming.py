"""Latents to audio while they are made: the decoder with its past carried along as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.models.flowvae.bigvgan import BigVGANDecoder
from kalle.models.flowvae.istft import ISTFTDecoder
from kalle.models.flowvae.model import FlowVAE
from kalle.models.flowvae.streaming_bigvgan import SAFE_LAG, BigVGANState, BigVGANStream, delay_samples, window_within
from kalle.models.flowvae.streaming_istft import ISTFTState, ISTFTStream
from kalle.models.flowvae.streaming_layers import join


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
    From ``exact_latency_frames`` on nothing is approximated. The paper's decoder may be asked for less, and its default is
    the smallest latency measured to stay within 1e-4; the inverse-STFT decoder is always exact.

    Takes the weights as they are now: after a change of ``flowvae``'s weights, device or precision make a new one. Weights that
    are normalised at every call of the module are kept here a second time, ready to use. Wrap pushes in
    ``torch.inference_mode()`` unless gradients with respect to the latents are wanted. One decoder serves any number of streams.
    """

    def __init__(self, flowvae: FlowVAE, latency_frames: int | None = None) -> None:
        """UserError when ``latency_frames`` is no integer, or shorter than this decoder can do; longer than it needs is allowed."""
        if latency_frames is not None and not hasattr(latency_frames, "__index__"):
            raise UserError(f"bad latency: got {latency_frames!r}, expected an integer number of frames; round it up")
        self.hop_length, self.latent_dim = flowvae.config.hop_length, flowvae.config.latent_dim
        decoder = flowvae.decoder
        self._stream: Any
        if isinstance(decoder, BigVGANDecoder):
            self.exact_latency_frames = self._frames(delay_samples(decoder))
            self.latency_frames = self._shortest(decoder, SAFE_LAG) if latency_frames is None else latency_frames
            window = window_within(decoder, self.latency_frames * self.hop_length)
            if window is None:
                raise _too_short(latency_frames, self._shortest(decoder, 1))
            self._stream = BigVGANStream(decoder, window)
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
        return DecoderState(0, 0, layers.conv_in.new_zeros(batch, 0), layers)

    def push(self, z: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Samples (B, n) in [-1, 1] that are due after the next latents ``z`` (B, t, D), t >= 0, and the state to go on from."""
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

    def _shortest(self, decoder: BigVGANDecoder, lag: int) -> int:
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
