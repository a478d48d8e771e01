"""Every CUDA kernel there is: which attention problems it serves, its tile, its source.

The build generates a source file from each entry (csrc/generate.py); `jvp_attn.backends.cuda` and
`python -m jvp_attn.info` choose from them. Nothing but the standard library is imported here, so
that the build can read this file before anything is installed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

ELEMENTS = ("bf16", "fp16")

# Whether products of the sm90 kernels may use a part of a swizzle atom, which is 64 columns wide
# (csrc/sm90/tile.cuh; csrc/generate.py tells the compiler). With False, head dims 65 to 96 take the
# sm90 kernels for 128, and `backward` is slower. The first tests of tests/gpu/conformance_sm90.py
# show on a GPU whether False is necessary.
PARTIAL_SWIZZLE_ATOMS = True

# The steps that the primitives consist of. Each has a class template, in
# csrc/<arch>/<header>.cuh, a flag for that (whether tangents are computed too; "-" where it has no
# such choice), and for each head dim a tile: the rows x keys that a block of threads works on at a
# time. A head dim between these is padded with zeros inside the kernel. Kernels that read a mask
# need more registers, so some have smaller tiles.
_SM80 = """
step              header        class        flag   masked  64     96     128    256
forward           forward       Forward      false  false   64x64  64x64  64x64  64x32
forward           forward       Forward      false  true    64x48  64x64  64x64  64x32
forward_jvp       forward       Forward      true   false   64x64  64x64  64x32  -
forward_jvp       forward       Forward      true   true    64x64  64x48  64x32  -
tangent_only      tangent       TangentOnly  -      false   64x48  64x64  64x32  64x16
tangent_only      tangent       TangentOnly  -      true    64x32  64x64  64x32  64x16
backward_dq       backward_dq   BackwardDq   false  false   64x48  64x64  64x64  64x16
backward_dq       backward_dq   BackwardDq   false  true    64x16  64x64  64x64  64x16
backward_dkv      backward_dkv  BackwardDkv  false  false   32x64  32x64  32x64  16x32
backward_dkv      backward_dkv  BackwardDkv  false  true    16x64  32x64  32x64  16x32
jvp_backward_dq   backward_dq   BackwardDq   true   false   64x32  64x32  64x16  -
jvp_backward_dq   backward_dq   BackwardDq   true   true    64x32  64x32  64x16  -
jvp_backward_dkv  backward_dkv  BackwardDkv  true   false   32x64  32x64  16x64  -
jvp_backward_dkv  backward_dkv  BackwardDkv  true   true    32x64  32x64  16x64  -
"""

# Those that are faster by the instructions that compute capability 9.0 has alone.
_SM90 = """
step              header            class           flag   masked  64       96       128      256
forward           forward           Forward         -      -       192x128  128x176  128x176  128x80
forward_jvp       forward_jvp       ForwardJvp      true   -       128x128  128x112  128x80   -
forward_jvp_q     forward_jvp       ForwardJvp      false  -       128x128  128x112  128x80   -
tangent_only      tangent           TangentOnly     -      -       -        -        -        128x48
backward          backward          Backward        -      -       -        64x128   64x128   -
backward_dq       backward_dq       BackwardDq      -      -       128x128  128x96   128x96   -
backward_dkv      backward_dkv      BackwardDkv     -      -       96x128   64x128   64x128   -
jvp_backward_dq   jvp_backward_dq   JvpBackwardDq   -      -       128x80   128x64   128x48   -
jvp_backward_dkv  jvp_backward_dkv  JvpBackwardDkv  -      -       96x64    64x64    64x64    -
"""

# The classes of the steps that go row by row, one kernel for all head dims, without tiles.
OF_ROWS = {"preprocess": "Preprocess", "bwd_postprocess": "BwdPostprocess"}


@dataclass(frozen=True)
class KernelEntry:
    """One compiled kernel.

    Attributes:
        name: as the extension knows it.
        step: a step of the table, or one of OF_ROWS.
        element: "bf16" or "fp16".
        head_dim: the largest that it serves; None is any.
        masked: whether it reads a mask.
        tile: (rows, keys); None where there are no tiles.
        header: where its class is, below csrc/.
        cpp_class: that class.
        arch: "sm80" runs on compute capability 8.0 and newer, "sm90" on 9.0 alone.
    """

    name: str
    step: str
    element: str
    head_dim: int | None
    masked: bool
    tile: tuple[int, int] | None
    header: str
    cpp_class: str
    arch: str = "sm80"


def kernel_name(
    step: str,
    element: str,
    head_dim: int | None = None,
    masked: bool = False,
    arch: str = "sm80",
) -> str:
    """The name of a kernel: "forward_bf16_d64_masked", "forward_jvp_fp16_d96_sm90"."""
    name = f"{step}_{element}"
    if head_dim is not None:
        name += f"_d{head_dim}"
    return name + ("_masked" if masked else "") + (f"_{arch}" if arch != "sm80" else "")


def padded_head_dim(head_dim: int, head_dim_v: int) -> int | None:
    """The smallest head dim of the kernels that serves a problem; None where there is none."""
    if min(head_dim, head_dim_v) == 0:
        return None
    return next((d for d in HEAD_DIMS if max(head_dim, head_dim_v) <= d), None)


HEAD_DIMS = (64, 96, 128, 256)


def sm90_head_dim(head_dim: int | None) -> int | None:
    """The head dim of the sm90 kernels that serve what sm80 kernels of a head dim serve."""
    if head_dim is None or PARTIAL_SWIZZLE_ATOMS:
        return head_dim
    return -(-head_dim // 64) * 64


def _kernel_of_rows(step: str, element: str) -> KernelEntry:
    return KernelEntry(
        name=kernel_name(step, element),
        step=step,
        element=element,
        head_dim=None,
        masked=False,
        tile=None,
        header=f"sm80/{step}.cuh",
        cpp_class=f"{OF_ROWS[step]}<{element.capitalize()}>",
    )


def _kernels_of(row: list[str], element: str, arch: str) -> Iterator[KernelEntry]:
    step, header, template, flag, masked, *tiles = row
    for head_dim, tile in zip(HEAD_DIMS, tiles, strict=True):
        if tile == "-" or (arch == "sm90" and head_dim != sm90_head_dim(head_dim)):
            continue
        rows, keys = tile.split("x")
        flags = [x for x in (flag, masked) if x != "-"]
        arguments = ", ".join([element.capitalize(), str(head_dim), rows, keys, *flags])
        namespace = "" if arch == "sm80" else f"{arch}::"
        yield KernelEntry(
            name=kernel_name(step, element, head_dim, masked == "true", arch),
            step=step,
            element=element,
            head_dim=head_dim,
            masked=masked == "true",
            tile=(int(rows), int(keys)),
            header=f"{arch}/{header}.cuh",
            cpp_class=f"{namespace}{template}<{arguments}>",
            arch=arch,
        )


def _kernels() -> Iterator[KernelEntry]:
    for element in ELEMENTS:
        for step in OF_ROWS:
            yield _kernel_of_rows(step, element)
        for arch, table in (("sm80", _SM80), ("sm90", _SM90)):
            for line in table.strip().splitlines()[1:]:
                yield from _kernels_of(line.split(), element, arch)


KERNELS: dict[str, KernelEntry] = {kernel.name: kernel for kernel in _kernels()}
