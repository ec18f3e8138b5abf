"""What all tests of the trainer share."""

import signal
import sys

import datasets
import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small only wait for a second thread: 22 s against 7 s for the engine's tests on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What datasets reads goes into a cache of this test alone, without progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def default_sigint():
    """Ctrl-C as Python has it, however pytest was started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def default_sighup():
    """A closed terminal as Python has it, however pytest was started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module of the user's own to the working directory, which is tmp_path; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    written = []

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)
