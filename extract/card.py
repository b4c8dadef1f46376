"""What the user says of a dataset for its card on the hub: licence, languages and source. It changes no data and no run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attlas.extract.errors import Refusal
from attlas.extract.printable import printable

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,59}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_LONGEST_SOURCE = 500
# the hub's categories of size, by their upper ends
_SIZES = tuple(10**power for power in range(3, 13))
_SIZE_NAMES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")


@dataclass(frozen=True, kw_only=True)
class Card:
    """Facts for the dataset card. Raises Refusal for values that the hub does not take.

    license: the hub's identifier, such as cc-by-4.0. language: codes of ISO 639, such as en. source: where the corpus is from, in
    words, or the hub name of a dataset.
    """

    license: str | None = None
    language: tuple[str, ...] = ()
    source: str | None = None

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise Refusal(
                f"a card's license is an identifier of the hub such as mit or cc-by-4.0; got {printable(self.license)!r}; "
                "choose one from https://huggingface.co/docs/hub/repositories-licenses, or other"
            )
        for code in self.language:
            if not _LANGUAGE.fullmatch(code):
                raise Refusal(
                    f"a card's language is a code such as en, or a list of them; got {printable(code)!r}; use ISO 639"
                )
        source = self.source
        if source is not None and (not source.strip() or len(source) > _LONGEST_SOURCE or printable(source) != source):
            raise Refusal(
                f"a card's source is one line of at most {_LONGEST_SOURCE} characters; got {printable(source, limit=60)!r}; shorten it"
            )


def front_matter(card: Card, manifest: Mapping[str, Any], *, lists_parts: bool) -> str:
    """The card's YAML: one configuration for each table, and what the hub sorts datasets by. lists_parts: as of `dataset_card`."""
    return "\n".join(["---", *_lines(card, manifest, lists_parts=lists_parts), "---"])


def _lines(card: Card, manifest: Mapping[str, Any], *, lists_parts: bool) -> Iterator[str]:
    if card.license is not None:
        yield f"license: {_text(card.license)}"
    if card.language:
        yield from ("language:", *(f"- {_text(code)}" for code in card.language))
    yield from ("size_categories:", f"- {_text(size_category(_rows(manifest)))}")
    if card.source is not None and _HUB_NAME.fullmatch(card.source):
        yield from ("source_datasets:", f"- {_text(card.source)}")
    yield "configs:"
    for name, facts in manifest["tables"].items():
        yield f"- config_name: {name}"
        if lists_parts:
            yield from ("  data_files:", *(f"  - {_text(part['path'])}" for part in facts["parts"]))
        else:
            yield f"  data_files: {_text(f'{name}/*.parquet')}"
        if name == "heads":
            yield "  default: true"
    yield from ("tags:", "- attention", "- interpretability")


def size_category(rows: int) -> str:
    """The hub's category of a number of rows, such as 10K<n<100K."""
    place = next((place for place, end in enumerate(_SIZES) if rows < end), len(_SIZES))
    if place == 0:
        return f"n<{_SIZE_NAMES[0]}"
    return f"n>{_SIZE_NAMES[-1]}" if place == len(_SIZES) else f"{_SIZE_NAMES[place - 1]}<n<{_SIZE_NAMES[place]}"


def _rows(manifest: Mapping[str, Any]) -> int:
    return manifest["tables"].get("heads", {}).get("rows", 0)


def _text(text: str) -> str:
    """Text as YAML that no reader takes for anything else: `no` is a language, not false."""
    return json.dumps(text)
