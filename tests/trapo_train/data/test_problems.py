"""Problems that are read when they are used: what stays in memory, what is the same as before, and when data has changed."""

import json
import tracemalloc

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trapo_train.data.dataset import DataConfig, load_problems
from trapo_train.data.problems import CACHED_PROBLEMS, CHUNK_ROWS
from trapo_train.data.rows import solution_text, with_think_tags, without_start
from trapo_train.models.tokenizer import continuations, decode, line_break_behind
from trapo_train.rewards.builtin import exact_match
from trapo_train.rewards.functions import WeightedSum
from trapo_train.rewards.grading import WorkerReward
from trapo_train.schema import UserError
from trapo_train.tasks import build_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
TOKENIZER = build_tokenizer()
ROWS = [
    {"prompt": "ab|", "solution": "bc", "expert": ["ab|bc#bc", "ab#ab"]},
    {"prompt": "ab|bc|", "solution": "cd", "expert": None},
    {"prompt": "a", "solution": "de", "expert": "de"},
]


@pytest.fixture
def load(tmp_path):
    def load(rows, reward=None, **options):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return load_problems(DataConfig(path=str(file), **options), TOKENIZER, reward)

    return load


@pytest.mark.parametrize(
    ("row", "what"),
    [({"prompt": "Hello"}, "row 1: the prompt"), ({"prompt": "a", "expert": "Hello"}, "from row 0 to row 1: an expert trace")],
)
def test_a_text_that_the_tokenizer_cannot_encode_is_named(load, row, what):
    with pytest.raises(ValueError, match=f"{what} must be text that the tokenizer knows: .*Set model.tokenizer"):
        load([ROWS[2], {"solution": "de", "expert": None} | row])


def test_long_experts_and_problems_without_one_are_left_out(load):
    problems = load(ROWS)
    short, dropped = problems.without_long_experts(6)  # "ab#ab" and its end-of-sequence token
    assert [[expert.text for expert in problem.experts] for problem in short] == [["ab#ab$"], [], ["de$"]]
    assert dropped == 1
    assert [problem.index for problem in short.with_experts()] == [0, 2]
    assert len(problems[0].experts) == 2  # the set that was asked is as it was
    assert problems.longest_prompt_tokens == 6
    assert [problems.longest_with_expert(longest) for longest in (99, 6, 3, 1)] == [(3, 9), (3, 6), (1, 3), (0, 0)]
    assert short.fingerprint == problems.fingerprint


def test_indices_slices_and_iteration(load):
    problems = load(ROWS)
    assert [problem.index for problem in problems] == [0, 1, 2]
    assert problems[-1] == problems[2] and problems[1:] == [problems[1], problems[2]]
    assert problems[:None] == list(problems)
    with pytest.raises(IndexError):
        problems[3]


def test_rows_in_more_than_one_chunk_keep_their_order_and_their_traces(load):
    count = CHUNK_ROWS + 3
    words = [f"{'abcdefgh'[i % 8]}{'abcdefgh'[i // 8 % 8]}" for i in range(count)]
    rows = [{"prompt": word, "solution": word, "expert": [word, "ab"]} for word in words]
    problems = load(rows, exact_match, on_rejected_expert="drop")
    assert [problem.prompt for problem in problems] == words
    assert all(problem.experts[0].text == f"{problem.prompt}$" for problem in problems)
    assert all(len(problem.experts) == 1 for problem in problems if problem.prompt != "ab")


