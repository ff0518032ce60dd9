"""What attention modules do with the keys and values that a cache returns, read from their source.

Attention on codes replaces the attention function and nothing else. It is right for a module that
hands what `Cache.update` returned to that function and to no one else, with no argument that
changes its mathematics. Whether a module does is written in its `forward`; what is not understood
counts as "no", so that a layer is dequantized rather than wrong.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

from torch import nn

# What the attention function understands, or what changes nothing about it: whoever passes more
# expects mathematics that it does not do (position biases, selected tokens).
UNDERSTOOD = frozenset(
    {
        *("query", "key", "value", "attention_mask", "dropout", "scaling", "softcap", "s_aux"),
        *("sliding_window", "is_causal", "output_attentions", "position_ids", "deterministic"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "use_cache"),
    }
)


def untouched_layers(model: nn.Module, count: int) -> set[int]:
    """Layers whose cached keys and values reach the attention function as the cache returned them.

    Args:
        model: A decoder.
        count: Layers of its cache.

    Returns:
        Their numbers, all below `count`.
    """
    untouched: set[int] = set()
    touched: set[int] = set()
    for module in model.modules():
        cls: Any = type(module)  # hashable, which a module's own type hints hide
        for call in _cached_calls(cls):
            index = getattr(module, "layer_idx", None) if call.own_layer else None
            layers = range(count) if not isinstance(index, int) else (index,)
            (untouched if call.hands_on(module) else touched).update(layers)
    return (untouched - touched) & set(range(count))


class _CachedCall:
    """A function of a module that updates a cache."""

    def __init__(self, function: ast.FunctionDef, update: ast.Call) -> None:
        self.function = function
        self.update = update
        self.own_layer = _layer_number(update) == "self.layer_idx"

    def hands_on(self, module: nn.Module) -> bool:
        """Whether what the update returns goes to the attention function and nowhere else."""
        names = self._results()
        if names is None:
            return False
        alive = list(_alive(self.function, module))
        functions = {name for node in alive for name in _attention_functions(node)}
        calls = [x for x in alive if isinstance(x, ast.Call) and _name(x.func) in functions]
        taken = {id(x) for call in calls for x in _keys_and_values(call, names)}
        understood = all(k.arg is None or k.arg in UNDERSTOOD for c in calls for k in c.keywords)
        read = [
            node
            for node in alive
            if isinstance(node, ast.Name)
            and node.id in names
            and isinstance(node.ctx, ast.Load)
            and _position(node) > _position(self.update, end=True)
        ]
        return bool(calls) and understood and all(id(node) in taken for node in read)

    def _results(self) -> tuple[str, str] | None:
        """The names of the keys and of the values that the update returns."""
        for node in ast.walk(self.function):
            if isinstance(node, ast.Assign) and node.value is self.update:
                target = node.targets[0]
                names = [_name(x) for x in target.elts] if isinstance(target, ast.Tuple) else []
                if len(node.targets) == 1 and len(names) == 2 and names[0] and names[1]:
                    return names[0], names[1]
        return None


def methods(cls: type[nn.Module]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The methods of a module's class, without those of all modules, and the names each reads."""
    for name, member in inspect.getmembers(cls, inspect.isfunction):
        if member is not getattr(nn.Module, name, None):
            method = inspect.unwrap(member)
            yield method, getattr(getattr(method, "__code__", None), "co_names", ())


@functools.cache
def _cached_calls(cls: Any) -> tuple[_CachedCall, ...]:
    """Every update of a cache by keys, values and a layer's number in the methods of `cls`."""
    found = []
    for method, names in methods(cls):
        # Reading the source of a method is slow, so what cannot matter is left out before.
        if "update" not in names:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            continue
        function = tree.body[0]
        if isinstance(function, ast.FunctionDef):
            calls = [node for node in ast.walk(function) if _updates_cache(node)]
            found += [_CachedCall(function, call) for call in calls]
    return tuple(found)


def _updates_cache(node: ast.AST) -> TypeGuard[ast.Call]:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "update"
        and "layer" in _layer_number(node)
    )


def _layer_number(update: ast.Call) -> str:
    """What an update is given as the layer's number, the third argument of `Cache.update`."""
    given = [*update.args[2:3], *(k.value for k in update.keywords if k.arg == "layer_idx")]
    return ast.unparse(given[0]) if given else ""


def _attention_functions(node: ast.AST) -> Iterator[str]:
    """Names that `node` gives to what transformers' table of attention functions holds."""
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        if "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from filter(None, map(_name, targets))


def _keys_and_values(call: ast.Call, names: tuple[str, str]) -> Iterator[ast.AST]:
    """The arguments of an attention function that are the cached keys and values, if in place."""
    given = dict(zip(("module", "query", "key", "value"), call.args, strict=False))
    given |= {k.arg: k.value for k in call.keywords if k.arg}
    for place, name in zip(("key", "value"), names, strict=True):
        if place in given and _name(given[place]) == name:
            yield given[place]


def _alive(node: ast.AST, module: nn.Module) -> Iterator[ast.AST]:
    """`node` and every node below it, but for branches that `module` never takes."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If | ast.IfExp):
        truth = _truth(node.test, module)
        branches: list[Any] = [
            *([node.body] if truth is not False else []),
            *([node.orelse] if truth is not True else []),
        ]
        children = [node.test]
        for branch in branches:
            children += branch if isinstance(branch, list) else [branch]
    for child in children:
        yield from _alive(child, module)


def _truth(test: ast.expr, module: nn.Module) -> bool | None:
    """What a condition on the module's own settings is; None if it depends on the call."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            truth = _truth(operand, module)
            return None if truth is None else not truth
        case ast.BoolOp(op=operator, values=values):
            settles = isinstance(operator, ast.Or)
            truths = [_truth(value, module) for value in values]
            if settles in truths:
                return settles
            return None if None in truths else not settles
        case ast.Attribute():
            value = _setting(test, module)
            return bool(value) if isinstance(value, bool | int | str | type(None)) else None
    return None


def _setting(node: ast.expr, module: nn.Module) -> Any:
    """The value of `self.a.b`; an object that is no setting if it cannot be read."""
    path = ast.unparse(node).split(".")
    if path[0] != "self":
        return NotImplemented
    value: Any = module
    for name in path[1:]:
        value = getattr(value, name, NotImplemented)
    return value


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _position(node: ast.expr, end: bool = False) -> tuple[int, int]:
    if end:
        return node.end_lineno or 0, node.end_col_offset or 0
    return node.lineno, node.col_offset
