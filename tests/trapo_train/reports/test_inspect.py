"""The annotated group shows every token with what training does with it, in colour and without."""

import io

import pytest
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trapo_train.records import Problem, Sample
from trapo_train.reports.inspect import COMPLETION, PREFIX_WITH_LOSS, PREFIX_WITHOUT_LOSS, SEGMENTS, decode_after, render_group
from trapo_train.rollouts.samples import sample_record


class CharacterTokenizer:
    """Token id = code point; id 0 is the end-of-sequence token."""

    def decode(self, token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=True):
        return "".join("<eos>" if i == 0 else chr(i) for i in token_ids if i or not skip_special_tokens)


class SpaceEatingTokenizer:
    """Like SentencePiece: each token is a word with its leading space, which decoding drops at the very start."""

    def decode(self, token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=True):
        return "".join(f" w{i}" for i in token_ids).removeprefix(" ")


class ByteTokenizer:
    """Token id = byte of UTF-8."""

    def decode(self, token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=True):
        return bytes(token_ids).decode("utf-8", errors="replace")


def ids(text):
    return tuple(map(ord, text))


def sample(prefix="", completion="", index=0, **fields):
    problem = Problem(index, "ab?", ids("ab?"), solution="c d")
    defaults = dict(micro_group=1, prefix_ratio=0.0, finish_reason="stop", completion_logprobs=())
    return Sample(problem, prefix_ids=ids(prefix), completion_ids=ids(completion), **(defaults | fields))


def rendered(samples, *, color, tokenizer=None, **options):
    console = Console(file=io.StringIO(), width=200, force_terminal=color, color_system="truecolor" if color else None)
    console.print(render_group(samples, tokenizer or CharacterTokenizer(), color=color, **options))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_without_colour_brackets_tell_the_kinds_apart():
    group = [sample("pre", "own"), sample("pre", "own", prefix_weight=0.0), sample("", "own")]
    text = rendered(group, color=False)
    assert "⟦pre⟧own" in text and "⟨pre⟩own" in text and "\n  own" in text
    assert "⟦expert prefix in the loss⟧" in text and "⟨expert prefix without loss⟩" in text
    assert "\x1b" not in text


def test_a_masked_completion_says_so():
    first, second = (rendered([sample("", "own", finish_reason="length", masked=masked)], color=False) for masked in (True, False))
    assert "completion 3 tokens, length, not in the loss  reward" in first
    assert "not in the loss" not in second


def test_no_prefix_is_in_the_loss_of_an_objective_without_expert_tokens():
    text = rendered([sample("pre", "own"), sample("pre", "own", prefix_weight=0.5)], color=False, trains_prefix=False)
    assert text.count("⟨pre⟩own") == 2 and "loss weight" not in text


def styled(style, text):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(text, style=style, end="")
    return console.file.getvalue()


def test_with_colour_each_kind_has_its_own():
    text = rendered([sample("pre", "own"), sample("pre", "own", prefix_weight=0.0)], color=True)
    assert styled(PREFIX_WITH_LOSS.style, "pre") + styled(COMPLETION.style, "own") in text
    assert styled(PREFIX_WITHOUT_LOSS.style, "pre") + styled(COMPLETION.style, "own") in text
    assert "⟦" not in text


def test_the_header_says_what_happened_to_the_sample():
    one = sample("abc", "d", micro_group=2, prefix_ratio=0.25, finish_reason="length", reward=1.0, advantage=-0.125,
                 prefix_weight=0.5, answer_in_prefix=True)  # fmt: skip
    text = rendered([one], color=False)
    for fact in ("micro-group 2", "25 % (3 tokens, loss weight 0.5)", "1 tokens, length", "reward 1",
                 "advantage -0.125", "answer in prefix"):  # fmt: skip
        assert fact in text
    assert "answer in prefix" not in rendered([sample("abc", "d")], color=False)


def test_whitespace_and_special_tokens_are_visible():
    text = rendered([sample("", "a b\n\tc\0")], color=False)
    assert "a·b↵\n  →" in text and "c<eos>" in text
    assert "solution c·d" in text


def test_markup_in_a_response_is_shown_as_it_is():
    assert "[bold]x[/bold]" in rendered([sample("", "[bold]x[/bold]")], color=False)


@pytest.mark.parametrize(("limit", "shown"), [(4, "01 … 6 tokens … 89"), (3, "01 … 7 tokens … 9"), (1, "0 … 9 tokens")])
def test_the_middle_of_a_long_response_is_left_out_and_counted(limit, shown):
    assert shown in rendered([sample("", "0123456789")], color=False, max_tokens=limit)
    assert "0123456789" in rendered([sample("", "0123456789")], color=False, max_tokens=10)


def test_the_space_between_prefix_and_completion_is_kept():
    assert decode_after((1, 2), (3,), SpaceEatingTokenizer()) == " w3"
    assert decode_after((), (3,), SpaceEatingTokenizer()) == "w3"


def test_a_character_cut_in_two_is_shown_whole_with_its_second_half():
    first, *rest = "é".encode()
    assert decode_after((97, first), rest, ByteTokenizer()) == "é"


def test_samples_of_two_problems_are_refused():
    with pytest.raises(ValueError, match="2 samples of 2 problems"):
        render_group([sample("", "a"), sample("", "a", index=1)], CharacterTokenizer())
    with pytest.raises(ValueError, match="0 samples"):
        render_group([], CharacterTokenizer())


def test_max_tokens_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        render_group([sample("", "a")], CharacterTokenizer(), max_tokens=0)


@pytest.mark.parametrize("system", [ColorSystem.TRUECOLOR, ColorSystem.EIGHT_BIT, ColorSystem.STANDARD])
def test_the_kinds_of_tokens_look_different_on_every_terminal(system):
    assert len({Style.parse(segment.style).bgcolor.downgrade(system) for segment in SEGMENTS}) == len(SEGMENTS)


def test_texts_are_shown_as_the_files_of_samples_hold_them():
    inner = Tokenizer(models.WordLevel({"a": 0, ".": 1, "n't": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=True)
    assert tokenizer.decode([0, 1]) == "a."  # which is not what a reward sees
    shown = sample("", "", index=0)
    shown.completion_ids = (0, 2, 1)
    assert decode_after((), (0, 2, 1), tokenizer) == sample_record(shown, tokenizer)["completion"] == "a n't ."