class Counting(PreTrainedTokenizerFast):
    """Notes how many texts each call has: 1 for a text, not a list."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def __call__(self, text, *args, **kwargs):
        self.calls.append(1 if isinstance(text, str) else len(text))
        return super().__call__(text, *args, **kwargs)


def test_prompts_are_tokenised_together_and_are_what_each_would_be_alone(tmp_path):
    words = {word: number for number, word in enumerate(("<s>", "</s>", "?", "a", "b", "user"))}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    template = "{% for message in messages %}user {{ message.content }}{% endfor %}"
    tokenizer = Counting(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template)
    chat = [{"role": "user", "content": "b </s>"}]
    ids = {"a b": (0, 3, 4), "<s> a": (0, 3), "a </s>": (0, 3, 1), "<s> <s> b": (0, 0, 4), "a ?": (0, 3, 2)}
    prompts = [*ids, chat, "b"] + ["a b b a"] * CHUNK_ROWS
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": prompt, "solution": "a"}) for prompt in prompts))
    problems = load_problems(DataConfig(path=str(tmp_path / "rows.jsonl")), tokenizer, None)
    # One call for the texts before the chat, one for it, one for the rest of either chunk; two doubtful beginnings are looked at.
    assert {len(ids), CHUNK_ROWS - len(ids) - 1, 7} <= set(tokenizer.calls) and len(tokenizer.calls) < 20
    alone = [problem.prompt_ids for problem in problems]
    assert alone == [*ids.values(), (5, 4, 1), (0, 4)] + [(0, 3, 4, 4, 3)] * CHUNK_ROWS


def test_a_prompt_stays_open_whatever_ends_a_response(tmp_path):
    words = {word: number for number, word in enumerate(("<s>", "</s>", "<end>", "a", "b"))}
    inner = Tokenizer(models.WordLevel(words, unk_token="b"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a b", "solution": "a", "expert": "b"}))
    for eos_token, end in (("</s>", 1), ("<end>", 2)):  # as model.eos_token says
        tokenizer = Counting(tokenizer_object=inner, bos_token="<s>", eos_token=eos_token)
        (problem,) = load_problems(DataConfig(path=str(tmp_path / "rows.jsonl")), tokenizer, None)
        assert problem.prompt_ids == (0, 3, 4) and problem.experts[0].token_ids == (4, end)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_the_traces(load):
    rows = 2 * CACHED_PROBLEMS
    trace_tokens = 1500
    problems = load([{"prompt": "ab", "solution": "ab", "expert": "ab|" * (trace_tokens // 3)} for _ in range(rows)])
    tracemalloc.start()
    for problem in problems:
        assert len(problem.experts[0].token_ids) > 0.99 * trace_tokens
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Token ids as Python numbers take 8 bytes each at least; only the cached problems may be held.
    assert held < 1.5 * CACHED_PROBLEMS * trace_tokens * 8


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "ac|"},
        {"solution": "bd"},
        {"expert": ["ab|bc#bc"]},
        {"expert": ["ab#ab", "ab|bc#bc"]},
        {"expert": ["ab|bc#bc", "ab#ac"]},
    ],
)
def test_the_fingerprint_is_that_of_the_data(load, change):
    before = load(ROWS).fingerprint
    assert load(ROWS).fingerprint == before
    assert load([ROWS[0] | change, *ROWS[1:]]).fingerprint != before


def test_the_fingerprint_knows_the_columns_that_the_reward_reads(load):
    first, other = (load([row | {"level": level} for row in ROWS]).fingerprint for level in (1, 2))
    assert first != other


def test_the_fingerprint_knows_order_and_number(load):
    before = load(ROWS).fingerprint
    assert load(ROWS[::-1]).fingerprint != before and load(ROWS[:2]).fingerprint != before
    assert load(ROWS, exact_match, on_rejected_expert="drop").fingerprint == before  # verdicts may be others the next time


def test_a_misspelt_column_gets_a_proposal(load):
    with pytest.raises(ValueError, match="no column 'experts'.*Did you mean 'expert'\\? Set data.expert_column"):
        load(ROWS, expert_column="experts")


@pytest.mark.parametrize(
    ("mode", "trace", "prompt", "expected"),
    [
        ("keep", "<think>\na</think>b", "p", "<think>\na</think>b"),
        ("strip", "<think>\na</think>b", "p", "ab"),
        ("strip", "a", "p", "a"),
        ("add", "a</think>b", "p", "<think>\na</think>b"),
        ("add", "<think>a", "p", "<think>a"),
        ("add", "a", "p<think>\n", "a"),
        ("require", "<think>a</think>b", "p", "<think>a</think>b"),
        ("require", "a</think>b", "p<think>", "a</think>b"),
    ],
)
def test_think_tags(mode, trace, prompt, expected):
    assert with_think_tags(trace, mode, prompt, "here") == expected


@pytest.mark.parametrize(("trace", "prompt"), [("a", "p"), ("<think>a", "p"), ("a</think>b", "p"), ("a", "p<think>")])
def test_required_think_tags(trace, prompt):
    with pytest.raises(ValueError, match="here: an expert trace must open with <think> and have </think>"):
        with_think_tags(trace, "require", prompt, "here")


@pytest.mark.parametrize(
    ("trace", "prompt", "start", "expected"),
    [
        ("<b>a</b>", "Write <b>", "", "<b>a</b>"),
        ("<think>\na", "p<think>\n", "", "a"),
        ("<think>\na", "p<think>", "", "\na"),
        ("\n<think> a", "p<think>\n", "", "a"),
        ("a", "p<think>\n", "", "a"),
        ("<think>\na", "p", "", "<think>\na"),
        ("Let me see: a", "pLet me see:", "Let me see:", " a"),
        ("<think>\na", "p</think>\n", "", "<think>\na"),
    ],
)
def test_nothing_is_opened_twice(trace, prompt, start, expected):
    assert without_start(trace, prompt, start, rendered=False) == expected


def test_a_tag_that_the_chat_template_opened_is_not_opened_twice():
    assert without_start("<plan>\na", "user: p\n<plan>\n", "", rendered=True) == "a"


def test_failed_gradings_while_loading_are_told_and_not_left_to_the_first_step(load, caplog):
    class Failing:
        def __init__(self):
            self.counts = {"reward/timeouts": 2.0, "reward/crashes": 1.0}

        def __call__(self, completions, **columns):
            return [0.0] * len(completions)

        def take_metrics(self):
            taken, self.counts = self.counts, {}
            return taken

    reward = Failing()
    assert load(ROWS, reward, on_rejected_expert="drop").report.dropped_experts == 3
    assert "2 gradings ran out of time and 1 crashed" in caplog.text
    assert reward.counts == {}


def sentencepiece(legacy, text):
    """A tokenizer learned from the text that puts a space before every text."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if legacy:  # as Llama-2's file has it
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(spaces)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator([text] * 20, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_trace_begins_without_the_space_that_sentencepiece_puts_before_a_text(tmp_path, legacy):
    tokenizer = sentencepiece(legacy, "Question: what is it? Answer: First we think so it is 5")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<t>", lstrip=True, special=True)]})
    prompt, traces = "Question: what is it?\n", ["First we think", "5", " 5", "\nso"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("5", add_special_tokens=False)["input_ids"])[0].startswith("▁")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "solution": "5", "expert": traces}))
    (problem,) = load_problems(DataConfig(path=str(tmp_path / "rows.jsonl")), tokenizer, None)
    for trace, expert in zip(traces, problem.experts, strict=True):
        joint = tokenizer(prompt + trace, add_special_tokens=False)["input_ids"]
        written = [*problem.prompt_ids, *expert.token_ids]
        assert expert.text == f"{trace}</s>" and decode(tokenizer, written, special=True) == f"{prompt}{trace}</s>"
        assert written == [*joint, tokenizer.eos_token_id]
    # A token that takes the white space before it would leave no line break to drop.
    line_break = line_break_behind(tokenizer)
    assert line_break and continuations(["<t>5"], tokenizer, line_break) == [
        tokenizer("<t>5", add_special_tokens=False)["input_ids"]
    ]


