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
from rayemb.train.adapters import LoRAConfig
from rayemb.train.checkpoints import CheckpointsConfig
from rayemb.train.ema import EMAConfig
from rayemb.train.evaluation import EarlyStoppingConfig, EvaluationConfig
from rayemb.train.objective import ContrastiveConfig
from rayemb.train.optimizers import AdamWConfig, AnyOptimizer
from rayemb.train.parameters import ParameterRule
from rayemb.train.retromae import RetroMAEConfig
from rayemb.train.schedules import AnySchedule, CosineConfig
from rayemb.train.sinks import LoggingConfig
from rayemb.train.step import Reduction

# A run that ran out of memory goes on with smaller micro-batches, one that lost machines with fewer workers, from its
# last checkpoint.
HOW = {
    "init",  # its digest decides, not where it lies
    "exchange",
    "tile",
    "micro_batch_size",
    "micro_batch_tokens",
    "gradient_reduction",
    "checkpoint_activations",
    "loader",
    "logging",
    "peak_flops",
    "checkpoints",
    "workers",
    "min_workers",
    "wait_seconds",
    "stall_seconds",
    "max_failures",
}


AnyObjective = Annotated[ContrastiveConfig | RetroMAEConfig, Field(discriminator="name")]

# Fields of a loss's batch that the trainer gives, beyond queries, documents and keys.
SUPPLIED = {"exits", "labels", "tasks"}


class TrainCorpus(CorpusEntry):
    """A corpus of the training."""

    loss: AnyLoss | None = Field(None, description="the loss of this corpus's batches; null: the run's")


