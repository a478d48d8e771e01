"""The table of kernels is consistent, and the generated sources match it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from jvp_attn.backends.kernel_select import PRIMITIVES, kernels_of, why_no_kernels
from jvp_attn.backends.kernel_table import KERNELS, OF_ROWS, padded_head_dim

ROOT = Path(__file__).parents[2]
generate_py = SimpleNamespace(**run_path(str(ROOT / "csrc" / "generate.py")))
FEW = [KERNELS[name] for name in ("preprocess_bf16", "forward_bf16_d64", "forward_fp16_d64_masked")]


def test_the_table_does_not_import_torch() -> None:
    script = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'torch' not in sys.modules, 'torch'"
    )
    table = ROOT / "jvp_attn" / "backends" / "kernel_table.py"
    subprocess.run([sys.executable, "-c", script, table], check=True)


def test_a_kernel_name_gives_its_step_dtype_head_dim_and_class() -> None:
    kernel = KERNELS["jvp_backward_dq_fp16_d128_masked"]
    assert (kernel.step, kernel.element, kernel.head_dim) == ("jvp_backward_dq", "fp16", 128)
    assert kernel.masked
    assert kernel.header == "sm80/backward_dq.cuh"
    rows, keys = kernel.tile
    assert kernel.cpp_class == f"BackwardDq<Fp16, 128, {rows}, {keys}, true, true>"
    assert KERNELS["preprocess_bf16"].cpp_class == "Preprocess<Bf16>"


def test_a_kernel_name_gives_its_architecture() -> None:
    kernel = KERNELS["forward_jvp_bf16_d128_sm90"]
    assert (kernel.step, kernel.arch, kernel.masked) == ("forward_jvp", "sm90", False)
    assert kernel.header == "sm90/forward_jvp.cuh"
    rows, keys = kernel.tile
    assert kernel.cpp_class == f"sm90::ForwardJvp<Bf16, 128, {rows}, {keys}, true>"


def test_every_kernel_exists_in_both_dtypes_and_on_sm80_with_and_without_mask() -> None:
    for name, kernel in KERNELS.items():
        twin = name.replace("bf16", "fp16") if "bf16" in name else name.replace("fp16", "bf16")
        assert twin in KERNELS
        if kernel.step not in OF_ROWS and kernel.arch == "sm80":
            assert name.removesuffix("_masked") in KERNELS
            assert name.removesuffix("_masked") + "_masked" in KERNELS


def test_tile_sizes_are_multiples_of_16() -> None:
    for kernel in KERNELS.values():
        assert kernel.tile is None or all(size % 16 == 0 for size in kernel.tile), kernel.name


def test_without_partial_swizzle_atoms_sm90_has_no_kernels_of_head_dim_96(tmp_path: Path) -> None:
    table = (ROOT / "jvp_attn" / "backends" / "kernel_table.py").read_text()
    constant = "PARTIAL_SWIZZLE_ATOMS = "
    assert table.count(constant) == 1
    kernels = {}
    for partial in (True, False):
        path = tmp_path / f"{partial}.py"
        path.write_text(re.sub(rf"^{constant}\w+$", f"{constant}{partial}", table, flags=re.M))
        kernels[partial] = run_path(str(path))["KERNELS"]
    missing = kernels[True].keys() - kernels[False].keys()
    assert kernels[True].keys() > kernels[False].keys()
    assert {n for n in missing if "_d96_sm90" in n} == missing
    assert not any("_d96_sm90" in n for n in kernels[False])


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "padded"),
    [(1, 1, 64), (64, 64, 64), (64, 65, 96), (97, 8, 128), (128, 129, 256), (256, 256, 256)],
)
def test_head_dims_are_padded_to_the_next_kernel(
    head_dim: int, head_dim_v: int, padded: int
) -> None:
    assert padded_head_dim(head_dim, head_dim_v) == padded


def test_no_kernel_supports_a_head_dim_above_256() -> None:
    assert padded_head_dim(257, 64) is None
    assert padded_head_dim(64, 0) is None
    assert all(kernels_of(name, torch.bfloat16, 257, 64) is None for name in PRIMITIVES)


def names_of(primitive: str, head_dim: int) -> list[str] | None:
    kernels = kernels_of(primitive, torch.bfloat16, head_dim, head_dim)
    return None if kernels is None else [kernel.name for kernel in kernels]


def test_kernels_of_each_primitive_in_launch_order() -> None:
    assert names_of("forward", 256) == ["forward_bf16_d256"]
    assert names_of("forward_jvp", 128) == ["forward_jvp_bf16_d128"]
    assert names_of("forward_jvp", 256) == [
        "forward_bf16_d256",
        "tangent_only_bf16_d256",
    ]
    assert names_of("backward", 80) == [
        "preprocess_bf16",
        "backward_dq_bf16_d96",
        "backward_dkv_bf16_d96",
    ]
    assert names_of("jvp_backward", 64) == [
        "preprocess_bf16",
        "jvp_backward_dq_bf16_d64",
        "jvp_backward_dkv_bf16_d64",
    ]
    assert names_of("jvp_backward", 256) is None


SMALL = (8, 8)


def qkv(
    seqlens: tuple[int, int], head_dims: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v without data."""
    (seqlen_q, seqlen_k), (head_dim, head_dim_v) = seqlens, head_dims
    shapes = (
        (1, seqlen_q, 1, head_dim),
        (1, seqlen_k, 1, head_dim),
        (1, seqlen_k, 1, head_dim_v),
    )
    q, k, v = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    return q, k, v


