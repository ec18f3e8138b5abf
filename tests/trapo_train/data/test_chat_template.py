"""Variables of the chat template: part of prompts, of what traces leave out, and of what a run must share with its continuation."""

import pytest

from tests.trapo_train.data import test_dataset as test_data
from tests.trapo_train.data.test_dataset import ROWS, TURNS
from tests.trapo_train.test_train import build_config
from trapo_train.checkpoints.checkpoint import compare_fingerprints
from trapo_train.run.continuation import split_settings
from trapo_train.schema import UserError

load, tokenizer = test_data.load, test_data.tokenizer  # fixtures
pytestmark = pytest.mark.usefixtures("own_cache")
SWITCHED = TURNS + "{% if add_generation_prompt %}<assistant>{% if not think %}<think>\n\n</think>\n\n{% endif %}{% endif %}"


def test_variables_of_the_chat_template_reach_prompts_and_what_a_template_opens_no_trace_opens_again(load, tokenizer):
    tokenizer.chat_template = SWITCHED
    rows = [{"prompt": [{"role": "user", "content": "1+1="}], "solution": "2", "expert": "<think>\n\n</think>\n\n2"}]
    (on,), (off,) = (load(rows, chat_template_kwargs={"think": think}) for think in (True, False))
    assert on.prompt == "<user>1+1=</s><assistant>" and on.experts[0].text == "<think>\n\n</think>\n\n2</s>"
    assert off.prompt == on.prompt + "<think>\n\n</think>\n\n" and off.experts[0].text == "2</s>"
    (text,) = load([{"prompt": "1+1=", "solution": "2"}], as_chat=True, chat_template_kwargs={"think": True})
    assert text.prompt == on.prompt
    assert load(rows, chat_template_kwargs={"think": True}).fingerprint != load(rows).fingerprint


def test_a_template_is_read_as_transformers_reads_it(load, tokenizer):
    """With {% break %}, a default that is set before a variable is used, and the assistant's block, in which nothing is set for
    what comes after it."""
    tokenizer.chat_template = (
        "{% if think is not defined %}{% set think = true %}{% endif %}{% for message in messages %}"
        "{{ message.content }}{% break %}{% endfor %}{% generation %}{% set kept = true %}{% endgeneration %}{{ think }}{{ kept }}"
    )
    (problem,) = load(ROWS[:1], as_chat=True, chat_template_kwargs={"think": "no", "kept": "yes"})
    assert problem.prompt.endswith("noyes")
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ValueError, match="row 0: the chat template cannot be read"):
        load([ROWS[0] | {"tools": [{"name": "f"}]}], as_chat=True)
    with pytest.raises(ValueError, match="row 0: the chat template cannot be read"):
        load(ROWS[:1], as_chat=True, chat_template_kwargs={"think": "no"})
    tokenizer.chat_template = {"one": TURNS, "other": TURNS}
    with pytest.raises(UserError, match="row 0: the tokenizer has several chat templates and none by default"):
        load(ROWS[:1], as_chat=True, chat_template_kwargs={"think": "no"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"as_chat": True, "chat_template_kwargs": {"thinking": True}},
            r"row 0: .* are enable_thinking, got thinking\. Leave",
        ),
        ({"as_chat": True, "chat_template_kwargs": {"message": "x"}}, "reads, which are enable_thinking, got message"),
        ({"chat_template_kwargs": {"think": True}}, "row 0: chat_template_kwargs need a prompt that is rendered .* got a text"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs must be variables of the template, got tokenize"),
    ],
)
def test_variables_that_nothing_reads_are_refused(options, message, load, tokenizer):
    tokenizer.chat_template = TURNS + "{% if enable_thinking %}<think>{% endif %}"
    with pytest.raises(ValueError, match=message):
        load(ROWS, **options)


def test_a_continuation_must_share_them(tmp_path):
    plain, switched = (
        {"config": split_settings(build_config(tmp_path, "run", *overrides))[0]}
        for overrides in ([], ["data.chat_template_kwargs={think: true}"])
    )
    assert compare_fingerprints(plain, plain) == []
    (difference,) = compare_fingerprints(plain, switched)
    assert difference.startswith("config.data.chat_template_kwargs")


def test_texts_that_the_chat_template_could_render_are_said_to_go_in_as_they_are(load, tokenizer):
    said = "; 3 prompts go in as the texts they are (as_chat: true renders them with the chat template)"
    assert str(load(ROWS).report).endswith(said)
    assert "as_chat" not in str(load(ROWS, as_chat=True).report) + str(load(ROWS, system_prompt="Add.").report)
    tokenizer.chat_template = None
    assert "as_chat" not in str(load(ROWS).report)
