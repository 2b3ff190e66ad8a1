"""Check the device that weights of a checkpoint are to be quantized on, before anything is read."""

from __future__ import annotations

from hal.errors import ArgumentError, EncodingError
from hal.quant.scheme import find_scheme

__all__ = ["require_device"]


def require_device(device: str, scheme: str) -> None:
    """Raise unless a device can make the bits of a checkpoint.

    Args:
        device: torch's name of it, such as `cpu`, `cuda` or `xpu:1`.
        scheme: Name of the scheme.

    Raises:
        ArgumentError: If torch knows no such name, or there is no device of that index.
        EncodingError: If its 8-bit floats are e4m3fnuz.
        PlatformError: If no device of that type is there.
    """
    import torch

    from hal.quant.quantize import encoding_for
    from hal.runtime import platform_for_device_type

    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = torch.device("meta")
    if wanted.type == "meta":
        raise ArgumentError("device", found=device, needed="cpu, cuda, xpu, or one such as cuda:1")
    platform = platform_for_device_type(wanted.type)
    index, count = wanted.index or 0, platform.device_count()
    if index >= count:
        raise ArgumentError(
            "device", found=device, needed=f"an index below {count}, of the devices that are here"
        )
    encoding = encoding_for(find_scheme(scheme), platform.device(index).formats.fp8_encoding)
    if encoding == "e4m3fnuz":
        raise EncodingError(
            f"device {device}",
            found="e4m3fnuz, its 8-bit floats",
            needed="e4m3fn, which checkpoints hold on every device",
            cure="quantize on the CPU (device cpu)",
        )
