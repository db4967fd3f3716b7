"""The machine: processors, memory, disk, players and codecs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kalle.cli.doctor_findings import Finding, gigabytes

ENOUGH_MEMORY = 4e9
ENOUGH_DISK = 5e9
READ_FORMATS = ("WAV", "FLAC", "OGG", "MP3")
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def processor_findings() -> Iterator[Finding]:
    """The CPU as torch sees it."""
    import torch

    vectors = torch.backends.cpu.get_cpu_capability()
    yield Finding("devices", "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, vectors {vectors}")
    supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    yield Finding("devices", "bfloat16 on the cpu", "fast" if supported else "emulated, slower than float32; leave --dtype at auto")


def accelerator_findings() -> Iterator[Finding]:
    """CUDA and MPS."""
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            value = (
                f"{properties.name}, {gigabytes(properties.total_memory)}, capability {properties.major}.{properties.minor}, "
                f"driver {driver or 'unknown'}, CUDA {torch.version.cuda}, bfloat16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
            )
            yield Finding("devices", f"cuda:{index}", value)
    elif driver is not None:
        built = f"torch was built for {torch.version.cuda or 'the CPU alone'}"
        yield Finding(
            "devices",
            "cuda",
            f"a GPU with driver {driver}, but torch does not see it ({built})",
            "problem",
            "install the torch for your driver from its download page, or update the driver",
        )
    else:
        yield Finding("devices", "cuda", "none; the CPU speaks")
    if torch.backends.mps.is_available():
        yield Finding("devices", "mps", "available, not tried by kalle; the CPU is used unless --device says otherwise", "note")


def _driver() -> str | None:
    """The version of the NVIDIA driver; None where there is none or it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.split()
    return lines[0] if result.returncode == 0 and lines else None


def memory_findings() -> Iterator[Finding]:
    """Memory of the machine, or of the container it is limited to."""
    total, free = total_memory(), available_memory()
    if total is None:
        yield Finding("memory and disk", "memory", "not known on this system", "note")
        return
    value = gigabytes(total) if free is None else f"{gigabytes(total)}, {gigabytes(free)} available"
    if free is not None and free < ENOUGH_MEMORY:
        yield Finding("memory and disk", "memory", value, "note", "the released weights need more; close other programs")
    else:
        yield Finding("memory and disk", "memory", value)


def total_memory() -> int | None:
    """Bytes of memory, of the container where it has a limit; None where it can't be told."""
    found = [value for value in (_meminfo("MemTotal"), _number(_CGROUP / "memory.max")) if value is not None]
    if found:
        return min(found)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def available_memory() -> int | None:
    """Bytes that can be used without swapping; None where it can't be told."""
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    found = [_meminfo("MemAvailable"), None if limit is None or used is None else limit - used]
    return min((value for value in found if value is not None), default=None)


def _meminfo(key: str) -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # also "max", which is no limit
        return None


def disk_findings(folder: Path) -> Iterator[Finding]:
    """Room at ``folder``, or at the first of its parents that exists."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    remedy = "converting the released weights needs about 6 GB; make room" if free < ENOUGH_DISK else None
    yield Finding("memory and disk", f"disk at {there}", f"{gigabytes(free)} free", "note" if remedy else "ok", remedy)


def codec_findings() -> Iterator[Finding]:
    """What kinds of recordings can be read."""
    import soundfile

    available = soundfile.available_formats()
    names = [name for name in READ_FORMATS if name in available]
    names += ["Opus"] if "OPUS" in soundfile.available_subtypes("OGG") else []
    missing = [name for name in READ_FORMATS if name not in available]
    remedy = "pip install -U soundfile" if missing else None
    value = f"libsndfile {soundfile.__libsndfile_version__} reads {', '.join(names)} and {len(available) - len(names)} more kinds"
    yield Finding("audio", "codecs", value, "note" if missing else "ok", remedy)
    others = "PyAV reads the rest (m4a, webm, …)"
    try:
        import av

        yield Finding("audio", "other codecs", f"{others}, {av.__version__}")
    except Exception as error:
        reason = "missing" if isinstance(error, ImportError) else type(error).__name__
        yield Finding("audio", "other codecs", f"none: PyAV is {reason}", "note", f"pip install av; {others}")


def player_findings() -> Iterator[Finding]:
    """What can play audio, for `kalle voices play` and `kalle stream --play`."""
    from kalle.cli.players import PLAYERS, available_players

    found = [player.name for player in available_players()]
    if found:
        yield Finding("audio", "players", ", ".join(found))
    else:
        wanted = ", ".join(player.name for player in PLAYERS)
        yield Finding("audio", "players", "none", "note", f"install one of {wanted} to hear voices from the command line")
    ffmpeg = shutil.which("ffmpeg")
    yield Finding("audio", "ffmpeg", ffmpeg or "none; only other programs need it")
