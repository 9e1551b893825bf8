"""Mining: which documents a query should be told apart from. `select` is plain numpy; `mine` runs over an index."""

from rayemb.mining.cross_encoder import CrossEncoder
from rayemb.mining.mine import MineConfig, mine
from rayemb.mining.select import ChoiceConfig, Chosen, MarginConfig, Veto, choose

__all__ = ["ChoiceConfig", "Chosen", "CrossEncoder", "MarginConfig", "MineConfig", "Veto", "choose", "mine"]
