"""What the tables and JSON files of a run must hold to be read back; more may stand there."""

from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic's demand on Python 3.11

from carvana.metrics import ERROR_PARTS
from carvana.profiles import TTA

FOLDS: dict[str, type] = {"car": str, "fold": int}  # columns that a table must have, and their types
HISTORY: dict[str, type] = {"epoch": int, "seconds": float, "dice": float, "iou": float}
QUALITY: dict[str, type] = {"img": str, "car": str, "exclude": str}
SCORES: dict[str, type] = {
    **{"img": str, "car": str, "view": int, "fold": int, "dice": float, "iou": float, "area": float},
    **{"predicted_area": float, **dict.fromkeys(ERROR_PARTS, int), "disputed": int},
}


class Member(TypedDict):
    """A checkpoint, its path relative to ensemble.json, and its share of the blend."""

    path: str
    weight: Annotated[float, Field(ge=0, le=1)]


class Members(TypedDict):
    """What of ensemble.json tells where its networks come from."""

    members: Annotated[list[Member], Field(min_length=1)]


class EnsembleNote(Members):
    """What ensemble.json holds; people may edit it."""

    views: Annotated[list[Annotated[str, Field(pattern=f"^({TTA})$")]], Field(min_length=1)]
    threshold: Annotated[float, Field(gt=0, lt=1)]


class Start(TypedDict):
    """What run.json holds at least."""

    parameters: dict[str, Any]


class Done(TypedDict):
    """What steps.json holds of each step."""

    key: str
    seconds: float


class Submission(TypedDict):
    """What submission.json holds at least."""

    path: str
    rows: int
    true_dice: NotRequired[float]
