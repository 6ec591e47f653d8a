"""An expression over a data set's columns: which rows to take."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from latent_ae.errors import UserError

__all__ = ["RowFilter"]

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "len": len,
    "lower": str.lower,
    "min": min,
    "max": max,
}


class RowFilter:
    """A condition such as `score > 5 and label in (1, 2) and "cat" in lower(caption)`.

    Python's own grammar, of which comparisons, `and`, `or`, `not`, arithmetic, numbers, words,
    tuples, `json["key"]` and the functions len, lower, min and max are taken, and nothing else: no
    attribute is read and nothing else called. A comparison with a missing value is false, as in
    SQL; `x is None` asks for one.

    Raises:
        UserError: it is no such expression.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        try:
            self._tree = ast.parse(expression, mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise UserError(f"the filter {expression!r} cannot be read: {error}") from error
        called = {id(n.func) for n in ast.walk(self._tree) if isinstance(n, ast.Call)}
        names = (n for n in ast.walk(self._tree) if isinstance(n, ast.Name))
        self.columns = sorted({n.id for n in names if id(n) not in called})
        self._check(self._tree)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether to take a row; raises `UserError` where its values do not fit the expression."""
        try:
            return bool(self._value(self._tree, row))
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            values = ", ".join(f"{name} = {row[name]!r}" for name in self.columns)
            raise UserError(f"the filter {self.expression!r} fails at {values}: {error}") from error

    def require_columns(self, known: Mapping[str, Any] | list[str]) -> None:
        """Raises `UserError` unless every column that it names is there."""
        if missing := [name for name in self.columns if name not in known]:
            raise UserError(
                f"the filter {self.expression!r} names {missing[0]!r}, which is no column of the "
                f"data; its columns: {', '.join(known)}"
            )

    def _check(self, node: ast.AST) -> None:
        allowed = (ast.BoolOp, ast.UnaryOp, ast.Compare, ast.BinOp, ast.Constant, ast.Name)
        if isinstance(node, ast.Call):
            known = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
            if not known or node.keywords:
                raise self._refusal(node)
            parts: list[ast.AST] = list(node.args)
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            parts = list(node.elts)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            parts = [node.value]
        elif isinstance(node, allowed):
            operators = (ast.boolop, ast.unaryop, ast.cmpop, ast.operator, ast.expr_context)
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.operator) and type(child) not in _ARITHMETIC:
                    raise self._refusal(node)
                if isinstance(child, ast.Invert):
                    raise self._refusal(node)
            parts = [c for c in ast.iter_child_nodes(node) if not isinstance(c, operators)]
        else:
            raise self._refusal(node)
        for part in parts:
            self._check(part)

    def _refusal(self, node: ast.AST) -> UserError:
        return UserError(
            f"the filter {self.expression!r} has {ast.unparse(node)!r}, which is not taken: only "
            f"comparisons, and, or, not, arithmetic, {', '.join(_FUNCTIONS)}"
        )

    def _value(self, node: ast.expr, row: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return row[node.id]
            case ast.Tuple() | ast.List() | ast.Set():
                return [self._value(item, row) for item in node.elts]
            case ast.Subscript(slice=ast.Constant(value=key)):
                return (self._value(node.value, row) or {}).get(key)
        return self._operation(node, row)

    def _operation(self, node: ast.expr, row: Mapping[str, Any]) -> Any:
        match node:
            case ast.UnaryOp(op=ast.Not()):
                return not self._value(node.operand, row)
            case ast.UnaryOp(op=ast.USub()):
                return _or_missing(operator.neg, self._value(node.operand, row))
            case ast.UnaryOp():
                return self._value(node.operand, row)
            case ast.BoolOp(op=ast.And()):
                return all(self._value(value, row) for value in node.values)
            case ast.BoolOp():
                return any(self._value(value, row) for value in node.values)
            case ast.BinOp():
                sides = self._value(node.left, row), self._value(node.right, row)
                return _or_missing(_ARITHMETIC[type(node.op)], *sides)
            case ast.Call(func=ast.Name(id=name)):
                return _or_missing(_FUNCTIONS[name], *(self._value(a, row) for a in node.args))
            case ast.Compare():
                return self._compare(node, row)
        raise self._refusal(node)

    def _compare(self, node: ast.Compare, row: Mapping[str, Any]) -> bool:
        left = self._value(node.left, row)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self._value(right_node, row)
            asks_for_it = isinstance(op, ast.Is | ast.IsNot)
            if not asks_for_it and (left is None or right is None):
                return False
            if not _COMPARE[type(op)](left, right):
                return False
            left = right
        return True


def _or_missing(function: Callable[..., Any], *values: Any) -> Any:
    return None if any(value is None for value in values) else function(*values)
