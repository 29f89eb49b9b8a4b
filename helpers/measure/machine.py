"""What this machine can do at most: read memory. A token's weights must be read, so bytes over bandwidth is its least time."""

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_cache() -> int | None:
    """Bytes of the largest cache that Linux names for the first core; None elsewhere. A virtual machine may be shown the
    whole of a cache that it shares."""
    sizes = [re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()) for path in CACHES.glob("index*/size")]
    return max((int(m[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[m[2]] for m in sizes if m), default=None)


def beyond_cache(device: torch.device | str = "cpu") -> int:
    """Bytes of an array of which next to nothing stays in a cache: four times the last one, at least 256 MiB."""
    gpu = torch.device(device).type == "cuda"
    cache = torch.cuda.get_device_properties(device).L2_cache_size if gpu else last_level_cache()
    return max(4 * (cache or 0), 1 << 28)


def seconds(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """How long a call takes; on a GPU what the GPU takes for it, when it is not kept waiting."""
    if torch.device(device).type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1000
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _reads(size: int | None, device: torch.device | str) -> tuple[Tensor, list[Callable[[], Tensor]]]:
    array = torch.ones((size or beyond_cache(device)) // 4, device=device)
    return array, [array.sum, lambda: array.dot(array)]  # either may be the better tuned; both read each number once


def bandwidth(device: torch.device | str = "cpu", size: int | None = None, repeats: int = 5) -> float:
    """Bytes/s of reading an array of `size` bytes (None: `beyond_cache`) with torch's threads: the best of all tries."""
    array, reads = _reads(size, device)
    return array.nbytes / min(seconds(read, device) for _ in range(repeats + 1) for read in reads)


@torch.inference_mode()
def share_of_bandwidth(linear: nn.Module, in_features: int, bytes_read: int, dtype: torch.dtype = torch.float32,
                       device: torch.device | str = "cpu", size: int | None = None, repeats: int = 20) -> float:
    """How much of the memory's bandwidth a linear of `bytes_read` reaches at batch 1: 1 is the least time that
    reading its weights can take, less is slower.

    An array beyond the cache (`size` as for `bandwidth`) is read before every run: it drives the weights out of the cache,
    as the rest of a model would, and is the measure. The median of the pairs. A linear that is small beside what a call
    costs shows that instead.
    """
    x = torch.randn(1, in_features, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    array, (_, read) = _reads(size, device)
    pairs = [(seconds(read, device), seconds(lambda: linear(x), device)) for _ in range(repeats + 2)][2:]
    return statistics.median((bytes_read / run) / (array.nbytes / whole) for whole, run in pairs)
