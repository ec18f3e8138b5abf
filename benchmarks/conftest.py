"""`pytest benchmarks [--small]`: the runner's timed cases, one test per case and contender."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--small`: tiny shapes, a dry run of every code path."""
    parser.addoption("--small", action="store_true", help="benchmarks: tiny shapes, no figures to quote")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every timed case of every question with each of its contenders, case by case."""
    from benchmarks import questions
    from benchmarks.contenders import CONTENDERS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name in questions.NAMES:
        for case in questions.load(name).cases(device, metafunc.config.getoption("--small")):
            chosen = [c for c in CONTENDERS if not case.contenders or c.name in case.contenders]
            found += [pytest.param(case, c, device, id=f"{name}: {case.title}: {c.name}") for c in chosen if case.measure == "time"]
    metafunc.parametrize("case, contender, device", found)
