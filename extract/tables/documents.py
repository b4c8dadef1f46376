"""`documents`: every document of the corpus, also those that gave nothing to measure, and why."""

from attlas.extract.tables.column import Column
from attlas.extract.tables.table import DOCUMENT_ID, Agreement, Rule, Table

REMOVED, CHANGED = GONE = ("removed", "changed")  # why a document of an earlier generation has no sequences

TABLE = Table(
    name="documents",
    row="document",
    kind="plan",
    keys=(DOCUMENT_ID,),
    facts=(
        Column(
            name="source",
            dtype="string",
            formula="file and place in it (line or row, from 1); an image's file; of a generated corpus its name and the document's number, from 1 (and the needle's depth)",
        ),
        Column(
            name="digest",
            dtype="string",
            formula="HMAC-SHA256(key, UTF-8 text, an image file's bytes, or ids as little-endian int32), hexadecimal",
            meaning="null without a key: an unkeyed digest lets anyone test whether a text they know was in the corpus",
            nullable=True,
        ),
        Column(
            name="characters",
            dtype="int64",
            unit="characters",
            formula="length of the text; null for an image and for generated ids",
            bounds=(0, None),
            nullable=True,
        ),
        Column(
            name="content_tokens",
            dtype="int64",
            unit="tokens",
            formula="ids without special tokens; of an image its patches",
            bounds=(0, None),
        ),
        Column(
            name="sequences",
            dtype="int64",
            formula="windows cut from the document; 1 for an image",
            bounds=(0, None),
        ),
        Column(
            name="dropped_reason",
            dtype="string",
            formula="why it has no sequence; null if it has; removed, changed: it had one in an earlier generation",
            nullable=True,
        ),
    ),
    order=("document_id",),
    counted_by="document_id",
    totals={"documents": "COUNT(document_id)", "content_tokens": "SUM(content_tokens)"},
    rules=(
        Rule(
            "links",
            "(dropped_reason IS NOT NULL) = (sequences > 0)",
            "documents that give sequences and a dropped_reason, or neither",
        ),
    ),
    agreements=(
        Agreement(
            "links",
            "sequences",
            by=("document_id",),
            where="sequences > 0",
            this="SUM(sequences)",
            that="COUNT(sequence_id)",
            message="documents with another number of sequences than they say",
        ),
    ),
)
