"""The layout of a dataset: the keys of its objects.

manifest.json            written last: without it there is no dataset
README.md                the dataset card
report.html              the report, if written beside the tables
heads/shard-00000.parquet …
_work/                   plan, spools, means that ablations use, draft of the manifest and shard records of an unfinished run; gone
                         when it is finished

_work/run.json says which run the dataset belongs to; it is created once and never changed. A lock keeps all but one run from
writing. Everything else in _work can be made again, and is, if it is damaged.
"""

MANIFEST = "manifest.json"
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


def part_key(table: str, shard: int) -> str:
    return f"{table}/shard-{shard:05d}.parquet"


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
