"""The next-distribution language model: text and past latents in, the Gaussian of the next frame out (KALL-E paper, section 3)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kalle.checkpoint import CONFIG_NAME, dataclass_from_dict, load_module, part_folder, read_json, resolve_device, save_part
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.backbone import Backbone, BackboneConfig
from kalle.models.batch import LMBatch, Packing, RowLayout, packed_layout, padded_layout
from kalle.models.int8 import Int8Backbone, Int8State, require_engine
from kalle.models.int8_weights import int8_tensors, is_quantised
from kalle.models.layers import without_autocast
from kalle.models.lm_state import CachedState, KVCache, LMState
from kalle.models.speaker import SpeakerEncoder, SpeakerEncoderConfig

if TYPE_CHECKING:
    from transformers import LlamaConfig

PART = "lm"
_OLDER_LLAMA_KEYS = frozenset({"_name_or_path", "model_type", "rope_scaling", "rope_theta", "torch_dtype"})
"""Keys of published config.json files that transformers reads but no longer lists."""


@dataclass(frozen=True)
class KalleLMConfig:
    """The configuration of a KalleLM."""

    backbone: Mapping[str, Any]
    """Values of transformers' LlamaConfig."""
    latent_dim: int = 512
    """Dimensions of a latent frame, the Flow-VAE's."""
    speaker: SpeakerEncoderConfig | None = None
    """The speaker encoder; the released weights have none."""
    normalise_latents: bool = False
    """Keep per-dimension mean and std of the latents in the weights, feed normalised latents and predict in those units."""
    stop_head: bool = False
    """One more output at every position, the logit that the frame after it is the end (MELLE, arXiv 2407.08551)."""

    def __post_init__(self) -> None:
        check_backbone(self.backbone, "lm.backbone")

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
        check_backbone(given["backbone"], source)
        return dataclass_from_dict(cls, given, source)


def check_backbone(values: Mapping[str, Any], source: str | Path) -> None:
    """A UserError when ``values`` are not those of a Llama configuration; an unknown key lists the valid ones."""
    if BackboneConfig.of(values) is not None:
        return  # known without transformers, which takes seconds to import
    from transformers import LlamaConfig

    valid = {field.name for field in dataclasses.fields(LlamaConfig)} | _OLDER_LLAMA_KEYS
    unknown = sorted(set(values) - valid)
    if unknown:
        raise UserError(f"unknown key {', '.join(map(repr, unknown))} in '{source}'; valid keys: {', '.join(sorted(valid))}")
    if values.get("model_type", "llama") != "llama":
        raise UserError(f"not a Llama configuration: model_type is {values['model_type']!r} in '{source}', expected 'llama'")
    _llama_config(values, source)


def _llama_config(values: Mapping[str, Any], source: str | Path) -> LlamaConfig:
    from transformers import LlamaConfig

    try:
        # transformers writes rope_theta into the rope_scaling it is given.
        return LlamaConfig(**copy.deepcopy(dict(values)))
    except Exception as error:  # its validators raise subclasses of Exception alone
        raise UserError(f"bad Llama configuration in '{source}': {' '.join(str(error).split())}; correct it") from None


def _backbone(values: Mapping[str, Any], for_training: bool) -> Any:
    known = None if for_training else BackboneConfig.of(values)
    if known is not None:
        return Backbone(known)
    from transformers import LlamaModel

    return LlamaModel(_llama_config(values, "lm.backbone"))


def quantisable(folder: str | Path) -> tuple[Path, BackboneConfig]:
    """The part folder of the language model in ``folder`` and the backbone of which `kalle.models.int8_weights` makes an 8-bit form.

    UserError for a folder without a language model, and for a backbone of another kind.
    """
    part = part_folder(folder, PART)
    known = BackboneConfig.of(KalleLMConfig.from_dict(read_json(part / CONFIG_NAME), str(part / CONFIG_NAME)).backbone)
    if known is None:
        raise UserError(f"the backbone of '{part}' is of a kind that has no 8-bit form, expected a plain Llama; leave quantize out")
    return part, known


