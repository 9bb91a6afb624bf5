"""Requests and responses of /v1/files and /v1/fine_tuning/jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from service.http.schemas import fields
from service.http.schemas.common import MODEL_FIELD, Answer, Options, Request, wrong_field
from tessera.errors import InvalidInput
from tessera.methods.scaling import Scaling
from tessera.queue.hyperparameters import check_together, given
from tessera.queue.preference import DPO, MAX_BETA, OPTIONS, SUPERVISED, PreferenceOptions

MAX_SEED = 2**31 - 1


class FileObject(Answer):
    """An uploaded file of examples. The upload checks it, so its status is always `processed`."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    num_examples: int | None
    sha256: str


def _kind_of_number(value: Any) -> str:
    return "~auto" if isinstance(value, str) else "~number"


Auto = Annotated[Literal["auto"], Tag("~auto")]


Number = TypeVar("Number")
OrAuto = Annotated[Auto | Annotated[Number, Tag("~number")], Discriminator(_kind_of_number)]


def _word(field: str) -> BeforeValidator:
    """Return what turns other tools' words for a value of the field into ours."""
    words = fields.HYPERPARAMETER_WORDS[field]
    return BeforeValidator(lambda value: words.get(value, value) if isinstance(value, str) else value)


Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Hyperparameters(Request):
    """How to train. `trainer_worker/training/plan.py` says what each one does.

    `other_names` are accepted as well, where the meaning is the same.
    """

    n_epochs: OrAuto[Annotated[int, Field(ge=1, le=50)]] = "auto"
    batch_size: OrAuto[Annotated[int, Field(ge=1, le=256)]] = "auto"
    gradient_accumulation_steps: OrAuto[Annotated[int, Field(ge=1, le=256)]] = Field(
        "auto", description="Batches in a step of the optimizer."
    )
    learning_rate_multiplier: OrAuto[Annotated[float, Field(gt=0, le=1000)]] = "auto"
    learning_rate: OrAuto[Annotated[float, Field(gt=0, le=100)]] = Field(
        "auto", description="The highest rate of the schedule."
    )
    lr_scheduler_type: Annotated[
        Literal["auto", "cosine_with_min_lr", "cosine", "linear", "constant"], _word("lr_scheduler_type")
    ] = Field("auto", description="The schedule after the warm-up.")
    min_lr_ratio: OrAuto[Share] = Field(
        "auto", description="The end of the schedule, as a share of its peak."
    )
    warmup_ratio: OrAuto[Share] = Field("auto", description="Warm-up, as a share of all steps.")
    warmup_steps: OrAuto[Annotated[int, Field(ge=0, le=1_000_000)]] = Field(
        "auto", description="Warm-up, in steps."
    )
    weight_decay: OrAuto[Share] = "auto"
    optimizer: Annotated[Literal["auto", "adamw", "sgd"], _word("optimizer")] = "auto"
    momentum: OrAuto[BelowOne] = Field("auto", description="Of SGD.")
    adam_beta1: OrAuto[BelowOne] = "auto"
    adam_beta2: OrAuto[BelowOne] = "auto"
    adam_epsilon: OrAuto[Annotated[float, Field(gt=0, le=1)]] = "auto"
    max_grad_norm: OrAuto[Annotated[float, Field(ge=0)]] = Field("auto", description="0: nothing is clipped.")
    max_length: OrAuto[Annotated[int, Field(ge=8, le=2**20)]] = Field(
        "auto", description="Longest example, in tokens."
    )
    validation_split: OrAuto[Annotated[float, Field(ge=0, le=0.9)]] = Field(
        "auto", description="Share of the examples that is held back for validation; 0: none."
    )
    publish: Literal["auto", "best", "last"] = Field("auto", description="The state that is published.")

    @property
    def given(self) -> dict[str, Any]:
        """The hyperparameters that are not "auto", by name."""
        return given(self.model_dump())

    neutral = fields.HYPERPARAMETER_NEUTRAL
    advice = fields.HYPERPARAMETER_ADVICE
    other_names = fields.HYPERPARAMETER_NAMES


