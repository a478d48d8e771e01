"""The inputs and expected outputs of the kernels of conformance.cu, in NumPy.

conformance_sm90.py uses `Probe` and its functions too.
"""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from runpy import run_path
from types import ModuleType
from typing import Any

import numpy as np
import pybind11
import torch

from tests.emulator import emulator
from tests.emulator.probe_kernels import aligned

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)
BEFORE = 77  # each byte of an output before the launch


@dataclass(frozen=True)
class Probe:
    """A kernel, its input, and the exact output.

    Attributes:
        given: params.q; a tensor (batch, rows, heads, columns) of elements, or any array.
        more: further inputs, by their names in AttentionParams.
        ulps: the relative tolerance, in units in the last place.
        absolute: an additional tolerance, for float32 sums in any order.
    """

    kernel: str
    given: Array
    expected: Array
    more: Mapping[str, Array] = field(default_factory=dict)
    ulps: int = 0
    absolute: float = 0

    def assert_agrees(self, output: Array, expected: Array | None = None) -> None:
        """The output is the expected one, bit for bit if there is no tolerance."""
        expected = self.expected if expected is None else expected
        assert output.shape == expected.shape
        if not (self.ulps or self.absolute):
            assert output.tobytes() == expected.tobytes()
            return
        finite = np.isfinite(expected)
        assert np.array_equal(output[~finite], expected[~finite], equal_nan=True)
        tolerance = self.ulps * np.spacing(np.abs(expected[finite])) + self.absolute
        assert np.all(np.abs(output[finite].astype(float) - expected[finite]) <= tolerance)


# ----------------------------------------------------------------------------
# Elements


def bits_of(x: Array, element: str) -> Array:
    """float32 as elements, rounded to the nearest."""
    tensor = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[element]
    return tensor.to(dtype).view(torch.int16).numpy().view(np.uint16)


