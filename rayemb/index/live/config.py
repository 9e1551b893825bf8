"""How much may be written before it has to be compacted."""

from pydantic import Field

from rayemb.config import Config


class LiveConfig(Config):
    """What a reader holds in memory of the updates that the index does not have yet."""

    max_rows: int = Field(
        100_000,
        ge=1,
        description="updates (upserts and deletes) since the last compaction; more are refused until the next one",
    )
