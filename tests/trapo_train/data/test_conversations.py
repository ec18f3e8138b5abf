"""Conversations: the answer as the chat template writes it, fields beside the content, tools, and what is said of the rest."""

import json
from types import SimpleNamespace

import pytest

from tests.trapo_train.data import test_dataset as test_data
from tests.trapo_train.data.test_dataset import CHAT, TEMPLATE
from trapo_train.data.conversations import Example, examples
from trapo_train.data.dataset import DataConfig, load_problems
from trapo_train.models.tokenizer import special_tokens
from trapo_train.rewards.builtin import exact_match
from trapo_train.rollouts.prefix import cut_prefix

load, tokenizer = test_data.load, test_data.tokenizer  # fixtures
pytestmark = pytest.mark.usefixtures("own_cache")
# As gpt-oss writes a turn of the assistant: thoughts and answer in channels of one turn, the last of which ends with EOS.
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}{% if m.thinking %}<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|><|start|>assistant{% endif %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "{{ '</s>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# As Qwen3 writes the last turn, with empty thoughts where it has none; tool calls are JSON, and a line ends every turn.
THOUGHTS = (
    "{% if tools %}<tools>{{ tools | tojson }}</s>\n{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Writes thoughts that stand in the content in a way of its own.
MOVES = TEMPLATE.replace(
    "{{ m.content }}",
    "{% if '</think>' in m.content %}({{ m.content.split('</think>')[0].split('<think>')[-1] | trim }}) "
    "{{ m.content.split('</think>')[1] | trim }}{% else %}{{ m.content }}{% endif %}",
)
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ASKED = {"role": "user", "content": "Weather?"}
ANSWER = {"role": "assistant", "content": "Sunny.", "reasoning_content": "It said so."}
OPENS_THOUGHTS = TEMPLATE.replace("<assistant>{% endif", "<assistant><think>{% endif")  # which no answer has


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (TEMPLATE, {"content": "4"}, "4</s>"),
        (CHANNELS, {"content": "4"}, "<|channel|>final<|message|>4</s>"),
        (
            CHANNELS,
            {"content": "4", "thinking": "easy"},
            "<|channel|>analysis<|message|>easy<|end|><|start|>assistant<|channel|>final<|message|>4</s>",
        ),
        (THOUGHTS, {"content": "4"}, "<think>\n\n</think>\n\n4</s>"),
        (THOUGHTS, {"content": "4", "reasoning_content": "easy"}, "<think>\neasy\n</think>\n\n4</s>"),
        (TEMPLATE.replace("</s>", "<turn>\n"), {"content": "4"}, "4</s>"),  # another token ends turns: a response ends with EOS
        (TEMPLATE.replace("</s>", "\n"), {"content": "4 <b>"}, "4 <b></s>"),
        (TEMPLATE + "{% if not add_generation_prompt %}\n<turn>{% endif %}", {"content": "4"}, "4</s>"),  # as Phi-3 ends a chat
        (TEMPLATE.replace("m.content }}", "m.content | trim }}"), {"content": " 4\n"}, "4</s>"),
        (MOVES, {"content": "<think>\neasy\n</think>\n\n4"}, "(easy) 4</s>"),
    ],
)
def test_an_answer_is_what_the_chat_template_writes(template, answer, expected, load, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", **answer}]
    problems = load([{"messages": messages}], preset="messages")
    (trace,) = problems[0].experts
    assert trace.text == expected == tokenizer.decode(trace.token_ids)
    assert problems[0].prompt == tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert problems.report.bare_answers == 0 and "content alone" not in str(problems.report)


def test_tools_and_tool_calls_reach_the_chat_template(load, tokenizer):
    tokenizer.chat_template = THOUGHTS
    row = {"messages": [ASKED, CALL, {"role": "tool", "name": "weather", "content": "sun"}, ANSWER], "tools": TOOLS}
    other = {"messages": [ASKED, ANSWER], "tools": None}  # whose fields are null in the rows of a dataset
    whole, plain = load([row, other], preset="messages")
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert whole.prompt.startswith('<tools>[{"type": "function", "function": {"name": "weather"') and call in whole.prompt
    assert whole.prompt.endswith("<tool>sun</s>\n<assistant>")
    assert whole.experts[0].text == "<think>\nIt said so.\n</think>\n\nSunny.</s>"
    assert plain.prompt == "<user>Weather?</s>\n<assistant>"
    nulls = {"messages": [ASKED, ANSWER], "tools": [{"name": "f", "strict": None, "parameters": {"type": "object", "enum": None}}]}
    assert load([nulls], preset="messages")[0].prompt.startswith('<tools>[{"name": "f", "parameters": {"type": "object"}}]</s>')
    (prompt,) = load([{"prompt": [ASKED], "tools": '[{"name": "f"}]', "solution": "s"}])  # and so with prompts of messages
    assert prompt.prompt == '<tools>[{"name": "f"}]</s>\n' + plain.prompt


def test_an_answer_that_is_a_tool_call_is_learned(load, tokenizer):
    tokenizer.chat_template = THOUGHTS
    (problem,) = load([{"messages": [ASKED, CALL]}], preset="messages")
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert problem.experts[0].text == f"<think>\n\n</think>\n\n{call}</s>"
    assert load([{"messages": [ASKED, CALL | {"content": []}]}], preset="messages")[0].experts == problem.experts
    assert load([{"messages": [ASKED, {"role": "assistant", "content": ""}]}], preset="messages")[0].experts == ()


# As gpt-oss and Llama 3.1 end a call by another token than an answer, and Phi 3 ends a chat by one more.
ENDS_CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls %}{{ call.function.name }}{% endfor %}"
    "{{ '<|call|>' if m.tool_calls else '<|end|>' }}\n{% endfor %}{{ '<assistant>' if add_generation_prompt else '</s>' }}"
)