@pytest.mark.parametrize("breaks", ["\n\n", "\n\n\n"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_trace_has_no_such_space_where_the_tokenizer_merges_line_breaks_either(legacy, breaks):
    tokenizer = sentencepiece(legacy, f"Question: what is it? Answer:{breaks}First we think so it is 5")
    line_break, traces = line_break_behind(tokenizer), ["First we", "5", "\nFirst", "\n\nFirst", f"{breaks}5", " 5"]
    assert line_break
    prompt = tokenizer("Question:", add_special_tokens=False)["input_ids"]
    for trace, token_ids in zip(traces, continuations(traces, tokenizer, line_break), strict=True):
        assert decode(tokenizer, [*prompt, *token_ids], special=True) == f"Question:{trace}"


def test_equal_rows_are_told_and_may_be_left_out(load):
    other_traces = ROWS[0] | {"expert": ["ab#ab"]}
    rows = [ROWS[0], other_traces, ROWS[1], ROWS[0], ROWS[1] | {"solution": "ce"}, ROWS[0]]
    kept, dropped = load(rows), load(rows, on_duplicate="drop")
    assert [problem.index for problem in kept] == list(range(6)) and kept.report.duplicates == 2
    assert "2 problems equal an earlier one in prompt, solution, expert traces and the columns" in str(kept.report)
    assert "(on_duplicate: drop leaves them out)" in str(kept.report)
    assert [problem.index for problem in dropped] == [0, 1, 2, 4]
    assert (dropped.report.problems, dropped.report.duplicates, dropped.report.dropped_duplicates) == (4, 0, 2)
    assert dropped.report.dropped_prompts == 0 and dropped.report.experts == 3
    assert "2 more dropped as equal to an earlier one" in str(dropped.report) and "on_duplicate" not in str(dropped.report)
    assert dropped.fingerprint != kept.fingerprint
    assert "equal" not in str(load(rows[:3]).report)


def _levels(completions, level, **columns):
    return [1.0 for _ in completions]


def _anything(completions, **columns):
    return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("answer", "reward", "kept"),
    [
        ({}, None, 3),  # nothing but the columns says what the answer is
        ({}, _levels, 2),
        ({}, _anything, 3),
        ({"expert": "bc"}, None, 1),  # SFT: an id makes no other example
        ({"expert": "bc"}, _anything, 1),
        ({"solution": "bc"}, exact_match, 1),
        ({"solution": "bc"}, _levels, 2),  # tests that a reward runs make another problem
        ({"solution": "bc", "expert": "bc"}, WeightedSum([("a", exact_match, 1.0), ("b", _levels, 1.0)]), 2),
        ({"solution": "bc"}, WorkerReward("m:f", _levels, time_limit_s=1.0, memory_limit_mib=64), 2),
    ],
)
def test_columns_make_another_problem_where_the_reward_names_them_or_nothing_else_is_the_answer(answer, reward, kept, load):
    rows = [{"prompt": "ab", "id": number, "level": level} | answer for number, level in enumerate((1, 2, 1))]
    column = "solution" if "solution" in answer else None
    assert len(load(rows, reward, solution_column=column, on_duplicate="drop")) == kept


@pytest.mark.parametrize(("value", "text"), [(27.0, "27"), (-3, "-3"), (["$5$"], "$5$"), ([7.0], "7"), ([None], None)])
def test_a_solution_may_be_a_float_without_a_fraction_or_the_only_item_of_a_list(value, text):
    assert solution_text(value, "here") == text


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), True, ["5", "6"], [], [[5]], [True]])
def test_other_solutions_are_refused(value):
    with pytest.raises(ValueError, match="here: a solution must be text, a whole number, a list of one of these, or null, got"):
        solution_text(value, "here")


@pytest.mark.parametrize("number", [123456789012345678901234567890, -(2**63) - 1])
def test_a_whole_number_that_a_table_rounds_is_no_solution(load, number):
    with pytest.raises(UserError, match=r"row 0: a solution that is a float must be below 2\^53, .* got .* \(float\)\. Write"):
        load([{"prompt": "a", "solution": number}])
    assert load([{"prompt": "a", "solution": str(number)}])[0].solution == str(number)
    assert solution_text(2**60 + 1, "here") == str(2**60 + 1) and solution_text(-(2.0**53) + 1, "here") == str(1 - 2**53)


def test_a_solution_that_json_makes_a_date_says_how_it_stays_text(load):
    with pytest.raises(UserError, match=r"row 0: a solution must be text, .* got datetime.* to text in Parquet: in JSON"):
        load([{"prompt": "a", "solution": "2021-05-04"}])
