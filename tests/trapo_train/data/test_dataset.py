"""Loading problems from every kind of source, and every rule for prompts and experts."""

import json

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trapo_train.checks.preflight import check_reward
from trapo_train.data.dataset import DataConfig, load_problems
from trapo_train.rewards.builtin import exact_match

pytestmark = pytest.mark.usefixtures("own_cache")
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
ROWS = [
    {"prompt": "1+1=", "solution": "2", "expert": "2", "level": 1},
    {"prompt": "1+2=", "solution": "3", "expert": "4", "level": 2},
    {"prompt": "2+2=", "solution": "4", "expert": None, "level": 3},
]


@pytest.fixture
def tokenizer():
    """Bytes as tokens, with a template, that puts <s> before a text and </s> behind it, as some tokenizers do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def load(tmp_path, tokenizer):
    """Load rows through a jsonl file."""

    def load(rows, reward=None, correct_by=None, **options):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return load_problems(DataConfig(path=str(file), **options), tokenizer, reward, correct_by)

    return load


def test_text_rows(load, tokenizer):
    problems = load(ROWS)
    assert [problem.prompt for problem in problems] == ["1+1=", "1+2=", "2+2="]
    assert [problem.index for problem in problems] == [0, 1, 2]
    assert tokenizer.decode(problems[0].prompt_ids) == "<s>1+1="  # open at its end
    assert [problem.solution for problem in problems] == ["2", "3", "4"]
    assert problems[1].columns == {"level": 2}
    assert problems[0].experts[0].text == "2</s>"
    assert tokenizer.decode(problems[0].experts[0].token_ids) == "2</s>"
    assert problems[2].experts == ()
    assert len(problems) == problems.report.problems == 3
    assert problems.report.without_expert == 1


CHAT = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2", "weight": 1},
    {"role": "user", "content": "+1="},
    {"role": "assistant", "content": "3"},
]


@pytest.mark.parametrize(
    "columns", [{"preset": "messages"}, {"prompt_column": "chat", "expert_column": "chat", "solution_column": None}]
)
def test_conversations_are_prompts_and_traces(columns, load, tokenizer):
    name = columns.get("prompt_column", "messages")
    problems = load([{name: CHAT, "level": 1}, {name: CHAT[:4], "level": 2}], **columns)
    before = "<system>Add.</s><user>1+1=</s><assistant>2</s><user>+1=</s><assistant>"
    assert [problem.prompt for problem in problems] == [before, before]
    assert [[trace.text for trace in problem.experts] for problem in problems] == [["3</s>"], []]  # nobody answered the second
    assert problems[0].solution is None and problems[0].columns == {"level": 1}
    whole = tokenizer.decode([*problems[0].prompt_ids, *problems[0].experts[0].token_ids])
    assert whole == tokenizer.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "pattern", "saved", "saved dict", "folder"])
def test_every_source_gives_the_same_problems(kind, tmp_path, tokenizer, load):
    folder = tmp_path / "source"
    folder.mkdir()
    dataset = datasets.Dataset.from_list(ROWS)
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        dataset.to_json(path)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "saved":
        dataset.save_to_disk(path)
    elif kind == "saved dict":
        datasets.DatasetDict(train=dataset).save_to_disk(path)
    else:
        dataset.to_parquet(folder / "rows.parquet")
        path = folder / "*.parquet" if kind == "pattern" else folder
    loaded = load_problems(DataConfig(path=str(path)), tokenizer, None)
    expected = load(ROWS)
    assert list(loaded) == list(expected)
    assert loaded.fingerprint == expected.fingerprint
    assert loaded.fingerprint != load(ROWS[:2]).fingerprint


def test_splits_and_limits(load):
    assert [p.prompt for p in load(ROWS, split="test[1:]")] == ["1+2=", "2+2="]
    assert [p.prompt for p in load(ROWS, num_problems=2)] == ["1+1=", "1+2="]
    assert len(load(ROWS, num_problems=99)) == 3


def test_a_prompt_that_begins_with_the_beginning_of_sequence_has_it_once(load, tokenizer, caplog):
    rows = [{"prompt": prompt, "solution": "s"} for prompt in ("<s>a", "<s>b", "c", "<s><s>d", "e<s>")]
    problems = load(rows)
    assert [tokenizer.decode(problem.prompt_ids) for problem in problems] == ["<s>a", "<s>b", "<s>c", "<s><s>d", "<s>e<s>"]
    (record,) = caplog.records  # once, not for every row and every time that it is read
    assert "row 0: the prompt begins with <s>, which the tokenizer adds: one is left out" in record.getMessage()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert tokenizer.decode(load(rows)[3].prompt_ids) == "<s><s>d"  # nothing is added, so nothing is left out
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("a", ["a"]),
        ("a</s>", ["a"]),
        (["a", "b"], ["a", "b"]),
        (["a", ""], ["a"]),
        ("", []),
        ([], []),
        ({"role": "assistant", "content": "a"}, ["a"]),
        ([{"role": "assistant", "content": "a"}], ["a"]),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], ["a", "b"]),
        ([[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]], ["a", "b"]),
    ],
)
def test_forms_of_an_expert(load, tokenizer, cell, texts):
    (problem,) = load([{"prompt": "p", "solution": "s", "expert": cell}])
    assert [expert.text for expert in problem.experts] == [text + "</s>" for text in texts]
    for expert in problem.experts:
        assert expert.token_ids[-1] == tokenizer.eos_token_id
        assert expert.token_ids.count(tokenizer.eos_token_id) == 1


def test_chat_prompts_are_rendered_with_the_generation_prompt(load, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    (problem,) = load([{"prompt": messages, "solution": "s", "expert": "e"}])
    assert problem.prompt == "<user>hi</s><assistant>"
    assert tokenizer.decode(problem.prompt_ids) == problem.prompt  # the template's special tokens and no further ones
    (problem,) = load([{"prompt": messages, "solution": "s", "expert": "e"}], system_prompt="Think.")
    assert problem.prompt == "<system>Think.</s><user>hi</s><assistant>"
    own = [{"role": "system", "content": "Own."}, *messages]
    (problem,) = load([{"prompt": own, "solution": "s", "expert": "e"}], system_prompt="Think.")
    assert problem.prompt == "<system>Own.</s><user>hi</s><assistant>"


def test_text_prompts_as_chat(load):
    assert load(ROWS, as_chat=True)[0].prompt == "<user>1+1=</s><assistant>"
    assert load(ROWS, system_prompt="Think.")[0].prompt == "<system>Think.</s><user>1+1=</s><assistant>"


def test_a_chat_prompt_without_template(load, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"row 0: a chat prompt needs a tokenizer with a chat template"):
        load([{"prompt": [{"role": "user", "content": "hi"}], "solution": "s", "expert": "e"}])
    with pytest.raises(ValueError, match="as_chat and system_prompt"):
        load(ROWS, system_prompt="Think.")


def test_a_template_that_refuses(load, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(ValueError, match="row 0: the chat template refused the prompt: no system role here"):
        load(ROWS, as_chat=True)


def test_columns_by_other_names_and_in_structs(load, caplog):
    rows = [{"q": "1+1=", "solution": "long text", "reward_model": {"ground_truth": "2"}, "target": "2", "prompts": 1, "n": 7}]
    options = {"prompt_column": "q", "solution_column": "reward_model.ground_truth", "expert_column": "target"}
    (problem,) = load(rows, exact_match, **options)
    assert problem.solution == "2"
    assert problem.columns == {"reward_model": {"ground_truth": "2"}, "n": 7}
    problems = load(rows, exact_match, **options)
    assert problems.report.unread_columns == ("solution", "prompts")
    check_reward(None, {"data": problems})
    assert not caplog.text  # no reward, nobody who might miss them
    check_reward(exact_match, {"data": problems})
    assert "data: rewards do not get the column 'solution', they have an argument of that name; rename it" in caplog.text


def test_columns_called_like_what_a_reward_is_told_of_responses_are_left_out_and_traces_have_lengths_too(load):
    seen = []

    def reward(completions, completion_tokens, finish_reasons, **columns):
        seen.append((completion_tokens, finish_reasons, sorted(columns)))
        return [1.0] * len(completions)

    rows = [{"prompt": "p", "solution": "2", "expert": ["1", "2 3"], "completion_tokens": 7, "finish_reasons": "x", "n": 1}]
    problems = load(rows, reward, on_rejected_expert="drop")
    (problem,) = problems
    assert problem.columns == {"n": 1} and problems.report.unread_columns == ("completion_tokens", "finish_reasons")
    lengths = [len(expert.token_ids) for expert in problem.experts]
    assert seen == [(lengths, ["expert", "expert"], ["n", "prompts", "solution", "thoughts_open"])]


def test_columns_may_be_absent_where_that_is_said(load):
    (problem,) = load([{"prompt": "p"}], solution_column=None, expert_column=None)
    assert (problem.solution, problem.experts, problem.columns) == (None, (), {})


def test_an_expert_column_that_nobody_named_may_be_absent(load):
    for rows, options in (([{"prompt": "p", "solution": "s"}], {}), ([LUFFY_ROW | {"target": None}], {"preset": "luffy"})):
        rows = [{name: value for name, value in row.items() if name != "target"} for row in rows]
        (problem,) = load(rows, **options)
        assert problem.experts == () and "expert" not in problem.columns


def test_whole_numbers_are_solutions(load):
    assert load([{"prompt": "p", "solution": 42, "expert": "e"}])[0].solution == "42"


@pytest.mark.parametrize(
    ("rows", "options", "error", "words"),
    [
        (ROWS, {"prompt_column": "question"}, ValueError, "no column 'question' (prompt_column); it has ['prompt',"),
        (ROWS, {"solution_column": "answer"}, ValueError, "Set data.solution_column to one of them, or to null."),
        (ROWS, {"expert_column": "traces"}, ValueError, "no column 'traces' (expert_column)"),
        (
            [{"prompt": "p", "solution": {"a": "s"}, "expert": "e"}],
            {"solution_column": "solution.b"},
            ValueError,
            "row 0: column 'solution.b' has no field 'b': the value there has the fields ['a']",
        ),
        (
            [{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "solution": "s", "expert": "e"}],
            {},
            ValueError,
            "row 0: a chat prompt must end with what the model is to answer, got an assistant message",
        ),
        ([{"prompt": 5, "solution": "s", "expert": "e"}], {}, ValueError, "row 0: a prompt must be text or a non-empty"),
        ([{"prompt": [], "solution": "s", "expert": "e"}], {}, ValueError, "row 0: a prompt must be text or a non-empty"),
        ([{"prompt": [{"role": "user"}], "solution": "s", "expert": "e"}], {}, ValueError, "row 0: a prompt must be"),
        ([{"prompt": "p", "solution": 0.5, "expert": "e"}], {}, ValueError, "row 0: a solution must be text, a whole"),
        ([{"prompt": "p", "solution": "s", "expert": 5}], {}, ValueError, "row 0: an expert trace must be text or"),
        (
            [{"prompt": "p", "solution": "s", "expert": [{"role": "user", "content": "x"}]}],
            {},
            ValueError,
            "must be one assistant message, got the roles ['user']",
        ),
        ([{"prompt": "p", "solution": "s", "expert": "a</s>b"}], {}, ValueError, "'</s>' before its end"),
        (ROWS, {"max_prompt_tokens": 4}, ValueError, "row 0: the prompt has 5 tokens, max_prompt_tokens is 4. Raise"),
        (ROWS, {"max_prompt_tokens": 4, "on_long_prompt": "drop"}, ValueError, "it has 3 rows, and no prompt in them is within"),
        (ROWS, {"split": "train[:0]"}, ValueError, "Check that it is there, readable and not empty."),
    ],
)
def test_bad_rows(load, rows, options, error, words):
    with pytest.raises(error) as raised:
        load(rows, **options)
    assert words in str(raised.value)


def test_an_empty_prompt(load, tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="row 1: the prompt is empty"):
        load([ROWS[0], ROWS[1] | {"prompt": ""}])


def test_long_prompts_are_dropped_and_counted(load):
    problems = load([*ROWS, ROWS[0] | {"prompt": "1+1+1+1="}], max_prompt_tokens=5, on_long_prompt="drop")
    assert len(problems) == 3
    assert problems.report.dropped_prompts == 1


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    broken = tmp_path / "broken.parquet"
    broken.write_text("no parquet")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    no_rows = tmp_path / "no_rows.json"
    no_rows.write_text("[]")
    table = tmp_path / "table.tsv"
    table.write_text("prompt\tsolution\n1+1=\t2\n")
    for path, words in [
        ("no_such_file.jsonl", "there is no file 'no_such_file.jsonl'"),
        (str(broken), "broken.parquet', split 'train', failed"),
        (str(empty), "not empty."),
        (str(no_rows), "not empty."),
        (str(tmp_path / "*.jsonl.gz"), "no file matches"),
        (str(table), "table.tsv'. Convert it."),
        (str(tmp_path / "*.tsv"), "*.tsv'. Convert it."),
    ]:
        with pytest.raises(ValueError) as error:
            load_problems(DataConfig(path=path), tokenizer, None)
        assert words in str(error.value)


def test_a_tokenizer_without_end_of_sequence(load, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an end-of-sequence token"):
        load(ROWS)


LUFFY_ROW = {
    "data_source": "openr1",
    "prompt": [{"role": "system", "content": "Reason."}, {"role": "user", "content": "1+1="}],
    "target": [{"role": "assistant", "content": "<think>\nOne and one.\n</think>\n2"}],
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": 7, "split": "default"},
}


def test_the_layout_of_luffy_by_its_preset(load):
    (problem,) = load([LUFFY_ROW], preset="luffy")
    assert problem.prompt == "<system>Reason.</s><user>1+1=</s><assistant>"
    assert problem.solution == "2"
    assert [expert.text for expert in problem.experts] == ["<think>\nOne and one.\n</think>\n2</s>"]
    assert problem.columns["data_source"] == "openr1" and problem.columns["extra_info"]["index"] == 7


def test_a_tag_that_the_prompt_opens_is_not_opened_again_by_the_trace(load):
    (problem,) = load([LUFFY_ROW], preset="luffy", response_start="<think>\n")
    assert problem.prompt.endswith("<assistant><think>\n")
    assert [expert.text for expert in problem.experts] == ["One and one.\n</think>\n2</s>"]
    (plain,) = load(ROWS[:1], response_start="<think>\n")
    assert plain.prompt == "1+1=<think>\n" and plain.experts[0].text == "2</s>"


def test_thoughts_behind_a_prompt_that_has_ended_them_are_refused(load):
    row = {"prompt": "p<think>\n\n</think>\n\n", "solution": "2", "expert": "<think>\nlong</think>2"}
    with pytest.raises(ValueError, match=r"row 0.*must have no thoughts where the prompt ends with empty ones.*think_tags=strip"):
        load([row])
    assert load([row], think_tags="strip")[0].experts[0].text.startswith("long2")


def test_a_column_beside_a_preset_stays_as_set(load):
    (problem,) = load([{k: v for k, v in LUFFY_ROW.items() if k != "target"}], preset="luffy", expert_column=None)
    assert problem.experts == () and problem.solution == LUFFY_ROW["reward_model"]["ground_truth"]
