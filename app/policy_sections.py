"""The configuration's sections for policies' parameters: made from the policies' fields, so that none is said twice.

A section's values are checked by making the policy of them: what it refuses with a ValueError stops the start.
"""

from dataclasses import MISSING, fields
from typing import Annotated, Any, get_type_hints

from pydantic import Field, create_model, model_validator

from app.sections import Section
from engine.fleet import BalanceConfig
from policies.admission import Admission
from policies.order import Hybrid, Mlq, Sjf
from policies.promotion import Promotion

Whole = Annotated[int, Field(le=2**53)]
"""Up to here a float, which policies reckon in, tells all whole numbers apart."""


def section_for(policy: Any) -> type[Section]:
    """A section with a key for each of the policy's parameters, and its default."""
    types = get_type_hints(policy)
    keys: dict[str, Any] = {
        each.name: (Whole if types[each.name] is int else types[each.name], Field(default=each.default))
        for each in fields(policy)
        if each.default is not MISSING
    }

    def made(section: Section) -> Section:
        policy(**section.model_dump())
        return section

    validators: dict[str, Any] = {"made": model_validator(mode="after")(made)}
    return create_model(policy.__name__, __base__=Section, __validators__=validators, **keys)


PARAMETERS: dict[str, type[Section]] = {
    "admission": section_for(Admission),
    "promotion": section_for(Promotion),
    "sjf": section_for(Sjf),
    "mlq": section_for(Mlq),
    "hybrid": section_for(Hybrid),
    "balance": section_for(BalanceConfig),
}
"""By the name of the table in [policies]."""
