"""The machine that something was measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from adaptok.config import Config

CPU_FACTS = Path("/proc/cpuinfo")


class Machine(Config):
    """What a reader of measured figures must know about the machine.

    Args:
        device: such as `"cpu"` or `"cuda:0"`.
        name: of the processor or GPU.
        cores: processor cores that this process may use.
        threads: threads that PyTorch uses for one operation.
        system: operating system and architecture.
        python: version.
        torch: version.
        adaptok: version.
        cuda: version; None without a GPU.
    """

    device: str
    name: str
    cores: int
    threads: int
    system: str
    python: str
    torch: str
    adaptok: str
    cuda: str | None = None

    def __str__(self) -> str:
        versions = f"torch {self.torch}, adaptok {self.adaptok}, Python {self.python}"
        if self.cuda is not None:
            versions += f", CUDA {self.cuda}"
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        cores = f"{self.cores} core{'s' if self.cores != 1 else ''}"
        return f"{self.device}: {self.name}, {threads} on {cores}, {self.system}; {versions}"


def describe_machine(device: torch.device | str = "cpu") -> Machine:
    """Describe this machine.

    Args:
        device: where the measured code runs.

    Returns:
        The description; it names no user and no host.

    Example:
        >>> describe_machine().threads == torch.get_num_threads()
        True
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return Machine(
        device=str(device),
        name=torch.cuda.get_device_name(device) if on_gpu else name_processor(),
        cores=count_cores(),
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=str(torch.__version__),
        adaptok=find_version(),
        cuda=torch.version.cuda if on_gpu else None,
    )


def find_version() -> str:
    """Return the version of the installed adaptok."""
    try:
        return version("adaptok")
    except PackageNotFoundError:  # run from a copy of the source
        return "not installed"


def count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def name_processor(facts: Path = CPU_FACTS) -> str:
    """Return the name of the processor, as far as the system tells it."""
    try:
        text = facts.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()
