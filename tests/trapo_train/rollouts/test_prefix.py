"""cut_prefix against a reference that reads the tokenizers' own offsets, for four kinds of tokenizers."""

import math

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trapo_train.models.tokenizer import decode
from trapo_train.records import ExpertTrace
from trapo_train.rollouts import prefix
from trapo_train.rollouts.prefix import cut_prefix
from trapo_train.tasks import build_tokenizer

TRACE = (
    "First we add the two numbers, héllo wörld.\n\n"
    "Then — with 日本語 and 🎉🎉 emoji — we multiply them by three; it is a longer paragraph than the others here.\n\n"
    "So x = 5.\n\n\n"
    "Therefore the final answer is the number five, as we wanted to show.\n\n"
    "Done."
)
CORPUS = [TRACE, "we add the numbers", "the final answer is five.\n\n", "Then we multiply by three\n\n"]
BREAK_WORD = "[SEP]"


def wrap(tokenizer):
    tokenizer.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def byte_bpe(vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=vocab_size > 300)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def metaspace_unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False, initial_alphabet=list(TRACE)
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def byte_fallback_bpe():
    """As Llama 2: Metaspace by normalizer, a leading space, characters outside the vocabulary as three or four bytes."""
    tokens = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", *sorted({c for c in TRACE if c.isascii()})]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer)


