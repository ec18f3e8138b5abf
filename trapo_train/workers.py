"""A pool of worker programs for code that may hang, crash or eat memory: none of it reaches the process that trains.

A worker is `python -m <module>` and speaks JSON lines: it says "ready" once, then answers each request, a list of arguments, with a
value. A worker that is late is killed and replaced, one that dies is replaced; the caller learns which.
"""

from __future__ import annotations

import atexit
import json
import queue
import resource
import selectors
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

START_LIMIT_S = 120  # a cold import on a busy machine


@dataclass(frozen=True)
class Answer:
    """What came of one request; `value` is None unless the outcome is "ok"."""

    outcome: Literal["ok", "timeout", "crash"]
    value: Any = None


class WorkerError(RuntimeError):
    """A worker program that does not even start."""


class WorkerPool:
    """Runs requests on `num_workers` worker programs, each with `time_limit_s` per request and `memory_limit_mib` of address space.

    Workers start with the first request and end with `close`, or when this process does.
    """

    def __init__(self, module: str, *, num_workers: int, time_limit_s: float, memory_limit_mib: int = 8192) -> None:
        self._command = [sys.executable, "-m", module, str(memory_limit_mib)]
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
        """End all workers."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for worker in self._all:
                worker.kill()
            self._all.clear()
        atexit.unregister(self.close)

    def _run(self, request: Sequence[Any]) -> Answer:
        worker = self._free.get()
        try:
            if worker is None:
                worker = _Worker(self._command)
                with self._lock:
                    self._all.add(worker)
            answer = worker.ask(request, self._time_limit_s)
            if answer.outcome != "ok":
                worker.kill()
                with self._lock:
                    self._all.discard(worker)
                worker = None
            return answer
        finally:
            self._free.put(worker)


class _Worker:
    """One worker process."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        if self._read(START_LIMIT_S) != "ready":
            self._process.kill()
            said = self._process.communicate()[1].decode(errors="replace").strip()
            raise WorkerError(f"worker {' '.join(command[1:3])} must start within {START_LIMIT_S} s, it ended with: {said[-500:]}")
        # From here on nobody reads what it complains about; a full pipe must not stop it.
        threading.Thread(target=self._drain, daemon=True).start()

    def ask(self, request: Sequence[Any], time_limit_s: float) -> Answer:
        """Send one request and wait for its answer."""
        try:
            self._process.stdin.write(json.dumps(list(request)).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return Answer("crash")
        try:
            reply = self._read(time_limit_s)
        except TimeoutError:
            return Answer("timeout")
        return Answer("ok", reply["value"]) if isinstance(reply, dict) and "value" in reply else Answer("crash")

    def kill(self) -> None:
        """End the process and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()
        self._selector.close()

    def _read(self, time_limit_s: float) -> Any:
        """The next line as JSON, or None at the end of the stream. A worker writes a line at once, so a started line will end."""
        if not self._selector.select(time_limit_s):
            raise TimeoutError
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def _drain(self) -> None:
        for _ in self._process.stderr:
            pass


def serve(function: Callable[..., Any]) -> int:
    """Answer requests from standard input with `function(*arguments)` until it ends; an exception ends the worker, too.

    The first command-line argument is the limit on the address space in MiB.
    """
    limit = int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    out, sys.stdout = sys.stdout, sys.stderr  # what the function prints must not look like an answer
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps({"value": function(*json.loads(line))}), file=out, flush=True)
    return 0
