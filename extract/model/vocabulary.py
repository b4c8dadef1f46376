"""The text that each id of a vocabulary stands for, and whether it begins a word.

A vocabulary spells text in a way of its own: byte by byte in an alphabet of letters (GPT-2), with ▁ for a space
(SentencePiece), with ## before the later pieces of a word (WordPiece), with a mark behind its last piece. What is read here
is the text itself. A vocabulary has no context, so the pieces that a mark leaves open count as it has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "▁"
_WORD_ENDS = "</w>"
_WORD_GOES_ON = "@@"  # CTRL, PhoBERT: behind every piece but a word's last
_WORDPIECE = "##"


class Entry(NamedTuple):
    """What an id stands for. Bytes that are no whole character are lone surrogates in `text`."""

    text: str
    begins_word: bool


Reader = Callable[[str], Entry]


def vocabulary_entries(tokenizer: Any) -> list[Entry]:
    """The entry of every id, from 0 to the largest; ids without a token have empty text."""
    tokens = _tokens(tokenizer)
    added = _added_tokens(tokenizer)
    read = _reader(tokenizer, tokens)
    entries = [read(token) if token else Entry("", False) for token in tokens]
    for number, content in added.items():  # found in the text as they are, before anything is spelled
        entries[number] = _of_added(content, entries[number])
    return entries


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens, those with a role and those that the vocabulary marks as special."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | {number for number in tokenizer.all_special_ids if number is not None}


def _tokens(tokenizer: Any) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    tokens = [""] * max(len(tokenizer), max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        tokens[number] = token.decode("utf-8", "surrogateescape") if isinstance(token, bytes) else token
    return tokens


def _added_tokens(tokenizer: Any) -> dict[int, str]:
    return {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}


def _of_added(content: str, spelled: Entry) -> Entry:
    if _METASPACE in content or _BYTE.fullmatch(content):
        return spelled  # some vocabularies list their runs of ▁ and their bytes as added tokens too
    return Entry(content, content[:1].isspace() or spelled.begins_word)


def _reader(tokenizer: Any, tokens: list[str]) -> Reader:
    """How this kind of vocabulary is read."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = {} if backend is None else json.loads(backend.to_str())
    kind = facts.get("model") or {}
    text_of = _byte_level if _is_byte_level(tokenizer, facts) else _as_spelled
    prefix, suffix = kind.get("continuing_subword_prefix"), kind.get("end_of_word_suffix")
    if prefix:
        return _after_first_piece(prefix, text_of)
    if suffix or _declared(facts, "BPEDecoder"):
        return _behind_last_piece(suffix or _WORD_ENDS, text_of)
    if text_of is _byte_level:
        return lambda token: _by_its_space(_byte_level(token))
    space = _space_mark(facts)
    if space or any(token.startswith(_METASPACE) for token in tokens):
        return _with_spaces(space or _METASPACE)
    if kind.get("type") == "WordLevel":
        return lambda token: Entry(token, True)
    return _by_the_tokenizer(tokenizer, tokens) if backend is None else _by_the_decoder(backend, tokens)


def _as_spelled(token: str) -> str:
    return token


def _by_its_space(text: str) -> Entry:
    return Entry(text, text[:1].isspace())


def _after_first_piece(prefix: str, text_of: Callable[[str], str]) -> Reader:
    """WordPiece: pieces after the first are marked. A mark alone is its own text."""

    def read(token: str) -> Entry:
        continues = token.startswith(prefix) and token != prefix
        return Entry(text_of(token[len(prefix) :] if continues else token), not continues)

    return read


def _behind_last_piece(suffix: str, text_of: Callable[[str], str]) -> Reader:
    """A mark behind a word's last piece. Pieces without it begin or continue: the vocabulary can't say, so they continue."""

    def read(token: str) -> Entry:
        text = text_of(token.removesuffix(suffix))
        return Entry(text or " ", token.endswith(suffix))  # a mark alone stands for the space behind a word

    return read


def _but_the_last_piece(token: str) -> Entry:
    """A mark behind all pieces but the last: those with it begin or continue."""
    goes_on = token.endswith(_WORD_GOES_ON) and token != _WORD_GOES_ON
    return Entry(token.removesuffix(_WORD_GOES_ON) if goes_on else token, not goes_on)


