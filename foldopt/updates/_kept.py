"""A result computed from tensors, kept for as long as these are unchanged."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from foldopt._compat import version

__all__ = ["Kept"]


class Kept(NamedTuple):
    """A result, and the tensors with their versions from which it was computed."""

    found: Any
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, found: Any, *tensors: Tensor) -> Kept | None:
        """Keep a result of these tensors; None for inference tensors, which have no version."""
        if any(t.is_inference() for t in tensors):
            return None
        return cls(found, tuple(t.detach() for t in tensors), tuple(version(t) for t in tensors))

    def suits(self, *tensors: Tensor) -> bool:
        """Return whether these tensors share the same memory, not written to since."""
        return len(tensors) == len(self.tensors) and all(
            not t.is_inference()
            and (t.data_ptr(), version(t), t.dtype, t.shape, t.stride())
            == (own.data_ptr(), written, own.dtype, own.shape, own.stride())
            for t, own, written in zip(tensors, self.tensors, self.versions, strict=True)
        )