class DpoHyperparameters(Hyperparameters):
    """How to train on preference pairs. `tessera/queue/preference.py` has the defaults."""

    beta: OrAuto[Annotated[float, Field(gt=0, le=MAX_BETA)]] = Field(
        "auto", description="How strongly the adapter is kept at its reference."
    )
    loss_type: Literal["auto", "sigmoid", "sigmoid_norm", "ipo", "hinge"] = Field(
        "auto", description="The loss of a pair, by TRL's names."
    )
    label_smoothing: OrAuto[Annotated[float, Field(ge=0, lt=0.5)]] = Field(
        "auto", description="The probability that a pair is the wrong way round."
    )
    reference_free: bool | None = Field(None, description="Compare with no reference.")

    @property
    def options(self) -> dict[str, Any]:
        """The options of DPO that are given. Raises `InvalidInput` if they exclude each other."""
        values = {name: getattr(self, name) for name in OPTIONS}
        options = {name: value for name, value in values.items() if value not in (None, "auto")}
        PreferenceOptions.of(options)
        return options


class Supervised(Request):
    hyperparameters: Hyperparameters | None = None


class Dpo(Request):
    hyperparameters: DpoHyperparameters | None = None


class Classification(Request):
    """Train a classification head beside the cores, on lines with a `label`."""

    hyperparameters: Hyperparameters | None = None
    problem_type: Literal["single_label_classification", "regression"] = Field(
        "single_label_classification", description="regression: labels are numbers, and so are the answers."
    )
    head_learning_rate: OrAuto[Annotated[float, Field(gt=0, le=100)]] = Field(
        "auto", description="The head's highest rate; it follows the schedule of the cores."
    )
    head_only: bool = Field(False, description="Leave the cores at zero and train the head alone.")


