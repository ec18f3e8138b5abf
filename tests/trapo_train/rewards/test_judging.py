"""What is found out about a sample beside its reward."""

import pytest

from trapo_train.rewards.judging import answer_in_prefix


@pytest.mark.parametrize(
    ("prefix", "solution", "expected"),
    [
        ("so x = 5.", "5", True),
        ("so x = 15", "5", False),
        ("so x = 5.2", "5", False),
        ("so x = 0.5", "5", False),
        ("so x = 51", "5", False),
        ("5", "5", True),
        ("it is $\\frac{1}{2}$, so", "\\frac{1}{2}", True),
        ("x\\frac{1}{2}", "\\frac{1}{2}", True),
        ("a  walk\nhome", "walk home", True),
        ("ac|cb|bd|", "bd", True),
        ("ac|cb|", "bd", False),
        ("", "5", False),
        ("anything", None, False),
        ("anything", "  ", False),
    ],
)
def test_answer_in_prefix(prefix, solution, expected):
    assert answer_in_prefix(prefix, solution) is expected
