"""Config of a training run."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayemb.config import Config
from rayemb.data.augment import AugmentConfig
from rayemb.data.decode import CORPUS_COLUMNS
from rayemb.data.mix import CorpusEntry, MixConfig
from rayemb.data.samplers import ClassBalancedConfig
from rayemb.data.stream import LoaderConfig
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
    "loader",
    "log_every",
    "keep_checkpoints",
    "max_failures",
}


# Fields of a loss's batch that the trainer gives, beyond queries, documents and keys.
SUPPLIED = {"labels", "tasks"}


class TrainCorpus(CorpusEntry):
    """A corpus of the training."""

    loss: AnyLoss | None = Field(None, description="the loss of this corpus's batches; null: the run's")


class TrainConfig(Config):
    """The model, the loss and the run: data-parallel workers, each a DeepSpeed engine."""

    model: TwoTowerConfig = TwoTowerConfig()
    loss: AnyLoss = Field(default_factory=InfoNCEConfig)
    corpora: dict[str, TrainCorpus] = Field(
        default_factory=lambda: {"main": TrainCorpus()},
        min_length=1,
        description="the corpora to train on, by name; default: `main`, the run's own",
    )
    mix: MixConfig = Field(default_factory=MixConfig, description="how they share the batches")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="what is varied in images")
    loader: LoaderConfig = Field(default_factory=LoaderConfig, description="how rows get to the workers")
    val_split: str | None = Field(
        "val", description="split of the first corpus for the recall during training; null for none"
    )
    max_bad_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="the run ends if more rows than this cannot be used; they are set aside anyway",
    )
    seed: int = Field(0, ge=0, description="weights, order of rows, captions drawn, augmentation")

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
        for where, loss in self.losses.items():
            if missing := loss.needs - SUPPLIED:
                raise ValueError(f"{where}: {loss.name} needs {sorted(missing)}, which a corpus does not have yet")
            if "tasks" in loss.needs and (tasks := _tasks(loss)) < len(self.corpora):
                raise ValueError(f"{where}: {loss.name} has {tasks} tasks and there are {len(self.corpora)} corpora")
            if misfit := loss.misfit(self.model.dim):
                raise ValueError(f"{where}: {misfit} (model.dim)")
        return self

    @model_validator(mode="after")
    def _mixable(self) -> "TrainConfig":
        weights = [corpus.weight for corpus in self.corpora.values()]
        if None in weights and any(weights):
            without = [name for name, corpus in self.corpora.items() if corpus.weight is None]
            raise ValueError(f"corpora: {', '.join(without)} has no weight and others have; give all or none")
        if self.mix.batches == "mixed" and len(self.corpora) > 1:
            for name, corpus in self.corpora.items():
                if corpus.loss is not None:
                    raise ValueError(
                        f"corpora.{name}.loss: rows of several corpora in a batch have one loss; use "
                        "mix.batches=one_corpus, or loss.name=rzenembed for a temperature of each"
                    )
                if corpus.sampler.whole_batches:
                    raise ValueError(
                        f"corpora.{name}.sampler: {corpus.sampler.name} makes whole batches; use mix.batches=one_corpus"
                    )
        for name, corpus in self.corpora.items():
            sampler = corpus.sampler
            column = getattr(sampler, "column", None)
            if column is not None and sampler.attributes is None and column not in CORPUS_COLUMNS:
                raise ValueError(
                    f"corpora.{name}.sampler: a corpus has no column {column!r} to sample by (it has "
                    f"{', '.join(CORPUS_COLUMNS)}); give an attribute table"
                )
            if isinstance(sampler, ClassBalancedConfig):
                if self.batch_size % sampler.per_class:
                    raise ValueError(
                        f"corpora.{name}.sampler: batch_size ({self.batch_size}) must be a multiple of per_class "
                        f"({sampler.per_class})"
                    )
                if sampler.column in self.mix.distinct:
                    raise ValueError(f"mix.distinct: {sampler.column} is what corpora.{name}.sampler repeats")
        return self

    @property
    def cpus(self) -> float:
        """What the workers and their decoders take in the cluster."""
        return self.workers * (self.cpus_per_worker + self.loader.decoders * self.loader.cpus_per_decoder)

    @property
    def losses(self) -> dict[str, AnyLoss]:
        """The loss of the run, or of each corpus if any has its own, by the key that says it."""
        if all(corpus.loss is None for corpus in self.corpora.values()):
            return {"loss": self.loss}
        return {f"corpora.{name}.loss": corpus.loss or self.loss for name, corpus in self.corpora.items()}

    @property
    def outcome(self) -> dict[str, Any]:
        """What decides the trained weights: all keys but those that only say how the work is cut up and reported."""
        return self.model_dump(mode="json", exclude=HOW)


def _tasks(loss: Any) -> int:
    while not hasattr(loss, "tasks"):
        loss = loss.loss
    return int(loss.tasks)
