"""Finds uses of a weight in the syntax of one function, by the attributes that lead to it from a variable.

A variable stands for all that is assigned to it anywhere in the function: more is followed than can happen, never less.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from leanvocab.reads.function_source import Syntax
from leanvocab.reads.tensor_questions import ATTRIBUTES, METHODS

Path = tuple[str, ...]  # a variable, then attributes; ANY for an element, "get_x()" for what such a method gives
ANY = "*"
_LONGEST, _MOST = 8, 64  # attributes in a path that is followed, and paths that one variable may stand for

# What asks about a weight and reads none of its rows.
_HARMLESS = ATTRIBUTES | METHODS | {"data_ptr", "requires_grad", "requires_grad_"}
# Methods, and functions by their last name, that read rows by their ids.
_ROW_READERS = {"embedding", "index_select"}
_HARMLESS_FUNCTIONS = {"isinstance", "hasattr", "id", "type", "len", "callable"}
_REGISTERS = {"_parameters", "_modules"}
_JUMPS = ast.Return | ast.Raise | ast.Continue | ast.Break
_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef


@dataclass(frozen=True)
class Use:
    """A use of the weight of what `path` leads to, or of the module itself where it is handed to code elsewhere."""

    path: Path
    asks: str  # the attribute of the weight that is used; "" where it is passed on
    is_certain: bool  # True where the function always comes there
    is_of_weight: bool = True
    is_of_rows: bool = False  # True where it may be a read of rows by their ids, which has an answer


class _TooTangledError(Exception):
    """A variable that stands for too many things to follow them all."""


def uses_in(syntax: Syntax) -> list[Use] | None:
    """The uses in a function; None where they cannot be followed."""
    try:
        finder = _Finder(syntax)
    except _TooTangledError:
        return None
    finder.visit_block(syntax.body if isinstance(syntax.body, list) else [syntax.body], True)
    return list(dict.fromkeys(finder.uses))


class _Finder:
    def __init__(self, syntax: Syntax):
        arguments = [*syntax.args.posonlyargs, *syntax.args.args]
        self.own = arguments[0].arg if arguments else ""
        self.uses: list[Use] = []
        self.shared = {name for node in ast.walk(syntax) for name in _shared_names(node)}
        self.bound: defaultdict[str, list[ast.AST]] = defaultdict(list)
        self.aliases: defaultdict[str, set[Path]] = defaultdict(set)
        bindings = [binding for node in ast.walk(syntax) for binding in _bindings(node)]
        for name, value, is_element in bindings:
            self.bound[name] += [value, value] if is_element else [value]
        size = -1
        while size != (size := sum(map(len, self.aliases.values()))):
            for name, value, is_element in bindings:
                self.aliases[name] |= self.elements(value) if is_element else self.paths(value)
                if len(self.aliases[name]) > _MOST:
                    raise _TooTangledError(name)

    # --- paths --------------------------------------------------------------------------------------------------------

    def paths(self, node: ast.AST) -> set[Path]:
        """The paths that an expression may stand for; none where it computes something new."""
        match node:
            case ast.Name(id=name):
                return self.aliases[name] | {(name,)}
            case ast.Attribute(value=owner, attr=name) if name in _REGISTERS:
                return self.paths(owner)
            case ast.Attribute(value=owner, attr=name):
                return self._below(owner, name)
            case ast.Call(func=ast.Name("getattr"), args=[owner, ast.Constant(str(name)), *_]):
                return self._below(owner, name)
            case ast.Subscript(value=ast.Attribute(attr=register) as owner, slice=ast.Constant(str(name))):
                return self._below(owner, name if register in _REGISTERS else ANY)
            case ast.Subscript(value=owner):
                return self._below(owner, ANY)
            case ast.Call(func=ast.Name("super")):
                return {(self.own,)}
            case ast.Call(func=ast.Attribute(value=owner, attr=method), args=[ast.Constant(str(name))]) if method in (
                "get_submodule", "get_parameter",
            ):  # fmt: skip
                return self._below(owner, *name.split("."))
            case ast.Call(func=ast.Attribute(value=owner, attr=name)) if name.startswith("get_"):
                return self._below(owner, f"{name}()")
            case ast.IfExp(body=first, orelse=second):
                return self.paths(first) | self.paths(second)
            case ast.BoolOp(values=values):
                return set().union(*map(self.paths, values))
            case ast.NamedExpr(value=value) | ast.Starred(value=value):
                return self.paths(value)
        return set()

    def _below(self, owner: ast.AST, *names: str) -> set[Path]:
        return {path + names for path in self.paths(owner) if len(path) < _LONGEST and path[-2:] != (ANY, ANY)}

    def elements(self, node: ast.AST) -> set[Path]:
        """The paths that the elements of an expression may stand for."""
        match node:
            case ast.Tuple(elts=values) | ast.List(elts=values) | ast.Set(elts=values):
                each = (
                    self.elements(value.value) if isinstance(value, ast.Starred) else self.paths(value)
                    for value in values
                )
                return set().union(*each)
            case ast.Call(func=function, args=arguments):
                inside = [function.value] if isinstance(function, ast.Attribute) else []
                return set().union(*map(self.elements, [*inside, *arguments]))
        return self._below(node, ANY)

    def weights(self, node: ast.AST) -> list[Path]:
        """The paths to the modules whose weight an expression may stand for."""
        return [path[:-1] for path in self.paths(node) if path[-1] == "weight" and len(path) > 1]

    def is_sure(self, node: ast.AST, left: int = _LONGEST) -> bool:
        """True where an expression stands for one thing alone."""
        while isinstance(node, ast.Attribute | ast.NamedExpr):
            node = node.value
        values = self.bound.get(node.id, []) if isinstance(node, ast.Name) else [node, node]
        return not values or (len(values) == 1 and left > 0 and self.is_sure(values[0], left - 1))

    # --- uses ---------------------------------------------------------------------------------------------------------

    def visit_block(self, body: Iterable[ast.AST], certain: bool) -> None:
        for statement in body:
            self.visit(statement, certain)
            if isinstance(statement, _JUMPS):
                return
            certain = certain and not _may_return(statement)

    def visit_all(self, nodes: Iterable[ast.AST], certain: bool, goes_on: bool = True) -> None:
        for node in nodes:
            self.visit(node, certain, goes_on)

    def visit(self, node: ast.AST, certain: bool, goes_on: bool = True) -> None:
        """Notes the uses in a node; where its own value goes on, to code elsewhere, that is one as well."""
        is_stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        paths = self.paths(node)
        if goes_on and not is_stored:
            self._note_weight(node, "", certain)
            handed_on = [path for path in paths if path[-1] != "weight" and len(path) > 1]
            self.uses += [Use(path, "", False, is_of_weight=False) for path in handed_on]
        match node:
            case ast.Attribute(value=owner, attr=name):
                if name not in _HARMLESS and not is_stored:
                    self._note_weight(owner, name, certain)
                self.visit(owner, certain, goes_on=False)
            case ast.Subscript(value=owner, slice=index):
                self._note_weight(owner, "", certain, is_of_rows=_may_be_ids(index))
                self.visit(owner, certain, goes_on=False)
                self.visit(index, certain)
            case ast.Starred(value=value) | ast.NamedExpr(value=value):
                self.visit(value, certain, goes_on and not paths)
            case ast.Call(func=function, args=arguments):
                self.visit(function, certain, goes_on=False)
                is_harmless = bool(paths) or (isinstance(function, ast.Name) and function.id in _HARMLESS_FUNCTIONS)
                if getattr(function, "attr", getattr(function, "id", "")) in _ROW_READERS:
                    self._visit_row_reader([*arguments, *(keyword.value for keyword in node.keywords)], certain)
                    return
                self.visit_all(arguments, certain, not is_harmless)
                self.visit_all(node.keywords, certain)
            case ast.BoolOp(values=values):
                self.visit(values[0], certain, goes_on and not paths)
                self.visit_all(values[1:], False, goes_on and not paths)
            case ast.IfExp(test=test, body=first, orelse=second):
                self._ask(test, certain)
                self.visit_all([first, second], False, goes_on and not paths)
            case _:
                self._visit_statement(node, certain)

    def _visit_statement(self, node: ast.AST, certain: bool) -> None:
        match node:
            case ast.Compare(ops=ops) if all(isinstance(each, ast.Is | ast.IsNot) for each in ops):
                self.visit_all([node.left, *node.comparators], certain, goes_on=False)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self._ask(operand, certain)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)) if (
                name not in self.shared
            ):
                self.visit_all([node.value] if node.value else [], certain, goes_on=False)
            case ast.AugAssign(target=target):
                self._note_weight(target, "", certain)
                self.visit_all([target, node.value], certain)
            case (
                ast.If(test=head)
                | ast.While(test=head)
                | ast.Assert(test=head)
                | ast.For(iter=head)
                | ast.AsyncFor(iter=head)
            ):
                self._ask(head, certain)
                self.visit_all((each for each in ast.iter_child_nodes(node) if each is not head), False)
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                first, *others = node.generators
                self._ask(first.iter, certain)
                computed = [each for each in ast.iter_child_nodes(node) if not isinstance(each, ast.comprehension)]
                self.visit_all([*first.ifs, *others, *computed], False)
            case ast.comprehension(iter=head, ifs=conditions):
                self._ask(head, certain)
                self.visit_all(conditions, certain)
            case ast.With(items=items, body=body) | ast.AsyncWith(items=items, body=body):
                self.visit_all(items, certain)
                self.visit_block(body, certain)
            case ast.Match(subject=subject, cases=cases):
                self.visit(subject, certain)
                self.visit_all(cases, False)
            case ast.Try() | ast.TryStar() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() | ast.ClassDef():
                self.visit_all(ast.iter_child_nodes(node), False)
            case _:
                self.visit_all(ast.iter_child_nodes(node), certain)

    def _visit_row_reader(self, arguments: list[ast.expr], certain: bool) -> None:
        for node in arguments:
            weights = self.weights(node)
            self.uses += [Use(path, "", certain and self.is_sure(node), is_of_rows=True) for path in weights]
            self.visit(node, certain, goes_on=not weights)

    def _ask(self, node: ast.AST, certain: bool) -> None:
        """Visits a condition or the head of a loop, which read a weight, and only ask about a module."""
        self.visit(node, certain, goes_on=bool(self.weights(node)))

    def _note_weight(self, node: ast.AST, asks: str, certain: bool, is_of_rows: bool = False) -> None:
        of_rows = is_of_rows or asks in _ROW_READERS
        self.uses += [
            Use(path, asks, certain and self.is_sure(node), is_of_rows=of_rows) for path in self.weights(node)
        ]


def _may_be_ids(index: ast.AST) -> bool:
    """True where an index may begin with an id or a tensor of them: no slice, no new axis, no ellipsis."""
    head = index.elts[0] if isinstance(index, ast.Tuple) and index.elts else index
    return not isinstance(head, ast.Slice | ast.Compare) and not (
        isinstance(head, ast.Constant) and type(head.value) is not int
    )


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.AST, bool]]:
    """The variables that a node assigns to, with the expression, and True where they get elements of it."""
    match node:
        case ast.Assign(targets=targets, value=value):
            is_loop = False
        case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
            targets, is_loop = [target], False
        case (
            ast.For(target=target, iter=value)
            | ast.AsyncFor(target=target, iter=value)
            | ast.comprehension(target=target, iter=value)
        ):
            targets, is_loop = [target], True
        case _:
            return
    for target in targets:
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                yield name.id, value, is_loop or name is not target


def _shared_names(node: ast.AST) -> list[str]:
    """The variables of a function that code outside it sees as well."""
    match node:
        case ast.Global(names=names) | ast.Nonlocal(names=names):
            return names
        case ast.ClassDef(body=body):
            return [name for statement in body for name, _, _ in _bindings(statement)]
    return []


def _may_return(node: ast.AST) -> bool:
    inside = ast.iter_child_nodes(node)
    return isinstance(node, ast.Return) or (not isinstance(node, _SCOPES) and any(map(_may_return, inside)))
