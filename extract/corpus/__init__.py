"""Documents, one after the other: the demo corpus, local files, data sets of the hub.

`datasets` reads the hub. Its readers of local files lose the name, the line and the byte of what is wrong, so these
are read here; a document that can't be used is yielded with the reason in place of its text, and damage whose extent
can't be known is refused.
"""

from extract.corpus.documents import Corpus, Document, reason_kind, refuse_unreadable
from extract.corpus.files import IMAGES
from extract.corpus.names import readable_name, real_name
from extract.corpus.opening import open_corpus
from extract.corpus.reading import Unit

__all__ = [
    "IMAGES",
    "Corpus",
    "Document",
    "Unit",
    "open_corpus",
    "readable_name",
    "real_name",
    "reason_kind",
    "refuse_unreadable",
]
