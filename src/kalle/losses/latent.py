"""Losses and statistics of latents: the Flow-VAE's KL, the language model's losses, guided attention, the health of latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.backbone import rotate_half
from kalle.models.layers import without_autocast
from kalle.models.lm import KalleLM
from kalle.models.lm_batch import LMBatch, RowLayout

if TYPE_CHECKING:
    from kalle.models.lm_batch import LMBatch

Direction = Literal["prediction_posterior", "posterior_prediction"]
"""Which argument of the KL comes first: KL(prediction || posterior), or the paper's eq. 10, KL(posterior || prediction)."""
KLReduction = Literal["none", "mean", "sum_dim"]


def flow_kl(z_prior: Tensor, posterior_log_std: Tensor, reduction: KLReduction = "mean") -> Tensor:
    """KL of the posterior to the flow prior, one Monte-Carlo sample (KALL-E eq. 3-7): ``-log_std - 1/2 + z_p^2 / 2`` per element.

    ``z_prior`` (..., D) is flow(z), whose log-determinant is 0, with z drawn from the posterior whose log standard deviation
    is ``posterior_log_std`` (..., D). The entropy is analytic and the cross-entropy sampled, so an element may be negative.
    ``reduction``: "mean" over batch, time and dimension; "sum_dim" sums the dimensions and averages the rest (nats per
    frame); "none" returns (..., D). fp32; ValueError for another reduction.
    """
    kl = -posterior_log_std.float() - 0.5 + 0.5 * z_prior.float().square()
    if reduction == "mean":
        return kl.mean()
    if reduction == "sum_dim":
        return kl.sum(-1).mean()
    if reduction == "none":
        return kl
    raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum_dim' or 'none'")


def directed_kl(prediction: DiagGaussian, posterior: DiagGaussian, direction: Direction) -> Tensor:
    """The KL of ``direction`` per dimension in nats, (..., D), fp32; ValueError for another direction."""
    if direction == "prediction_posterior":
        return prediction.kl_to(posterior)
    if direction == "posterior_prediction":
        return posterior.kl_to(prediction)
    raise ValueError(f"direction: got {direction!r}, expected 'prediction_posterior' or 'posterior_prediction'")


@dataclass(frozen=True)
class LMLoss:
    """The language model's loss and its parts: scalars in nats per dimension, fp32."""

    total: Tensor
    """``frame_kl + end_weight * end_kl``: what is minimised."""
    frame_kl: Tensor
    """Mean over all valid frames of the batch."""
    end_kl: Tensor
    """Mean over utterances, at the row after the last frame."""
    frames: Tensor
    """Number of valid frames, int64."""
    utterances: Tensor
    """Number of utterances, int64."""


def next_distribution_loss(
    prediction: DiagGaussian, batch: LMBatch, direction: Direction = "prediction_posterior", end_weight: float = 0.02
) -> LMLoss:
    """``mean over frames of KL + end_weight * mean over utterances of the end KL``, each averaged over D (KALL-E section 3).

    ``prediction`` (B, T + 1, D): row t predicts frame t (from 0) of ``batch.posterior`` (B, T, D), row latent_lengths[b]
    the end distribution N(1, e). Rows beyond it have no part in the loss, nor in its gradient, whatever they hold.
    A batch without any frame is a broken invariant.
    """
    posterior, lengths = batch.posterior, batch.latent_lengths
    assert posterior is not None, "the loss needs batch.posterior"
    rows, frames = prediction.mean.shape[1], posterior.mean.shape[1]
    assert rows == frames + 1, f"prediction must have one row more than the posterior: {rows} and {frames}"
    valid = torch.arange(frames, device=lengths.device) < lengths[:, None]
    frame_kl = directed_kl(_masked(prediction[:, :frames], valid), _masked(posterior, valid), direction).mean(-1)
    frame_count = valid.sum()
    frame_loss = frame_kl.sum() / frame_count
    at_end = prediction[torch.arange(len(lengths), device=lengths.device), lengths]
    end_loss = directed_kl(at_end, DiagGaussian.end(at_end.mean), direction).mean()
    utterances = torch.tensor(len(lengths), device=lengths.device)
    return LMLoss(frame_loss + end_weight * end_loss, frame_loss, end_loss, frame_count, utterances)


def _masked(distribution: DiagGaussian, valid: Tensor) -> DiagGaussian:
    """N(0, I) where ``valid`` (B, T) is False, so that padding's KL is exactly 0.

    Masking the KL instead would multiply an overflow's gradient by zero, which is NaN.
    """
    padding = ~valid.unsqueeze(-1)
    return DiagGaussian(distribution.mean.masked_fill(padding, 0.0), distribution.log_std.masked_fill(padding, 0.0))


