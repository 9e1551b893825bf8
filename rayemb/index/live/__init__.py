"""Live updates: written to a log beside the embeddings, searched beside the index at once, compacted into it later.

log.py         the durable log: a Lance table          items.py    what is checked before it is written
follower.py    the log in memory, at one version       delta.py    its rows, searched as shards
tombstones.py  rows that are gone, by version          compact.py  log -> embeddings -> the next index version
config.py      how much may wait for a compaction
"""
