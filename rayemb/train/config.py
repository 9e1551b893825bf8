"""Config of a training run."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayemb.config import Config
from rayemb.losses import AnyLoss, InfoNCEConfig
from rayemb.models import TwoTowerConfig
from rayemb.parallel import ExchangeName
from rayemb.train.step import Reduction

# A run that ran out of memory goes on with smaller micro-batches, from its last checkpoint.
HOW = {
    "exchange",
    "tile",
    "micro_batch_size",
    "micro_batch_tokens",
    "gradient_reduction",
    "log_every",
    "keep_checkpoints",
    "max_failures",
}


class TrainConfig(Config):
    """The model, the loss and the run: data-parallel workers, each a DeepSpeed engine."""

    model: TwoTowerConfig = TwoTowerConfig()
    loss: AnyLoss = Field(default_factory=InfoNCEConfig)
    split: str = Field("train", description="split of the corpus to train on")
    val_split: str | None = Field("val", description="split for the recall during training; null for none")
    fraction: float = Field(1.0, gt=0, le=1, description="train on this share of the row groups (for quick sweeps)")
    main_caption: float = Field(
        0.5, ge=0, le=1, description="how often an image comes with its main caption rather than with any of its own"
    )
    seed: int = Field(0, ge=0, description="weights, order of rows, captions drawn")

    steps: int = Field(400, ge=1, description="optimizer steps")
    batch_size: int = Field(256, ge=1, description="pairs per step over all workers: each is a negative of all others")
    learning_rate: float = Field(2e-3, gt=0, description="peak learning rate; cosine decay to zero")
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.1, ge=0, description="AdamW; not on norms, biases, or the temperature")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW")
    gradient_clipping: float = Field(1.0, ge=0, description="norm of the whole gradient; 0 for none")

    workers: int = Field(2, ge=1, description="data-parallel workers")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that each worker takes in the cluster")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that each worker takes; 0 trains on CPU")
    threads_per_worker: int = Field(1, ge=1, description="torch threads of each worker")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO: what is sharded between workers")
    offload_optimizer: bool = Field(False, description="keep the optimizer's state in host memory; zero_stage 1 to 3")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="compute dtype; the loss is fp32 either way")
    compile_ops: bool = Field(
        False, description="compile DeepSpeed's shared-memory operator on first use (~30-100 s and g++ on CPU)"
    )

    exchange: ExchangeName = Field(
        "gather",
        description="how ranks see each other's vectors: gather holds all of them, ring two visiting ranks' at a time; "
        "the result is the same",
    )
    tile: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        None, description="rows and columns of similarities computed at a time; null chooses for the device"
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="pairs that a worker encodes at a time; more than one micro-batch costs a second forward pass "
        "(gradient cache) and changes nothing else. null: all at once",
    )
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="tokens, padding included, that a worker encodes at a time; texts are sorted by length"
    )
    gradient_reduction: Reduction = Field(
        "auto", description="when workers exchange the gradients of micro-batches; auto is boundary"
    )

    log_every: int = Field(10, ge=1, description="steps between reports")
    evaluate_every: int = Field(100, ge=1, description="steps between recalls on val_split")
    evaluate_rows: int = Field(512, ge=2, description="pairs of val_split that are used")
    checkpoint_every: int = Field(300, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept, newest first")
    max_failures: int = Field(2, ge=0, description="restarts from the last checkpoint before giving up")

    @model_validator(mode="after")
    def _agree(self) -> "TrainConfig":
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of workers ({self.workers})")
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError("precision bf16 needs zero_stage >= 1: stage 0 follows another loss curve there")
        if self.zero_stage == 0 and self.offload_optimizer:
            raise ValueError("offload_optimizer needs zero_stage >= 1")
        if self.loss.needs:
            raise ValueError(f"loss {self.loss.name} needs {sorted(self.loss.needs)}, which a corpus does not have yet")
        misfit = self.loss.misfit(self.model.dim)
        if misfit:
            raise ValueError(f"loss: {misfit} (model.dim)")
        return self

    @property
    def outcome(self) -> dict[str, Any]:
        """What decides the trained weights: all keys but those that only say how the work is cut up and reported."""
        return self.model_dump(mode="json", exclude=HOW)
