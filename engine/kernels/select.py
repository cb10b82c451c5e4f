"""Which dtype and which kernels a device gets. The kernels' modules are imported only when chosen: some need
libraries that the machine may lack, and some take long."""

from dataclasses import dataclass

import torch
from llvmlite.binding import get_host_cpu_features

from engine.kernels.protocol import Kernels, UnsupportedDevice

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Choice:
    dtype: torch.dtype
    facts: tuple[str, ...]  # sentences worth a log line


def choose_dtype(wanted: str, device: torch.device, stored: torch.dtype) -> Choice:
    """`wanted` is "auto" or a dtype's name; `stored` is the checkpoint's.

    auto: on CUDA the checkpoint's own half precision (float32 becomes bfloat16: tensor cores); on a CPU
    bfloat16 where it multiplies such numbers in hardware, else float32.
    """
    if wanted != "auto" and wanted not in NAMES:
        raise UnsupportedDevice(f"dtype {wanted!r} is unknown; supported: auto, {', '.join(NAMES)}")
    dtype = _fastest(device, stored) if wanted == "auto" else NAMES[wanted]
    if dtype == torch.float16 and device.type == "cpu":
        raise UnsupportedDevice(
            "float16 multiplies a hundred times slower than float32 on a CPU; "
            "set model.dtype to auto, bfloat16 or float32"
        )
    if dtype == stored:
        return Choice(dtype, ())
    return Choice(dtype, (f"weights converted from {_name(stored)} to {_name(dtype)}",))


def make_kernels(device: torch.device, dtype: torch.dtype, exact: bool = True) -> Kernels:
    """The fastest exact kernels for the device; with `exact` false the fastest. On a CPU they are one."""
    if device.type == "cpu":
        from engine.kernels.cpu import CpuKernels

        return CpuKernels(dtype)
    if device.type == "cuda":
        from engine.kernels.cuda import CudaKernels

        return CudaKernels(dtype, device, exact=exact)
    raise UnsupportedDevice(f"device {str(device)!r} is not supported; supported: cpu, cuda")


def reference_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The plain ones, for any device: what the others are proved by."""
    from engine.kernels.reference import ReferenceKernels

    return ReferenceKernels(dtype, device)


def _fastest(device: torch.device, stored: torch.dtype) -> torch.dtype:
    if device.type != "cpu":
        return torch.bfloat16 if stored == torch.float32 else stored
    found = get_host_cpu_features()
    return torch.bfloat16 if found.get("amx-bf16") or found.get("avx512bf16") else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
