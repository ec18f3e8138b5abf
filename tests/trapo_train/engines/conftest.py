import pytest

from tests.trapo_train.engines.fake_vllm import FakeServer, FakeVllm


@pytest.fixture
def vllm(monkeypatch):
    fake = FakeVllm()
    fake.install(monkeypatch)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # restored afterwards
    return fake


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.close()
