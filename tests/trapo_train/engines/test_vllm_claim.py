"""One run at a time samples from a vLLM server."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from tests.trapo_train.engines.test_vllm_server import server_settings
from tests.trapo_train.test_train import build_config
from trapo_train.engines import vllm_server
from trapo_train.engines.engine import EngineError
from trapo_train.trainer import Trainer

HOLDS = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("process 7", file=file, flush=True)
print("held", flush=True)
input()
"""
IS_FREE = """
import fcntl, sys
fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


def test_a_server_that_another_process_samples_from_is_refused(server, tmp_path):
    config = build_config(tmp_path, "run", *server_settings(server))
    command = [sys.executable, "-c", HOLDS, vllm_server.claim_file(server.url)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(EngineError, match=rf"one run, or one evaluation, at a time, got {server.url}, which process 7 uses"):
            Trainer(config)
        other.communicate(b"\n")
    assert [Trainer(config).engine.sync_dir for _ in range(2)] == [tmp_path / "run" / "vllm_weights"] * 2  # of one process


def test_a_server_stays_claimed_where_an_engine_of_the_process_is_gone(server, tmp_path):
    config = build_config(tmp_path, "run", *server_settings(server))
    first, second = Trainer(config), Trainer(config)
    del first
    gc.collect()
    command = [sys.executable, "-c", IS_FREE, vllm_server.claim_file(server.url)]
    tried = subprocess.run(command, capture_output=True, check=False, text=True)
    assert tried.returncode == 1 and "BlockingIOError" in tried.stderr and second.engine
