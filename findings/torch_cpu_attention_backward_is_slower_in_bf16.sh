#!/usr/bin/env bash
# torch on a CPU: the backward pass of scaled_dot_product_attention takes two to three times as long in bf16 as in fp32 where rows are short.
#
# bf16 halves the memory that moves and, on processors with bf16 products, doubles the arithmetic: one would guess that
# in a mixed-precision training every large operation is at least as fast as in fp32. Its linear layers are, by far.
#
# What happens: the forward pass of the fused attention for CPUs gains nothing from bf16, and its backward pass loses: with heads of 64 and some 2,600
# positions in all, rows of 50 positions take about three times as long as in fp32, rows of 100 two and a half times, of 200 half as long again;
# rows of 1,000 take a fifth less. Two batched products and a softmax in bf16 take a third to a quarter of the fused kernel's
# time at 100 positions, forward and backward together. No warning is given, and under autocast nothing in the code says bf16 at that place.
#
# Why it matters for speech: at 12.5 latent frames a second, as at 25 tokens, an utterance with its text is a row of 50 to 250 positions, where text
# models have thousands. A quarter of a step of a small language model went there; it is 1.3 times as fast without.
#
# torch 2.11.0, numpy 2.4.6, Python 3.11, Linux x86-64 (AMD EPYC with AVX-512 and bf16), one thread, 2026-12-01. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" --quiet --disable-pip-version-check install torch==2.11.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

torch.set_num_threads(1)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability(), "bf16 products:", torch.cpu._is_avx512_bf16_supported())
HEADS, WIDTH, POSITIONS = 6, 64, 2600


def fused(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def products(q, k, v):
    rows, heads, length, width = q.shape
    q, k, v = (x.reshape(rows * heads, length, width) for x in (q, k, v))
    later = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1)
    scores = torch.baddbmm(later, q, k.transpose(1, 2), alpha=width**-0.5)
    return (scores.softmax(-1, torch.float32).to(v.dtype) @ v).view(rows, heads, length, width)


def milliseconds(attention, length, dtype):
    """Processor time of the forward and of the backward pass, the least of nine."""
    inputs = [torch.randn(POSITIONS // length, HEADS, length, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3)]
    gradient = torch.randn_like(inputs[0])
    forward, backward = [], []
    for _ in range(9):
        begun = time.process_time()
        output = attention(*inputs)
        middle = time.process_time()
        output.backward(gradient)
        forward.append(middle - begun)
        backward.append(time.process_time() - middle)
    return 1000 * min(forward), 1000 * min(backward)


if not torch.cpu._is_avx512_bf16_supported():
    raise SystemExit("this processor has no bf16 products: seen on one that has them")
ratios = {}
for length in (25, 50, 100, 200, 400, 1000):
    (f32, b32), (f16, b16) = (milliseconds(fused, length, dtype) for dtype in (torch.float32, torch.bfloat16))
    other = sum(milliseconds(products, length, torch.bfloat16))
    ratios[length] = b16 / b32
    print(
        f"{length:5} positions a row: forward fp32 {f32:5.1f} ms, bf16 {f16:5.1f}; backward fp32 {b32:5.1f}, bf16 {b16:5.1f} ({b16 / b32:.2f} times); "
        f"both by products in bf16 {other:5.1f} against {f16 + b16:5.1f}"
    )
assert ratios[50] > 1.5 and ratios[100] > 1.5, f"the behaviour has changed: backward passes of short rows take {ratios} times as long in bf16"
assert ratios[1000] < 1.2, f"the behaviour has changed: long rows are slower, too: {ratios}"
PYTHON