def int8_backbone(folder: str | Path, device: str | torch.device) -> Int8Backbone:
    """The 8-bit backbone of the weights in ``folder``; its embeddings are not filled.

    UserError on another device than the CPU, for a backbone of another kind, and without onnxruntime.
    """
    if resolve_device(device).type != "cpu":
        raise UserError(f"8-bit weights run on the CPU: got device '{device}'; use device=cpu, or leave quantize out")
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

    def __init__(self, config: KalleLMConfig, for_training: bool = True, backbone: nn.Module | None = None) -> None:
        """``backbone`` is taken as it is. Without one it is transformers' LlamaModel ``for_training``, with its choice of kernels, or else
        `Backbone` where that knows the configuration. Weights and results are the same, up to rounding."""
        super().__init__()
        self.config = config
        self.backbone = _backbone(config.backbone, for_training) if backbone is None else backbone
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
        for_training: bool = False,
        quantize: Literal["int8"] | None = None,
    ) -> KalleLM:
        """Load ``folder`` (NAME or NAME/lm), in evaluation mode, with the backbone in ``dtype`` and the rest in fp32.

        ``for_training``: with transformers' backbone, as ``__init__`` says; `set_attention` chooses among its kernels.
        ``quantize`` "int8" computes the backbone with 8-bit weights (`kalle.models.int8`), which are made once and kept beside the others;
        it needs the CPU and is for inference. UserError where that cannot be.

        On the CPU the weights are the mapped file: replace it by a rename while the model is in use, never overwrite it in place (``cp``),
        which would change the model or end the process. ``save_pretrained`` renames.
        """
        part = part_folder(folder, PART)
        config = KalleLMConfig.from_dict(read_json(part / CONFIG_NAME), str(part / CONFIG_NAME))
        if quantize is None:
            return load_module(lambda: cls(config, for_training), part, device, {"backbone.": dtype})
        assert not for_training, "8-bit weights are not trained"
        backbone = int8_backbone(part, device)
        return load_module(lambda: cls(config, backbone=backbone), part, device, skip=is_quantised)

    @classmethod
    def names_of(cls, config: KalleLMConfig) -> set[str]:
        """Names of the state of a model of ``config``."""
        with torch.device("meta"):
            return set(cls(config, for_training=False).state_dict())

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
        return self._advance(self._context(text_ids, prompt_latents, speaker_latent), self._new_state())

    def append(self, z: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """As ``step``, with the hidden state (B, H) of the new position in place of what ``predict_from`` makes of it."""
        return self._advance(self._embed_latents(z[:, None]), state)

    def predict_from(self, hidden: Tensor) -> NextFrame:
        """The prediction (..., D) that belongs to hidden states (..., H)."""
        return self._head(hidden)

    def predict(self, text_ids: Tensor, latents: Tensor | None = None, speaker_latent: Tensor | None = None) -> NextFrame:
        """The distribution (B, D) of the frame after ``latents``, from the whole context and with no cache; shapes as in ``prefill``."""
        embeddings = self._context(text_ids, latents, speaker_latent)
        return self._head(self.backbone(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, -1])

    def predict_all(self, text_ids: Tensor, latents: Tensor, speaker_latent: Tensor | None = None) -> NextFrame:
        """The distributions (B, T + 1, D) of every frame of ``latents`` (B, T, D) and of the one after them, with gradients.

        They come from the very context that ``prefill`` reads, shapes as there: teacher forcing for a speaker latent that is given.
        """
        hidden = self.backbone(inputs_embeds=self._context(text_ids, latents, speaker_latent), use_cache=False).last_hidden_state
        return self._head(hidden[:, -(latents.shape[1] + 1) :])

    def step(self, z: Tensor, state: LMState) -> tuple[NextFrame, LMState]:
        """Append the frame ``z`` (B, D) and predict the next: the distribution (B, D) and the (same, extended) state.

        The rows of ``state`` may differ in length, see ``LMState.join``.
        """
        return self._extend(self._embed_latents(z[:, None]), state)

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

    def _new_state(self) -> LMState:
        if isinstance(self.backbone, Int8Backbone):
            return self.backbone.new_state()
        if isinstance(self.backbone, Backbone):
            return CachedState(KVCache())
        from transformers import DynamicCache

        return CachedState(DynamicCache())

    def _context(self, text_ids: Tensor, latents: Tensor | None, speaker_latent: Tensor | None) -> Tensor:
        """Embeddings (B, W, H) of ``[speaker] text latents``."""
        parts = [self.backbone.embed_tokens(text_ids)]
        if speaker_latent is not None:
            parts.insert(0, speaker_latent[:, None])
        if latents is not None:
            parts.append(self._embed_latents(latents))
        dtype = self.backbone.embed_tokens.weight.dtype
        return torch.cat([part.to(dtype) for part in parts], dim=1)

    def _extend(self, embeddings: Tensor, state: LMState) -> tuple[NextFrame, LMState]:
        hidden, state = self._advance(embeddings, state)
        return self._head(hidden), state

    def _advance(self, embeddings: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        if isinstance(state, Int8State):
            hidden, after = self.backbone.advance(embeddings, state)
            return hidden, after
        assert isinstance(state, CachedState), f"a state of another kind: {type(state).__name__}"
        new = embeddings.shape[1]
        hidden = self.backbone(
            inputs_embeds=embeddings,
            attention_mask=state.attention_mask(new),
            position_ids=state.position_ids(new),
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden[:, -1], state

    def _embed_latents(self, z: Tensor) -> Tensor:
        with without_autocast(z.device):
            z = z.float()
            if self.config.normalise_latents:
                z = (z - self.latent_mean) / self.latent_std
            return self.audio_linear(z).to(self.backbone.embed_tokens.weight.dtype)

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
        # restarts of the positions make it block-diagonal, but only without a cache and without a mask of ours.
        return self.backbone(
            inputs_embeds=embeddings, attention_mask=None, position_ids=layout.position_ids, use_cache=False
        ).last_hidden_state

    def _assemble(self, batch: LMBatch, layout: RowLayout, speaker_latent: Tensor | None) -> Tensor:
        """Embeddings (R, W, H): each document's speaker, text and latents joined without gaps."""
        dtype = self.backbone.embed_tokens.weight.dtype
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


# How a language model is computed: none of it changes weights.
ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention", "flash": "flash_attention_2"}
"""Our names and transformers'."""
_CUDA_ONLY = ("flex", "flash")


def set_attention(lm: KalleLM, attention: str, device: torch.device, half_precision: bool = False) -> None:
    """Choose the implementation of the backbone's attention; a UserError where it is not available.

    sdpa and eager run everywhere; flex and flash need CUDA, and flash half precision and a kernel for it.
    """
    if attention not in ATTENTION:
        raise UserError(f"attention: got '{attention}', expected {', '.join(ATTENTION)}; correct it")
    if not hasattr(lm.backbone, "set_attn_implementation"):
        raise UserError(
            f"attention={attention}: got a language model for synthesis, expected one for training; load it with for_training=True"
        )
    if attention in _CUDA_ONLY and device.type != "cuda":
        raise UserError(f"attention={attention} needs a CUDA device: the run is on '{device.type}'; use attention=sdpa")
    if attention == "flash" and not half_precision:
        raise UserError("attention=flash needs half precision; use precision=bf16-mixed or attention=sdpa")
    try:
        lm.backbone.set_attn_implementation(ATTENTION[attention])
    except Exception as error:  # transformers raises ImportError, ValueError or whatever fetching a kernel does
        raise UserError(f"attention={attention} is not available here: {' '.join(str(error).split())}; use attention=sdpa") from None


def recompute_activations(lm: KalleLM) -> None:
    """Keep only the input of every layer in training and compute the rest again on the way back: less memory, a third more work."""
    lm.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def compile_layers(lm: KalleLM) -> None:
    """Compile every layer of the backbone in place: names of weights stay, and all layers share one compilation."""
    for layer in lm.backbone.layers:
        layer.compile()


@torch.no_grad()
def check_documents_apart(attention: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """A UserError when this version of transformers lets the documents of a packed row see each other.

    It derives the block-diagonal mask from the restarts of ``position_ids``, but not with a cache, and says nothing when it does not.
    ``attention`` is its name of an implementation. Tried on a toy backbone of 16-wide heads.
    """
    from transformers import LlamaConfig, LlamaModel

    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = LlamaModel(LlamaConfig(**size, head_dim=16, vocab_size=4))
        model.set_attn_implementation(attention)
        toy: nn.Module = model.eval()
        toy.to(device, dtype)
        embeddings = torch.randn(1, 6, 16, device=device, dtype=dtype)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)

    def second(inputs: Tensor) -> Tensor:
        return toy(inputs_embeds=inputs, position_ids=positions, attention_mask=None, use_cache=False).last_hidden_state[:, 3:]

    changed = embeddings.clone()
    changed[:, :3] *= -3
    if not torch.equal(second(embeddings), second(changed)):
        raise UserError(f"packing: with attention '{attention}' this version of transformers mixes packed utterances; use packing=false")
