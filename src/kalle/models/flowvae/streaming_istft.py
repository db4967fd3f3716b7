"""The inverse-STFT decoder in pushes: every layer waits for all it sees, so the numbers are those of the whole."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kalle.models.flowvae.istft import MIN_ENVELOPE, ConvNeXtBlock, ISTFTDecoder, ISTFTHead
from kalle.models.flowvae.streaming_layers import SymmetricConvStream, delayed_sum


@dataclass(frozen=True)
class HeadState:
    """What later frames are added to, the windows under it, and how many samples of the beginning are still to be cut."""

    samples: Tensor
    envelope: Tensor
    to_cut: int


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
        return HeadState(samples, self.head.window.new_zeros(1, self.overlap), self.head.trim)

    def push(self, x: Tensor, state: HeadState, end: bool) -> tuple[Tensor, HeadState]:
        samples, envelope, count = state.samples, state.envelope, x.shape[-1]
        if count:
            samples = _add_front(self.head.overlap_add(self.head.frames(x)), samples)
            envelope = _add_front(self.head.envelope(count), envelope)
        ready = count * self.head.hop_length
        # Of what the last frame reaches beyond its hop, as much is kept as was cut from the first.
        until = ready + self.head.trim * end
        wav = samples[:, :until] / envelope[:, :until].clamp(min=MIN_ENVELOPE)
        cut = min(state.to_cut, wav.shape[-1])
        return wav[:, cut:], HeadState(samples[:, ready:].clone(), envelope[:, ready:].clone(), state.to_cut - cut)


def _add_front(x: Tensor, front: Tensor) -> Tensor:
    return torch.cat((front + x[:, : front.shape[-1]], x[:, front.shape[-1] :]), dim=-1)


class ISTFTStream:
    """``ISTFTDecoder`` in pushes: latents (B, D, t) in, samples (B, n) out, ``delay_samples`` later."""

    def __init__(self, decoder: ISTFTDecoder) -> None:
        self.decoder = _frozen(decoder)
        self.conv_in = SymmetricConvStream(self.decoder.conv_in)
        self.blocks = [block for block in self.decoder.blocks if isinstance(block, ConvNeXtBlock)]
        self.depthwise = [SymmetricConvStream(block.depthwise) for block in self.blocks]
        self.head = _HeadStream(self.decoder.head)
        self.delay_samples = delay_samples(decoder)

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


def delay_samples(decoder: ISTFTDecoder) -> int:
    """Samples by which ``ISTFTStream`` lags behind its input."""
    hop = decoder.head.hop_length
    blocks = sum(block.depthwise.kernel_size[0] // 2 for block in decoder.blocks if isinstance(block, ConvNeXtBlock))
    return (decoder.conv_in.kernel_size[0] // 2 * decoder.upsample + blocks) * hop + decoder.head.trim


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
