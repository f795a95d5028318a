"""The shard: one hospital's folder of tables, checked against the contract before anyone reads it.

`Shard.open` reads, `write_shard` writes, `inspect` lists every problem, `discover` finds the shards
of a folder. docs/shard.md describes the tables.
"""

from client.site.shard.images import decode_image, to_grey
from client.site.shard.shard import Shard, discover, inspect, write_shard

__all__ = ["Shard", "decode_image", "discover", "inspect", "to_grey", "write_shard"]
