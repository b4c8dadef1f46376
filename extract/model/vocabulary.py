"""The text that each id of a vocabulary stands for, and whether it begins a word.

Vocabularies spell text in their own ways: byte by byte in an alphabet of printable characters (GPT-2), with ▁ for a space
(SentencePiece), with ## before the later pieces of a word (WordPiece), or with a mark after its last piece. This module
decodes each token to its text. A vocabulary has no context, so a token whose position in a word depends on its neighbours
is classified by its own mark alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "▁"
_END_OF_WORD = "</w>"
_CONTINUED = "@@"  # CTRL, PhoBERT: after every piece of a word but the last
_WORDPIECE = "##"


class VocabularyEntry(NamedTuple):
    """The text of an id. Bytes that form no whole character are lone surrogates in `text`."""

    text: str
    begins_word: bool


EntryReader = Callable[[str], VocabularyEntry]


def vocabulary_entries(tokenizer: Any) -> list[VocabularyEntry]:
    """The entries of all ids, from 0 to the largest; an id without a token has empty text."""
    tokens = _tokens(tokenizer)
    entry_of = _entry_reader(tokenizer, tokens)
    entries = [entry_of(token) if token else VocabularyEntry("", False) for token in tokens]
    for number, token in tokenizer.added_tokens_decoder.items():  # matched in the text as they are, before any spelling
        entries[number] = _added_entry(str(token), entries[number])
    return entries


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens: those with a role, and added tokens marked as special."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | {number for number in tokenizer.all_special_ids if number is not None}


def _tokens(tokenizer: Any) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    tokens = [""] * max(len(tokenizer), max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        tokens[number] = token.decode("utf-8", "surrogateescape") if isinstance(token, bytes) else token
    return tokens


def _added_entry(content: str, entry: VocabularyEntry) -> VocabularyEntry:
    if _METASPACE in content or _BYTE.fullmatch(content):
        return entry  # some vocabularies also add runs of ▁ and bytes as tokens
    return VocabularyEntry(content, content[:1].isspace() or entry.begins_word)


def _entry_reader(tokenizer: Any, tokens: list[str]) -> EntryReader:
    """The reader for this tokenizer's kind of vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = {} if backend is None else json.loads(backend.to_str())
    model = pipeline.get("model") or {}
    decode = _decode_byte_level if _is_byte_level(tokenizer, pipeline) else _identity
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if prefix:
        return _prefix_reader(prefix, decode)
    if suffix or _has_step(pipeline, "BPEDecoder"):
        return _suffix_reader(suffix or _END_OF_WORD, decode)
    if decode is _decode_byte_level:
        return lambda token: _entry_by_space(_decode_byte_level(token))
    space = _space_mark(pipeline)
    if space or any(token.startswith(_METASPACE) for token in tokens):
        return _space_reader(space or _METASPACE)
    if model.get("type") == "WordLevel":
        return lambda token: VocabularyEntry(token, True)
    return _python_reader(tokenizer, tokens) if backend is None else _decoder_reader(backend, tokens)


def _identity(token: str) -> str:
    return token


def _entry_by_space(text: str) -> VocabularyEntry:
    return VocabularyEntry(text, text[:1].isspace())


def _prefix_reader(prefix: str, decode: Callable[[str], str]) -> EntryReader:
    """WordPiece: a prefix marks all pieces but the first. The prefix alone is ordinary text."""

    def entry_of(token: str) -> VocabularyEntry:
        continues = token.startswith(prefix) and token != prefix
        return VocabularyEntry(decode(token[len(prefix) :] if continues else token), not continues)

    return entry_of


def _suffix_reader(suffix: str, decode: Callable[[str], str]) -> EntryReader:
    """A suffix marks the last piece of a word. A piece without it may be the first or a later one; it counts as later."""

    def entry_of(token: str) -> VocabularyEntry:
        text = decode(token.removesuffix(suffix))
        return VocabularyEntry(text or " ", token.endswith(suffix))  # the suffix alone is the space after a word

    return entry_of


def _continued_entry(token: str) -> VocabularyEntry:
    """A suffix marks all pieces but the last. A piece with it may be the first or a later one; it counts as later."""
    continued = token.endswith(_CONTINUED) and token != _CONTINUED
    return VocabularyEntry(token.removesuffix(_CONTINUED) if continued else token, not continued)


