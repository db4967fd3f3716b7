"""The next-distribution language model: text and past latents in, the Gaussian of the next frame out (KALL-E paper, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kalle.checkpoint import (
    CONFIG_NAME,
    check_fields,
    check_sizes,
    dataclass_from_dict,
    load_module,
    part_folder,
    read_json,
    read_weights,
    resolve_device,
    save_part,
)
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.backbone import Backbone, BackboneConfig
from kalle.models.half_precision import pad_products
from kalle.models.int8 import Int8Backbone, require_engine
from kalle.models.int8_weights import int8_tensors, is_quantised
from kalle.models.layers import without_autocast
from kalle.models.lm_batch import LMBatch, Packing, RowLayout, packed_layout, padded_layout
from kalle.models.lm_state import LMState
from kalle.models.speaker import SpeakerEncoder, SpeakerEncoderConfig
from kalle.models.static_cache import StaticBackbone

PART = "lm"
ATTENTION = ("sdpa", "flex")


EMBEDDINGS = "backbone.embed_tokens.weight"


@dataclass(frozen=True)
class KalleLMConfig:
    """The configuration of a KalleLM."""

    backbone: Mapping[str, Any]
    """Values of a Llama config.json, see `BackboneConfig.of`."""
    latent_dim: int = 512
    """Dimensions of a latent frame, the Flow-VAE's."""
    speaker: SpeakerEncoderConfig | None = None
    """The speaker encoder; the released weights have none."""
    normalise_latents: bool = False
    """Keep per-dimension mean and std of the latents in the weights, feed normalised latents and predict in those units."""
    stop_head: bool = False
    """One more output at every position, the logit that the frame after it is the end (MELLE, arXiv 2407.08551)."""

    def __post_init__(self) -> None:
        check_fields(self, "lm")
        check_sizes(self, "lm")
        BackboneConfig.of(self.backbone)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in config.json; a head that is not there is not mentioned, so that older programs read the rest."""
        values = dataclasses.asdict(dataclasses.replace(self, backbone=dict(self.backbone)))
        if not self.stop_head:
            del values["stop_head"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "lm/config.json") -> KalleLMConfig:
        """The inverse of ``to_dict``; an unknown key is a UserError that lists the valid ones."""
        given = dict(values)
        if given.get("speaker") is not None:
            given["speaker"] = dataclass_from_dict(SpeakerEncoderConfig, given["speaker"], source)
        if "backbone" not in given:
            raise UserError(f"key 'backbone' is missing in '{source}': expected the values of a Llama configuration; convert again")
        if not isinstance(given["backbone"], Mapping):
            raise UserError(f"bad value in '{source}': backbone is {given['backbone']!r}, expected an object {{...}}; correct the file")
        BackboneConfig.of(given["backbone"], source)
        return dataclass_from_dict(cls, given, source)


def quantisable(folder: str | Path) -> tuple[Path, BackboneConfig]:
    """The part folder of the language model in ``folder`` and the backbone of which `kalle.models.int8_weights` makes an 8-bit form.

    UserError for a folder without a language model.
    """
    part = part_folder(folder, PART)
    return part, BackboneConfig.of(KalleLMConfig.from_dict(read_json(part / CONFIG_NAME), str(part / CONFIG_NAME)).backbone)


def int8_backbone(folder: str | Path, device: str | torch.device) -> Int8Backbone:
    """The 8-bit backbone of the weights in ``folder``; its embeddings are not filled.

    UserError on another device than the CPU, and without onnxruntime.
    """
    if resolve_device(device).type != "cpu":
        raise UserError(f"8-bit weights run on the CPU: got device '{device}'; use cpu, or leave quantize out")
    part, known = quantisable(folder)
    require_engine()
    return Int8Backbone(known, int8_tensors(part, known))


@dataclass(frozen=True)
class NextFrame(DiagGaussian):
    """The Gaussian (..., D) of the next frame, and the stop head's logit (...) that this frame is the end; None without a head."""

    stop_logit: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[NextFrame]) -> NextFrame:
        """The rows of ``parts``, of one model, below one another."""
        logits = [part.stop_logit for part in parts if part.stop_logit is not None]
        assert len(logits) in (0, len(parts)), "predictions with and without a stop head do not go together"
        mean, log_std = torch.cat([part.mean for part in parts]), torch.cat([part.log_std for part in parts])
        return cls(mean, log_std, torch.cat(logits) if logits else None)

    def to(self, *args: object, **kwargs: object) -> NextFrame:
        """Every tensor through ``Tensor.to``."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))  # type: ignore[call-overload,no-any-return]

    def detach(self) -> NextFrame:
        """Every tensor cut from the graph."""
        return self._each(Tensor.detach)

    def __getitem__(self, index: object) -> NextFrame:
        """Index every tensor alike, over the leading dimensions."""
        return self._each(lambda tensor: tensor[index])  # type: ignore[index]

    def _each(self, function: Callable[[Tensor], Tensor]) -> NextFrame:
        return NextFrame(function(self.mean), function(self.log_std), None if self.stop_logit is None else function(self.stop_logit))


class KalleLM(nn.Module):
    """Shapes: B batch, L text positions, T latent frames, D latent_dim, H hidden size.

    The sequence is ``[speaker] text z_1 … z_T``; the last text position predicts z_1, z_t predicts z_{t+1} and z_T
    the end distribution, and so with the stop head's logit. The backbone may run in half precision; the two latent layers, the
    stop head and all outputs are fp32.
    """

    backbone: Any
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: KalleLMConfig, backbone: Backbone | Int8Backbone | None = None) -> None:
        """``backbone`` is taken as it is; without one a new `Backbone` is drawn."""
        super().__init__()
        self.config = config
        self.backbone = Backbone(BackboneConfig.of(config.backbone)) if backbone is None else backbone
        hidden: int = self.backbone.config.hidden_size
        self.audio_linear = nn.Linear(config.latent_dim, hidden)
        self.distribution_linear = nn.Linear(hidden, 2 * config.latent_dim)
        self.speaker_encoder: SpeakerEncoder | None = None
        if config.speaker is not None:
            self.speaker_encoder = SpeakerEncoder(config.speaker)
            self.speaker_projection = nn.Linear(config.speaker.embedding_dim, 2 * hidden)
        if config.normalise_latents:
            self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
            self.register_buffer("latent_std", torch.ones(config.latent_dim))
        # The last to be drawn, so that a seed means the same for everything else with and without it.
        self.stop_head = nn.Linear(hidden, 1) if config.stop_head else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.audio_linear.weight.device

    @property
    def hidden_size(self) -> int:
        """Width H of the backbone, and of the speaker latent."""
        return self.audio_linear.out_features

    @property
    def vocab_size(self) -> int:
        """Rows of the text embedding."""
        return int(self.backbone.config.vocab_size)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        quantize: Literal["int8"] | None = None,
        graph: bool = False,
    ) -> KalleLM:
        """Load ``folder`` (NAME or NAME/lm), in evaluation mode, with the backbone in ``dtype`` and the rest in fp32.

        ``quantize`` "int8" computes the backbone with 8-bit weights (`kalle.models.int8`), which are made once and kept beside the others;
        it needs the CPU and is for inference. ``graph`` replays steps as CUDA graphs (`kalle.models.static_cache`), also for inference.
        UserError where that cannot be.

        On the CPU the weights are the mapped file: replace it by a rename while the model is in use, never overwrite it in place (``cp``),
        which would change the model or end the process. ``save_pretrained`` renames.
        """
        part = part_folder(folder, PART)
        config = KalleLMConfig.from_dict(read_json(part / CONFIG_NAME), str(part / CONFIG_NAME))
        if graph and (quantize is not None or resolve_device(device).type != "cuda"):
            raise UserError(f"graph needs CUDA and weights of its own: got device '{device}' and quantize {quantize}; leave graph out")
        if quantize is None:
            known = BackboneConfig.of(config.backbone)
            lm = load_module(lambda: cls(config, StaticBackbone(known, True) if graph else None), part, device, {"backbone.": dtype})
            pad_products(lm.backbone)
            return lm
        backbone = int8_backbone(part, device)
        stored = read_weights(part).get(EMBEDDINGS)
        kept = {} if stored is None else {EMBEDDINGS: stored.dtype}
        return load_module(lambda: cls(config, backbone=backbone), part, device, kept, skip=is_quantised)

    @classmethod
    def names_of(cls, config: KalleLMConfig) -> set[str]:
        """Names of the state of a model of ``config``."""
        with torch.device("meta"):
            return set(cls(config).state_dict())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``folder``/lm/{config.json, model.safetensors} (``folder`` itself when it is named lm)."""
        root = Path(folder)
        save_part(root if root.name == PART else root / PART, self.config.to_dict(), self)

    def add_stop_head(self, generator: torch.Generator) -> None:
        """Give a model that has none an untrained stop head, drawn from ``generator`` (CPU) as ``nn.Linear`` draws its own."""
        assert self.stop_head is None, "a second stop head"
        self.config = dataclasses.replace(self.config, stop_head=True)
        self.stop_head = nn.Linear(self.hidden_size, 1)
        bound = self.hidden_size**-0.5
        with torch.no_grad():
            for parameter in self.stop_head.parameters():
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
        self.stop_head.to(self.device)

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the per-dimension mean and std (D,) of the latents; only with ``normalise_latents``."""
        if not self.config.normalise_latents:
            raise UserError("latent statistics need normalise_latents=true in the configuration of the language model")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def forward(self, batch: LMBatch, layout: RowLayout | None = None, speaker_latent: Tensor | None = None) -> NextFrame:
        """Teacher forcing: (B, T+1, D). Row t predicts frame t+1, row ``latent_lengths[b]`` the end; later rows repeat it.

        ``layout`` (of this batch) says where the utterances lie in the rows that the backbone reads; without one each has a row
        and is padded. The result is the same. ``speaker_latent`` (B, H) is taken instead of encoding ``batch.speaker_mels``.
        """
        layout = layout or self.layout(batch)
        hidden = self._run(batch, layout, speaker_latent)
        last = layout.start + layout.lengths - 1
        steps = torch.arange(batch.latents.shape[1] + 1, device=last.device)
        index = torch.minimum((last - batch.latent_lengths)[:, None] + steps, last[:, None])
        return self._head(hidden[layout.row[:, None], index])

    def all_positions(self, batch: LMBatch) -> NextFrame:
        """The prediction at every text and latent position, (B, max(L_b + T_b), D); the speaker position is dropped."""
        assert batch.speaker_kept is None, "rows with and without a speaker have no common first column"
        hidden = self._run(batch, self.layout(batch))
        return self._head(hidden)[:, 0 if batch.speaker_mels is None else 1 :]

    def layout(self, batch: LMBatch, packing: Packing | None = None) -> RowLayout:
        """Where the utterances of ``batch`` lie, each padded in a row of its own or, with ``packing``, several in one."""
        lengths = batch.text_lengths + batch.latent_lengths + self._speaker_positions(batch)
        return padded_layout(lengths) if packing is None else packed_layout(lengths, packing)

    def prefill(
        self, text_ids: Tensor, prompt_latents: Tensor | None = None, speaker_latent: Tensor | None = None
    ) -> tuple[NextFrame, LMState]:
        """Read the context and predict the first new frame.

        ``text_ids`` (B, L) int64 without padding, ``prompt_latents`` (B, P, D), ``speaker_latent`` (B, H).
        Returns the distribution (B, D) and the state for ``step``.
        """
        hidden, state = self.read(text_ids, prompt_latents, speaker_latent)
        return self._head(hidden), state

    def read(self, text_ids: Tensor, prompt_latents: Tensor | None = None, speaker_latent: Tensor | None = None) -> tuple[Tensor, LMState]:
        """As ``prefill``, with the last position's hidden state (B, H) in place of what ``predict_from`` makes of it."""
        hidden, state = self.backbone.advance(self._context(text_ids, prompt_latents, speaker_latent), self.backbone.new_state())
        return hidden, state

    def append(self, z: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """As ``step``, with the hidden state (B, H) of the new position in place of what ``predict_from`` makes of it."""
        hidden, state = self.backbone.advance(self._embed_latents(z[:, None]), state)
        return hidden, state

    def predict_from(self, hidden: Tensor) -> NextFrame:
        """The prediction (..., D) that belongs to hidden states (..., H)."""
        return self._head(hidden)

    def predict(self, text_ids: Tensor, latents: Tensor | None = None, speaker_latent: Tensor | None = None) -> NextFrame:
        """The distribution (B, D) of the frame after ``latents``, from the whole context and with no cache; shapes as in ``prefill``."""
        embeddings = self._context(text_ids, latents, speaker_latent)
        return self._head(self.backbone(inputs_embeds=embeddings).last_hidden_state[:, -1])

    def predict_all(self, text_ids: Tensor, latents: Tensor, speaker_latent: Tensor | None = None) -> NextFrame:
        """The distributions (B, T + 1, D) of every frame of ``latents`` (B, T, D) and of the one after them, with gradients.

        They come from the very context that ``prefill`` reads, shapes as there: teacher forcing for a speaker latent that is given.
        """
        hidden = self.backbone(inputs_embeds=self._context(text_ids, latents, speaker_latent)).last_hidden_state
        return self._head(hidden[:, -(latents.shape[1] + 1) :])

    def step(self, z: Tensor, state: LMState) -> tuple[NextFrame, LMState]:
        """Append the frame ``z`` (B, D) and predict the next: the distribution (B, D) and the (same, extended) state.

        The rows of ``state`` may differ in length, see ``LMState.join``.
        """
        prediction, state = self.backbone.step(z, state, self._embed_latents, self._head)
        return prediction, state

    def encode_speaker(self, mels: Tensor) -> DiagGaussian:
        """Distribution (B, H) of the speaker latent of ``mels`` (B, 80, F)."""
        if self.speaker_encoder is None:
            raise UserError("this model has no speaker encoder; give prompt audio with its transcript instead")
        with without_autocast(mels.device):
            return DiagGaussian.from_parameters(self.speaker_projection(self.speaker_encoder(mels.float())))

    def speaker_latent(self, batch: LMBatch) -> tuple[Tensor, DiagGaussian] | None:
        """Speaker latent (B, H) of the batch and its distribution, or None when the batch carries no speaker."""
        if batch.speaker_mels is None:
            return None
        distribution = self.encode_speaker(batch.speaker_mels)
        return (distribution.mean if batch.speaker_noise is None else distribution.sample(batch.speaker_noise)), distribution

    def _context(self, text_ids: Tensor, latents: Tensor | None, speaker_latent: Tensor | None) -> Tensor:
        """Embeddings (B, W, H) of ``[speaker] text latents``."""
        parts = [self.backbone.embed_tokens(text_ids)]
        if speaker_latent is not None:
            parts.insert(0, speaker_latent[:, None])
        if latents is not None:
            parts.append(self._embed_latents(latents))
        dtype = self.backbone.dtype
        return torch.cat([part.to(dtype) for part in parts], dim=1)

    def _embed_latents(self, z: Tensor) -> Tensor:
        with without_autocast(z.device):
            z = z.float()
            if self.config.normalise_latents:
                z = (z - self.latent_mean) / self.latent_std
            return self.audio_linear(z).to(self.backbone.dtype)

    def _head(self, hidden: Tensor) -> NextFrame:
        with without_autocast(hidden.device):
            hidden = hidden.float()
            mean, log_std = self.distribution_linear(hidden).chunk(2, dim=-1)
            logit = None if self.stop_head is None else self.stop_head(hidden)[..., 0]
            if not self.config.normalise_latents:
                return NextFrame(mean, log_std, logit)
            return NextFrame(self.latent_mean + self.latent_std * mean, log_std + self.latent_std.log(), logit)

    def _run(self, batch: LMBatch, layout: RowLayout, speaker_latent: Tensor | None = None) -> Tensor:
        """The backbone's output at every position, (R, W, H)."""
        if speaker_latent is None and (speaker := self.speaker_latent(batch)) is not None:
            speaker_latent = speaker[0]
        embeddings = self._assemble(batch, layout, speaker_latent)
        # Rows are padded at their end only, so the causal mask alone keeps padding out of every valid position. In packed rows the
        # restarts of the positions keep the documents apart.
        return self.backbone(inputs_embeds=embeddings, position_ids=layout.position_ids).last_hidden_state

    def _assemble(self, batch: LMBatch, layout: RowLayout, speaker_latent: Tensor | None) -> Tensor:
        """Embeddings (R, W, H): each document's speaker, text and latents joined without gaps."""
        dtype = self.backbone.dtype
        embeddings = torch.zeros(layout.rows, layout.width, self.hidden_size, dtype=dtype, device=batch.text_ids.device)
        begin = layout.start
        if speaker_latent is not None:
            spoken = self._speaker_positions(batch) > 0
            embeddings = embeddings.index_put((layout.row[spoken], begin[spoken]), speaker_latent[spoken].to(dtype))
            begin = begin + spoken
        for embed, values, lengths in (
            (self.backbone.embed_tokens, batch.text_ids, batch.text_lengths),
            (self._embed_latents, batch.latents, batch.latent_lengths),
        ):
            steps = torch.arange(values.shape[1], device=values.device)
            documents, columns = (steps < lengths[:, None]).nonzero(as_tuple=True)
            places = (layout.row[documents], begin[documents] + columns)
            embeddings = embeddings.index_put(places, embed(values[documents, columns]).to(dtype))
            begin = begin + lengths
        return embeddings

    @staticmethod
    def _speaker_positions(batch: LMBatch) -> Tensor:
        """(B,) int64: 1 where an utterance begins with its speaker."""
        if batch.speaker_mels is None:
            return torch.zeros_like(batch.text_lengths)
        return torch.ones_like(batch.text_lengths) if batch.speaker_kept is None else batch.speaker_kept.long()


def set_attention(lm: KalleLM, attention: str, device: torch.device) -> None:
    """Choose how the documents of packed rows are kept apart in training; a UserError where that is not possible.

    "sdpa" runs everywhere, with a mask where rows are packed; "flex" needs CUDA and skips fully masked blocks.
    """
    if attention not in ATTENTION:
        raise UserError(f"attention: got '{attention}', expected {' or '.join(ATTENTION)}; correct it")
    if attention == "flex" and device.type != "cuda":
        raise UserError(f"attention=flex needs a CUDA device: the run is on '{device.type}'; use attention=sdpa")
    lm.backbone.flex = attention == "flex"


def recompute_activations(lm: KalleLM) -> None:
    """Keep only the input of every layer in training and compute the rest again on the way back: less memory, a third more work."""
    lm.backbone.recompute = True


def compile_layers(lm: KalleLM) -> None:
    """Compile every layer of the backbone in place: names of weights stay, and all layers share one compilation."""
    for layer in lm.backbone.layers:
        layer.compile()
