"""Every field of a request is known: used, without effect here and accepted, or refused by name.

A client that asks for what this server does not do must not get an answer as if it had: so fields that would change
the answer are refused unless they have the value that changes nothing, and a field that is no field at all names the
nearest one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

_MOST_CHARS = 60


class CheckedModel(BaseModel):
    """A part of a request whose fields are all known."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, protected_namespaces=())

    harmless: ClassVar[frozenset[str]] = frozenset()
    """Fields without effect on the answer."""
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that would change the answer, with the values beside null that do not."""

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise PydanticCustomError("dict_type", "expected an object")
        for name, value in data.items():
            if name in cls.model_fields or name in cls.harmless:
                continue
            if name in cls.unsupported:
                if value is not None and value not in cls.unsupported[name]:
                    raise refused(name, _not_supported(cls.unsupported[name]))
            else:
                # JSON allows halves of characters, which pydantic's errors cannot hold
                shown = str(name).encode(errors="backslashreplace").decode()[:_MOST_CHARS]
                raise refused(shown, cls._unknown(shown))
        return data

    @classmethod
    def _unknown(cls, name: str) -> str:
        nearest = difflib.get_close_matches(name, [*cls.model_fields, *cls.unsupported, *cls.harmless], n=1)
        return "unknown field." + (f" Did you mean {nearest[0]!r}?" if nearest else "")


def _not_supported(neutral: tuple[Any, ...]) -> str:
    return "this server does not support it." + (f" Leave it out, or give {neutral[0]!r}." if neutral else "")


def refused(name: str, message: str) -> PydanticCustomError:
    """The error of a validator that says which field is at fault."""
    return PydanticCustomError("field", "{message}", {"message": message, "param": name})
