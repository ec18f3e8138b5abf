"""Clocks and counters: interleaved rounds, CUDA events with hot and cold L2, peak memory, launches and host syncs."""

from __future__ import annotations

import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 15


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
    """CUDA events around each call; before the cold one a buffer of four times the L2 is overwritten.

    The GPU is kept busy while Python issues a call, as in a training loop: what is timed is the GPU, or Python where that is slower
    than its work and a head start of a millisecond.
    """

    HEAD_START = 2_000_000  # cycles: about a millisecond

    def __init__(self):
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._half = properties.total_memory // 2
        size = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
        self._flush = torch.empty(4 * size, dtype=torch.uint8, device="cuda")
        self._warm: set[Callable[[], object]] = set()  # whose memory the allocator has

    def time(self, call: Callable[[], object]) -> tuple[float, float | None]:
        """(hot, cold) milliseconds; the cold call comes first and leaves the L2 as the hot one finds it."""
        if torch.cuda.memory_reserved() > self._half:
            torch.cuda.empty_cache()  # else the allocator would do it inside the timed call
            self._warm.clear()
        if call not in self._warm:  # an extra call fills the allocator's cache
            call()
            self._warm.add(call)
        torch.cuda.synchronize()
        torch.cuda._sleep(self.HEAD_START)
        self._flush.zero_()
        cold, hot = self._between_events(call), self._between_events(call)
        torch.cuda.synchronize()
        return hot[0].elapsed_time(hot[1]), cold[0].elapsed_time(cold[1])

    @staticmethod
    def _between_events(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        return start, end


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation was refused; a CPU's allocator says so in a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def context_is_lost() -> bool:
    """Whether an earlier error has broken the CUDA context, so that every further call fails as well."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def clock(device: str) -> CpuClock | CudaClock:
    """The clock of a device."""
    return CudaClock() if device == "cuda" else CpuClock()


def interleave(
    calls: dict[str, Callable],
    ticker: CpuClock | CudaClock,
    seconds: float,
    most: int,
    announce: Callable[[str], None] = lambda name: None,
    timings: dict[str, Timing] | None = None,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Round after round of all calls, so that a drifting machine drifts for all; each in another order, the same in every run, so
    that none is always first or behind the same one.

    At least MIN_ROUNDS (or `most`, if fewer), then as many as fit into about `seconds`, at most `most`; every call must have run
    once before, to warm up. A call that fails, for want of memory beside the others, say, leaves the rounds: its error is in the
    second answer. `announce` is told whose turn it is. `timings`: where to put the first answer, of which a caller that is
    interrupted reads what there is.
    """
    timings = {} if timings is None else timings
    timings |= {name: Timing([], []) for name in calls}
    failed: dict[str, Exception] = {}
    names, order = list(calls), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        start, turn = time.perf_counter(), 0
        while turn < min(MIN_ROUNDS, most) or (turn < most and (time.perf_counter() - start) * (turn + 1) / turn < seconds):
            for name in order.sample(names, len(names)):
                announce(name)
                try:
                    hot, cold = ticker.time(calls[name])
                except Exception as error:  # this contender's failure; the others are still timed
                    failed[name] = _without_frames(error)
                    names.remove(name)
                    continue
                timings[name].hot_ms.append(hot)
                if cold is not None:
                    timings[name].cold_ms.append(cold)
            turn += 1
    finally:
        gc.enable()
    for name in failed:
        del timings[name]
    return timings, failed


def whole_rounds(timings: dict[str, Timing]) -> dict[str, Timing]:
    """The rounds in which every contender had its turn; {} before the first."""
    rounds = min((len(timing.hot_ms) for timing in timings.values()), default=0)
    return {name: Timing(timing.hot_ms[:rounds], timing.cold_ms[:rounds]) for name, timing in timings.items()} if rounds else {}


def _without_frames(error: Exception) -> Exception:
    """The error alone, the tensors of its frames given back: of an eager call, tens of GB beside the contenders that are still
    timed."""
    error.__cause__ = error.__context__ = error.__traceback__ = None
    gc.collect()
    if out_of_memory(error):  # after another error CUDA may refuse this as well
        torch.cuda.empty_cache()
    return error


def summary(timing: Timing, floor: Timing | None) -> dict[str, object]:
    """Every round, and their median, p20 and p80; ratios are taken round by round against the floor of the same round, then
    summarised."""
    found: dict[str, object] = {"rounds": len(timing.hot_ms), "rounds_ms": [round(ms, 4) for ms in timing.hot_ms]}
    found |= dict(zip(("p20_ms", "median_ms", "p80_ms"), quantiles(timing.hot_ms), strict=True))
    if timing.cold_ms:
        found["cold_median_ms"] = statistics.median(timing.cold_ms)
        if floor is not None:
            found["cold_ratio"] = statistics.median(mine / bare for mine, bare in zip(timing.cold_ms, floor.cold_ms, strict=True))
    if floor is not None:
        ratios = [mine / bare for mine, bare in zip(timing.hot_ms, floor.hot_ms, strict=True)]
        found |= dict(zip(("ratio_p20", "ratio", "ratio_p80"), quantiles(ratios), strict=True))
        found |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
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
    syncs = sum(str(warning.message).startswith("called a synchronizing") for warning in caught)
    return {"launches": launches or None, "host_syncs": syncs}