def test_a_turn_keeps_the_token_that_ends_it_where_a_response_may_end_with_it(tmp_path, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|end|>"]})
    tokenizer.chat_template = ENDS_CALLS
    chat = [ASKED, {"content": ""} | CALL, {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "Sunny."}]
    config = DataConfig(path=str(tmp_path / "rows.jsonl"), preset="messages", learned_turns="all")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat}))
    call, end = tokenizer.convert_tokens_to_ids(["<|call|>", "<|end|>"])
    for end_ids, expected in (
        ([1, call, end], ["weather<|call|>", "Sunny.<|end|>"]),
        ([1, call], ["weather<|call|>", "Sunny.<|end|>\n</s>"]),
        ([end, call], ["weather<|call|>", "Sunny.<|end|>"]),
    ):
        problems = load_problems(config, tokenizer, None, end_ids=end_ids)
        traces = [problem.experts[0] for problem in problems]
        assert [trace.text for trace in traces] == [tokenizer.decode(trace.token_ids) for trace in traces] == expected
        assert cut_prefix(traces[0], 0.99, tokenizer) == traces[0].token_ids[:-2]
    answer = [ASKED, {"role": "assistant", "content": "It is <|call|>."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": answer}))
    with pytest.raises(ValueError, match=r"row 0 up to message 2: an expert trace has '<\|call\|>' before its end"):
        load_problems(config, tokenizer, None, end_ids=[1, call])


def test_the_special_tokens_are_read_once(load, monkeypatch):  # Gemma 3 has thousands
    read = []
    monkeypatch.setattr(
        "trapo_train.data.conversations.special_tokens", lambda tokenizer: read.append(1) or special_tokens(tokenizer)
    )
    load([{"messages": CHAT}] * 3, preset="messages", learned_turns="all")
    assert len(read) == 1


def test_a_trace_that_is_a_text_keeps_its_end_and_gets_the_first_where_it_has_none(tmp_path, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1=", "solution": "2", "expert": ["2<|end|>", "2", "2</s>"]}))
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    config = DataConfig(path=str(tmp_path / "rows.jsonl"), on_rejected_expert="drop")  # no reward sees an end
    (problem,) = load_problems(config, tokenizer, exact_match, end_ids=[1, end])
    assert [trace.text for trace in problem.experts] == ["2<|end|>", "2</s>", "2</s>"]
    assert [trace.token_ids[-1] for trace in problem.experts] == [end, 1, 1]


def test_the_report_says_what_is_not_learned_as_the_template_has_it(load, tokenizer):
    assert str(load([{"messages": CHAT, "solution": n} for n in range(3)], preset="messages").report).endswith(
        "3 expert traces; 3 assistant turns before the last are context only (learned_turns: all)"
    )
    tokenizer.chat_template = OPENS_THOUGHTS
    report = load([{"messages": CHAT[:3]}] * 2, preset="messages").report
    assert report.bare_answers == 2 and "2 answers are their content alone" in str(report)
    assert load([{"messages": CHAT[:3]}], preset="messages")[0].experts[0].text == "2</s>"


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (TEMPLATE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] | trim }}"), "<think>easy</think>4"),
        (TEMPLATE.replace("{{ m.content }}", "{{ m.content[:9] }}"), "a long answer"),
        # More than special tokens behind EOS: another prompt, or words.
        (TEMPLATE.replace("{% if add_generation_prompt %}<assistant>{% endif %}", "<assistant>"), "4"),
        (TEMPLATE + "{% if not add_generation_prompt %}<turn> and so on{% endif %}", "4"),
    ],
)
def test_an_answer_that_the_template_does_not_write_whole_is_its_content_and_counted(template, answer, load, tokenizer):
    tokenizer.chat_template = template
    problems = load([{"messages": [ASKED, {"role": "assistant", "content": answer}]}], preset="messages")
    assert problems.report.bare_answers == 1 and problems[0].experts[0].text == f"{answer}</s>"


