"""The layout of a dataset: the keys of its objects.

manifest.json            written last: without it there is no dataset; of a dataset that has grown, a copy of the newest generation's
manifests/000007.json …  of a dataset that has grown: the manifest of each generation that is kept
README.md                the dataset card
report.html              the report, if written beside the tables
heads/shard-00000.parquet …
heads/shard-00012-1f0c….parquet …   of later generations: with the first digits of the SHA-256 of what was measured, so that no part
                         of an earlier generation is ever replaced
_work/                   plan, spools, means that ablations use, draft of the manifest and shard records of an unfinished run; gone
                         when it is finished

_work/run.json says which run the dataset belongs to, and which state of the corpus is being measured; it is created once, and
replaced only when a finished dataset grows. A lock keeps all but one run from
writing. Everything else in _work can be made again, and is, if it is damaged.
"""

import re

MANIFEST = "manifest.json"
MANIFESTS = "manifests"
CARD = "README.md"
REPORT = "report.html"
WORK = "_work"
RUN = f"{WORK}/run.json"
LOCK = f"{WORK}/lock"
PLAN = f"{WORK}/plan.json"
MEANS = f"{WORK}/means.json"  # the SHA-256 of the means, and of the plan that they are of
MEAN_VECTORS = f"{WORK}/means.arrow"
DRAFT = f"{WORK}/manifest.json"  # the manifest without the parts
RECORDS = f"{WORK}/records"
SPOOL = "shard-"  # prefix of the names of spools
TEMPORARY = ".tmp"  # suffix of files that are still being written


_PART = re.compile(r"shard-(\d+)([.-][\w.-]+)?\.parquet", re.ASCII)
_MANIFEST = re.compile(r"(\d{6,12})\.json", re.ASCII)
_SOURCE_DIGITS = 12


def part_key(table: str, shard: int, source: str = "") -> str:
    """source: the SHA-256 of what the shard was measured from, in every generation but the first."""
    return f"{table}/shard-{shard:05d}{'-' if source else ''}{source[:_SOURCE_DIGITS]}.parquet"


def shard_of(path: str) -> int | None:
    """The shard of a part, or None if this is not the key or the name of one."""
    found = _PART.fullmatch(name_of(path))
    return None if found is None else int(found[1])


def manifest_key(generation: int) -> str:
    return f"{MANIFESTS}/{generation:06d}.json"


def earlier_report_key(generation: int) -> str:
    return f"report-{generation:06d}.html"


def generation_in(name: str) -> int | None:
    """The generation in the name of a manifest in `manifests`, or None if it is another name."""
    found = _MANIFEST.fullmatch(name)
    return None if found is None else int(found[1])


def record_key(shard: int) -> str:
    return f"{RECORDS}/{shard:05d}.json"


def spool_key(shard: int) -> str:
    return f"{WORK}/{SPOOL}{shard:05d}.arrow"


def name_of(key: str) -> str:
    """The last part of a key."""
    return key.rpartition("/")[2]


def shard_in(name: str, *, before: str = "", after: str) -> int | None:
    """The shard number in a name of this form, or None if the name has another form."""
    number = name.removeprefix(before).removesuffix(after)
    return int(number) if name == f"{before}{number}{after}" and number.isdecimal() else None
