"""Clocks and rounds: what is timed, in which order, and what a failed call leaves behind."""

import weakref
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
import triton

from benchmarks import measure, provenance


def test_a_gpu_s_clock_keeps_it_busy_while_calls_are_issued_and_times_no_first_call(monkeypatch):
    done, reserved = [], [0]

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 1.0

    properties = SimpleNamespace(total_memory=100, L2_cache_size=8)
    buffer = SimpleNamespace(zero_=lambda: done.append("flush"))
    fakes = {"current_device": lambda: 0, "get_device_properties": lambda index: properties, "Event": Event}
    fakes |= {"memory_reserved": lambda: reserved[0], "empty_cache": lambda: done.append("empty cache")}
    fakes |= {"synchronize": lambda: done.append("synchronised"), "_sleep": lambda cycles: done.append("sleep")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "empty", lambda *size, **named: buffer)
    ticker = measure.CudaClock()
    timed = ["synchronised", "sleep", "flush", "event", "call", "event", "event", "call", "event", "synchronised"]

    def call():
        done.append("call")

    for at, before in ((0, ["call"]), (0, []), (51, ["empty cache", "call"])):
        done.clear()
        reserved[0] = at
        assert ticker.time(call) == (1.0, 1.0)
        assert done == before + timed


def test_clocks_are_read_while_calls_are_queued(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronised"))
    monkeypatch.setattr(provenance, "smi", lambda fields: done.append("looked") or "1980 MHz, 1980 MHz, 3201 MHz, 690.1 W, 51")
    found = provenance.clocks(lambda: done.append("call"), median_ms=200.0)
    assert done == ["call"] * 12 + ["looked", "synchronised"]
    assert found["sm_clock"] == "1980 MHz" and found["power"] == "690.1 W"


def test_nvidia_smi_is_asked_about_the_gpu_that_torch_has(monkeypatch):
    """Under CUDA_VISIBLE_DEVICES=1 torch's number 0 is nvidia-smi's 1."""
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="1980 MHz\n" if "-i" in command else "345 MHz\n1980 MHz\n")

    monkeypatch.setattr(provenance.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="5c9f"))
    assert provenance.smi("clocks.sm") == "1980 MHz"
    assert asked[0][asked[0].index("-i") + 1] == "GPU-5c9f"


def test_a_call_that_fails_leaves_the_rounds_and_says_why():
    def fails():
        raise torch.OutOfMemoryError("no room")

    turns = []
    calls = {"good": lambda: None, "bad": fails}
    timings, failed = measure.interleave(calls, measure.CpuClock(), 0.0, 3, announce=turns.append)
    assert set(timings) == {"good"} and len(timings["good"].hot_ms) == 3
    assert str(failed["bad"]) == "no room" and measure.out_of_memory(failed["bad"])
    assert sorted(turns[:2]) == ["bad", "good"] and turns[2:] == ["good", "good"]


def test_each_round_has_another_order_the_same_in_every_run():
    def turns():
        told = []
        measure.interleave(dict.fromkeys("abcde", lambda: None), measure.CpuClock(), 0.0, 3, announce=told.append)
        return told

    first = turns()
    rounds = [first[i : i + 5] for i in (0, 5, 10)]
    assert first == turns() and all(sorted(one) == list("abcde") for one in rounds) and len({*map(tuple, rounds)}) == 3


def test_nothing_of_a_failed_call_stays_in_memory_while_the_others_are_timed():
    tensors, alive = [], []

    def fails():
        mine = torch.zeros(1000)
        tensors.append(weakref.ref(mine))
        cycle = [mine]
        cycle.append(cycle)  # which the collector, off while calls are timed, would not see
        try:
            raise ValueError("in the middle")
        except ValueError as error:
            raise torch.OutOfMemoryError("no room") from error

    calls = {"bad": fails, "good": lambda: alive.append(bool(tensors) and tensors[0]() is not None)}
    _, failed = measure.interleave(calls, measure.CpuClock(), 0.0, 3)
    assert alive == [False] * 3 and len(tensors) == 1 and str(failed["bad"]) == "no room"


def test_a_triton_that_was_installed_under_another_name_has_its_version(monkeypatch):
    known = metadata.version

    def without_triton(name):
        if name == "triton":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", without_triton)
    assert provenance.versions()["triton"] == triton.__version__


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Intel(R) Xeon(R) Processor", "cpu-intel-xeon"),
        ("Intel(R) Xeon(R) Processor @ 2.80GHz", "cpu-intel-xeon-2-80ghz"),  # another one
        ("AMD EPYC", "cpu-amd-epyc"),
    ],
)
def test_processors_that_differ_have_folders_of_their_own(name, folder, monkeypatch):
    monkeypatch.setattr(provenance, "_cpu_name", lambda: name)
    assert provenance.folder("cpu") == folder
