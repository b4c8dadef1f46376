"""Read the documents of a corpus: the demo corpus, local files, or a dataset on the hub.

The hub is read with `datasets`. Local files are not, because its readers do not report the file, line and byte of an error.
A document that can't be used is yielded with a reason in place of its text; damage of unknown extent is refused.
"""

from attlas.extract.corpus.documents import Corpus, Document, reason_kind, refuse_unreadable
from attlas.extract.corpus.files import IMAGES, image_folder
from attlas.extract.corpus.names import readable_name, real_name
from attlas.extract.corpus.opening import open_corpus, open_corpus_of
from attlas.extract.corpus.options import Unit

__all__ = [
    "IMAGES",
    "Corpus",
    "Document",
    "Unit",
    "image_folder",
    "open_corpus",
    "open_corpus_of",
    "readable_name",
    "real_name",
    "reason_kind",
    "refuse_unreadable",
]