@pytest.mark.parametrize(
    ("template", "answer", "message"),
    [
        (TEMPLATE, ANSWER, "row 0: the chat template must write the field reasoning_content of the last message, it does not"),
        (TEMPLATE, CALL, "the field tool_calls of the last message"),
        (TEMPLATE, CALL | {"content": "Let me see."}, "the field tool_calls of the last message"),
        (THOUGHTS, ANSWER | {"thinking": "So it said."}, "the field thinking of the last message"),
        (OPENS_THOUGHTS.replace("</s>", "{{ m.tool_calls }}</s>"), CALL, "row 0: the chat template must write all of the last"),
        (TEMPLATE.replace("m.content", "m.tool_calls or m.content"), CALL | {"content": "Let me see."}, "must write all of"),
        (TEMPLATE.replace("m.content", "m.content | trim"), {"role": "assistant", "content": " "}, "must write all of"),
    ],
)
def test_what_the_template_leaves_out_of_an_answer_is_refused(template, answer, message, load, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        load([{"messages": [ASKED, answer]}], preset="messages")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED, ANSWER], "tools": TOOLS}, "row 0: the tokenizer's chat template must read the tools"),
        ({"messages": [ASKED, ANSWER], "tools": "a hammer"}, "row 0: the column tools must hold a list of function descriptions"),
        ({"messages": [{"role": "user"}, ANSWER]}, r"text under 'role' and 'content' \(which one with tool_calls need not have\)"),
        (
            {"messages": ASKED["content"], "solution": "s", "expert": [ANSWER]},
            r"row 0: an expert trace is the content of a message, got one with reasoning_content as well\. Append",
        ),
    ],
)
def test_what_would_be_lost_is_refused(row, message, load, tokenizer):
    tokenizer.chat_template = OPENS_THOUGHTS
    options = {"prompt_column": "messages"} if "expert" in row else {"preset": "messages"}
    with pytest.raises(ValueError, match=message):
        load([row], **options)


def test_each_turn_of_the_assistant_can_be_learned(load, tokenizer):
    tokenizer.chat_template = THOUGHTS
    greeting = {"role": "assistant", "content": "Hello."}  # answers nothing
    other = ANSWER | {"reasoning_content": "So."}
    long = {"messages": [greeting, ASKED, CALL, {"role": "tool", "content": "sun"}, ANSWER, ASKED, other]}
    rows = [long, {"messages": [ASKED, ANSWER, ASKED]}, {"messages": [ASKED, ANSWER]}]
    problems = load(rows, preset="messages", learned_turns="all")
    assert [problem.index for problem in problems] == list(range(6)) and problems.report.context_turns == 0
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    said = "<think>\nIt said so.\n</think>\n\nSunny.</s>"
    learned = [[trace.text for trace in problem.experts] for problem in problems]
    assert learned == [[f"<think>\n\n</think>\n\n{call}</s>"], [said], [said.replace("It said so", "So")], [said], [], [said]]
    # Each is what it is as the last turn of a shorter conversation: this template leaves earlier thoughts out of a prompt.
    cuts = [(0, 3), (0, 5), (0, 7), (1, 2), (1, 3), (2, 2)]
    alone = load([{"messages": rows[row]["messages"][:end]} for row, end in cuts], preset="messages")
    assert list(problems) == list(alone) and "It said so" not in problems[2].prompt


