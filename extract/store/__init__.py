"""Dataset storage: local folders and object stores behind one interface, and the parts of a dataset on top of it.

`interface` defines a storage; `local` and `objects` implement it; `opening` opens one. `layout` defines all keys; `parts`,
`records`, `manifest`, `generations`, `claim` and `work` each cover one kind of object; `dataset` combines them.
"""

from attlas.extract.errors import Refusal as Refusal
from attlas.extract.files import write_atomically as write_atomically
from attlas.extract.store.claim import Identity as Identity
from attlas.extract.store.claim import recipe_differences as recipe_differences
from attlas.extract.store.dataset import Store as Store
from attlas.extract.store.dataset import open_dataset as open_dataset
from attlas.extract.store.generations import discard_generations as discard_generations
from attlas.extract.store.generations import generation_of as generation_of
from attlas.extract.store.generations import generations as generations
from attlas.extract.store.generations import named_parts as named_parts
from attlas.extract.store.generations import next_sequence as next_sequence
from attlas.extract.store.generations import read_generation as read_generation
from attlas.extract.store.generations import report_key as report_key
from attlas.extract.store.interface import Storage as Storage
from attlas.extract.store.interface import is_key as is_key
from attlas.extract.store.interface import sha256_of as sha256_of
from attlas.extract.store.layout import CARD as CARD
from attlas.extract.store.layout import MANIFEST as MANIFEST
from attlas.extract.store.layout import MANIFESTS as MANIFESTS
from attlas.extract.store.layout import REPORT as REPORT
from attlas.extract.store.layout import WORK as WORK
from attlas.extract.store.layout import name_of as name_of
from attlas.extract.store.layout import part_key as part_key
from attlas.extract.store.layout import shard_of as shard_of
from attlas.extract.store.local import LINK_OUT as LINK_OUT
from attlas.extract.store.local import LocalFolder as LocalFolder
from attlas.extract.store.lock import Lock as Lock
from attlas.extract.store.opening import Location as Location
from attlas.extract.store.opening import open_storage as open_storage
from attlas.extract.store.parts import Part as Part
from attlas.extract.store.parts import is_as_written as is_as_written
from attlas.extract.store.parts import parts_of as parts_of
from attlas.extract.store.parts import read_part as read_part
from attlas.extract.store.parts import restore_part as restore_part
from attlas.extract.store.records import ShardRecord as ShardRecord
