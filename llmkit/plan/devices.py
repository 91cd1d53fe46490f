"""Devices by name, as their makers' data sheets say: what a plan for another machine, and a run's MFU, reckon with."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from llmkit.core.errors import RecipeError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator and its place among others. Rates are peaks, dense (without sparsity)."""

    name: str
    memory: int
    """Bytes."""
    half: float
    """Floating-point operations a second in bf16 and fp16, summed in fp32."""
    single: float
    """In fp32, without tensor cores."""
    quarter: float
    """In fp8; 0 where it has none."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second, one way, to another one of the same host."""
    network: float
    """Bytes a second, one way, of the network that each has to other hosts: what such hosts are commonly built with."""
    here: int
    """How many a host has."""
    source: str = ""
    """The data sheet."""
    known: tuple[str, ...] = ()
    """What torch calls it: all of these words are in the name."""


_NVIDIA = "https://www.nvidia.com/en-us/"
_GEN4 = 32e9  # PCIe x16, one way
_400G, _200G, _100G = 50e9, 25e9, 12.5e9

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # the larger memory stands first: its name holds what the smaller one's does
        Device(
            "b200-180gb",
            180 * GIB,
            2250e12,
            75e12,
            4500e12,
            7.7e12,
            900e9,
            _400G,
            8,
            f"{_NVIDIA}data-center/hgx/",
            ("B200",),
        ),
        Device(
            "h200-141gb",
            141 * GIB,
            989e12,
            67e12,
            1979e12,
            4.8e12,
            450e9,
            _400G,
            8,
            f"{_NVIDIA}data-center/h200/",
            ("H200",),
        ),
        Device(
            "h100-80gb",
            80 * GIB,
            989e12,
            67e12,
            1979e12,
            3.35e12,
            450e9,
            _400G,
            8,
            f"{_NVIDIA}data-center/h100/",
            ("H100",),
        ),
        Device(
            "a100-80gb",
            80 * GIB,
            312e12,
            19.5e12,
            0,
            2.04e12,
            300e9,
            _200G,
            8,
            f"{_NVIDIA}data-center/a100/",
            ("A100", "80GB"),
        ),
        Device(
            "a100-40gb",
            40 * GIB,
            312e12,
            19.5e12,
            0,
            1.555e12,
            300e9,
            _200G,
            8,
            f"{_NVIDIA}data-center/a100/",
            ("A100",),
        ),
        Device(
            "l40s-48gb",
            48 * GIB,
            362e12,
            91.6e12,
            733e12,
            864e9,
            _GEN4,
            _200G,
            8,
            f"{_NVIDIA}data-center/l40s/",
            ("L40S",),
        ),
        Device(
            "l4-24gb",
            24 * GIB,
            121e12,
            30.3e12,
            242e12,
            300e9,
            _GEN4,
            _100G,
            8,
            f"{_NVIDIA}data-center/l4/",
            ("L4",),
        ),
        Device(
            "a6000-48gb",
            48 * GIB,
            154.8e12,
            38.7e12,
            0,
            768e9,
            _GEN4,
            _100G,
            4,
            f"{_NVIDIA}design-visualization/rtx-a6000/",
            ("RTX A6000",),
        ),
        Device(
            "rtx4090-24gb",
            24 * GIB,
            165.2e12,
            82.6e12,
            330.3e12,
            1008e9,
            _GEN4,
            _100G,
            4,
            f"{_NVIDIA}geforce/graphics-cards/40-series/rtx-4090/",
            ("RTX 4090",),
        ),
        Device(
            "rtx3090-24gb",
            24 * GIB,
            71e12,
            35.6e12,
            0,
            936e9,
            _GEN4,
            _100G,
            4,
            f"{_NVIDIA}geforce/graphics-cards/30-series/rtx-3090-3090ti/",
            ("RTX 3090",),
        ),
        Device(
            "mi300x-192gb",
            192 * GIB,
            1307e12,
            163.4e12,
            2614e12,
            5.3e12,
            448e9,
            _400G,
            8,
            "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
            ("MI300X",),
        ),
    )
}


def named(name: str) -> Device:
    """The device of a name.

    Raises:
        RecipeError: none is called so.
    """
    if name in DEVICES:
        return DEVICES[name]
    near = difflib.get_close_matches(name.lower(), DEVICES, 1, 0.3)
    fix = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(f"{name} is no device that is known", fix=f"{fix}use one of {', '.join(DEVICES)}", key="--device")


def recognised(said: str) -> Device | None:
    """The device that torch calls `said`, where its data sheet is known."""
    words = said.upper()
    return next((device for device in DEVICES.values() if all(word in words for word in device.known)), None)
