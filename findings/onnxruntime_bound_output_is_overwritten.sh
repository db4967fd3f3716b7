#!/usr/bin/env bash
# onnxruntime: an array taken from a bound output changes when the binding runs again.
#
# `OrtValue.numpy()` of an input that came from numpy is a copy-free view by design. One would guess that the array got from
# `binding.get_outputs()[0].numpy()` is a result, as that of `session.run` is: an array of one's own.
#
# What happens: it is a view (`array.flags.owndata` is False). The next run of the same
# binding writes into it, so a list of the outputs of ten steps is ten times the last one.
#
# Why it matters for speech: a streaming decoder or language model keeps the hidden state or the audio of each step; kept this
# way, every chunk that waits to be played becomes the newest one. Binding the output anew each step, or copying, is right.
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

print("onnxruntime", ort.__version__)
node = helper.make_node("Mul", ["x", "x"], ["y"])
x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
model = helper.make_model(helper.make_graph([node], "square", [x], [y]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

binding = session.io_binding()
binding.bind_output("y", "cpu")
steps = []
for step in (1, 2, 3):
    binding.bind_cpu_input("x", np.full(4, step, np.float32))
    session.run_with_iobinding(binding)
    steps.append(binding.get_outputs()[0].numpy())
by_run = [session.run(None, {"x": np.full(4, step, np.float32)})[0] for step in (1, 2, 3)]

firsts = [float(array[0]) for array in steps]
print("squares of 1, 2, 3 by session.run:         ", [float(array[0]) for array in by_run])
print("the same kept from one binding's outputs:  ", firsts, "- owns its memory:", steps[0].flags.owndata)
assert [float(array[0]) for array in by_run] == [1, 4, 9], "session.run has changed"
assert firsts == [9, 9, 9] and not steps[0].flags.owndata, "the behaviour has changed"
PYTHON