def test_a_turn_that_answers_nothing_is_context(load):
    said = {"role": "assistant", "content": "Well."}
    rows = [[CHAT[0], said, ASKED, said], [*CHAT[1:3], said, *CHAT[3:5]], [*CHAT[1:3], said], [CHAT[0], said]]
    problems = load([{"messages": row} for row in rows], preset="messages", learned_turns="all")
    assert [problem.prompt.removesuffix("<assistant>") for problem in problems] == [
        "<system>Add.</s><assistant>Well.</s><user>Weather?</s>",
        "<user>1+1=</s>",
        "<user>1+1=</s><assistant>2</s><assistant>Well.</s><user>+1=</s>",
        "<user>1+1=</s>",
        "<system>Add.</s>",  # as with learned_turns: last
    ]
    with pytest.raises(ValueError, match=r"got two assistant messages at its end\. Remove the row, or the last message from it"):
        load([{"messages": rows[2]}], preset="messages")


def test_the_solution_of_a_row_is_that_of_its_last_turn(load):
    other = {"messages": [*CHAT[1:3], ASKED], "solution": "2"}
    rows = [{"messages": CHAT, "solution": "3"}, other]
    problems = load(rows, exact_match, preset="messages", learned_turns="all", on_rejected_expert="drop")
    assert [problem.solution for problem in problems] == [None, "3", None, "2"]
    assert [len(problem.experts) for problem in problems] == [1, 1, 1, 0] and problems.report.dropped_experts == 0


def test_conversations_whose_last_turn_is_learned_take_no_memory(load):
    found = examples(range(10**12), SimpleNamespace(learned_turns="last"), "")
    assert (len(found), found[7], found[-1]) == (10**12, Example(7), Example(10**12 - 1))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([ASKED, ANSWER, ASKED], "split train, row 1 up to message 2: the chat template must write the field reasoning_content"),
        ([ASKED, {"role": "assistant", "content": "</s>."}, ASKED], "row 1 up to message 2: an expert trace has '</s>' before its"),
        ([{"role": "assistant", "content": "Hi."}], "row 1 up to message 1: a conversation must have a message before the last"),
        ([], "row 1: a conversation must be a non-empty list"),
    ],
)
def test_a_turn_that_cannot_be_learned_is_named(messages, message, load):
    with pytest.raises(ValueError, match=message):
        load([{"messages": [ASKED, ASKED]}, {"messages": messages}], preset="messages", learned_turns="all")


def test_learned_turns_are_those_of_conversations(load):
    with pytest.raises(ValueError, match=r"learned_turns: all needs conversations, .* expert_column = expert\. Set preset"):
        load([{"prompt": [ASKED]}], learned_turns="all")


def test_content_in_parts_of_text_is_one_text(load):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1="}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]
    (whole,) = load([{"messages": messages}], preset="messages")
    assert whole.prompt == "<user>1+1=</s><assistant>" and whole.experts[0].text == "1=</s>"
    with pytest.raises(ValueError, match="with text under 'role' and 'content'"):
        load([{"messages": [{"role": "user", "content": []}, *messages[1:]]}], preset="messages")
    picture = [{"role": "user", "content": [{"type": "image", "text": "a cat"}]}, *messages[1:]]
    with pytest.raises(ValueError, match="with text under 'role' and 'content'"):
        load([{"messages": picture}], preset="messages")


def test_chats_whose_own_system_message_stays_are_counted(load):
    rows = [{"messages": CHAT}, {"messages": CHAT[1:3]}]
    problems = load(rows, preset="messages", system_prompt="Be brief.")
    assert problems.report.own_system == 1
    assert "; 1 chats have a system message of their own, which system_prompt does not replace" in str(problems.report)
    assert load(rows, preset="messages").report.own_system == 0


