"""Choosing rows of an index by an expression such as `luma > 20 and not is_hdr and 0.5 <= aspect <= 2`."""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

NUMBERS = (
    *("size", "frames", "duration_seconds", "width", "height", "bit_depth", "fps", "aspect"),
    *("luma", "sharpness", "motion"),
)
FLAGS = ("is_image", "has_audio", "is_variable_rate", "is_hdr", "seekable")
_GRAMMAR = "comparisons (< <= > >= == !=) of columns and numbers, joined by and, or, not and brackets"
_MAX_CHARACTERS = 2000
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class Columns(Protocol):
    """What a filter needs of an index."""

    @property
    def folder(self) -> Path: ...

    def __len__(self) -> int: ...

    def column(self, name: str) -> np.ndarray: ...


def select_rows(index: Columns, expression: str, *, field: str = "data.filter") -> np.ndarray:
    """The rows, int64 and ascending, for which the expression holds; an empty expression takes all.

    Columns are `NUMBERS` (fps and aspect, which is width / height, are computed) and `FLAGS`, which stand alone. Raises ValueError,
    which names `field`, for anything else and for a column that was not measured.
    """
    if not expression.strip():
        return np.arange(len(index), dtype=np.int64)
    where = f"{field}={expression!r}"
    if len(expression) > _MAX_CHARACTERS:
        raise ValueError(f"{field} has {len(expression)} characters, more than {_MAX_CHARACTERS}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        mask = _Evaluation(index, where).truth(tree.body)
    except (SyntaxError, RecursionError, MemoryError, OverflowError) as error:
        reason = {SyntaxError: "it cannot be parsed", OverflowError: "a number is too large"}.get(
            type(error), "it is nested too deeply"
        )
        raise ValueError(f"{where} is no filter ({reason}): write {_GRAMMAR}") from error
    return np.flatnonzero(mask).astype(np.int64)


def expression_fault(expression: str, *, field: str = "data.filter") -> str | None:
    """What is wrong with an expression whatever the index, as a message that names `field`; None if nothing is."""
    try:
        select_rows(_NoRows(), expression, field=field)
    except ValueError as error:
        return str(error)
    return None


class _NoRows:
    folder = Path()

    def __len__(self) -> int:
        return 0

    def column(self, name: str) -> np.ndarray:
        return np.zeros(0, dtype=bool if name in FLAGS else float)


class _Evaluation:
    # Walks over the parsed expression; only the nodes named here have a meaning, and nothing is ever run as code.
    def __init__(self, index: Columns, where: str) -> None:
        self._index = index
        self._where = where

    def truth(self, node: ast.expr) -> np.ndarray:
        match node:
            case ast.BoolOp(op=ast.And(), values=values):
                return np.logical_and.reduce([self.truth(value) for value in values])
            case ast.BoolOp(op=ast.Or(), values=values):
                return np.logical_or.reduce([self.truth(value) for value in values])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.truth(operand)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                numbers = [self.number(value) for value in (left, *comparators)]
                if any(type(op) not in _COMPARISONS for op in ops):
                    raise self._fault(node)
                pairs = zip(ops, numbers, numbers[1:])
                held = np.logical_and.reduce([_COMPARISONS[type(op)](a, b) for op, a, b in pairs])
                return np.broadcast_to(held, len(self._index))
            case ast.Name(id=name) if name in FLAGS:
                return self._index.column(name)
            case ast.Name(id=name) if name in NUMBERS:
                raise ValueError(f"{self._where}: {name} is a number; compare it with another")
            case ast.Name(id=name):
                raise self._unknown(name)
        raise self._fault(node)

    def number(self, node: ast.expr) -> np.ndarray | float:
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return float(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -float(value)
            case ast.Name(id=name) if name in NUMBERS:
                return self._column(name)
            case ast.Name(id=name) if name in FLAGS:
                raise ValueError(f"{self._where}: {name} is true or false; write `{name}` or `not {name}`")
            case ast.Name(id=name):
                raise self._unknown(name)
        raise self._fault(node)

    def _column(self, name: str) -> np.ndarray:
        if name == "fps":
            return self._index.column("fps_numerator") / self._index.column("fps_denominator")
        if name == "aspect":
            return self._index.column("width") / self._index.column("height")
        values = self._index.column(name)
        if missing := int(np.isnan(values).sum()) if values.dtype.kind == "f" else 0:
            raise ValueError(
                f"{self._where}: {name} was not measured for {missing} of {len(values)} clips of {self._index.folder}; "
                f"measure it with --quality (muybridge prepare or muybridge index)"
            )
        return values

    def _fault(self, node: ast.expr) -> ValueError:
        return ValueError(f"{self._where}: `{ast.unparse(node)[:80]}` is not allowed: write {_GRAMMAR}")

    def _unknown(self, name: str) -> ValueError:
        near = difflib.get_close_matches(name, [*NUMBERS, *FLAGS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"columns are {', '.join([*NUMBERS, *FLAGS])}"
        return ValueError(f"{self._where}: there is no column {name}; {hint}")