def word_piece():
    """As BERT, white space lost, so paragraphs end with a word of their own."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([BREAK_WORD])
    return wrap(tokenizer)


def characters():
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(sorted(set(TRACE)))}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return wrap(tokenizer)


TOKENIZERS = {
    "byte BPE with words": lambda: byte_bpe(400),
    "byte BPE across words": lambda: byte_bpe(290),
    "Unigram with Metaspace": metaspace_unigram,
    "BPE with byte fallback": byte_fallback_bpe,
    "characters": characters,
}


def expert(tokenizer, text):
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ExpertTrace(text + tokenizer.eos_token, (*token_ids, tokenizer.eos_token_id))


def reference_cut(tokenizer, text, ratio, window):
    """The rule of shared text offsets, on the end of each token in the original text as the tokenizer reports it, and the ratio's
    own cut, which may lie inside a character."""
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    length = len(ends)
    # A token that ends inside a character reports the character's end; it only completes what the token before did.
    done, whole = [0], []
    for i, end in enumerate(ends):
        completes = i + 1 == length or ends[i + 1] != end
        done.append(end if completes else done[-1])
        whole += [i + 1] if (completes or text[end - 1].isascii()) and i + 1 < length else []  # ▁ ends where its letter does
    cut = max(1, math.floor(ratio * length + 1e-9))
    breaks = [i + 2 for i in range(len(text)) if text.startswith("\n\n", i) and i + 2 >= done[cut]]
    if breaks:
        boundary = next(j for j in range(cut, length + 1) if done[j] >= breaks[0])
        if boundary < length and boundary < (ratio + window) * length - 1e-9:
            return boundary, cut
    return next((place for place in whole if place >= cut), whole[-1]), cut


@pytest.mark.parametrize("name", TOKENIZERS)
def test_cut_agrees_with_the_tokenizers_offsets(name):
    tokenizer = TOKENIZERS[name]()
    trace = expert(tokenizer, TRACE)
    snapped = moved = 0
    for percent in range(1, 100):
        for window in (0.0, 0.1, 0.3):
            ratio = percent / 100
            prefix = cut_prefix(trace, ratio, tokenizer, snap_window=window)
            cut, exact = reference_cut(tokenizer, TRACE, ratio, window)
            assert prefix == trace.token_ids[:cut], (ratio, window)
            assert TRACE.startswith(tokenizer.decode(prefix))
            moved += not TRACE.startswith(tokenizer.decode(trace.token_ids[:exact]))
            snapped += len(prefix) > max(1, math.floor(ratio * (len(trace.token_ids) - 1) + 1e-9))
    assert snapped > 50
    assert moved or not name.startswith(("byte BPE across", "BPE with byte"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_snapped_prefix_ends_a_paragraph(name):
    tokenizer = TOKENIZERS[name]()
    text = tokenizer.decode(cut_prefix(expert(tokenizer, TRACE), 0.1, tokenizer))
    assert text == TRACE[: TRACE.index("Then")]


def test_multi_byte_characters_split_over_tokens_do_not_shift_the_cut():
    tokenizer = byte_bpe(256 + 3)
    text = "🎉日本🎉" * 20 + "\n\n" + "日本語" * 40
    trace = expert(tokenizer, text)
    assert len(trace.token_ids) > len(text) * 2  # most characters are three or four tokens
    prefix = cut_prefix(trace, 0.3, tokenizer)
    assert tokenizer.decode(prefix) == "🎉日本🎉" * 20 + "\n\n"
    exact = cut_prefix(trace, 0.301, tokenizer, snap_window=0.0)
    assert 0 < len(exact) - math.floor(0.301 * (len(trace.token_ids) - 1)) < 4
    assert text.startswith(tokenizer.decode(exact))


def test_a_cut_inside_a_character_moves_behind_it_or_else_before_it():
    tokenizer = byte_bpe(256)  # a token is a byte
    trace = expert(tokenizer, "a日本🎉b語")
    cuts = [len(cut_prefix(trace, cut / 15, tokenizer, snap_window=0.0)) for cut in range(1, 15)]
    assert cuts == [1, 4, 4, 4, 7, 7, 7, 11, 11, 11, 11, 12, 12, 12]
    assert len(cut_prefix(expert(tokenizer, "語"), 0.5, tokenizer)) == 1  # no other is left
    assert len(cut_prefix(expert(tokenizer, "a\ufffd" + "b" * 6), 0.4, tokenizer, snap_window=0.0)) == 4  # one of the text's own


def test_a_cut_between_characters_costs_one_decoding(monkeypatch):
    tokenizer, decoded = byte_bpe(400), []
    trace = expert(tokenizer, "Then we multiply by three")
    monkeypatch.setattr(prefix, "decode", lambda *args, **options: decoded.append(args) or decode(*args, **options))
    cut_prefix(trace, 0.1, tokenizer, snap_window=0.0)
    assert len(decoded) == 1


def test_word_piece_cuts_behind_the_break_word():
    tokenizer = word_piece()
    text = f"we add the numbers {BREAK_WORD} then we multiply by three {BREAK_WORD} the final answer is five"
    trace = expert(tokenizer, text)
    prefix = cut_prefix(trace, 0.1, tokenizer, paragraph_break=BREAK_WORD)
    assert tokenizer.decode(prefix) == f"we add the numbers {BREAK_WORD}"
    prefix = cut_prefix(trace, 0.5, tokenizer, paragraph_break=BREAK_WORD)
    assert tokenizer.decode(prefix) == f"we add the numbers {BREAK_WORD} then we multiply by three {BREAK_WORD}"


def test_word_piece_that_loses_the_breaks_cuts_at_the_ratio():
    tokenizer = word_piece()
    trace = expert(tokenizer, "we add the numbers\n\nthen we multiply by three\n\nthe final answer is five")
    body = len(trace.token_ids) - 1
    assert len(cut_prefix(trace, 0.25, tokenizer)) == math.floor(0.25 * body)


def test_pointer_chasing_snaps_to_whole_steps():
    tokenizer = build_tokenizer()
    trace = expert(tokenizer, "ae|eg|gd|db|bf#bf")
    cuts = {r: tokenizer.decode(cut_prefix(trace, r, tokenizer, paragraph_break="|")) for r in (0.05, 0.2, 0.25, 0.5, 0.9)}
    assert cuts == {0.05: "ae|", 0.2: "ae|", 0.25: "ae|eg|", 0.5: "ae|eg|gd|", 0.9: "ae|eg|gd|db|bf#"}
    assert cut_prefix(trace, 0.5, tokenizer, paragraph_break="|", snap_window=0.0) == trace.token_ids[:8]


def test_the_window_is_open_at_its_end():
    tokenizer = build_tokenizer()
    trace = expert(tokenizer, "abcdefg|ab")  # 10 tokens, the break ends at 8
    assert len(cut_prefix(trace, 0.5, tokenizer, paragraph_break="|", snap_window=0.3)) == 5
    assert len(cut_prefix(trace, 0.5, tokenizer, paragraph_break="|", snap_window=0.31)) == 8


def test_a_break_at_the_very_end_leaves_a_token_to_generate():
    tokenizer = build_tokenizer()
    trace = expert(tokenizer, "abcdefgab|")
    assert len(cut_prefix(trace, 0.9, tokenizer, paragraph_break="|")) == 9


def test_ends_of_the_ratio():
    tokenizer = build_tokenizer()
    trace = expert(tokenizer, "ab|bc#bc")
    assert cut_prefix(trace, 0.0, tokenizer) == ()
    assert cut_prefix(trace, 1.0, tokenizer) == trace.token_ids
    assert cut_prefix(trace, 1e-6, tokenizer) == trace.token_ids[:1]
    assert cut_prefix(trace, 0.9999999, tokenizer)[-1] != tokenizer.eos_token_id
    only_eos = ExpertTrace("$", (tokenizer.eos_token_id,))
    assert cut_prefix(only_eos, 0.5, tokenizer) == ()
    assert cut_prefix(only_eos, 1.0, tokenizer) == only_eos.token_ids
    assert cut_prefix(ExpertTrace("", ()), 0.5, tokenizer) == ()
    assert len(cut_prefix(expert(tokenizer, "a" * 100), 0.29, tokenizer)) == 29  # 0.29 · 100 is 28.999… in floats


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.1}, "ratio must be in [0, 1], got 1.1"),
        ({"ratio": -0.1}, "got -0.1"),
        ({"ratio": float("nan")}, "got nan"),
        ({"ratio": 0.5, "snap_window": -1.0}, "snap_window must be at least 0"),
        ({"ratio": 0.5, "paragraph_break": ""}, "paragraph_break is empty"),
    ],
)
def test_bad_arguments(options, words):
    tokenizer = build_tokenizer()
    with pytest.raises(ValueError) as error:
        cut_prefix(expert(tokenizer, "ab"), tokenizer=tokenizer, **options)
    assert words in str(error.value)
