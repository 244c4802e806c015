"""What stands before the image's tokens: the condition c of p(s | c), as a short prefix.

Source: arXiv 2012.09841, section 3.2, equation 9 ("prepend c to s"). A condition is a class and one
line in CONDITIONS, by the name that `model/condition=` has.
"""

from taming_dist.models.prior.conditions.classes import ClassCondition
from taming_dist.models.prior.conditions.codes import CodesCondition
from taming_dist.models.prior.conditions.coordinates import CoordinatesCondition
from taming_dist.models.prior.conditions.interface import (
    Codes,
    Columns,
    Condition,
    Request,
    agreed,
)
from taming_dist.models.prior.conditions.objects import (
    ObjectCentersCondition,
    ObjectsCondition,
)
from taming_dist.models.prior.conditions.several import SeveralConditions
from taming_dist.models.prior.conditions.text import TextCondition
from taming_dist.models.prior.conditions.unconditional import Unconditional

__all__ = [
    "CONDITIONS",
    "ClassCondition",
    "Codes",
    "CodesCondition",
    "Columns",
    "Condition",
    "CoordinatesCondition",
    "ObjectCentersCondition",
    "ObjectsCondition",
    "Request",
    "SeveralConditions",
    "TextCondition",
    "Unconditional",
    "agreed",
]

# name in conf/model/condition -> the condition; the first is the default
CONDITIONS: dict[str, type[Condition]] = {
    "none": Unconditional,
    "class": ClassCondition,
    "codes": CodesCondition,
    "coordinates": CoordinatesCondition,
    "objects": ObjectsCondition,
    "object_centers": ObjectCentersCondition,
    "several": SeveralConditions,
    "text": TextCondition,
}
