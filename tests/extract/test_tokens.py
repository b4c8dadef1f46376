"""Token classes follow from a token's text, for every way in which a vocabulary spells text.

The expected tables are written by hand; the tokenizers are small but real.
"""

import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AddedToken,
    ByT5Tokenizer,
    CanineTokenizer,
    CTRLTokenizer,
    GPTNeoXJapaneseTokenizer,
    PreTrainedTokenizerFast,
    XLNetTokenizer,
)

from attlas.extract.engines.quantities import TOKEN_CLASSES
from attlas.extract.model.token_classes import class_sizes, token_classes
from attlas.extract.model.vocabulary import vocabulary_entries

# one letter for each class
LETTERS = {
    "b": "bos",
    "s": "separator",
    "x": "special",
    "_": "whitespace",
    ".": "punctuation",
    "1": "number",
    "W": "word_start",
    "w": "subword",
}
SPECIAL = {"<s>": "b", "</s>": "s", "<unk>": "x"}
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def numbered(tokens) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def fast(raw: Tokenizer, **roles) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=raw, **(roles or ROLES))


def wordpiece(table):
    raw = Tokenizer(models.WordPiece(numbered(table), unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return fast(raw)


def wordpiece_without_a_decoder(table):
    return fast(Tokenizer(models.WordPiece(numbered(table), unk_token="<unk>")))


def byte_level(table):
    raw = Tokenizer(models.BPE(numbered(table), []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = fast(raw)
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("\n\t", normalized=False), "é"])
    return tokenizer


def byte_level_after_a_split(table):
    """As in Llama 3 and Qwen: ByteLevel is one of several steps, and there is no decoder."""
    raw = Tokenizer(models.BPE(numbered(table), []))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return fast(raw)


def unigram(table):
    raw = Tokenizer(models.Unigram([(token, -1.0) for token in table], unk_id=2, byte_fallback=True))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast(raw)


def llama(table):
    """As in Llama 2 and Gemma: a normalizer replaces spaces, and a sequence of decoders restores them."""
    raw = Tokenizer(models.BPE(numbered(table), [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = fast(raw)
    tokenizer.add_tokens([AddedToken("▁▁▁", normalized=False), AddedToken("\n\n", normalized=False)])
    return tokenizer


def another_mark(table):
    raw = Tokenizer(models.Unigram([(token, -1.0) for token in table], unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_")
    raw.decoder = decoders.Metaspace(replacement="_")
    return fast(raw)


def word_ends(table):
    raw = Tokenizer(models.BPE(numbered(table), [], end_of_word_suffix="</w>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    return fast(raw)


def clip(table):
    """Byte-level spelling with a mark at the end of a word."""
    raw = Tokenizer(models.BPE(numbered(table), [], end_of_word_suffix="</w>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(raw)


def whole_words(table):
    raw = Tokenizer(models.WordLevel(numbered(table), unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(raw)


def characters(table):
    """No marks: only the decoder determines the text of a token."""
    raw = Tokenizer(models.BPE(numbered(table), [], byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.Replace("¶", "\n"), decoders.ByteFallback()])
    return fast(raw)


def xlnet(table):
    special = [token for token in table if token.startswith("<")]
    tokens = [*special, *(token for token in table if token not in special)]
    return XLNetTokenizer(vocab=[(token, 0.0 if token in special else -2.0) for token in tokens])


MARKED = {"▁": "_", "▁▁▁▁": "_", "▁\n": "_", "\t": "_", "\u00a0": "_", "\u3000": "_", "▁the": "W", "ing": "w"}
SENTENCEPIECE_TABLE = {
    **MARKED,
    "▁.": ".",
    "—": ".",
    "€": ".",
    "▁3rd": "1",
    "７": "1",
    "▁it's": "W",
    "’s": "w",
    "▁日本": "W",
}
BYTE_LEVEL_TABLE = {
    **SPECIAL,
    "Ċ": "_",
    "ĊĊ": "_",
    "Ġ": "_",
    "ĠĠĠĠ": "_",
    "čĊ": "_",
    "ĉ": "_",
    "Âł": "_",  # a no-break space
    "ãĢĢ": "_",  # an ideographic space
    "Ġthe": "W",
    "ĊThe": "W",
    "the": "w",
    "Ã©t": "w",  # ét
    "ĠÃ©t": "W",
    "Ã": "w",  # bytes that form no whole character
    "©": "w",
    "ĠÃ": "W",
    "Ġ.": ".",
    ");Ċ": ".",
    "âĢĶ": ".",  # —
    "âĤ¬": ".",  # €
    "ï¿½": ".",  # U+FFFD itself
    "Ġ2": "1",
    "x2": "1",
}
KINDS = {
    "wordpiece": (
        wordpiece,
        {
            **SPECIAL,
            "the": "W",
            "##ing": "w",
            "##": ".",
            "#": ".",
            "###": ".",
            "##.": ".",
            "¿": ".",
            "##2": "1",
            "3d": "1",
            "\n": "_",
            "日": "W",
            "##本": "w",
            "Ġ": "W",
            "▁": ".",
        },
    ),
    "wordpiece without a decoder": (wordpiece_without_a_decoder, {**SPECIAL, "the": "W", "##ing": "w", "##!": "."}),
    "byte-level": (byte_level, BYTE_LEVEL_TABLE),
    "byte-level after a split": (byte_level_after_a_split, BYTE_LEVEL_TABLE),
    "unigram": (
        unigram,
        {**SPECIAL, **SENTENCEPIECE_TABLE, "<0x0A>": "_", "<0x20>": "_", "<0x2E>": ".", "<0x37>": "1", "<0x41>": "w"}
        | {"<0xC3>": "w", "<0x00>": "w"},
    ),
    "llama": (llama, {**SPECIAL, **SENTENCEPIECE_TABLE, "<0x0A>": "_", "<0x0D>": "_", "<0xE2>": "w", "<0x2C>": "."}),
    "another mark for spaces": (another_mark, {**SPECIAL, "_": "_", "__": "_", "_the": "W", "the": "w", "▁": "."}),
    "marks behind words": (
        word_ends,
        {**SPECIAL, "the</w>": "W", "th": "w", ".</w>": ".", "!": ".", "2</w>": "1", "</w>": "_", "\n</w>": "_"},
    ),
    "clip": (
        clip,
        {**SPECIAL, "the</w>": "W", "th": "w", "âĢľ</w>": ".", "âĢľ": ".", "Ã©t</w>": "W", "7</w>": "1", "Ġ</w>": "_"},
    ),
    "whole words": (whole_words, {**SPECIAL, "the": "W", ".": ".", "42": "1", "\n": "_", "don't": "W"}),
    "characters": (
        characters,
        {**SPECIAL, "t": "w", " ": "_", "¶": "_", ".": ".", "4": "1", "<0x0A>": "_", "<0xC3>": "w"},
    ),
    "xlnet": (
        xlnet,
        {"<unk>": "x", "<s>": "b", "</s>": "s", "<cls>": "b", "<sep>": "s", "<pad>": "x", "<mask>": "x", "<eop>": "x"}
        | {"<eod>": "x", **SENTENCEPIECE_TABLE},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_depends_on_the_text_and_not_its_spelling(kind):
    build, table = KINDS[kind]
    tokenizer = build(table)
    classes = token_classes(tokenizer)
    actual = {token: TOKEN_CLASSES[classes[number]] for token, number in tokenizer.get_vocab().items()}
    wanted = {token: LETTERS[letter] for token, letter in table.items()}
    assert {token: actual[token] for token in wanted} == wanted


@pytest.mark.parametrize(
    ("build", "added"),
    [
        (byte_level, {"    ": "whitespace", "\n\t": "whitespace", "é": "subword"}),
        (llama, {"▁▁▁": "whitespace", "\n\n": "whitespace"}),
    ],
)
def test_added_tokens_stand_for_their_own_text(build, added):
    tokenizer = build({**SPECIAL, "Ġa": "W", "▁a": "W"})
    classes = token_classes(tokenizer)
    assert {token: TOKEN_CLASSES[classes[tokenizer.get_vocab()[token]]] for token in added} == added


def test_an_added_token_marked_as_special_is_special():
    tokenizer = wordpiece({**SPECIAL, "the": "W"})
    tokenizer.backend_tokenizer.add_special_tokens(["<|header|>"])
    tokenizer.add_tokens(["covid"])
    classes = token_classes(tokenizer)
    class_of = {token: TOKEN_CLASSES[classes[number]] for token, number in tokenizer.get_vocab().items()}
    assert (class_of["<|header|>"], class_of["covid"]) == ("special", "word_start")


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [ByT5Tokenizer(), CanineTokenizer()], ids=["byt5", "canine"])
def test_characters_and_bytes_of_a_tokenizer_written_in_python(tokenizer):
    classes = token_classes(tokenizer)
    table = {
        "a": "subword",
        " ": "whitespace",
        "\n": "whitespace",
        "\t": "whitespace",
        "!": "punctuation",
        "7": "number",
    }
    for text, name in table.items():
        (number,) = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert TOKEN_CLASSES[classes[number]] == name, text
    accented = tokenizer("é", add_special_tokens=False)["input_ids"]  # two bytes, or one character
    assert {TOKEN_CLASSES[classes[number]] for number in accented} == {"subword"}
    assert TOKEN_CLASSES[classes[tokenizer.eos_token_id or tokenizer.sep_token_id]] == "separator"


def test_marks_of_a_vocabulary_written_in_python(tmp_path):
    import json

    tokens = {"<unk>": 0, "hel@@": 1, "lo": 2, ".": 3, "19@@": 4, "@@": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(tokens))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh el\n")
    tokenizer = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    names = [TOKEN_CLASSES[c] for c in token_classes(tokenizer)[:6]]
    assert names == ["special", "subword", "word_start", "punctuation", "number", "punctuation"]


def test_names_for_white_space_are_converted_by_the_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["<|endoftext|>", "日", "<SP>", "<BR>", "<TAB>", "。", "7"]))
    (tmp_path / "emoji.json").write_text('{"emoji": {}, "emoji_inv": {}}')
    tokenizer = GPTNeoXJapaneseTokenizer(
        str(tmp_path / "vocab.txt"), str(tmp_path / "emoji.json"), unk_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    names = [TOKEN_CLASSES[c] for c in token_classes(tokenizer)[1:7]]
    assert names == ["subword", "whitespace", "whitespace", "whitespace", "punctuation", "number"]


def test_texts_of_a_real_vocabulary_match_its_decoder(demo):
    tokenizer = demo.tokenizer
    anchor = tokenizer.convert_tokens_to_ids("a")
    entries = vocabulary_entries(tokenizer)
    numbers = [n for n in range(0, len(entries), 7) if n not in tokenizer.all_special_ids]
    decoded = tokenizer.backend_tokenizer.decode_batch([[anchor, n] for n in numbers], skip_special_tokens=False)
    for number, text in zip(numbers, decoded, strict=True):
        assert text[1:].strip() == entries[number].text, number


def test_classes_of_a_trained_byte_level_vocabulary_follow_from_decoded_text(tmp_path):
    from tests.extract.test_planning import gpt2_like

    tokenizer = gpt2_like(["def f(x):\n\n    return x + 1  # naïve café\t…\n"] * 3)
    classes = token_classes(tokenizer)
    for number in range(1, len(tokenizer)):
        text = tokenizer.backend_tokenizer.decode([number])
        if "\ufffd" in text:
            continue
        visible = [c for c in text if not c.isspace()]
        wanted = (
            "whitespace"
            if not visible
            else "punctuation"
            if all(unicodedata.category(c)[0] in "PS" for c in visible)
            else "number"
            if any(c.isdigit() for c in visible)
            else "word_start"
            if text[0].isspace()
            else "subword"
        )
        assert TOKEN_CLASSES[classes[number]] == wanted, text


def test_class_sizes_leave_out_ids_without_a_token():
    tokenizer = wordpiece({"<s>": "b", "</s>": "s", "<unk>": "x", "the": "W", "##ing": "w"})
    assert class_sizes(tokenizer, token_classes(tokenizer)) == dict.fromkeys(TOKEN_CLASSES, 0) | {
        "bos": 1,
        "separator": 1,
        "special": 1,
        "word_start": 1,
        "subword": 1,
    }


def test_every_id_has_a_class():
    tokenizer = byte_level(BYTE_LEVEL_TABLE)
    classes = token_classes(tokenizer)
    assert classes.dtype == np.int8
    assert len(classes) == len(tokenizer)