def values_of(bits: Array, element: str) -> Array:
    """Elements as float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[element]
    tensor = torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(dtype)
    return tensor.float().numpy()


def floats_to_round(element: str) -> Array:
    """Numbers of all magnitudes, midpoints between elements, overflowing numbers, and infinity."""
    ordinary = RANDOM.standard_normal(4096) * 2.0 ** RANDOM.integers(-40, 40, 4096)
    below = values_of(RANDOM.integers(0, 0x7000, 2048).astype(np.uint16), element)
    above = values_of(bits_of(below, element) + 1, element)
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        65504,
        65519.99,
        65520,
        1e-45,
        3.4e38,
        -3.4e38,
        6e-8,
        3e-8,
    ]
    special += [2.0**-24, 2.0**-25, -(2.0**-25), 1.5 * 2.0**-24]
    return np.concatenate([ordinary, (below + above) / 2, special]).astype(np.float32)


def every_number(element: str) -> Array:
    """All elements except NaN, whose bits may change."""
    bits = np.arange(2**16, dtype=np.uint16)
    return bits[~np.isnan(values_of(bits, element))]


# ----------------------------------------------------------------------------
# Probes


def indices() -> Probe:
    block, thread = np.divmod(np.arange(3 * 64, dtype=np.uint32), 64)
    expected = np.stack([thread, block, np.zeros_like(block)], 1).astype(np.uint32)
    return Probe("indices", np.zeros(3, np.uint32), expected)


def reverse_floats() -> Probe:
    x = RANDOM.standard_normal(64).astype(np.float32)
    return Probe("reverse_floats", x, x[::-1].copy())


def random_bytes(*shape: int) -> Array:
    return RANDOM.integers(0, 256, shape).astype(np.uint8)


def reverse_words() -> Probe:
    x = random_bytes(64, 16)
    return Probe("reverse_words", x, x[::-1].copy())


def copy_groups() -> Probe:
    x = random_bytes(3, 64, 16)
    return Probe("copy_groups", x, x[:, ::-1].copy())


def copy_nothing() -> Probe:
    return Probe("copy_nothing", random_bytes(1), np.zeros((32, 16), np.uint8))


def widen_bytes() -> Probe:
    x = random_bytes(1001)
    return Probe("widen_bytes", x, x.astype(np.uint32))


def widen_elements() -> Probe:
    x = random_bytes(2002).view(np.uint16)
    return Probe("widen_elements", x, x.astype(np.uint32))


def copy_elements() -> Probe:
    x = random_bytes(2002).view(np.uint16)
    return Probe("copy_elements", x, x)


def copy_async_parts() -> Probe:
    x = random_bytes(17, 16)
    copied = np.arange(16) < np.arange(17)[:, None]
    return Probe("copy_async_parts", x, np.where(copied, x, 0).astype(np.uint8))


def any_thread() -> Probe:
    conditions = np.zeros((40, 64), np.float32)
    conditions[np.arange(36), RANDOM.integers(0, 64, 36)] = 1  # one thread; in four rows none
    conditions[30:35] = RANDOM.integers(0, 2, (5, 64))
    of_warp = np.repeat(conditions.reshape(40, 2, 32).any(2), 32, 1)
    of_block = np.repeat(conditions.any(1), 64).reshape(40, 64)
    return Probe("any", conditions, np.stack([of_warp, of_block]).astype(np.float32))


def shuffle() -> Probe:
    x = RANDOM.standard_normal(32).astype(np.float32)
    lanes = np.arange(32)
    return Probe("shuffle", x, np.stack([x[lanes ^ mask] for mask in range(32)]))


def matrices(transposed: bool) -> Probe:
    x = random_bytes(4, 8, 8, 2).view(np.uint16)[..., 0]
    y = x.transpose(0, 2, 1) if transposed else x
    # Lane 4g + t holds the elements (g, 2t) and (g, 2t + 1) of each matrix.
    held = y.reshape(4, 32, 2).transpose(1, 0, 2).copy()
    return Probe("matrices_transposed" if transposed else "matrices", x.copy(), held)


def multiply_add(element: str) -> Probe:
    a, b = (bits_of(RANDOM.standard_normal(shape), element) for shape in ((16, 16), (16, 8)))
    c = RANDOM.standard_normal((16, 8)).astype(np.float32)
    given = np.concatenate([a.ravel(), b.ravel(), c.ravel().view(np.uint16)])
    exact = values_of(a, element).astype(float) @ values_of(b, element).astype(float) + c
    return Probe(f"multiply_add_{element}", given, exact.astype(np.float32), absolute=2e-5)


def exp2() -> Probe:
    special = [0.0, -0.0, 1.0, 127.9, 128.0, 1e4, np.inf, -np.inf, -1e4, -126.0, -126.1, -127.0]
    x = np.concatenate([RANDOM.uniform(-140, 130, 10000), RANDOM.uniform(-1, 1, 10000), special])
    x = x.astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp2(x.astype(float)).astype(np.float32)
    exact[exact < np.finfo(np.float32).tiny] = 0
    # The instruction is within 2 ulp, and both that it is compared with are rounded.
    return Probe("exp2", x, exact, ulps=3)


def multiply() -> Probe:
    x = RANDOM.uniform(-1e4, 1e4, (1000, 3)).astype(np.float32)
    x[::2, 2] = x[::2, 0] * x[::2, 1]  # a fused product would leave the rounding error
    return Probe("multiply", x, x[:, 0] * x[:, 1] - x[:, 2])


def divide() -> Probe:
    x = np.exp2(RANDOM.uniform(-60, 60, (10000, 2))) * RANDOM.choice([-1, 1], (10000, 2))
    x = x.astype(np.float32)
    x[:2] = [[1, 2**126], [2**-100, 2**-126]]
    exact = (x[:, 0].astype(float) / x[:, 1]).astype(np.float32)
    # The instruction is within 2 ulp, and both that it is compared with are rounded.
    return Probe("divide", x, exact, ulps=3)


def pack(element: str) -> Probe:
    x = floats_to_round(element)
    return Probe(f"pack_{element}", x, bits_of(x, element))


def unpack(element: str) -> Probe:
    bits = every_number(element)
    return Probe(f"unpack_{element}", bits, values_of(bits, element))


PROBES = [
    *(indices(), reverse_floats(), reverse_words(), any_thread(), shuffle()),
    *(copy_groups(), copy_nothing(), copy_async_parts()),
    *(widen_bytes(), widen_elements(), copy_elements()),
    *(matrices(transposed=False), matrices(transposed=True), exp2(), multiply(), divide()),
    *(probe(element) for probe in (multiply_add, pack, unpack) for element in ("bf16", "fp16")),
]


# ----------------------------------------------------------------------------
# Launches


def params_of(module: ModuleType, probe: Probe, address: Callable[[str], int], output: int) -> Any:
    """AttentionParams with the addresses and shapes of the inputs and of the output."""
    params = module.AttentionParams()
    params.out = module.Tensor(output, 0, 0, 0)
    params.heads = params.heads_k = 1
    if probe.given.ndim == 4:
        params.batch, params.seqlen_q, params.heads, params.head_dim = probe.given.shape
        params.q = module.Tensor(address("q"), *strides_of(probe.given))
    else:
        # For tensor maps: rows of 8 elements.
        params.batch = params.seqlen_q = len(probe.given)
        params.head_dim = 8
        params.q = module.Tensor(address("q"), 8, 8, 8)
    for name, x in probe.more.items():
        params.seqlen_k = len(x)
        if name == "v":
            _, params.seqlen_k, params.heads_k, params.head_dim_v = x.shape
            params.v = module.Tensor(address("v"), *strides_of(x))
        else:
            setattr(params, name, address(name))
    return params


def strides_of(x: Array) -> list[int]:
    """The strides of batch, row and head, in elements."""
    return [stride // x.itemsize for stride in x.strides[:3]]


def inputs_of(probe: Probe) -> dict[str, Array]:
    """All inputs by name, at multiples of 16 bytes, as CUDA allocates memory."""
    return {name: aligned(x) for name, x in {"q": probe.given, **probe.more}.items()}


def run_in_the_emulator(module: ModuleType, probe: Probe) -> Array:
    """The output of the kernel in the emulator."""
    output = aligned(np.full(probe.expected.nbytes, BEFORE, np.uint8).view(probe.expected.dtype))
    inputs, output = inputs_of(probe), output.reshape(probe.expected.shape)
    with emulator.launching(module, seed=1, inputs=inputs, outputs={"output": output}):
        params = params_of(module, probe, lambda name: inputs[name].ctypes.data, output.ctypes.data)
        module.launch(probe.kernel, params, 0)
    return output


def run_on_the_gpu(module: ModuleType, probe: Probe) -> Array:
    """The output of the kernel on the current GPU."""
    inputs = {
        name: torch.from_numpy(x.ravel().view(np.uint8)).cuda()
        for name, x in inputs_of(probe).items()
    }
    output = torch.full((probe.expected.nbytes,), BEFORE, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    params = params_of(module, probe, lambda name: inputs[name].data_ptr(), output.data_ptr())
    module.launch(probe.kernel, params, stream)
    return output.cpu().numpy().view(probe.expected.dtype).reshape(probe.expected.shape)


def build_for_gpu(folder: Path, source: str, arch: str) -> Path:
    """Compile the kernels of a source file with nvcc, as a module of its name plus `_gpu`.

    Args:
        folder: where the module is written.
        source: a file name in tests/gpu.
        arch: such as "sm_80".
    """
    toolkit = run_path(str(ROOT / "setup.py"))["find_toolkit"]()
    if toolkit is None:
        raise FileNotFoundError("no nvcc in CUDA_HOME, CUDA_PATH or PATH")
    name = f"{Path(source).stem}_gpu"
    file = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [
        *(toolkit.root / "bin" / "nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-shared"),
        f"-DJVP_ATTN_MODULE={name}",
        *("-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden"),
        *("-I", ROOT / "csrc", "-I", ROOT / "tests" / "emulator"),
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
        *(HERE / source, HERE / "conformance_module.cpp", "-o", file),
    ]
    result = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0 and "warning" not in result.stdout, result.stdout
    return file