class Method(Request):
    type: Literal["supervised", "dpo", "classification"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    classification: Classification | None = None

    neutral = fields.METHOD_NEUTRAL

    @model_validator(mode="after")
    def _check_type(self) -> Method:
        for name in ("supervised", "dpo", "classification"):
            if getattr(self, name) is not None and name != self.type:
                raise wrong_field(self, name, f"the method's type is {self.type}; leave this out")
        return self

    @property
    def hyperparameters(self) -> Hyperparameters | None:
        chosen: Supervised | Dpo | Classification | None = getattr(self, self.type)
        return None if chosen is None else chosen.hyperparameters


def _kind_of_choice(value: Any) -> str:
    return "~name" if isinstance(value, str) else "~recipe"


Name = Annotated[str, Field(min_length=1, max_length=64), Tag("~name")]


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class BasisRecipe(Request):
    """How the basis of a job is built. `GET /v1/bases/methods` lists the methods."""

    method: str = Field(
        min_length=1, max_length=64, description="Name of a method, or of a preset for its basis."
    )
    options: Options = Field(default_factory=dict)
    calibration: str | None = Field(
        None, max_length=128, description="`own` (the training data) or a file id."
    )


class StartRecipe(Request):
    """How an adapter is initialized before training."""

    method: str = Field(
        min_length=1, max_length=64, description="Name of an init, or of a preset for its init."
    )
    options: Options = Field(default_factory=dict)


def _kind_of_names(value: Any) -> str:
    return "~list" if isinstance(value, list) else "~name"


ModuleName = Annotated[str, Field(min_length=1, max_length=256)]
ModuleRank = Annotated[int, Field(ge=1, le=512)]
ModuleNames = Annotated[list[ModuleName], Field(min_length=1, max_length=64)]


class AdapterOptions(Request):
    """Tessera's own options (`extra_body` in OpenAI's clients)."""

    id: str | None = Field(
        default=None,
        max_length=64,
        description="The adapter's id. Training an existing one makes its next version.",
    )
    form: Literal["core", "lora"] = Field(
        default="core", description="lora: train A and B as `init` says, which makes a private basis."
    )
    rank: int | None = Field(default=None, ge=1, le=512)
    alpha: float | None = Field(
        default=None, ge=1e-6, le=1e6, description="s = alpha / r in delta_W = s B R A."
    )
    use_rslora: bool | None = Field(default=None, description="s = alpha / √r, where alpha is r by default.")
    scale: float | None = Field(default=None, ge=1e-6, le=1e6, description="s itself.")
    rank_pattern: Annotated[dict[ModuleName, ModuleRank], Field(max_length=64)] | None = Field(
        default=None, description="Ranks of modules that have another, by regular expression, as in PEFT."
    )
    target_modules: (
        Annotated[
            Annotated[ModuleName, Tag("~name")] | Annotated[ModuleNames, Tag("~list")],
            Discriminator(_kind_of_names),
        ]
        | None
    ) = Field(default=None, description="Patterns of module names, or `all-linear`.")
    method: str | None = Field(
        default=None, max_length=64, description="The method of a basis that is built without data."
    )
    basis: Annotated[Name | Annotated[BasisRecipe, Tag("~recipe")], Discriminator(_kind_of_choice)] | None = (
        Field(default=None, description="Id of a stored basis, name of a preset or method, or a recipe.")
    )
    init: Annotated[Name | Annotated[StartRecipe, Tag("~recipe")], Discriminator(_kind_of_choice)] | None = (
        Field(default=None, description="Name of an init or preset, or a recipe.")
    )

    other_names = fields.ADAPTER_NAMES
    advice = fields.ADAPTER_ADVICE

    @property
    def scaling(self) -> Scaling:
        return Scaling(self.scale, self.alpha, bool(self.use_rslora))

    @property
    def module_patterns(self) -> list[str] | None:
        """The target modules in alphabetical order, each once; None: the default ones."""
        given = self.target_modules
        if given is None:
            return None
        return sorted({name.strip() for name in (given.split(",") if isinstance(given, str) else given)})


class EarlyStopping(Request):
    """Training ends when the validation loss has not fallen by `min_delta` for `patience` evaluations."""

    patience: int | None = Field(2, ge=1, le=1000, description="null: never end early.")
    min_delta: float = Field(0.0, ge=0)


class FineTuningJobRequest(Request):
    """A job that trains an adapter. `model` is the base model, or an adapter from which training goes on."""

    model: str = MODEL_FIELD
    training_file: str = Field(max_length=128)
    validation_file: str | None = Field(None, max_length=128)
    suffix: str | None = Field(None, min_length=1, max_length=64, description="Part of the adapter's id.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    metadata: Metadata | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="The older place of those in `method`.")
    adapter: AdapterOptions = Field(default_factory=AdapterOptions)
    early_stopping: EarlyStopping | None = None

    neutral = fields.FINE_TUNING_NEUTRAL
    advice = fields.FINE_TUNING_ADVICE

    @model_validator(mode="after")
    def _check_choices(self) -> FineTuningJobRequest:
        self.chosen_hyperparameters()
        try:
            self.adapter.scaling.check()
        except InvalidInput as error:
            raise InvalidInput(error.message, param=f"adapter.{error.param}") from error
        self.objective_options()
        if self.suffix is not None and self.adapter.id is not None:
            raise InvalidInput(
                "suffix makes a new adapter id, but adapter.id gives one; leave one of them out",
                param="suffix",
            )
        return self

    def chosen_hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters of both places. Raises `InvalidInput` if they contradict each other."""
        newer = None if self.method is None else self.method.hyperparameters
        newer_values = {} if newer is None else newer.given
        chosen = {name: value for name, value in newer_values.items() if name not in OPTIONS}
        for name, value in ({} if self.hyperparameters is None else self.hyperparameters.given).items():
            _choose(chosen, name, value)
        try:
            check_together(chosen, has_validation_file=self.validation_file is not None)
        except InvalidInput as error:
            name = str(error.param).rpartition(".")[2]
            if newer is None or name not in newer.given:
                raise
            param = f"method.{self.method.type if self.method else SUPERVISED}.{error.param}"
            raise InvalidInput(error.message, param=param) from error
        return chosen

    @property
    def objective(self) -> str:
        """One of `OBJECTIVES` of `tessera/queue/preference.py`."""
        return DPO if self.method is not None and self.method.type == DPO else SUPERVISED

    def objective_options(self) -> dict[str, Any]:
        """Return the given options of DPO. Raises `InvalidInput`."""
        newer = None if self.method is None else self.method.hyperparameters
        return newer.options if isinstance(newer, DpoHyperparameters) else {}


def _choose(chosen: dict[str, Any], name: str, value: Any) -> None:
    if chosen.setdefault(name, value) != value:
        message = f"{name} is given as {chosen[name]} and as {value}; give it once"
        raise InvalidInput(message, param=f"hyperparameters.{name}")


class JobError(Answer):
    code: str
    message: str
    param: str | None


class TrainedAdapter(Answer):
    """The adapter that a job trains."""

    id: str
    version: int | None = Field(description="None until the job has succeeded.")
    form: str
    method: str
    rank: int
    rank_pattern: dict[str, int] | None
    target_modules: list[str] | None = Field(description="None: those of the basis, or the default ones.")
    alpha: float | None
    use_rslora: bool
    scale: float | None
    basis: str | None
    calibration: str | None
    init: str = Field(description="Name of the init, or of the LoRA form.")


class JobHyperparameters(Answer):
    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    gradient_accumulation_steps: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]
    learning_rate: float | Literal["auto"]
    lr_scheduler_type: str
    min_lr_ratio: float | Literal["auto"]
    warmup_ratio: float | Literal["auto"]
    warmup_steps: int | Literal["auto"]
    weight_decay: float | Literal["auto"]
    optimizer: str
    momentum: float | Literal["auto"]
    adam_beta1: float | Literal["auto"]
    adam_beta2: float | Literal["auto"]
    adam_epsilon: float | Literal["auto"]
    max_grad_norm: float | Literal["auto"]
    max_length: int | Literal["auto"]
    validation_split: float | Literal["auto"]
    publish: str


class JobSupervised(Answer):
    hyperparameters: JobHyperparameters


class JobDpoHyperparameters(JobHyperparameters):
    beta: float
    loss_type: str
    label_smoothing: float
    reference_free: bool


class JobDpo(Answer):
    hyperparameters: JobDpoHyperparameters


class JobClassification(Answer):
    hyperparameters: JobHyperparameters
    problem_type: str
    head_learning_rate: float | Literal["auto"]
    head_only: bool


class JobMethod(Answer):
    type: Literal["supervised"] = "supervised"
    supervised: JobSupervised


class JobDpoMethod(Answer):
    type: Literal["dpo"] = "dpo"
    dpo: JobDpo


class JobClassificationMethod(Answer):
    type: Literal["classification"] = "classification"
    classification: JobClassification


class FineTuningJob(Answer):
    """A job: OpenAI's fields first, then those that Tessera adds."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None = Field(description="None while nobody knows.")
    fine_tuned_model: str | None = Field(description="The adapter's id, once the job has succeeded.")
    hyperparameters: JobHyperparameters
    model: str
    organization_id: str
    result_files: list[str] = Field(default_factory=list)
    seed: int
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    error: JobError | None
    integrations: list[str] = Field(default_factory=list)
    metadata: dict[str, Any]
    method: JobMethod | JobDpoMethod | JobClassificationMethod
    user_provided_suffix: str | None
    adapter: TrainedAdapter
    progress: dict[str, Any] = Field(description="Epoch, step, losses … of a running job.")
    result: dict[str, Any] | None
    early_stopping: dict[str, Any] | None
    started_at: int | None
    attempt: int
    queue_position: int | None = Field(description="Place among the caller's own waiting jobs, from 1.")


class TokenCounts(Answer):
    """Tokens of a whole job that makes all its steps and shares its passes with nobody."""

    per_epoch: int
    trained: int
    padding: int = Field(description="Beside the trained ones.")
    evaluated: int


class JobWarning(Answer):
    code: str
    message: str


class JobEstimate(Answer):
    """What a job would do, if it were created now."""

    object: Literal["fine_tuning.job.estimate"] = "fine_tuning.job.estimate"
    hyperparameters: JobHyperparameters = Field(
        description="A learning rate that is searched, or depends on a basis not built yet, stays auto."
    )
    searched_multiples: list[float] = Field(
        description="Of the automatic learning rate, tried together; empty if the job trains once."
    )
    steps: int
    num_evaluations: int
    data: dict[str, Any] = Field(description="Examples, duplicates, truncations, held-back examples …")
    tokens: TokenCounts
    cost_tokens: int = Field(description="What the fairness between tenants counts.")
    quota_bytes: int = Field(description="What a private basis of the job takes of your quota.")
    wait_s: float | None = Field(description="Until a worker takes it; None if no worker is there.")
    run_s: float | None = Field(description="In the worker; None before any worker has measured.")
    estimated_finish: int | None
    warnings: list[JobWarning]


class JobEventObject(Answer):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any]


class CheckpointMetrics(Answer):
    """What was measured at a step. Every evaluation reads all validation data, so `full_` says the same."""

    step: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class Checkpoint(Answer):
    """A state of a job that can be asked like any model."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics
