"""How answers are found in responses as models and datasets write them, and when grading them takes too long."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from trapo_train.records import Problem, Sample
from trapo_train.rewards import math_grader
from trapo_train.rewards.grading import MathVerify
from trapo_train.rewards.judging import judge_samples
from trapo_train.rewards.math_grader import anchored_answer, grade
from trapo_train.rewards.workers import OutOfTime
from trapo_train.rollouts.rollout import RolloutConfig

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 in April and May.\n#### 72"

MATH_EVAL = Path(__file__).parents[4] / "shared" / "data" / "math_eval"


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra [math])")


@pytest.mark.parametrize(
    ("completion", "solution", "expected"),
    [
        (GSM8K, "72", 1.0),
        (GSM8K, GSM8K, 1.0),
        (GSM8K, "24", 0.0),
        ("It is\n#### 1,234\n", "1234", 1.0),
        ("#### $\\frac{1}{2}$", "0.5", 1.0),
        ("It is\n#### 72.", "72", 1.0),
        ("It is\n#### **72**", "72", 1.0),
        ("It is\n#### **.5**.", "0.5", 1.0),
        ("So \\boxed{71}.\n#### 72", "72", 0.0),  # what is boxed is the answer
        ("#### 72\nThat was it.", "72", 0.0),
        ("We go on.\n#### 2. The second case", "2", 0.0),
        ("##### 72", "72", 0.0),
        ("Answer: **34**", "34", 1.0),
        ("**Answer:** **34**", "34", 1.0),
        ("The final answer is **$x = 34$**.", "34", 1.0),
        ("the answer is **34**.", "34", 1.0),
        ("**Answer: 34**", "34", 1.0),
        ("**So the answer is $34$.**", "34", 1.0),
        ("**Answer: \\boxed{34}**", "34", 1.0),
        ("**Answer: 34 and 5**", "34", 0.0),
        ("Answer: **34**", "3", 0.0),
        ("Answer: **-2 + 7i**", "-2", 0.0),
        ("Answer: **18 eggs**.", "18", 1.0),
        ("**Answer: 18 miles per hour**", "18", 1.0),
        ("The answer is **5 dollars**", "5", 1.0),
        ("**Answer: 1/2 cup**", "1/2", 1.0),
        ("Answer: **\\(34\\)**", "34", 1.0),
        ("**Answer:** \\(34\\) because **both** hold", "34", 1.0),
        ("**Answer:** \\[34\\] **Check**", "34", 1.0),
        ("**Answer:** The area is \\(34\\pi\\) **square units**.", "34\\pi", 1.0),
        ("**Answer:** 1/2 of the **total**", "1/2", 1.0),
        ("Answer: **\\frac{1}{2}**", "1/2", 1.0),
        ("Answer: **18 eggs**.", "1", 0.0),
        ("Answer: **3\\sqrt{x}**", "3", 0.0),
        ("Answer: **3 eggs and 4 hens**", "3", 0.0),
        ("so **34** it is", "34", 0.0),  # bold, and no answer
        ("The answer is $2**3$", "23", 0.0),
    ],
)
def test_answers_as_they_are_written(completion, solution, expected):
    assert grade(completion, solution) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>try \\boxed{3}</think>\nThe final answer is 4.", 0.0),
        ("<think>try \\boxed{3}</think> I cannot tell.", 0.0),
        ("<think>try \\boxed{3}</think>", 0.0),
        ("<think>try \\boxed{4}</think>\nThe final answer is 3.", 1.0),
        ("<think>try \\boxed{4}</think>\n#### 3", 1.0),
        ("try \\boxed{4}</think>\n**Answer: 3**", 1.0),  # <think> stood in the prompt
        ("<think>a</think> \\boxed{3} <think>b</think> So \\boxed{4}.", 0.0),
        ("<think>no, \\boxed{4}</think>\\boxed{3}\n</think>", 1.0),
        ("<think>\nSo it is 3.\n</think>\n\n## Solution\n1 + 2 = 3.\n\n$\\boxed{3}$", 1.0),  # as LUFFY's traces
        ("<think>still at it, \\boxed{3}", 0.0),
        ("First \\boxed{3}. <think>Or is it?", 0.0),
    ],
)
def test_thoughts_are_no_answer(completion, expected):
    assert grade(completion, "3") == expected


WORDS = ["<pad>", "</s>", "<think> step one.", " step one.", "</think>", " so \\boxed{3}?"]


@pytest.mark.parametrize(
    ("prompt", "prefix", "completion", "shown", "expected"),
    [
        ("1 + 2?<think>\n", (), (5,), "completion", 0.0),
        ("1 + 2?<think>\n", (3,), (5,), "completion", 0.0),
        ("1 + 2?<think>\n", (3,), (5,), "response", 0.0),
        ("1 + 2?", (2,), (5,), "completion", 0.0),  # opened in a prefix that the reward does not see
        ("1 + 2?<think>\n", (3, 4), (5,), "completion", 1.0),  # ended there
        ("1 + 2?", (2,), (4, 5), "completion", 1.0),
        ("1 + 2?", (3,), (5,), "completion", 1.0),
    ],
)
def test_thoughts_of_a_prefix_are_open_until_they_end_whether_it_is_shown_or_not(prompt, prefix, completion, shown, expected):
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    vocabulary.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="</s>", pad_token="<pad>")
    ratio = 0.5 if prefix else 0.0
    sample = Sample(Problem(0, prompt, (3,), "3"), 1, ratio, prefix, completion, (0.0,) * len(completion), "length")
    judge_samples([sample], MathVerify(), tokenizer, RolloutConfig(verify=shown))
    assert sample.reward == expected


def test_thoughts_that_the_prompt_opens_are_no_answer_until_they_end():
    opened, closed = "What is 1 + 2? <think>\n", "Think in <think>. What is 1 + 2?<think>\n\n</think>\n\n"
    responses = ["still at it, \\boxed{3}", "So it is 3.\n</think>\n\n$\\boxed{3}$", "still at it, \\boxed{3}"]
    assert MathVerify()([opened, opened, closed], responses, ["3"] * 3) == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("text", ["2**3**2", "Answer: 2**3**2", "Answer: **a\nb**", "**Answer:** 2", "**2**", "answers **two**"])
def test_what_is_no_bold_answer_stays(text):
    assert anchored_answer(text) == text


@pytest.mark.parametrize("text", ["**answer is" + " " * 50_000, "**" + "answer: " * 30_000, "**a " * 50_000, "** answer " * 30_000])
def test_a_response_that_repeats_itself_is_read_at_once(text):
    started = time.monotonic()
    anchored_answer(text)
    assert time.monotonic() - started < 2


@pytest.mark.slow
@pytest.mark.parametrize(("completion", "solution"), [("\\boxed{9^{9^{9^{9}}}}", "5"), ("\\boxed{5}", "9^{9^{9^{9}}}")])
def test_a_limit_of_math_verify_is_a_timeout(monkeypatch, completion, solution):
    monkeypatch.setattr(math_grader, "TIME_LIMIT_S", 1)
    started = time.monotonic()
    with pytest.raises(OutOfTime):
        grade(completion, solution)
    assert time.monotonic() - started < 10


def test_a_solution_that_takes_too_long_to_parse_is_no_fault_of_the_response(monkeypatch):
    library = math_grader.load_library()

    def parse(text, **options):
        if "slow" in text:
            raise library.errors.TimeoutException
        return [5]

    monkeypatch.setattr(library, "parse", parse)
    assert grade("\\boxed{5}", "slow") is None
    with pytest.raises(OutOfTime):
        grade("slow", "5")


def test_grading_outside_the_main_thread_is_refused():
    with (
        ThreadPoolExecutor(1) as threads,
        pytest.raises(RuntimeError, match=r"must run in the main thread.*Use the reward math_verify"),
    ):
        threads.submit(grade, "\\boxed{5}", "5").result()


def test_a_pair_that_fails_does_not_hide_an_equal_one(monkeypatch):
    library = math_grader.load_library()

    def verify(gold, answer, **options):
        if answer == 1:
            raise library.errors.TimeoutException
        if answer == 2:
            raise TypeError
        return gold == answer

    monkeypatch.setattr(library, "verify", verify)
    answers = {"\\boxed{3}": [3], "right": [1, 2, 3], "late": [2, 1], "wrong": [2, 4]}
    monkeypatch.setattr(library, "parse", lambda text, **options: answers[text])
    assert [grade(text, "3") for text in ("right", "wrong")] == [1.0, 0.0]
    with pytest.raises(OutOfTime):
        grade("late", "3")


@pytest.mark.parametrize("name", ["aime", "amc", "math"])
def test_no_answer_is_right_because_of_how_it_is_written(name):
    file = MATH_EVAL / f"{name}.parquet"
    if not file.is_file():
        pytest.skip(f"{file.name} is not there: real answers are checked where shared/data/math_eval is")
    import pyarrow.parquet

    cells = pyarrow.parquet.read_table(file, columns=["reward_model"]).column("reward_model").to_pylist()
    answers = sorted({cell["ground_truth"] for cell in cells})[:60]
    others = answers[1:] + answers[:1]
    for written in ("Answer: **{}**", "So it is\n#### {}"):
        assert sum(grade(written.format(answer), answer) for answer in answers) > 0.5 * len(answers)  # those without LaTeX
        for other, answer in zip(others, answers, strict=True):
            assert grade(written.format(other), answer) <= grade(f"\\boxed{{{other}}}", answer), (written, other, answer)
