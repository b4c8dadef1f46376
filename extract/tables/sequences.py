"""`sequences`: the windows that documents are cut into, as the model was given them."""

from attlas.extract.tables.column import Column
from attlas.extract.tables.table import DOCUMENT_ID, SEQUENCE_ID, SHARD, Agreement, Table

TABLE = Table(
    name="sequences",
    row="sequence (a window of a document)",
    kind="plan",
    keys=(SEQUENCE_ID,),
    facts=(
        DOCUMENT_ID,
        SHARD,
        Column(name="window", dtype="int32", formula="number of the window in its document, from 0", bounds=(0, None)),
        Column(
            name="first_token",
            dtype="int32",
            formula="index of the window's first token among the document's ids without special tokens",
            bounds=(0, None),
        ),
        Column(
            name="tokens", dtype="int64", unit="tokens", formula="length, special tokens included", bounds=(1, None)
        ),
        Column(
            name="special_tokens",
            dtype="int64",
            unit="tokens",
            formula="special tokens in it; of an image those that are no patches (class, registers), 0 if its grid is not known",
            bounds=(0, None),
        ),
        Column(
            name="token_ids",
            dtype="list<int32>",
            formula="the ids (only with --tokens ids or text)",
            nullable=True,
            core=False,
        ),
        Column(
            name="text",
            dtype="string",
            formula="the window's text (only with --tokens text)",
            nullable=True,
            core=False,
        ),
    ),
    order=("sequence_id",),
    counted_by="sequence_id",
    totals={"sequences": "COUNT(sequence_id)", "tokens": "SUM(tokens)"},
    agreements=(
        Agreement(
            "links",
            "sequences",
            by=("document_id",),
            this="MAX(window) + 1",
            that="COUNT(DISTINCT window)",
            message="documents whose windows are not 0, 1, 2, …",
        ),
    ),
)