def test_what_is_counted_of_rows_is_counted_of_those_that_are_kept(load, tokenizer):
    tokenizer.chat_template = OPENS_THOUGHTS
    chats = {"preset": "messages", "system_prompt": "Be brief.", "on_duplicate": "drop"}
    report = load([{"messages": CHAT}] * 3, **chats).report
    assert (report.dropped_duplicates, report.context_turns, report.own_system, report.bare_answers) == (2, 1, 1, 1)
    report = load([{"prompt": "1+1=", "solution": "2"}] * 3, on_duplicate="drop").report
    assert (report.dropped_duplicates, report.plain_prompts) == (2, 1)


MESSAGES = {"preset": "messages"}
OF_CONVERSATIONS = {"prompt_column": "conversations", "expert_column": "conversations", "solution_column": None}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"prompt": "a", "completion": "b"},
            MESSAGES,
            "For SFT on them set no preset, prompt_column: prompt, expert_col",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {},
            r"expert_column: completion and solution_column: null\. Set data.solution_column to",
        ),
        (
            {"instruction": "a", "output": "b"},
            {},
            "set prompt_column: instruction, expert_column: output and solution",
        ),
        ({"conversations": [ASKED]}, MESSAGES, "set prompt_column and expert_column to conversations, .* Remove preset: messages"),
        (
            {"conversations": [{"from": "human", "value": "a"}]},
            OF_CONVERSATIONS,
            "Rename from and value to role and content",
        ),
    ],
)
def test_layouts_that_are_common_elsewhere_are_told_how_they_are_read(row, options, message, load):
    with pytest.raises(ValueError, match=message):
        load([row], **options)


@pytest.mark.parametrize(
    ("row", "options", "near"),
    [
        ({"problem": "a", "answer": "b", "generations": ["x"], "messages": CHAT}, {"expert_column": "generation"}, "generations"),
        ({"problem": "a", "answer": "b", "conversations": CHAT}, {"prompt_column": "problems"}, "problem"),
        ({"problem": "a", "prompt": "a", "response": "b", "answer": "3"}, {"solution_column": "answr"}, "answer"),
    ],
)
def test_a_column_that_is_misspelt_gets_a_proposal_whatever_layout_is_beside_it(row, options, near, load):
    with pytest.raises(ValueError, match=f"Did you mean {near!r}") as raised:
        load([row], **{"prompt_column": "problem", "solution_column": "answer"} | options)
    assert "For " not in str(raised.value)


def test_the_settings_that_are_advised_read_those_layouts(load):
    (pair,) = load([{"prompt": "a", "completion": "b"}], expert_column="completion", solution_column=None)
    (chat,) = load([{"conversations": CHAT}], **OF_CONVERSATIONS)
    assert (pair.experts[0].text, chat.experts[0].text) == ("b</s>", "3</s>")


def test_conversations_keep_their_solution_and_their_own_system_prompt(load):
    rows = [{"messages": CHAT, "solution": "3"}, {"messages": CHAT[1:3], "solution": "2"}]
    first, second = load(rows, preset="messages", system_prompt="Be brief.")
    assert (first.solution, second.solution) == ("3", "2")
    assert first.prompt.startswith("<system>Add.</s>") and second.prompt == "<system>Be brief.</s><user>1+1=</s><assistant>"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"messages": CHAT}, {}, r"has no column 'prompt' .* For conversations set preset: messages\."),
        ({"messages": CHAT[2:3]}, {"preset": "messages"}, "row 0: a conversation must have a message before the last"),
        ({"messages": []}, {"preset": "messages"}, "row 0: a conversation must be a non-empty list of messages"),
        ({"messages": "1+1="}, {"preset": "messages"}, "row 0: a conversation must be a non-empty list of messages"),
        ({"messages": CHAT}, {"preset": "messages", "solution_column": "truth"}, "has no column 'truth'"),
        ({"messages": CHAT, "solution": "3"}, {"prompt_column": "messages"}, "or the same column for conversations"),
    ],
)
def test_bad_conversations(row, options, message, load):
    with pytest.raises(ValueError, match=message):
        load([row], **options)