def _space_reader(mark: str) -> EntryReader:
    """SentencePiece: a mark stands for a space, and single bytes have their own tokens."""

    def entry_of(token: str) -> VocabularyEntry:
        byte = _BYTE.fullmatch(token)
        return _entry_by_space(_decode_bytes(bytes.fromhex(byte[1])) if byte else token.replace(mark, " "))

    return entry_of


def _decoder_reader(backend: Any, tokens: list[str]) -> EntryReader:
    """The tokenizer's own decoder, applied to each token by itself; single bytes may not form a whole character."""
    texts = dict(
        zip(tokens, backend.decode_batch([[n] for n in range(len(tokens))], skip_special_tokens=False), strict=True)
    )

    def entry_of(token: str) -> VocabularyEntry:
        byte = _BYTE.fullmatch(token)
        return _entry_by_space(_decode_bytes(bytes.fromhex(byte[1])) if byte else texts[token])

    return entry_of


def _python_reader(tokenizer: Any, tokens: Sequence[str]) -> EntryReader:
    """The reader for a tokenizer written in Python: by the marks in its vocabulary, else by its own conversion."""
    long = [token for token in tokens if len(token) > len(_WORDPIECE)]
    if any(token.startswith(_WORDPIECE) for token in long):
        return _prefix_reader(_WORDPIECE, _identity)
    if any(token.endswith(_END_OF_WORD) for token in long):
        return _suffix_reader(_END_OF_WORD, _identity)
    if any(token.endswith(_CONTINUED) for token in long):
        return _continued_entry

    texts = _converted_texts(tokenizer, tokens)
    # an empty result is a byte that forms no whole character
    return lambda token: _entry_by_space(texts[token] or "\udc80")


def _converted_texts(tokenizer: Any, tokens: Sequence[str]) -> dict[str, str]:
    """Each token's text, converted between two letters because some tokenizers strip white space at the ends."""
    letter = next((token for token in tokens if len(token) == 1 and token.isalpha()), "")
    texts = {}
    for token in tokens:
        parts = [letter, _round_trip(tokenizer, token), letter] if letter else [_round_trip(tokenizer, token)]
        try:
            texts[token] = str(tokenizer.convert_tokens_to_string(parts)).removeprefix(letter).removesuffix(letter)
        except (ValueError, TypeError, KeyError, NotImplementedError):
            texts[token] = token
    return texts


def _round_trip(tokenizer: Any, token: str) -> str:
    """The token that the tokenizer returns for this token's id; some vocabularies name line ends, such as <BR>."""
    if len(token) == 1 or not token:
        return token
    return tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(token))


def _is_byte_level(tokenizer: Any, pipeline: Mapping[str, Any]) -> bool:
    if pipeline:
        return _has_step(pipeline, "ByteLevel")
    return isinstance(getattr(tokenizer, "byte_decoder", None), dict)


def _has_step(pipeline: Mapping[str, Any], kind: str) -> bool:
    return any(step.get("type") == kind for step in _steps(pipeline))


def _steps(pipeline: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps of a fast tokenizer, including those inside sequences."""
    queue = [pipeline.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while queue:
        step = queue.pop()
        if isinstance(step, Mapping):
            yield step
            for name in ("normalizers", "pretokenizers", "decoders"):
                queue += step.get(name) or []


def _space_mark(pipeline: Mapping[str, Any]) -> str | None:
    """The character that stands for a space, if the tokenizer's steps define one."""
    for step in _steps(pipeline):
        if step.get("type") == "Metaspace":
            return step.get("replacement")
    for step in _steps({"decoder": pipeline.get("decoder")}):
        pattern = step.get("pattern")
        if step.get("type") == "Replace" and step.get("content") == " " and isinstance(pattern, Mapping):
            return pattern.get("String")
    return None


def _decode_byte_level(token: str) -> str:
    """The text of a token spelled in GPT-2's byte alphabet; a token with other characters is its own text."""
    byte_of = _byte_alphabet()
    values = [byte_of.get(character) for character in token]
    return token if None in values else _decode_bytes(bytes(value for value in values if value is not None))


def _decode_bytes(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet (Radford 2019): printable bytes are themselves, all others start at U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    hidden = (b for b in range(256) if b not in set(printable))
    return table | {chr(256 + n): b for n, b in enumerate(hidden)}
