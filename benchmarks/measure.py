"""Clocks and counters: interleaved rounds, CUDA events with hot and cold L2, peak memory, launches and host syncs."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 15
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class Timing(NamedTuple):
    """Milliseconds of one contender, one entry per round; `cold_ms` with a flushed L2, empty on a CPU."""

    hot_ms: list[float]
    cold_ms: list[float]


class CpuClock:
    """Wall time; a CPU's caches are smaller than any weight here, so there is no cold twin."""

    def time(self, call: Callable[[], object]) -> tuple[float, float | None]:
        """(hot, cold) milliseconds of one call."""
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3, None


class CudaClock:
    """CUDA events around each call; before the cold one a buffer of four times the L2 is overwritten."""

    def __init__(self):
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._half = properties.total_memory // 2
        size = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
        self._flush = torch.empty(4 * size, dtype=torch.uint8, device="cuda")

    def time(self, call: Callable[[], object]) -> tuple[float, float | None]:
        """(hot, cold) milliseconds; the cold call comes first and leaves the L2 as the hot one finds it."""
        if torch.cuda.memory_reserved() > self._half:
            torch.cuda.empty_cache()  # else the allocator would do it inside the timed call; the extra call refills its cache
            call()
        self._flush.zero_()
        cold = self._once(call)
        return self._once(call), cold

    def _once(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def clock(device: str) -> CpuClock | CudaClock:
    """The clock of a device."""
    return CudaClock() if device == "cuda" else CpuClock()


def interleave(calls: dict[str, Callable], ticker: CpuClock | CudaClock, seconds: float, most: int) -> dict[str, Timing]:
    """Round after round of all calls, so that a drifting machine drifts for all; the order rotates, so that none is always first.

    One warm-up round, then at least MIN_ROUNDS (or `most`, if fewer) and at most `most` rounds within about `seconds`. A call that
    runs out of memory beside the others leaves the rounds, and is missing from the answer.
    """
    timings = {name: Timing([], []) for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for name in list(names):
            _once(name, names, calls, ticker)
        per_round = time.perf_counter() - start
        rounds = max(min(MIN_ROUNDS, most), min(most, int(seconds / max(per_round, 1e-6))))
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                hot, cold = _once(name, names, calls, ticker) or (None, None)
                if hot is not None:
                    timings[name].hot_ms.append(hot)
                if cold is not None:
                    timings[name].cold_ms.append(cold)
    finally:
        gc.enable()
    return {name: timings[name] for name in names}


def _once(name: str, names: list[str], calls: dict, ticker: CpuClock | CudaClock) -> tuple[float, float | None] | None:
    try:
        return ticker.time(calls[name])
    except OUT_OF_MEMORY:
        names.remove(name)
        return None


def summary(timing: Timing, floor: Timing | None) -> dict[str, object]:
    """Median, p20 and p80; ratios are taken round by round against the floor of the same round, then summarised."""
    found: dict[str, object] = {"rounds": len(timing.hot_ms)}
    found |= dict(zip(("p20_ms", "median_ms", "p80_ms"), quantiles(timing.hot_ms), strict=True))
    if timing.cold_ms:
        found["cold_median_ms"] = statistics.median(timing.cold_ms)
    if floor is not None:
        ratios = [mine / bare for mine, bare in zip(timing.hot_ms, floor.hot_ms, strict=True)]
        found |= dict(zip(("ratio_p20", "ratio", "ratio_p80"), quantiles(ratios), strict=True))
    return found


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, median, p80 with linear interpolation."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(levels).tolist())


def cuda_peak_mib(call: Callable[[], object]) -> float:
    """Peak of the caching allocator above what was allocated before the call; the results count, the inputs do not."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak / 2**20


def cuda_counts(call: Callable[[], object]) -> dict[str, int | None]:
    """Launches (kernels, copies and fills seen by the profiler; None where it sees none, because it may not look) and host syncs
    (as torch's sync debug mode reports them)."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    syncs = sum("synchroniz" in str(warning.message) for warning in caught)
    return {"launches": launches or None, "host_syncs": syncs}
