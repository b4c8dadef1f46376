"""Where everything of a dataset is: the keys of its objects.

manifest.json            written last: without it there is no dataset
README.md                the dataset card
report.html              the report, where it is written beside the tables
heads/shard-00000.parquet …
_work/                   plan, spools and shard records of an unfinished run; gone when it is finished

Whose dataset it is stands in _work/run.json, which is created and never changed; one run writes at a time, by a lock. All
else in _work can be made again, and is where it is damaged.
"""

MANIFEST = "manifest.json"
CARD = "README.md"
REPORT = "report.html"
WORK = "_work"
RUN = f"{WORK}/run.json"
LOCK = f"{WORK}/lock"
PLAN = f"{WORK}/plan.json"
RECORDS = f"{WORK}/records"
SPOOL = "shard-"  # how the name of a spool begins
TEMPORARY = ".tmp"  # how the name of a file ends that is still being written


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
    """The shard's number in a name, between what stands before and after it; None where the name is another."""
    number = name.removeprefix(before).removesuffix(after)
    return int(number) if name == f"{before}{number}{after}" and number.isdecimal() else None
