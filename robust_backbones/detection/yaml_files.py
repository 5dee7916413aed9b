"""Detectron2's YAML files, read without running code or accessing the network."""

from __future__ import annotations

import ast
import copy
import functools
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from robust_backbones.configs import StrictLoader

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's settings merged over those of its ``_BASE_``, one or several files, with paths relative to it.

    Raises:
        ValueError: it has no settings; or a ``_BASE_`` is not a file, is missing, or leads back to itself.
        yaml.YAMLError: it is not YAML, or asks for code.
    """
    path = path.resolve()
    if path in above:
        raise ValueError(f"_BASE_ of {above[-1].name} leads in a circle, to {path.name}")
    content = copy.deepcopy(_parsed(path.read_text()))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no settings")
    bases = content.pop("_BASE_", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str) or "://" in base:
            raise ValueError(f"_BASE_ of {path.name} is {base!r}: give a file")
        file = path.parent / Path(base).expanduser()
        if not file.is_file():
            raise ValueError(f"_BASE_ of {path.name} is {base}, and there is no {file}")
        _merge(read_yaml(file, (*above, path)), merged)
    _merge(content, merged)
    return merged


@functools.lru_cache(maxsize=64)  # most files share a few bases, and a study reads each of them for every run
def _parsed(text: str) -> Any:
    return yaml.load(text, _Loader)


def _merge(own: Mapping[str, Any], settings: dict[str, Any]) -> None:
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(held := settings.get(key, {}), dict):
            settings[key] = held
            _merge(value, held)
        else:
            settings[key] = value


class _Loader(StrictLoader):
    """YAML, and the only kind of expression for which Detectron2's files need ``eval``: lists of anchor sizes."""


def _expression(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> Any:
    try:
        (text,) = loader.construct_sequence(node)
        return _value(ast.parse(text, mode="eval").body, {})
    except (ValueError, TypeError, SyntaxError, ArithmeticError) as error:
        raise yaml.YAMLError(f"an expression is read only if it is arithmetic on numbers and lists ({error})") from None


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _expression)


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression of numbers, lists, ``+ - * / **`` and unnested ``[... for x in ...]``."""
    match node:
        case ast.Constant(value=int() | float()):
            return node.value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, names) for item in items]
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, exponent = float(_value(left, names)), float(_value(right, names))
            return base**exponent
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            one, other = _value(left, names), _value(right, names)
            if isinstance(one, int | float) and isinstance(other, int | float):
                return _OPERATORS[type(op)](one, other)
        case ast.ListComp(elt=element, generators=[ast.comprehension(target=ast.Name(id=name), iter=source, ifs=[])]):
            if not names:
                return [_value(element, {name: value}) for value in _value(source, {})]
    raise ValueError(f"not {ast.unparse(node)[:60]}")
