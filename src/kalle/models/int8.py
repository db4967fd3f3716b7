"""The backbone of the language model with 8-bit weights, on a CPU through onnxruntime (extra ``fast``).

Every linear layer of the backbone holds blocks of 32 values along its input, each block with a scale of its own; activations are rounded to
8 bits by block as well (`MatMulNBits`, accuracy level 4). Norms, rotary embedding, attention and its cache stay fp32, as do the
embeddings and the head, which `KalleLM` computes with torch.

B rows, W new positions, H hidden size, N cached positions of a row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kalle.errors import UserError
from kalle.models.backbone import BackboneConfig, BackboneOutput
from kalle.models.int8_weights import BLOCK, check_tensors, expected_tensors, products
from kalle.models.lm_state import LMState

if TYPE_CHECKING:
    import onnxruntime

T = TypeVar("T")
_ACCURACY_INT8 = 4
_OPSET, _IR_VERSION = 21, 10
_PROMPT_CHUNK = 512
"""Positions that one run reads at most, which bounds the memory of a long prompt."""
_LEAST_ROOM = 64


@dataclass(frozen=True)
class Int8State(LMState):
    """Every layer's keys and values in buffers in which row b holds ``lengths[b]`` positions from its beginning."""

    buffers: tuple[Tensor, ...] = ()
    """Keys and values of layer 0, then of layer 1, …: fp32 (B, kv_heads, room, head_dim) each; empty before the first position."""
    lengths: tuple[int, ...] = ()

    def _joined(self, states: Sequence[Int8State]) -> Int8State:
        lengths = tuple(length for state in states for length in state.lengths)
        longest, parts = max(lengths), zip(*(state.buffers for state in states), strict=True)
        return Int8State(tuple(torch.cat([_resized(part, _room_for(longest), longest) for part in same]) for same in parts), lengths)

    def _selected(self, rows: Sequence[int]) -> Int8State:
        index = torch.tensor(list(rows))
        return Int8State(tuple(buffer[index] for buffer in self.buffers), tuple(self.lengths[row] for row in rows))


