"""Runs with vLLM itself, on a GPU or with its CPU build: as a server, and in the process that trains. Skipped without vLLM."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from tests.trapo_train.test_train import TINY
from trapo_train.reports.metrics_log import read_metrics

ROOT = Path(__file__).parents[3]
SHAPE = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32, "max_position": 128}
CPU = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# A sampler and a trainer with the same weights: what bfloat16 rounds, and no more.
LIMITS = {"rollout/mismatch_kl": 1e-3, "rollout/mismatch_p95": 2e-2}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")]


def environment():
    device = {} if torch.cuda.is_available() else CPU
    return os.environ | device | {"PYTHONPATH": str(ROOT), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def train(directory, *overrides, model=None):
    """A run of 4 steps in a process of its own; its training rows."""
    values = TINY | {"output_dir": str(directory / "run"), "steps": 4, "model": model or {"scratch": SHAPE}}
    values["optimizer"] = {"learning_rate": 1e-2}
    (directory / "run.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "trapo_train", "run", str(directory / "run.yaml"), *overrides]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return [row for row in read_metrics(directory / "run") if row["kind"] == "train"]


def check(rows):
    assert len(rows) == 4 and len({row["rollout/logprob"] for row in rows}) == 4  # the weights move
    for row in rows:
        assert all(abs(row[name]) < limit for name, limit in LIMITS.items()), row


@pytest.mark.parametrize("lora", [(), ("model.lora={rank: 4}",)])
def test_in_the_process_that_trains(tmp_path, lora):
    check(train(tmp_path, "rollout.engine=vllm", "rollout.vllm={enforce_eager: true, max_model_len: 100}", *lora))


def test_as_a_server(tmp_path):
    from transformers import AutoModelForCausalLM

    from trapo_train.models.scratch import ScratchConfig, scratch_config
    from trapo_train.tasks import build_tokenizer

    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_config(scratch_config(ScratchConfig(**SHAPE), tokenizer))
    model.generation_config.update(do_sample=True, repetition_penalty=1.5, min_p=0.3)  # defaults of the server, not of a run
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(tmp_path / "model"), "--port", str(port)]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "100", "--logprobs-mode", "processed_logprobs"]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(
            [*command, *options], stdout=log, stderr=log, cwd=tmp_path, env=environment() | {"VLLM_SERVER_DEV_MODE": "1"}
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "server.log")
        rows = train(
            tmp_path,
            "rollout.engine=vllm_server",
            f"rollout.vllm_server.base_url='http://127.0.0.1:{port}'",
            model={"name_or_path": str(tmp_path / "model"), "dtype": "float32"},
        )
    finally:
        server.terminate()
        server.wait(60)
    check(rows)


def wait_for(url, server, log):
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(1)
        else:
            return
    pytest.fail(f"vLLM was not ready after 4 minutes: {log.read_text()[-4000:]}")
