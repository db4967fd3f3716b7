#!/usr/bin/env bash
# onnxruntime: a padded chunk after a prompt overwrites the past in GroupQueryAttention's cache, without an error.
#
# A speech language model reads its prompt (text, then the latents of a voice) in chunks of a fixed length and pads the last
# one. One would guess that a chunk of 4 positions of which 2 are valid, behind 5 cached positions, writes behind the 5:
# `seqlens_k` says that 7 positions are valid afterwards, and that is what it is documented to say.
#
# What happens: the operator takes "valid after the call" minus "positions in the call" (7 - 4 = 3) for the length of the past. It
# writes the new keys to places 3, 4, ..., so the last two positions of the prompt are gone, rotates the new ones by the angles
# of 3, 4, ... and returns numbers that look like any others. Rows are refused for such a chunk only when there are several of them.
# With the optional input `query_seqlens` (valid positions of the chunk, the 17th) the same call is right.
#
# Why it matters for speech: a voice's prompt is cut short by a frame or two, which is heard as a slip at the seam and is
# not found by a test whose prompts are a multiple of the chunk.
#
# onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, CPU, Linux x86-64, 2026-11-30. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" --quiet --disable-pip-version-check install onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

HEADS, SIZE, ROOM = 1, 8, 16
print("onnxruntime", ort.__version__)


def session(with_query_lengths):
    inputs = ["q", "k", "v", "past_k", "past_v", "seqlens", "total"]
    shapes = {"q": ["b", "l", SIZE], "k": ["b", "l", SIZE], "v": ["b", "l", SIZE], "past_k": ["b", HEADS, "p", SIZE], "past_v": ["b", HEADS, "p", SIZE]}
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    infos += [helper.make_tensor_value_info("seqlens", TensorProto.INT32, ["b"]), helper.make_tensor_value_info("total", TensorProto.INT32, [])]
    if with_query_lengths:
        inputs += [""] * 9 + ["query_lengths"]
        infos.append(helper.make_tensor_value_info("query_lengths", TensorProto.INT32, ["b"]))
    node = helper.make_node("GroupQueryAttention", inputs, ["y", "new_k", "new_v"], domain="com.microsoft", num_heads=HEADS, kv_num_heads=HEADS)
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "new_k", "new_v")]
    graph = helper.make_graph([node], "attention", infos, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


random = np.random.default_rng(0)
past = np.zeros((1, HEADS, ROOM, SIZE), np.float32)
past[:, :, :5] = random.standard_normal((1, HEADS, 5, SIZE))
chunk = random.standard_normal((1, 4, SIZE)).astype(np.float32)
chunk[:, 2:] = 9  # two valid positions, two of padding
feeds = {"q": chunk, "k": chunk, "v": chunk, "past_k": past, "past_v": past, "seqlens": np.array([6], np.int32), "total": np.array(9, np.int32)}

_, guessed, _ = session(True).run(None, feeds | {"query_lengths": np.array([2], np.int32)})
_, got, _ = session(False).run(None, feeds)
kept = [bool(np.array_equal(cache[0, 0, :5], past[0, 0, :5])) for cache in (guessed, got)]
moved = bool(np.array_equal(got[0, 0, 3:5], chunk[0, :2]))
print("the 5 cached positions after the call: with query_seqlens", "kept" if kept[0] else "changed", "- without it", "kept" if kept[1] else "changed")
print("places 3 and 4 hold the two new positions:", moved)
assert kept == [True, False] and moved, "the behaviour has changed"
PYTHON