def _room_for(positions: int) -> int:
    """Columns of a buffer that has to hold ``positions``: half as much again, so that copies a position stay bounded."""
    return max(_LEAST_ROOM, positions + positions // 2)


def _resized(buffer: Tensor, room: int, used: int) -> Tensor:
    """``buffer`` (B, heads, any, head_dim) with ``room`` columns, of which the first ``used`` are kept."""
    kept = min(used, buffer.shape[2])
    larger = buffer.new_zeros(*buffer.shape[:2], room, buffer.shape[3])
    larger[:, :, :kept] = buffer[:, :, :kept]
    return larger


class StoredEmbedding(nn.Embedding):
    """Embeddings in any dtype, given in fp32: those of a 16-bit file stay in it, where they are half a gigabyte at full size."""

    def reset_parameters(self) -> None:
        """Draw nothing: the memory of weights that others replace is never touched."""

    def forward(self, input: Tensor) -> Tensor:
        """Ids (B, N) -> (B, N, H) fp32."""
        return super().forward(input).float()


class Int8Backbone(nn.Module):
    """Embeddings in, hidden states out, for rows with positions of their own; equal to a `Backbone` up to the rounding to 8 bits.

    One row gives the same bits alone and among others. Runs on the CPU with torch's number of threads, without gradients; only
    ``embed_tokens`` is a torch module, to be filled. Not to be used from two threads at once with the same state; different states may
    run side by side.
    """

    dtype = torch.float32
    """Of what goes in and comes out."""

    def __init__(self, config: BackboneConfig, tensors: Mapping[str, Tensor], threads: int | None = None) -> None:
        """``tensors`` are those of ``quantised_backbone``, copied; ``threads`` of one run, by default torch's.

        UserError when a tensor is missing or misshapen.
        """
        super().__init__()
        self.config = config
        self.embed_tokens = StoredEmbedding(config.vocab_size, config.hidden_size)
        check_tensors(config, tensors)
        self._session = _session(config, tensors, threads or torch.get_num_threads())
        self._frequencies = config.inverse_frequencies()
        self._rotary = torch.empty(2, 0, config.head_dim // 2)

    def new_state(self) -> Int8State:
        """The state before the first position."""
        return Int8State()

    def advance(self, embeddings: Tensor, state: Int8State) -> tuple[Tensor, Int8State]:
        """Read ``embeddings`` (B, W, H) behind ``state``: the hidden state (B, H) of the last position, and the extended state.

        A state without rows is the beginning. B rows read W positions each.
        """
        hidden, state = self._read(embeddings, state)
        return hidden[:, -1], state

    def step(self, z: Tensor, state: Int8State, embed: Callable[[Tensor], Tensor], head: Callable[[Tensor], T]) -> tuple[T, Int8State]:
        """As ``Backbone.step``."""
        hidden, state = self.advance(embed(z[:, None]), state)
        return head(hidden), state

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor | None = None, **_: Any) -> BackboneOutput:
        """Every hidden state (B, W, H) of ``inputs_embeds`` (B, W, H), without a cache; called as a `Backbone` is. Rows are not packed."""
        assert position_ids is None, "packed rows need the fp32 backbone"
        return BackboneOutput(self._read(inputs_embeds, self.new_state(), every=True)[0])

    def _read(self, embeddings: Tensor, state: Int8State, every: bool = False) -> tuple[Tensor, Int8State]:
        """The hidden states of the last run, or of ``every`` position, and the extended state."""
        embeddings = embeddings.detach().float().contiguous()
        rows, new, _ = embeddings.shape
        lengths = state.lengths or (0,) * rows
        assert len(lengths) == rows, f"{rows} rows of embeddings for a state of {len(lengths)}"
        buffers = self._with_room(state.buffers, rows, max(lengths) + new, max(lengths))
        parts: list[Tensor] = []
        begin = 0
        for end in _chunk_ends(new):
            hidden = self._run(embeddings[:, begin:end].contiguous(), buffers, lengths)
            parts = [*parts, hidden] if every else [hidden]
            lengths = tuple(length + end - begin for length in lengths)
            begin = end
        return torch.cat(parts, dim=1), Int8State(buffers, lengths)

    def _with_room(self, buffers: tuple[Tensor, ...], rows: int, needed: int, used: int) -> tuple[Tensor, ...]:
        if buffers and buffers[0].shape[2] >= needed:
            return buffers
        room = _room_for(needed)
        if buffers:
            return tuple(_resized(buffer, room, used) for buffer in buffers)
        shape = (rows, self.config.num_key_value_heads, room, self.config.head_dim)
        return tuple(torch.zeros(shape) for _ in range(2 * self.config.num_hidden_layers))

    def _run(self, embeddings: Tensor, buffers: tuple[Tensor, ...], lengths: tuple[int, ...]) -> Tensor:
        """One pass over ``embeddings`` (B, W, H), whose keys and values are written into ``buffers``; (B, W, H)."""
        rows, new, hidden_size = embeddings.shape
        ends = torch.tensor([length + new - 1 for length in lengths], dtype=torch.int32)
        hidden = torch.empty(rows, new, hidden_size)
        cosine, sine = self._angles(max(lengths) + new)
        inputs = {
            "embeddings": embeddings,
            "last_positions": ends,
            "total": torch.tensor(max(lengths) + new, dtype=torch.int32),
            "new_positions": torch.full((rows,), new, dtype=torch.int32),
            "cosine": cosine,
            "sine": sine,
        }
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            _bind(binding.bind_input, name, tensor)
        _bind(binding.bind_output, "hidden", hidden)
        for number, buffer in enumerate(buffers):
            _bind(binding.bind_input, f"past.{number}", buffer)
            _bind(binding.bind_output, f"present.{number}", buffer)
        self._session.run_with_iobinding(binding)
        return hidden

    def _angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles of at least ``positions`` positions, (positions, head_dim / 2) each."""
        table = self._rotary  # another thread may replace it
        if table.shape[1] < positions:
            angles = torch.arange(max(256, positions + positions // 2)).float()[:, None] * self._frequencies
            self._rotary = table = torch.stack([angles.cos(), angles.sin()])
        return table[0], table[1]


def _chunk_ends(new: int) -> list[int]:
    """Where the runs over ``new`` positions end. No run of a longer prompt has a single position, whose last bits would differ."""
    ends = [*range(_PROMPT_CHUNK, new, _PROMPT_CHUNK), new]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        ends[-2] -= 1
    return ends


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    types = {torch.float32: np.float32, torch.int32: np.int32}
    bind(name, "cpu", 0, types[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())


def require_engine() -> None:
    """UserError when a library of the extra ``fast`` is missing."""
    missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"8-bit weights need onnxruntime and onnx: got no {', '.join(missing)}; install kalle with the extra 'fast'")


def _session(config: BackboneConfig, tensors: Mapping[str, Tensor], threads: int) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait by counting would take the cores from torch, which runs in turn with this.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    options.add_external_initializers(list(values), list(values.values()))
    try:
        return onnxruntime.InferenceSession(_graph(config), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common base of their own
        version = onnxruntime.__version__
        raise UserError(f"8-bit weights do not run here: onnxruntime {version} says '{error}'; leave quantize out, or update it") from error


def _graph(config: BackboneConfig) -> bytes:
    """The network as an ONNX model without its weights, which are handed over in memory."""
    from onnx import TensorProto, helper

    nodes: list[Any] = []
    microsoft = {"domain": "com.microsoft"}

    def add(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]

    def product(layer: int, name: str, x: str) -> str:
        _, inputs, outputs = products(config)[name]
        weights = [f"{layer}.{name}.codes", f"{layer}.{name}.scales"]
        shape = {"K": inputs, "N": outputs, "bits": 8, "block_size": BLOCK, "accuracy_level": _ACCURACY_INT8}
        return add("MatMulNBits", [x, *weights], [f"{layer}.{name}.out"], **shape, **microsoft)

    def norm(x: str, branch: str, gain: str, out: str) -> tuple[str, str]:
        """The norm of ``x + branch``, and that sum. Epsilon is written out: the defaults of the two operators differ."""
        outputs = [out, "", "", f"{out}.sum"]
        add("SkipSimplifiedLayerNormalization", [x, branch, gain], outputs, epsilon=config.rms_norm_eps, **microsoft)
        return out, f"{out}.sum"

    residual, branch = "embeddings", ""
    for layer in range(config.num_hidden_layers):
        if layer == 0:
            normed = add(
                "SimplifiedLayerNormalization", [residual, "0.before"], ["0.in"], axis=-1, epsilon=config.rms_norm_eps, stash_type=1
            )
        else:
            normed, residual = norm(residual, branch, f"{layer}.before", f"{layer}.in")
        attended = [f"{layer}.attended", f"present.{2 * layer}", f"present.{2 * layer + 1}"]
        past = [f"past.{2 * layer}", f"past.{2 * layer + 1}"]
        sizes = {"num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads}
        places = ["last_positions", "total", "cosine", "sine", *[""] * 7, "new_positions"]
        attention_inputs = [product(layer, "qkv", normed), "", "", *past, *places]
        add("GroupQueryAttention", attention_inputs, attended, **sizes, do_rotary=1, rotary_interleaved=0, **microsoft)
        normed, residual = norm(residual, product(layer, "o", attended[0]), f"{layer}.after", f"{layer}.middle")
        gate = product(layer, "gate", normed)
        sigmoid = add("Sigmoid", [gate], [f"{layer}.sigmoid"])
        swish = add("Mul", [gate, sigmoid], [f"{layer}.swish"])
        gated = add("Mul", [swish, product(layer, "up", normed)], [f"{layer}.gated"])
        branch = product(layer, "down", gated)
    outputs = ["hidden", "", "", "hidden.sum"]
    add("SkipSimplifiedLayerNormalization", [residual, branch, "norm"], outputs, epsilon=config.rms_norm_eps, **microsoft)

    hidden: list[str | int | None] = ["rows", "new", config.hidden_size]
    cache: list[str | int | None] = ["rows", config.num_key_value_heads, "room", config.head_dim]
    numbers = range(2 * config.num_hidden_layers)
    single, whole = TensorProto.FLOAT, TensorProto.INT32
    inputs = [
        helper.make_tensor_value_info("embeddings", single, hidden),
        helper.make_tensor_value_info("last_positions", whole, ["rows"]),
        helper.make_tensor_value_info("total", whole, []),
        helper.make_tensor_value_info("new_positions", whole, ["rows"]),
        helper.make_tensor_value_info("cosine", single, ["positions", config.head_dim // 2]),
        helper.make_tensor_value_info("sine", single, ["positions", config.head_dim // 2]),
        *(helper.make_tensor_value_info(f"past.{number}", single, cache) for number in numbers),
    ]
    results = [helper.make_tensor_value_info("hidden", single, hidden)]
    results += [helper.make_tensor_value_info(f"present.{number}", single, cache) for number in numbers]
    initializers = [_external(name, shape, dtype) for name, (shape, dtype) in expected_tensors(config).items()]
    graph = helper.make_graph(nodes, "backbone", inputs, results, initializers)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="kalle")
    return bytes(model.SerializeToString())


def _external(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """An initializer whose bytes come from elsewhere; the location is a word that nothing opens."""
    from onnx import StringStringEntryProto, TensorProto

    tensor = TensorProto()
    tensor.name = name
    tensor.dims.extend(shape)
    tensor.data_type = TensorProto.UINT8 if dtype == torch.uint8 else TensorProto.FLOAT
    tensor.data_location = TensorProto.EXTERNAL
    size = int(np.prod(shape)) * (1 if dtype == torch.uint8 else 4)
    for key, value in (("location", "memory"), ("offset", "0"), ("length", str(size))):
        tensor.external_data.append(StringStringEntryProto(key=key, value=value))
    return tensor
