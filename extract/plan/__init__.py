"""The plan of a run: one pass over the corpus cuts documents into sequences, and sequences into shards.

`texts`, `ids` and `images` make a plan, by way of `spool`; `stored` reads and writes it, and `means` the means over its sample. A shard's spool holds everything that
measuring the shard needs, so any worker can measure any shard without reading the corpus.
"""

from attlas.extract.plan.ids import make_id_plan as make_id_plan
from attlas.extract.plan.images import make_image_plan as make_image_plan
from attlas.extract.plan.known import KnownCorpus as KnownCorpus
from attlas.extract.plan.means import StoredMeans as StoredMeans
from attlas.extract.plan.means import load_means as load_means
from attlas.extract.plan.means import write_means as write_means
from attlas.extract.plan.stored import Plan as Plan
from attlas.extract.plan.stored import clear_plan as clear_plan
from attlas.extract.plan.stored import load_plan as load_plan
from attlas.extract.plan.stored import planned_schema as planned_schema
from attlas.extract.plan.stored import planned_tables as planned_tables
from attlas.extract.plan.stored import read_plan as read_plan
from attlas.extract.plan.stored import read_shard as read_shard
from attlas.extract.plan.texts import make_plan as make_plan
