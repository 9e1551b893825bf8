"""How large a model and its vectors are."""

from typing import Literal

from rayemb.tune.measures.base import Measure, Trained


class Size(Measure):
    """How large the model and its vectors are."""

    name: Literal["size"] = "size"

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `Measure.metrics`."""
        return ("bytes_per_vector", "parameters")

    def measure(self, trained: Trained) -> dict[str, float]:
        """Bytes of a vector in fp32, and the number of weights of the towers."""
        parameters = sum(parameter.numel() for parameter in trained.model.network.parameters())
        return {"bytes_per_vector": 4.0 * trained.model.dim, "parameters": float(parameters)}