@pytest.mark.parametrize(
    ("seqlens", "head_dims", "dtype", "capability", "reason"),
    [
        (SMALL, SMALL, torch.float32, (9, 0), "compute in float16 and bfloat16, and q has float32"),
        (SMALL, SMALL, torch.float16, (7, 5), "need compute capability 8.0 or newer"),
        (SMALL, SMALL, torch.float16, (7, 5), "and the device has 7.5"),
        ((2**30, 8), SMALL, torch.float16, (8, 0), "up to 1073741823, and that of q is 1073741824"),
        ((8, 2**30), SMALL, torch.float16, (8, 0), "up to 1073741823, and that of k is 1073741824"),
        (SMALL, (512, 8), torch.float16, (8, 0), "head_dim 512 is above 256, the kernels' largest"),
        (SMALL, (8, 257), torch.float16, (9, 0), "head_dim_v 257 is above 256, the kernels'"),
        (SMALL, (0, 8), torch.float16, (9, 0), "head_dim is 0, and the kernels' smallest is 1"),
        (SMALL, (8, 0), torch.float16, (9, 0), "head_dim_v is 0, and the kernels' smallest is 1"),
    ],
)
def test_a_problem_without_kernels_has_a_reason(
    seqlens: tuple[int, int],
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    capability: tuple[int, int],
    reason: str,
) -> None:
    assert reason in (why_no_kernels(*qkv(seqlens, head_dims, dtype), capability) or "")
    assert why_no_kernels(*qkv(SMALL, (1, 256), torch.bfloat16), (8, 0)) is None


# ----------------------------------------------------------------------------
# Generated sources


def test_each_kernel_has_a_source_and_is_listed(tmp_path: Path) -> None:
    sources = generate_py.generate(tmp_path, generate_py.kernel_table())
    assert sorted(sources) == sorted(tmp_path.iterdir())
    assert {path.stem for path in sources} == {*KERNELS, "all_kernels"}
    for name, kernel in KERNELS.items():
        text = (tmp_path / f"{name}.cu").read_text()
        assert f"JVP_ATTN_KERNEL({name}, {kernel.cpp_class})" in text
        assert f'#include "{kernel.header}"' in text
        launch = {"sm80": "sm80/launch.cuh", "sm90": "sm90/launch.cuh"}[kernel.arch]
        assert f'#include "{launch}"' in text
    listed = (tmp_path / "all_kernels.cpp").read_text()
    assert all(f"extern const Kernel {name};" in listed for name in KERNELS)


def test_without_partial_swizzle_atoms_sources_say_so(tmp_path: Path) -> None:
    definition = "#define JVP_ATTN_PARTIAL_SWIZZLE_ATOMS 0"
    for partial in (True, False):
        sources = generate_py.generate(tmp_path, FEW, partial_swizzle_atoms=partial)
        found = [definition in path.read_text() for path in sources if path.suffix == ".cu"]
        assert found == [not partial] * len(FEW)


def test_unchanged_sources_are_not_rewritten(tmp_path: Path) -> None:
    generate_py.generate(tmp_path, FEW)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    changed = tmp_path / "preprocess_bf16.cu"
    changed.write_text("something else")
    generate_py.generate(tmp_path, FEW)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path for path in after if after[path] != before[path]} == {changed}
    assert "Preprocess" in changed.read_text()


def test_only_generated_sources_are_deleted(tmp_path: Path) -> None:
    generate_py.generate(tmp_path, FEW)
    by_hand = tmp_path / "by_hand.cu"
    by_hand.write_text("// by hand\n")
    generate_py.generate(tmp_path, FEW[:1])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"preprocess_bf16.cu", "all_kernels.cpp", "by_hand.cu"}
