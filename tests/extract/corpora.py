"""Write a corpus to disk and read it back."""

from pathlib import Path

from attlas.extract.corpus import Document, open_corpus


def written(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(corpus: str, **options) -> list[Document]:
    return list(open_corpus(corpus, **options))


def outcomes(corpus: str, **options) -> dict[str, str]:
    """The text of each document by its source, or the reason it was dropped."""
    return {d.source: d.dropped_reason or d.text for d in read(corpus, **options)}
