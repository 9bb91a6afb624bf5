"""Requests and answers of /v1/files and /v1/fine_tuning/jobs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from service.routes.schemas import MODEL_FIELD, Answer, IsHarmless, OpenAIRequest, Strict, absent

MAX_SEED = 2**31 - 1


class FileObject(Answer):
    """An uploaded file of examples. It was checked at the upload, so it is processed at once."""

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


class Hyperparameters(OpenAIRequest):
    n_epochs: Annotated[
        Auto | Annotated[int, Field(ge=1, le=50), Tag("~number")], Discriminator(_kind_of_number)
    ] = "auto"
    batch_size: Annotated[
        Auto | Annotated[int, Field(ge=1, le=256), Tag("~number")], Discriminator(_kind_of_number)
    ] = "auto"
    learning_rate_multiplier: Annotated[
        Auto | Annotated[float, Field(gt=0, le=1000), Tag("~number")], Discriminator(_kind_of_number)
    ] = "auto"

    unsupported: ClassVar[dict[str, IsHarmless]] = {"beta": absent}


class Supervised(OpenAIRequest):
    hyperparameters: Hyperparameters | None = None


class Method(OpenAIRequest):
    type: Literal["supervised"]
    supervised: Supervised | None = None


def _kind_of_choice(value: Any) -> str:
    return "~name" if isinstance(value, str) else "~recipe"


def _kind_of_option(value: Any) -> str | None:
    kinds = {bool: "~flag", int: "~integer", float: "~number", str: "~text", type(None): "~null"}
    return kinds.get(type(value))


OptionValue = Annotated[
    Annotated[bool, Tag("~flag")]
    | Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Tag("~integer")]
    | Annotated[float, Tag("~number")]
    | Annotated[str, Field(max_length=128), Tag("~text")]
    | Annotated[None, Tag("~null")],
    Discriminator(_kind_of_option),
]
MethodOptions = Annotated[dict[Annotated[str, Field(max_length=64)], OptionValue], Field(max_length=32)]
Name = Annotated[str, Field(min_length=1, max_length=64), Tag("~name")]


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class BasisRecipe(Strict):
    """How the basis of a job is built. What there is: `GET /v1/bases/methods`."""

    method: str = Field(min_length=1, max_length=64, description="of a method, or a preset's basis half")
    options: MethodOptions = Field(default_factory=dict)
    calibration: str | None = Field(
        None, max_length=128, description="`own` (the training data) or a file id"
    )


class StartRecipe(Strict):
    """Where the training of an adapter begins."""

    method: str = Field(min_length=1, max_length=64, description="of a start, or a preset's start half")
    options: MethodOptions = Field(default_factory=dict)


class AdapterOptions(Strict):
    """Tessera's own options (`extra_body` of OpenAI's clients)."""

    id: str | None = Field(default=None, max_length=64, description="training it again: its next version")
    form: Literal["core", "lora"] = Field(
        default="core", description="lora: A and B are trained, as `init` says, into a basis of one's own"
    )
    rank: int | None = Field(default=None, ge=1, le=512)
    method: str | None = Field(default=None, max_length=64, description="how a basis is built without data")
    basis: Annotated[Name | Annotated[BasisRecipe, Tag("~recipe")], Discriminator(_kind_of_choice)] | None = (
        Field(default=None, description="id of a stored basis, name of a preset or method, or a recipe")
    )
    init: Annotated[Name | Annotated[StartRecipe, Tag("~recipe")], Discriminator(_kind_of_choice)] | None = (
        Field(default=None, description="name of a start or preset, or a recipe")
    )


class EarlyStopping(Strict):
    """Training ends when the validation loss has not fallen by `min_delta` for `patience` evaluations."""

    patience: int | None = Field(2, ge=1, le=1000, description="null: never end early")
    min_delta: float = Field(0.0, ge=0)


class FineTuningJobRequest(OpenAIRequest):
    """A job that trains an adapter. model: the base model, or an adapter to start from."""

    model: str = MODEL_FIELD
    training_file: str = Field(max_length=128)
    validation_file: str | None = Field(None, max_length=128)
    suffix: str | None = Field(None, min_length=1, max_length=64, description="part of the adapter's id")
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    metadata: Metadata | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="the older place; `method` goes before")
    adapter: AdapterOptions = Field(default_factory=AdapterOptions)
    early_stopping: EarlyStopping | None = None

    unsupported: ClassVar[dict[str, IsHarmless]] = {"integrations": absent}

    @property
    def chosen_hyperparameters(self) -> Hyperparameters:
        if self.method is not None and self.method.supervised is not None:
            newer = self.method.supervised.hyperparameters
            if newer is not None:
                return newer
        return self.hyperparameters or Hyperparameters()


class JobError(Answer):
    code: str
    message: str
    param: str | None


class TrainedAdapter(Answer):
    """version: None until the job has succeeded. init: what training began with: a start, or a LoRA form."""

    id: str
    version: int | None
    form: str
    method: str
    rank: int
    basis: str | None
    calibration: str | None
    init: str


class JobHyperparameters(Answer):
    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]


class JobSupervised(Answer):
    hyperparameters: JobHyperparameters


class JobMethod(Answer):
    type: Literal["supervised"] = "supervised"
    supervised: JobSupervised


class FineTuningJob(Answer):
    """A job in OpenAI's shape, then what Tessera adds."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    fine_tuned_model: str | None = Field(description="the adapter's id, once the job has succeeded")
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
    method: JobMethod
    user_provided_suffix: str | None
    adapter: TrainedAdapter
    progress: dict[str, Any] = Field(description="epoch, step, losses … of a running job")
    result: dict[str, Any] | None
    early_stopping: dict[str, Any] | None
    started_at: int | None
    attempt: int
    queue_position: int | None = Field(description="1-based place among the caller's own waiting jobs")


class JobEventObject(Answer):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any]


class CheckpointMetrics(Answer):
    step: int
    valid_loss: float | None


class Checkpoint(Answer):
    """The best state of a job: the one that was published."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics
