"""A pool of worker programs for code that may hang, crash or eat memory: none of it reaches the process that trains.

A worker is `python -m <module>` and speaks JSON lines: it says "ready" once, then answers each request, a list of arguments, with a
value, with the exception that it raised, or that it ran out of time. A worker that is late is killed and replaced, one that dies is
replaced; the caller learns which. Where a signal from outside ended one, another is asked once more, for what is left of the time
limit: most often that is no fault of the request, though the kernel's SIGKILL for want of memory may be. Programs of their own, not
forks: nothing of this process's threads, locks or GPU is copied into them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from trapo_train.user_code import in_words

START_LIMIT_S = 120  # a cold import on a busy machine
# What job managers and people send, and the kernel where the machine's memory is short, whoever took it. Beyond a limit on the
# address space a worker ends otherwise, and so it does where something crashes.
FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)


@dataclass(frozen=True)
class Answer:
    """What came of one request: `value` is the function's, or the exception in words for the outcome "error"."""

    outcome: Literal["ok", "error", "timeout", "crash"]
    value: Any = None


class OutOfTime(Exception):
    """What a function of a worker raises when a limit of its own ended it: the outcome is "timeout", and the worker stays."""


class WorkerError(RuntimeError):
    """A worker program that does not even start."""


class WorkerPool:
    """Runs requests on `num_workers` worker programs, each with `time_limit_s` per request and `memory_limit_mib` of address space.

    `arguments` are further command-line arguments of the module. Workers start with the first request and end with `close`, or
    when this process does, however it does.
    """

    def __init__(
        self, module: str, arguments: Sequence[str] = (), *, num_workers: int, time_limit_s: float, memory_limit_mib: int = 8192
    ) -> None:
        self._command = [sys.executable, "-m", module, str(memory_limit_mib), *arguments]
        self._time_limit_s = time_limit_s
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="worker-pool")
        self._free: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        for _ in range(num_workers):
            self._free.put(None)  # a place for a worker that has yet to be started
        atexit.register(self.close)

    def map(self, requests: Sequence[Sequence[Any]]) -> list[Answer]:
        """Answers in the order of the requests.

        Raises: WorkerError for a worker that does not start, with what it wrote to its error stream.
        """
        return list(self._threads.map(self._run, requests))

    def close(self) -> None:
        """End all workers, busy ones too."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for worker in self._all:
                worker.kill()
        self._threads.shutdown(wait=True)
        with self._lock:
            for worker in self._all:  # one may have started in between
                worker.kill()
            self._all.clear()
        atexit.unregister(self.close)

    def _run(self, request: Sequence[Any]) -> Answer:
        worker = self._free.get()
        try:
            if worker is not None and worker.has_died:  # while it was idle
                self._drop(worker)
                worker = None
            worker = worker or self._start()
            asked_at = time.monotonic()
            answer = worker.ask(request, self._time_limit_s)
            if worker.was_ended_from_outside:
                left_s = self._time_limit_s - (time.monotonic() - asked_at)
                self._drop(worker)
                worker = None
                worker = self._start()
                answer = worker.ask(request, left_s)
            if worker.is_lost:
                self._drop(worker)
                worker = None
            return answer
        finally:
            self._free.put(worker)

    def _start(self) -> _Worker:
        worker = _Worker(self._command)
        with self._lock:
            self._all.add(worker)
        return worker

    def _drop(self, worker: _Worker) -> None:
        worker.kill()
        with self._lock:
            self._all.discard(worker)


class _Worker:
    """One worker process."""

    is_lost = False
    """Whether it was late or died, so that another must take its place."""
    was_ended_from_outside = False
    """Whether it died of a signal that neither this pool nor, as far as can be told, the request sent."""

    def __init__(self, command: list[str]) -> None:
        # A session of its own: Ctrl-C in the terminal is for the process that trains, and what a worker starts ends with it.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._ended_here = False
        self._complaints: deque[bytes] = deque(maxlen=10)
        # A full pipe must not stop a worker.
        drain = threading.Thread(target=lambda: self._complaints.extend(self._process.stderr), daemon=True)
        drain.start()
        reply, late = self._exchange(None, START_LIMIT_S)
        if reply == "ready":
            return
        self.kill()
        drain.join(1)
        said = b"".join(self._complaints).decode(errors="replace").strip()
        ended = f"it was not ready after {START_LIMIT_S} s" if late else "it ended"
        remedy = "It may need a larger memory_limit_mib."
        raise WorkerError(f"worker {' '.join(command[1:])} must start, {ended}: {said[-500:]}. {remedy}")

    def ask(self, request: Sequence[Any], time_limit_s: float) -> Answer:
        """Send one request and wait for its answer."""
        reply, late = self._exchange(json.dumps(list(request)).encode() + b"\n", time_limit_s)
        if late:
            self.is_lost = True
            return Answer("timeout")
        if not isinstance(reply, dict):
            self.is_lost = True
            with contextlib.suppress(subprocess.TimeoutExpired):  # its pipes close a moment before it has ended
                self.was_ended_from_outside = -self._process.wait(1) in FROM_OUTSIDE and not self._ended_here
            return Answer("crash")
        if "out of time" in reply:
            return Answer("timeout")
        return Answer("error", reply["error"]) if "error" in reply else Answer("ok", reply["value"])

    @property
    def has_died(self) -> bool:
        """Whether the process is gone, and this pool did not end it."""
        return self._process.poll() is not None and not self._ended_here

    def kill(self) -> None:
        """End the process and what it started, and wait until it is gone."""
        self._end()
        self._process.wait()

    def _exchange(self, line: bytes | None, time_limit_s: float) -> tuple[Any, bool]:
        """Write a line and read one: the reply (None if the worker died) and whether the time was up.

        The clock ends the process, so that neither a full pipe nor half a line can hold this thread.
        """
        late = threading.Event()
        clock = threading.Timer(time_limit_s, lambda: (late.set(), self._end()))
        clock.daemon = True
        clock.start()
        try:
            if line is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except OSError:
            reply = b""
        finally:
            clock.cancel()
        return json.loads(reply) if reply.endswith(b"\n") else None, late.is_set()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._ended_here = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def serve(function: Callable[..., Any]) -> int:
    """Answer requests from standard input with `function(*arguments)` until it ends.

    An exception is the answer, `OutOfTime` the outcome "timeout", but running out of memory ends the worker. SIGTERM, SIGHUP
    and SIGINT do not: a job manager sends them to every process of the job, and the one that trains still wants its answers, then
    ends its workers. The first command-line argument is the limit on the address space in MiB.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        # A handler, which programs that the function starts do not take over, as they would SIG_IGN; nor do forks.
        previous = signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=partial(signal.signal, number, previous or signal.SIG_DFL))
    limit = int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    # What the function prints, from Python or C, must not look like an answer.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        print(json.dumps("ready"), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(_answer(function, json.loads(line))), file=out, flush=True)
    return 0


def _answer(function: Callable[..., Any], arguments: Sequence[Any]) -> dict[str, Any]:
    try:
        return {"value": function(*arguments)}
    except MemoryError:
        raise
    except OutOfTime:
        return {"out of time": True}
    except Exception as error:
        return {"error": in_words(error)}


def _end_with_parent(parent: int) -> None:
    """End a busy worker whose parent was killed; an idle one sees its input end."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
