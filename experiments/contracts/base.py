"""The base of all contracts: optional members, and clear errors for missing ones."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, get_type_hints

from foldopt.errors import FoldoptError


class ContractError(FoldoptError, TypeError):
    """A class lacks a member that the harness needs, or a member returns a wrong value; the message names both."""


class Contract:
    """Base of `Problem`, `Task` and `Backend`.

    ABSENT: the optional members, each with a clause for error messages that says what a class without it lacks.
    lacking: a class may give more precise clauses here, with the reason why it leaves a member out.
    """

    ABSENT: ClassVar[Mapping[str, str]] = {}
    lacking: ClassVar[Mapping[str, str]] = {}

    def lacks(self, *members: str) -> str | None:
        """Return the clause of the first of these optional members that is missing; None if none is."""
        for name in members:
            if name not in vars(self) and "ABSENT" in vars(_definer(type(self), name)):
                return self.lacking.get(name, self.ABSENT[name])
        return None

    def _absent(self, member: str) -> NoReturn:
        """Raise ContractError because an optional member that is missing was called."""
        raise ContractError(f"{dotted(type(self))} has no {member}: {self.lacking.get(member, self.ABSENT[member])}.")


def _definer(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in vars(base))


def dotted(cls: Any) -> str:
    """Return the dotted path of a class or function."""
    return f"{cls.__module__}.{cls.__qualname__}"


def require_contract(cls: Any, contract: type[Contract], group: str) -> None:
    """Raise ContractError unless `cls` is a subclass of the contract and defines all its required methods."""
    if not (isinstance(cls, type) and issubclass(cls, contract)):
        raise ContractError(
            f"{group}: {dotted(cls)} is no {contract.__name__}; derive it from {dotted(contract)}, which describes "
            "each member."
        )
    for name, _ in inspect.getmembers(cls, _is_abstract):
        member = getattr(contract, name)
        first = (inspect.getdoc(member) or "").partition("\n")[0]
        raise ContractError(
            f"{group}: {dotted(cls)} has no method {name}{_signature(member)}; add it. What it has to do: {first}"
        )


def require_attributes(value: Contract, contract: type[Contract], group: str) -> None:
    """Raise ContractError unless an object has every attribute that its contract declares without a default."""
    for name in get_type_hints(contract):
        if not hasattr(value, name):
            raise ContractError(
                f"{group}: {dotted(type(value))} does not set {name}; set it in __init__ or in the class. "
                f"{dotted(contract)} says what it is."
            )


def _is_abstract(member: Any) -> bool:
    return bool(getattr(member, "__isabstractmethod__", False))


def _signature(member: Any) -> str:
    names = [name for name in inspect.signature(member).parameters if name != "self"]
    return f"({', '.join(names)})"
