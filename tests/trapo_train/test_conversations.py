"""Conversations: the answer as the chat template writes it, fields beside the content, tools, and what is said of the rest."""

import pytest

from tests.trapo_train import test_data
from tests.trapo_train.test_data import CHAT, TEMPLATE

own_cache, load, tokenizer = test_data.own_cache, test_data.load, test_data.tokenizer  # fixtures
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
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ASKED = {"role": "user", "content": "Weather?"}
ANSWER = {"role": "assistant", "content": "Sunny.", "reasoning_content": "It said so."}


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
    (prompt,) = load([{"prompt": [ASKED], "tools": '[{"name": "f"}]', "solution": "s"}])  # and so with prompts of messages
    assert prompt.prompt == '<tools>[{"name": "f"}]</s>\n' + plain.prompt


def test_an_answer_that_is_a_tool_call_is_learned(load, tokenizer):
    tokenizer.chat_template = THOUGHTS
    (problem,) = load([{"messages": [ASKED, CALL]}], preset="messages")
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert problem.experts[0].text == f"<think>\n\n</think>\n\n{call}</s>"
    assert load([{"messages": [ASKED, {"role": "assistant", "content": ""}]}], preset="messages")[0].experts == ()


def test_the_report_says_what_is_not_learned_as_the_template_has_it(load, tokenizer):
    assert str(load([{"messages": CHAT}] * 3, preset="messages").report).endswith(
        "3 expert traces; 3 assistant turns before the last are context only"
    )
    tokenizer.chat_template = TEMPLATE.replace("<assistant>{% endif", "<assistant><think>{% endif")  # which no answer has
    report = load([{"messages": CHAT[:3]}] * 2, preset="messages").report
    assert report.bare_answers == 2 and "2 answers are their content alone" in str(report)
    assert load([{"messages": CHAT[:3]}], preset="messages")[0].experts[0].text == "2</s>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED, CALL]}, "row 0: the chat template must write the last message after the rendered prompt"),
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
    tokenizer.chat_template = TEMPLATE.replace("<assistant>{% endif", "<assistant><think>{% endif")
    options = {"prompt_column": "messages"} if "expert" in row else {"preset": "messages"}
    with pytest.raises(ValueError, match=message):
        load([row], **options)
