"""The common part of all requests and responses: strictness, the error body, pages of lists.

Types are strict: "7" and true are not integers, and NaN is not a number. A request refuses every unknown
field, except those that `fields.py` lets pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from functools import cache
from itertools import islice
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from service.http.schemas.fields import Neutral, OtherName

Item = TypeVar("Item")

#: The tags of unions begin with this: they appear in the path of an error, but are not part of a field's
#: name.
UNION_TAG = "~"
#: The most refused fields of one object that an error lists.
MAX_REFUSED_FIELDS = 20

MAX_MODEL_NAME = 256
MODEL_FIELD = Field(
    max_length=MAX_MODEL_NAME, description="The base model, `<adapter>` or `<adapter>@<version>`."
)


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
#: Options of a method or a chat template, by name.
Options = Annotated[dict[Annotated[str, Field(max_length=64)], OptionValue], Field(max_length=32)]


class Strict(BaseModel):
    """A small part of a request, which may hold many thousands of them."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Request(Strict):
    """A request, or an object in it. null means "not given"; the tables decide about names that are not
    fields."""

    #: Name -> why it is harmless.
    ignored: ClassVar[Mapping[str, str]] = {}
    #: Name -> the values that change nothing.
    neutral: ClassVar[Mapping[str, Neutral]] = {}
    #: Name -> what to use instead.
    advice: ClassVar[Mapping[str, str]] = {}
    #: Another tool's name of a field -> the field, and how a value of the other is read.
    other_names: ClassVar[Mapping[str, OtherName]] = {}

    @model_validator(mode="wrap")
    @classmethod
    def _judge_names(cls, body: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate the object and report all its problems at once: unknown names and wrong values."""
        known = _fields_of(cls)
        if not isinstance(body, dict) or (body.keys() <= known.all and None not in body.values()):
            return handler(body)
        refused = list(islice(cls._refused(body, known.all), MAX_REFUSED_FIELDS))
        given = {
            name: body[name]
            for name in known.all
            if name in body and (body[name] is not None or name in known.taking_null)
        }
        sent = {name: name for name in given}
        for name in cls.other_names.keys() & body.keys():
            if body[name] is not None:
                field, value = cls.other_names[name].read(body[name])
                if field in given and given[field] != value:
                    refused.append(_contradiction(name, sent[field]))
                given.setdefault(field, value)
                sent.setdefault(field, name)
        try:
            request = handler(given)
        except ValidationError as error:
            details = list(_details(error, sent))
            raise ValidationError.from_exception_data(cls.__name__, [*refused, *details]) from None
        if refused:
            raise ValidationError.from_exception_data(cls.__name__, refused)
        return request

    @classmethod
    def _refused(cls, body: Mapping[str, Any], known: Set[str]) -> Iterator[InitErrorDetails]:
        for name, value in body.items():
            if value is None or name in known or name in cls.ignored or name in cls.other_names:
                continue
            neutral = cls.neutral.get(name)
            if neutral is None or not neutral.allows(value):
                yield InitErrorDetails(type=cls._objection(name, neutral), loc=(name,), input=None)

    @classmethod
    def _objection(cls, name: str, neutral: Neutral | None) -> PydanticCustomError:
        if neutral is not None:
            advice = f"; {neutral.advice}" if neutral.advice else ""
            return PydanticCustomError("unsupported_parameter", "{why}", {"why": f"not supported{advice}"})
        if name in cls.advice:
            why = f"not supported; {cls.advice[name]}"
            return PydanticCustomError("unsupported_parameter", "{why}", {"why": why})
        known = {*_fields_of(cls).all, *cls.other_names}
        return PydanticCustomError("unknown_parameter", "unknown field", {"known": known})

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the schema of the fields, and of the other names that may be sent."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        for name, neutral in cls.neutral.items():
            values = [None, *neutral.values]
            schema["properties"].setdefault(name, {"enum": values, "description": "changes nothing"})
        for name, why in cls.ignored.items():
            schema["properties"].setdefault(name, {"description": f"ignored: {why}"})
        for name, other in cls.other_names.items():
            schema["properties"].setdefault(name, {"description": f"another name of `{other.field}`"})
        return reference


class ModelRequest(Request):
    """A request to a model. lora_path and adapter_id are other servers' names of the field for an adapter."""

    model: str = MODEL_FIELD
    lora_path: str | None = Field(
        None, max_length=MAX_MODEL_NAME, description="SGLang's name of this field; see `model`."
    )
    adapter_id: str | None = Field(
        None, max_length=MAX_MODEL_NAME, description="LoRAX's name of this field; see `model`."
    )

    @property
    def aliases(self) -> dict[str, str]:
        """The other fields that name an adapter, with that name."""
        given = {"lora_path": self.lora_path, "adapter_id": self.adapter_id}
        return {field: name for field, name in given.items() if name is not None}


class _Fields(NamedTuple):
    """The names of a schema's fields."""

    all: frozenset[str]
    #: Fields for which null is a value or an error; for all others null means the default.
    taking_null: frozenset[str]


@cache
def _fields_of(schema: type[BaseModel]) -> _Fields:
    fields = schema.model_fields
    taking_null = (n for n, f in fields.items() if f.is_required() or type(None) in get_args(f.annotation))
    return _Fields(frozenset(fields), frozenset(taking_null))


def _details(error: ValidationError, sent: Mapping[str, str]) -> Iterator[InitErrorDetails]:
    """Yield the problems. sent: field -> the name by which the caller has sent it."""
    for problem in error.errors(include_url=False, include_input=False):
        kind = PydanticCustomError(problem["type"], problem["msg"], problem.get("ctx"))
        loc = problem["loc"]
        if loc:
            loc = (sent.get(str(loc[0]), loc[0]), *loc[1:])
        yield InitErrorDetails(type=kind, loc=loc, input=None)


def _contradiction(name: str, other: str) -> InitErrorDetails:
    why = f"is another name of {other}, with another value; give one of them"
    return InitErrorDetails(
        type=PydanticCustomError("invalid_value", "{why}", {"why": why}), loc=(name,), input=None
    )


def wrong_field(request: BaseModel, field: str, message: str) -> ValidationError:
    """Return the error of an "after" validator about one field of its object."""
    detail = InitErrorDetails(
        type=PydanticCustomError("invalid_value", "{why}", {"why": message}), loc=(field,), input=None
    )
    return ValidationError.from_exception_data(type(request).__name__, [detail])


class Answer(BaseModel):
    """A response, or an object in it."""

    model_config = ConfigDict(protected_namespaces=())


class LineProblem(Answer):
    line: int
    code: str
    message: str


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None
    errors: list[LineProblem] | None = Field(None, description="The problems of a training file, by line.")


class ErrorBody(Answer):
    """The body of every error."""

    error: ErrorDetail


class Deleted(Answer):
    id: str
    object: str
    deleted: bool = True


class Page(Answer, Generic[Item]):
    """One page of a list. The next page starts `after` the last id of this one."""

    object: str = "list"
    data: list[Item]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class AdapterUsed(Answer):
    """The adapter that generated the answer."""

    id: str
    version: int | None = Field(description="None for an intermediate state, which the id names.")


class Measured(Answer):
    """Measurements of the request."""

    ttft_ms: float | None = Field(description="Time to the first token, in milliseconds.")
    max_distinct_in_batch: int = Field(
        description="The most distinct models (adapters, base) that shared a step with the request."
    )


class PromptTokens(Answer):
    cached_tokens: int


class UsageReport(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


def page_of(items: list[Item], has_more: bool) -> Page[Item]:
    """Return a page of items, which have an `id`."""
    ids = [getattr(item, "id", None) for item in items]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return Page(data=items, has_more=has_more, first_id=first, last_id=last)