def speaker_kl(speaker: DiagGaussian) -> Tensor:
    """KL of the speaker latent (B, H) to N(0, I), averaged over dimensions, then over the batch; scalar in nats, fp32."""
    return speaker.kl_to(DiagGaussian.standard(speaker.mean)).mean(-1).mean()


@dataclass(frozen=True)
class ConstantBaseline:
    """The constant Gaussian closest to a set of posteriors, and how close: the result of a model that learnt nothing."""

    distribution: DiagGaussian
    """Mean and log standard deviation, (D,), fp64."""
    kl: Tensor
    """KL in nats per dimension, averaged over frames, (D,), fp64; its mean compares with a frame loss."""
    frames: int
    """Number of frames seen."""


@dataclass
class _Moments:
    """Running fp64 sums over frames, each (D,)."""

    frames: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, posterior: DiagGaussian) -> None:
        """Add posteriors (..., D)."""
        mean, log_std = (tensor.detach().double().reshape(-1, tensor.shape[-1]) for tensor in (posterior.mean, posterior.log_std))
        precision = torch.exp(-2 * log_std)
        terms = {
            "log_std": log_std,
            "mean": mean,
            "power": torch.exp(2 * log_std) + mean.square(),
            "precision": precision,
            "weighted_mean": mean * precision,
            "weighted_power": mean.square() * precision,
        }
        for name, term in terms.items():
            total = term.sum(0)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.frames += mean.shape[0]

    def average(self, name: str) -> Tensor:
        """The frame average of one sum, (D,)."""
        return self.sums[name] / self.frames


def constant_gaussian_baseline(posteriors: Iterable[DiagGaussian], direction: Direction) -> ConstantBaseline:
    """The diagonal Gaussian N(m, s^2) that minimises the mean KL of ``direction`` over all frames, in closed form.

    ``posteriors`` are (..., D) with padding already removed; one pass, sums in fp64, so a corpus can be streamed. With
    averages over frames written E: KL(prediction || posterior) gives m = E[mu / sigma^2] / E[1 / sigma^2] and
    s^2 = 1 / E[1 / sigma^2]; KL(posterior || prediction) is moment matching, m = E[mu], s^2 = E[sigma^2 + mu^2] - m^2.
    ValueError for no frames or another direction.
    """
    moments = _Moments()
    for posterior in posteriors:
        moments.add(posterior)
    if not moments.frames:
        raise ValueError("constant_gaussian_baseline: got no frames, expected at least one posterior")
    if direction == "prediction_posterior":
        distribution, kl = _precision_weighted(moments)
    elif direction == "posterior_prediction":
        distribution, kl = _moment_matched(moments)
    else:
        raise ValueError(f"direction: got {direction!r}, expected 'prediction_posterior' or 'posterior_prediction'")
    return ConstantBaseline(distribution, kl, moments.frames)


def _precision_weighted(moments: _Moments) -> tuple[DiagGaussian, Tensor]:
    """Minimiser and minimum of E[KL(N(m, s^2) || N(mu, sigma^2))]."""
    precision = moments.average("precision")
    mean = moments.average("weighted_mean") / precision
    log_std = -0.5 * torch.log(precision)
    spread = (moments.average("weighted_power") - mean.square() * precision).clamp(min=0)
    return DiagGaussian(mean, log_std), moments.average("log_std") - log_std + 0.5 * spread


def _moment_matched(moments: _Moments) -> tuple[DiagGaussian, Tensor]:
    """Minimiser and minimum of E[KL(N(mu, sigma^2) || N(m, s^2))]."""
    mean = moments.average("mean")
    log_std = 0.5 * torch.log(moments.average("power") - mean.square())
    return DiagGaussian(mean, log_std), log_std - moments.average("log_std")


def stop_bce(logits: Tensor, lengths: Tensor, positive_weight: float = 100.0) -> Tensor:
    """Binary cross-entropy of the stop head in nats, a scalar in fp32: the mean over all valid rows of the batch.

    ``logits`` (B, T + 1) as `KalleLM.forward` gives them, ``lengths`` (B,) int64 the frames of each utterance. Row ``lengths[b]`` is the
    end and counts ``positive_weight`` times, because an utterance has one end and many frames (MELLE, arXiv 2407.08551); the
    rows before it are not the end; those beyond have no part in the loss, nor in its gradient, whatever they hold.
    """
    rows = torch.arange(logits.shape[1], device=logits.device)
    valid, target = rows <= lengths[:, None], (rows == lengths[:, None]).float()
    weight = torch.tensor(positive_weight, device=logits.device)
    # Masking the loss instead would multiply an overflow's gradient by zero, which is NaN.
    kept = logits.float().masked_fill(~valid, 0.0)
    each = binary_cross_entropy_with_logits(kept, target, pos_weight=weight, reduction="none")
    return each.where(valid, 0.0).sum() / stop_rows(lengths)


def stop_rows(lengths: Tensor) -> Tensor:
    """How many rows `stop_bce` is a mean over: every frame of ``lengths`` (B,) and an end for each utterance; scalar int64."""
    return lengths.sum() + len(lengths)


ACTIVE_VARIANCE = 0.01
"""A dimension is active when its posterior mean varies by more than this (Burda et al., arXiv 1509.00519, appendix C)."""
_TERMS = ("mean", "mean_square", "z", "z_square", "kl", "std", "abs_mean")


class LatentHealth:
    """Sums over frames, so that a whole split counts as one: averages of batches would be wrong for variances, and for frames of utterances
    of unequal length.
    """

    def __init__(self, latent_dim: int) -> None:
        self.latent_dim = latent_dim
        self.sums = torch.zeros(len(_TERMS) * latent_dim + 1, dtype=torch.float64)
        """Every term of every dimension, then the number of frames; those of several ranks may be added. fp64, on the CPU."""

    def add(self, posterior: DiagGaussian, z: Tensor, z_prior: Tensor | None = None) -> None:
        """Count posteriors (..., D) and their samples ``z`` (..., D); the KL is against the flow prior when ``z_prior`` = flow(z) is
        given (one sample), else against N(0, I) in closed form.
        """
        posterior, z = posterior.detach(), z.detach().double()
        if z_prior is None:
            kl = posterior.kl_to(DiagGaussian.standard(posterior.mean))
        else:
            kl = flow_kl(z_prior.detach(), posterior.log_std, reduction="none")
        mean = posterior.mean.double()
        terms = (mean, mean.square(), z, z.square(), kl.double(), posterior.std.double(), mean.abs())
        sums = [term.reshape(-1, self.latent_dim).sum(0) for term in terms]
        frames = torch.tensor([mean.numel() // self.latent_dim], dtype=torch.float64)
        self.sums += torch.cat([*(total.cpu() for total in sums), frames])

    def summary(self) -> dict[str, float]:
        """``kl_per_element`` and ``kl_per_frame`` in nats; ``mean_std`` and ``mean_abs_mean`` over everything; ``active_dimensions``;
        ``z_std``, the standard deviation of the samples within a dimension, averaged. No frames is a broken invariant.
        """
        frames = self.sums[-1]
        assert frames > 0, "no frames were counted"
        average = dict(zip(_TERMS, self.sums[:-1].view(len(_TERMS), self.latent_dim) / frames, strict=True))
        spread = (average["mean_square"] - average["mean"].square()).clamp(min=0)
        z_spread = (average["z_square"] - average["z"].square()).clamp(min=0)
        return {
            "kl_per_element": float(average["kl"].mean()),
            "kl_per_frame": float(average["kl"].sum()),
            "mean_std": float(average["std"].mean()),
            "mean_abs_mean": float(average["abs_mean"].mean()),
            "active_dimensions": float((spread > ACTIVE_VARIANCE).sum()),
            "z_std": float(z_spread.sqrt().mean()),
        }


def latent_health(posterior: DiagGaussian, z: Tensor, z_prior: Tensor | None = None) -> dict[str, float]:
    """`LatentHealth` of posteriors (B, T, D) and their samples alone."""
    health = LatentHealth(z.shape[-1])
    health.add(posterior, z, z_prior)
    return health.summary()


HEAD = 0
"""The head that is read; its keys are those of key-value head 0."""


class TextAttention:
    """Inside the block, what the query and key projections of ``layers`` put out in a pass of ``lm``.

    The fused attention kernels give no weights, so those of one head are computed once more from its queries and keys.
    B documents, T frames, L text positions, R rows of W positions.
    """

    def __init__(self, lm: KalleLM, layers: Sequence[int]) -> None:
        """A UserError when ``lm`` lacks one of the ``layers`` (from 0)."""
        self.lm, self.layers = lm, tuple(layers)
        depth = len(lm.backbone.layers)
        if not all(0 <= layer < depth for layer in self.layers):
            raise UserError(f"objective.alignment_layers: got {list(layers)}, expected layers from 0 to {depth - 1}; correct it")
        self._seen: dict[tuple[int, str], Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> TextAttention:
        for layer in self.layers:
            attention: Any = self.lm.backbone.layers[layer].self_attn
            for name in ("q_proj", "k_proj"):
                self._handles.append(getattr(attention, name).register_forward_hook(self._keep(layer, name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, layer: int, name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            self._seen[layer, name] = output

        return hook

    def weights(self, layer: int, batch: LMBatch, layout: RowLayout, text_start: Tensor) -> Tensor:
        """Attention of head `HEAD` of ``layer`` to the text, (B, T, L) fp32: row t when it predicts frame t (from 0).

        ``text_start`` (B,) int64 counts the positions before the text. A row sums to what the head does not spend on frames and on the
        speaker; columns beyond a text are 0, rows beyond the frames mean nothing.
        """
        config = self.lm.backbone.config
        width = int(config.head_dim or config.hidden_size // config.num_attention_heads)
        steps = torch.arange(int(layout.lengths.max()), device=text_start.device)
        documents = layout.row[:, None]
        keys = self._seen[layer, "k_proj"][documents, (layout.start[:, None] + steps).clamp(max=layout.width - 1)]
        frames = torch.arange(batch.latents.shape[1], device=text_start.device)
        asked = (text_start + batch.text_lengths - 1)[:, None] + frames
        places = (layout.start[:, None] + asked).clamp(max=layout.width - 1)
        queries = self._seen[layer, "q_proj"][documents, places]
        chosen = slice(HEAD * width, (HEAD + 1) * width)
        queries = self._rotated(queries[..., chosen].float(), asked)
        keys = self._rotated(keys[..., chosen].float(), steps.expand(len(documents), -1))
        with without_autocast(queries.device):
            scores = queries @ keys.transpose(1, 2) * width**-0.5
        hidden = (steps > asked[..., None]) | (steps >= layout.lengths[:, None, None])
        # A query beyond the document would be left without any key; it may look at the first.
        hidden[..., 0] = False
        attention = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self._text_columns(attention, batch, text_start)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        cosine, sine = self.lm.backbone.rotary_emb(x, positions)
        return x * cosine + rotate_half(x) * sine

    @staticmethod
    def _text_columns(attention: Tensor, batch: LMBatch, text_start: Tensor) -> Tensor:
        columns = torch.arange(batch.text_ids.shape[1], device=text_start.device)
        index = (text_start[:, None] + columns).clamp(max=attention.shape[2] - 1)
        picked = attention.gather(2, index[:, None].expand(-1, attention.shape[1], -1))
        return picked.masked_fill((columns >= batch.text_lengths[:, None])[:, None], 0.0)


RELATIVE_TOLERANCE = 0.08
"""How far from the straight line attention may be for nothing, as a share of the text; speech is not read at one pace."""
TOLERANCE_POSITIONS = 3.0
"""The same in text positions, which counts in short texts."""
RELATIVE_WIDTH = 0.08
"""Standard deviation of what is beyond the tolerance, as a share of the text."""
_SMALLEST_SHARE = 1e-6


def diagonal_band(text_lengths: Tensor, frame_lengths: Tensor, text_width: int, frame_width: int) -> Tensor:
    """How welcome attention to text position n is at frame t, (B, frame_width, text_width) in [0, 1].

    1 near n / L = t / T, falling off as a Gaussian; the idea of guided attention (Tachibana et al., arXiv 1710.08969) with room
    around the line. ``text_lengths`` and ``frame_lengths`` are (B,) int64.
    """
    texts, frames = text_lengths[:, None, None].float(), frame_lengths[:, None, None].clamp(min=1).float()
    positions = (torch.arange(text_width, device=text_lengths.device) + 0.5) / texts
    times = (torch.arange(frame_width, device=text_lengths.device)[:, None] + 0.5) / frames
    away = ((positions - times).abs() - RELATIVE_TOLERANCE - TOLERANCE_POSITIONS / texts).clamp(min=0)
    return torch.exp(-0.5 * (away / RELATIVE_WIDTH).square())


def alignment_loss(attention: Tensor, text_lengths: Tensor, frame_lengths: Tensor) -> Tensor:
    """``-log`` of the attention that falls into `diagonal_band`, averaged over all frames; a scalar in nats, fp32.

    ``attention`` (B, T, L) is a head's, to the text alone; what it spends elsewhere counts as astray.
    """
    band = diagonal_band(text_lengths, frame_lengths, attention.shape[2], attention.shape[1])
    astray = -(attention * band).sum(-1).clamp(min=_SMALLEST_SHARE).log()
    valid = torch.arange(attention.shape[1], device=frame_lengths.device) < frame_lengths[:, None]
    return astray.masked_fill(~valid, 0.0).sum() / valid.sum()