def _with_spaces(mark: str) -> Reader:
    """SentencePiece: a mark is a space, and bytes have tokens of their own."""

    def read(token: str) -> Entry:
        byte = _BYTE.fullmatch(token)
        return _by_its_space(_of_bytes(bytes.fromhex(byte[1])) if byte else token.replace(mark, " "))

    return read


def _by_the_decoder(backend: Any, tokens: list[str]) -> Reader:
    """What the tokenizer's own decoder makes of each token by itself; one alone may spell what is no whole character."""
    texts = dict(
        zip(tokens, backend.decode_batch([[n] for n in range(len(tokens))], skip_special_tokens=False), strict=True)
    )

    def read(token: str) -> Entry:
        byte = _BYTE.fullmatch(token)
        return _by_its_space(_of_bytes(bytes.fromhex(byte[1])) if byte else texts[token])

    return read


def _by_the_tokenizer(tokenizer: Any, tokens: Sequence[str]) -> Reader:
    """A tokenizer written in Python tells no structure: its marks are looked for, else it says what a token's text is."""
    long = [token for token in tokens if len(token) > len(_WORDPIECE)]
    if any(token.startswith(_WORDPIECE) for token in long):
        return _after_first_piece(_WORDPIECE, _as_spelled)
    if any(token.endswith(_WORD_ENDS) for token in long):
        return _behind_last_piece(_WORD_ENDS, _as_spelled)
    if any(token.endswith(_WORD_GOES_ON) for token in long):
        return _but_the_last_piece

    texts = _as_converted(tokenizer, tokens)
    # where nothing is said it is a byte that is no whole character
    return lambda token: _by_its_space(texts[token] or "\udc80")


def _as_converted(tokenizer: Any, tokens: Sequence[str]) -> dict[str, str]:
    """What the tokenizer makes of each token between two letters: at an end it may strip white space."""
    letter = next((token for token in tokens if len(token) == 1 and token.isalpha()), "")
    texts = {}
    for token in tokens:
        spelled = [letter, _converted(tokenizer, token), letter] if letter else [_converted(tokenizer, token)]
        try:
            texts[token] = str(tokenizer.convert_tokens_to_string(spelled)).removeprefix(letter).removesuffix(letter)
        except (ValueError, TypeError, KeyError, NotImplementedError):
            texts[token] = token
    return texts


def _converted(tokenizer: Any, token: str) -> str:
    """The token as the tokenizer gives it back for its id: some name their line ends in the vocabulary."""
    if len(token) == 1 or not token:
        return token
    return tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(token))


def _is_byte_level(tokenizer: Any, facts: Mapping[str, Any]) -> bool:
    if facts:
        return _declared(facts, "ByteLevel")
    return isinstance(getattr(tokenizer, "byte_decoder", None), dict)


def _declared(facts: Mapping[str, Any], kind: str) -> bool:
    return any(part.get("type") == kind for part in _parts(facts))


def _parts(facts: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps that a fast tokenizer is made of, sequences taken apart."""
    waiting = [facts.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            yield part
            for name in ("normalizers", "pretokenizers", "decoders"):
                waiting += part.get(name) or []


def _space_mark(facts: Mapping[str, Any]) -> str | None:
    """The character that stands for a space, where the tokenizer says so."""
    for part in _parts(facts):
        if part.get("type") == "Metaspace":
            return part.get("replacement")
    decoder = {"decoder": facts.get("decoder")}
    for part in _parts(decoder):
        pattern = part.get("pattern")
        if part.get("type") == "Replace" and part.get("content") == " " and isinstance(pattern, Mapping):
            return pattern.get("String")
    return None


def _byte_level(token: str) -> str:
    """The bytes of a token in the alphabet of GPT-2; a token with other characters is its own text, as in its decoder."""
    numbers = [_BYTE_OF.get(character) for character in token]
    return token if None in numbers else _of_bytes(bytes(number for number in numbers if number is not None))


def _of_bytes(spelled: bytes) -> str:
    return spelled.decode("utf-8", "surrogateescape")


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2 (Radford 2019): printable bytes stand for themselves, the rest from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    hidden = (b for b in range(256) if b not in set(printable))
    return table | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTE_OF = _byte_of_character()