class TrainConfig(Config):
    """The model, the loss and the run: data-parallel workers, each a DeepSpeed engine."""

    model: TwoTowerConfig = TwoTowerConfig()
    init: str | None = Field(
        None,
        description="a model directory, path or URI, whose towers, tokenizer and weights training starts from; `model` "
        "then says nothing",
    )
    objective: AnyObjective = Field(default_factory=ContrastiveConfig, description="what is learned from the corpora")
    loss: AnyLoss = Field(default_factory=InfoNCEConfig, description="what tells pairs apart; of objective contrastive")
    corpora: dict[str, TrainCorpus] = Field(
        default_factory=lambda: {"main": TrainCorpus()},
        min_length=1,
        description="the corpora to train on, by name; default: `main`, the run's own",
    )
    mix: MixConfig = Field(default_factory=MixConfig, description="how they share the batches")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="what is varied in images")
    loader: LoaderConfig = Field(default_factory=LoaderConfig, description="how rows get to the workers")
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="what is measured on held-out rows while training"
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        None, description="end the run when an evaluation no longer improves; null: never"
    )
    max_bad_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="the run ends if more rows than this cannot be used; they are set aside anyway",
    )
    seed: int = Field(0, ge=0, description="weights, order of rows, captions drawn, augmentation, dropout")

    steps: int = Field(400, ge=1, description="optimizer steps")
    batch_size: int = Field(256, ge=1, description="pairs per step over all workers: each is a negative of all others")
    optimizer: AnyOptimizer = Field(default_factory=AdamWConfig)
    schedule: AnySchedule = Field(default_factory=CosineConfig, description="the learning rate over the steps")
    parameters: list[ParameterRule] = Field([], description="what is special about some; the first that matches holds")
    layer_decay: float = Field(1.0, gt=0, le=1, description="each block's learning rate over that of the block above")
    adapters: LoRAConfig | None = Field(
        None, description="train small matrices beside the towers' frozen ones, merged when the model is saved"
    )
    ema: EMAConfig | None = Field(None, description="a running mean of the weights; null for none")
    gradient_clipping: float = Field(1.0, ge=0, description="norm of the whole gradient; 0 for none")

    workers: int = Field(
        2, ge=1, description="data-parallel workers; any number of them takes the same steps, up to rounding"
    )
    min_workers: int | None = Field(
        None,
        ge=1,
        description="elastic: go on with as few while nodes are missing, and with more when there is room again, at "
        "the same batch_size; null: always `workers`",
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that each worker takes in the cluster")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that each worker takes; 0 trains on CPU")
    threads_per_worker: int = Field(1, ge=1, description="torch threads of each worker")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO: what is sharded between workers")
    offload_optimizer: bool = Field(False, description="keep the optimizer's state in host memory; zero_stage 1 to 3")
    offload_parameters: bool = Field(False, description="keep this rank's share of the weights there; zero_stage 3")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="compute dtype; the loss is fp32 whatever it is. fp16 scales it, and leaves out steps while the "
        "scale is too large",
    )
    checkpoint_activations: bool = Field(
        False, description="compute what is in a block again in the backward instead of keeping it: slower, less memory"
    )
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

    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="how often a run reports, and where to")
    peak_flops: float | None = Field(
        None, gt=0, description="FLOP/s of a worker's device at most, for the MFU; null: known, or measured"
    )
    checkpoints: CheckpointsConfig = Field(default_factory=CheckpointsConfig, description="when the run is saved")
    max_failures: int = Field(2, ge=0, description="restarts from the last checkpoint before giving up")
    stall_seconds: float = Field(
        600.0, gt=0, description="without a finished step, start-up included, before the workers are started again"
    )
    wait_seconds: float = Field(
        600.0, gt=0, description="a restart, or an elastic run, waits so long for nodes with room for its workers"
    )

    @model_validator(mode="after")
    def _agree(self) -> "TrainConfig":
        if self.batch_size < self.workers:
            raise ValueError(f"batch_size ({self.batch_size}) is less than a row for each of {self.workers} workers")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) is more than workers ({self.workers})")
        if self.zero_stage == 0 and self.precision != "fp32":
            raise ValueError(
                f"precision {self.precision} needs zero_stage >= 1: stage 0 follows another loss curve there"
            )
        if self.zero_stage == 0 and self.offload_optimizer:
            raise ValueError("offload_optimizer needs zero_stage >= 1")
        if self.zero_stage < 3 and self.offload_parameters:
            raise ValueError("offload_parameters needs zero_stage 3: below it every rank works on whole weights")
        if self.zero_stage and self.optimizer.whole_matrices:
            raise ValueError(
                f"optimizer {self.optimizer.name} needs zero_stage 0: it looks at whole matrices, and ZeRO gives it a "
                "slice of all parameters in one vector"
            )
        for where, loss in self.losses.items():
            if missing := loss.needs - SUPPLIED:
                raise ValueError(f"{where}: {loss.name} needs {sorted(missing)}, which a corpus does not have yet")
            if "tasks" in loss.needs and (tasks := _tasks(loss)) < len(self.corpora):
                raise ValueError(f"{where}: {loss.name} has {tasks} tasks and there are {len(self.corpora)} corpora")
            if self.init is None and (misfit := loss.misfit(self.model.dim)):
                raise ValueError(f"{where}: {misfit} (model.dim)")
        return self

    @model_validator(mode="after")
    def _fits_the_objective(self) -> "TrainConfig":
        if isinstance(self.objective, ContrastiveConfig):
            return self
        name = self.objective.name
        if self.loss != InfoNCEConfig() or any(corpus.loss is not None for corpus in self.corpora.values()):
            raise ValueError(f"loss: the objective {name} is a loss itself; leave it out")
        if self.init is None and (misfit := self.objective.misfit(self.model)):
            raise ValueError(f"objective {name}: {misfit}")
        return self

    @model_validator(mode="after")
    def _evaluable(self) -> "TrainConfig":
        for name, task in self.evaluation.chosen.items():
            if task.corpus is not None and task.corpus not in self.corpora:
                raise ValueError(
                    f"evaluation.tasks.{name}.corpus: {task.corpus!r} is none of corpora ({', '.join(self.corpora)}); "
                    "give its uri"
                )
        stopping = self.early_stopping
        if stopping is not None and stopping.metric not in self.evaluation.metrics:
            raise ValueError(
                f"early_stopping.metric: {stopping.metric!r} is not measured; there are "
                f"{', '.join(self.evaluation.metrics)}"
            )
        return self

    @model_validator(mode="after")
    def _starts_somewhere(self) -> "TrainConfig":
        if self.init is not None and self.model != TwoTowerConfig():
            raise ValueError("model: train.init brings its own towers and tokenizer; leave out one of the two")
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
        return self.workers * self.cpus_of_one

    @property
    def cpus_of_one(self) -> float:
        """What one worker and its decoders take."""
        return self.cpus_per_worker + self.loader.decoders * self.loader.cpus_per_decoder

    @property
    def least_workers(self) -> int:
        """With how many the run goes on."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def losses(self) -> dict[str, AnyLoss]:
        """The loss of the run, or of each corpus if any has its own, by the key that says it."""
        if all(corpus.loss is None for corpus in self.corpora.values()):
            return {"loss": self.loss}
        return {f"corpora.{name}.loss": corpus.loss or self.loss for name, corpus in self.corpora.items()}

    @property
    def criteria(self) -> dict[str, AnyLoss | AnyObjective]:
        """What the training minimises, by the key that says it: the losses, or an objective that is one itself."""
        if isinstance(self.objective, ContrastiveConfig):
            return dict(self.losses)
        return {"objective": self.objective}

    @property
    def outcome(self) -> dict[str, Any]:
        """What decides the trained weights: all keys but those that only say how the work is cut up and reported."""
        return self.model_dump(mode="json", exclude=HOW)


def _tasks(loss: Any) -> int:
    while not hasattr(loss, "tasks"):
        loss = loss.loss
    return int(loss.tasks)
