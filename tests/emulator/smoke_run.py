"""Runs three kernels in a variant of the build: `python -m tests.emulator.smoke_run sanitized`.

Fails if a result is wrong. Needs neither torch nor pytest.
"""

from __future__ import annotations

import sys

import numpy as np

from tests.emulator import emulator, emulator_build
from tests.emulator.probe_kernels import VARIANTS, aligned

KERNELS = ("forward_fp16_d64", "forward_jvp_fp16_d64", "forward_jvp_fp16_d64_sm90")
ROWS, KEYS, HEAD_DIM = 70, 130, 40  # partial tiles, and a padded head dim


def main(variant: str) -> None:
    """Build the kernels, and compare their results with the formula in float64."""
    file = emulator_build.build_kernels(VARIANTS[variant], wanted=KERNELS.__contains__)
    machine = emulator.import_file(file)
    random = np.random.default_rng(0)
    shapes = {name: (ROWS if "q" in name else KEYS, HEAD_DIM) for name in TENSORS}
    x = {
        name: aligned(random.normal(size=shape).astype(np.float16))
        for name, shape in shapes.items()
    }
    expected = attention(*(x[name].astype(np.float64) for name in TENSORS))

    for kernel in KERNELS:
        outputs = {
            name: aligned(np.full((ROWS, HEAD_DIM), np.nan, np.float16)) for name in MATRICES
        }
        outputs |= {name: np.full(ROWS, np.nan, np.float32) for name in VECTORS}
        params = machine.AttentionParams()
        params.batch = params.heads = params.heads_k = 1
        params.seqlen_q, params.seqlen_k = ROWS, KEYS
        params.head_dim = params.head_dim_v = HEAD_DIM
        params.softmax_scale = HEAD_DIM**-0.5
        for name, array in (x | outputs).items():
            kind = machine.RowVector if name in VECTORS else machine.Tensor
            strides = (0, 0) if name in VECTORS else (0, HEAD_DIM, 0)
            setattr(params, name, kind(array.ctypes.data, *strides))
        with emulator.launching(machine, seed=1, inputs=x, outputs=outputs):
            machine.launch(kernel, params, 0)
        for name in (*MATRICES, *VECTORS) if "jvp" in kernel else ("out", "lse"):
            np.testing.assert_allclose(outputs[name], expected[name], atol=4e-3, err_msg=kernel)


TENSORS = ("q", "k", "v", "tq", "tk", "tv")
MATRICES = ("out", "tout")
VECTORS = ("lse", "mu")


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, tq: np.ndarray, tk: np.ndarray, tv: np.ndarray
) -> dict[str, np.ndarray]:
    """Attention and its tangent for one head."""
    scale = HEAD_DIM**-0.5
    weights = np.exp(scale * q @ k.T)
    total = weights.sum(-1, keepdims=True)
    weights /= total
    tangents = scale * (tq @ k.T + q @ tk.T)
    mu = (weights * tangents).sum(-1, keepdims=True)
    return {
        "out": weights @ v,
        "tout": (weights * (tangents - mu)) @ v + weights @ tv,
        "lse": np.log(total[:, 0]),
        "mu": mu[:, 0],
    }


if __name__ == "__main__":
    main(sys.argv[1])
