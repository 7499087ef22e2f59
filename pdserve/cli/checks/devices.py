"""The GPUs that the pools want against those that torch sees."""

from __future__ import annotations

from pathlib import Path

from pdserve.cli.checks.check import Check
from pdserve.config import Config

_DRIVER = Path("/proc/driver/nvidia/gpus")


def gpus(config: Config) -> Check:
    pools = config.pools
    wanted = pools.gpus_per_worker * (pools.prefill + pools.decode + pools.mixed)
    if pools.ray_address != "local":
        return Check("gpus", True, "the nodes of the joined Ray cluster have them: not looked at")
    if not wanted:
        count = len(list(_DRIVER.glob("*")))
        return Check("gpus", True, f"{count} here; the CPU is used (pools.gpus_per_worker = 0)")
    try:
        import torch  # noqa: PLC0415  (takes seconds, and doctor must speak where it is broken)
    except (ImportError, OSError) as error:
        return Check("gpus", False, f"torch cannot be imported: {error}", remedy="see packages")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    seen = f"{count} GPUs ({', '.join(names)})" if count else "none"
    shared = ", which share them" if 0 < count < wanted else ""
    build = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    return Check(
        "gpus",
        count > 0,
        f"{seen} for {wanted} workers{shared} ({build})",
        remedy="set pools.gpus_per_worker to 0, or install a CUDA build of torch and the driver",
    )
