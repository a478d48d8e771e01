"""Versions, devices and backends for a bug report: `python -m jvp_attn.info [--json]`.

With `--shape batch,seqlen,heads,head_dim` it prints instead which kernels would compute attention
of this shape, and why: on the present device, or on another with `--capability 8.0`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jvp_attn.backends import kernel_report
from jvp_attn.backends.select import available_backends, current_backend
from jvp_attn.validation import DTYPES

if TYPE_CHECKING:
    from jvp_attn._C import BuildInfo, Device


@dataclass(frozen=True, kw_only=True)
class Extension:
    """The CUDA extension: how it was built, or why it cannot be used."""

    build: BuildInfo | None = None
    import_error: str | None = None
    runtime_version: str | None = None
    driver_version: str | None = None
    device_error: str | None = None


@dataclass(frozen=True, kw_only=True)
class CpuExtension:
    """The CPU extension: the instruction sets that this CPU supports, or why it cannot be used."""

    instruction_sets: list[str] | None = None  # the first is used
    import_error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that `python -m jvp_attn.info` prints."""

    jvp_attn: str
    python: str
    torch: str
    torch_cuda: str | None  # None is a CPU-only torch
    os: str
    cpu: str
    cpu_extension: CpuExtension
    extension: Extension
    devices: list[Device]
    available_backends: tuple[str, ...]
    current_backend: str


def collect() -> Report:
    """Collect a report about this process and machine."""
    extension, devices = _extension_and_devices()
    return Report(
        jvp_attn=version("jvp-attn"),
        python=platform.python_version(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        os=platform.platform(),
        cpu=f"{_cpu_model()}, {os.cpu_count()} cores",
        cpu_extension=_cpu_extension(),
        extension=extension,
        devices=devices,
        available_backends=available_backends(),
        current_backend=current_backend(),
    )


def as_text(report: Report) -> str:
    """Format a report, one fact per line."""
    cuda = f"CUDA {report.torch_cuda}" if report.torch_cuda else "CPU only"
    lines = [
        ("jvp_attn", report.jvp_attn),
        ("python", report.python),
        ("torch", f"{report.torch} ({cuda})"),
        ("os", report.os),
        ("cpu", f"{report.cpu}; {_cpu_extension_text(report.cpu_extension)}"),
        ("extension", _extension_text(report.extension)),
        *[("device", _device_text(device)) for device in report.devices],
    ]
    if not report.devices:
        lines.append(("devices", f"none ({report.extension.device_error or 'torch sees none'})"))
    backends = ", ".join(report.available_backends)
    lines.append(("backend", f"{report.current_backend} (available: {backends})"))
    return "\n".join(f"{name:<11}{text}" for name, text in lines)


def main() -> None:
    """Print a report."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.shape is None:
        of_a_problem = ("seqlen_k", "heads_k", "head_dim_v", "mask", "capability")
        if any(getattr(arguments, name) for name in of_a_problem):
            parser.error("these options describe a problem, which also needs --shape")
        report = collect()
        print(json.dumps(asdict(report), indent=2) if arguments.json else as_text(report))
        return
    try:
        reports = kernel_report.report_problem(
            getattr(torch, arguments.dtype),
            arguments.shape,
            seqlen_k=arguments.seqlen_k,
            heads_k=arguments.heads_k,
            head_dim_v=arguments.head_dim_v,
            masked=arguments.mask,
            capability=arguments.capability,
        )
    except ValueError as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
    else:
        print(kernel_report.as_text(reports))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jvp_attn.info",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    problem = parser.add_argument_group("which kernels would compute attention")
    problem.add_argument("--shape", type=_shape, help="of q: batch,seqlen,heads,head_dim")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    problem.add_argument("--dtype", choices=dtypes, default="bfloat16", help="%(default)s")
    problem.add_argument("--seqlen-k", type=_size, help="of k and v; as of q by default")
    problem.add_argument("--heads-k", type=_size, help="of k and v; as of q by default")
    problem.add_argument("--head-dim-v", type=_size, help="of v; as of q by default")
    problem.add_argument("--mask", action="store_true", help="there is an attn_mask")
    problem.add_argument("--capability", type=_capability, help="of a device: 8.0, 9.0, ...")
    return parser


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+){3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not batch,seqlen,heads,head_dim")
    return tuple(map(int, text.split(",")))


def _size(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 16")
    return int(text)


def _capability(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d+)\.(\d)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability such as 8.0")
    return int(match[1]), int(match[2])


def _extension_and_devices() -> tuple[Extension, list[Device]]:
    try:
        module = importlib.import_module("jvp_attn._C")
    except ImportError as error:
        return Extension(import_error=str(error)), _devices_seen_by_torch()
    extension = Extension(
        build=module.build_info(),
        runtime_version=module.runtime_version(),
        driver_version=module.driver_version(),
        device_error=module.device_error(),
    )
    return extension, module.devices()


def _cpu_extension() -> CpuExtension:
    try:
        module = importlib.import_module("jvp_attn._cpu")
    except ImportError as error:
        return CpuExtension(import_error=str(error))
    return CpuExtension(instruction_sets=module.instruction_sets())


def _cpu_extension_text(extension: CpuExtension) -> str:
    if extension.instruction_sets is None:
        why = f"{extension.import_error}; JVP_ATTN_CPU=1 pip install says what is missing"
        return f"no kernels ({why})"
    return f"kernels for {', '.join(extension.instruction_sets)}"


def _devices_seen_by_torch() -> list[Device]:
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": properties.name,
            "capability": (properties.major, properties.minor),
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            # torch's stub lacks this attribute.
            "shared_memory_per_block": properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        }
        for properties in every
    ]


def _extension_text(extension: Extension) -> str:
    if extension.build is None:
        return f"none ({extension.import_error}); JVP_ATTN_CUDA=1 pip install says what is missing"
    build = extension.build
    return (
        f"{' '.join(build['archs'])}; nvcc {build['nvcc']}, {build['compiler']}, "
        f"git {build['git_hash']}; CUDA runtime {extension.runtime_version}, "
        f"driver {extension.driver_version or 'missing'}"
    )


def _device_text(device: Device) -> str:
    major, minor = device["capability"]
    return (
        f"{device['name']}, compute capability {major}.{minor}, "
        f"{device['multiprocessors']} SMs, {device['memory'] / 2**30:.0f} GiB, "
        f"{device['shared_memory_per_block'] // 1024} KiB of shared memory a block"
    )


def _cpu_model() -> str:
    # `platform.processor()` is empty on most Linux systems.
    try:
        described = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        described = []
    models = (line.partition(":")[2].strip() for line in described if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
