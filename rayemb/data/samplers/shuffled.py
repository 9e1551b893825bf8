"""Every row once an epoch, in random order (random reshuffling; Mishchenko et al., 2020)."""

from typing import Literal

import numpy as np

from rayemb.data.samplers.base import Arrangement, Sampler, Window


class ShuffledConfig(Sampler):
    """Every row once an epoch, in random order; batches are cut across windows and epochs."""

    name: Literal["shuffled"] = "shuffled"

    @property
    def whole_batches(self) -> bool:
        """No: any number of rows may be taken."""
        return False

    def arrange(self, window: Window, size: int, rng: np.random.Generator) -> Arrangement:
        """A permutation."""
        return Arrangement(rng.permutation(window.rows).astype(np.int64))
