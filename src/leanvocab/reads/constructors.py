"""Constructors of transformers' models, read: which modules and tensors a config gives, by kind and name, with nothing imported.

A small interpreter of `__init__`: modules and their tensors are what it keeps, configs are what it computes with. Whatever it
does not know for certain ends in `Unsure`, never in a guess: who asks then builds the model
(docs/decisions/estimates-from-headers.md).
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from leanvocab.reads.transformers_text import UNKNOWN, ClassText, Config, Unsure, class_of, resolve, room_of


@dataclass(eq=False)
class Leaf:
    """A parameter or a buffer; `shape` is None where the text does not say it."""

    shape: tuple[Any, ...] | None = None
    is_buffer: bool = False
    is_saved: bool = True
    trains: bool = True


@dataclass(eq=False)
class Module:
    """A module: what hangs on it, be it modules, tensors or values, and the class of torch that it is of, such as `nn.Linear`."""

    kind: str = ""
    source: ClassText | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    def named_modules(self, path: str = "") -> Iterator[tuple[str, "Module"]]:
        """Paths and modules, itself first. A module that hangs in two positions comes twice."""
        yield path, self
        for name, value in self.attributes.items():
            if isinstance(value, Module):
                yield from value.named_modules(f"{path}.{name}" if path else name)

    def at(self, path: str) -> Any:
        """What hangs at a path; None where nothing does, UNKNOWN below what is not known."""
        value: Any = self
        for name in path.split("."):
            if value is UNKNOWN:
                return UNKNOWN
            value = value.attributes.get(name) if isinstance(value, Module) else None
        return value


def construct(model_type: str, auto_class: str, content: Mapping[str, Any]) -> Module:
    """What the constructor of the class makes that an auto class finds for a config.

    Raises:
        Unsure: there is no such class in the transformers that is installed, or only running it tells.
    """
    try:
        made: Module = _make(ClassText(class_of(auto_class, model_type), room_of(model_type)), [Config(content)], {})
    except (RecursionError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise Unsure(f"{type(error).__name__}: {error}") from error
    return made


def called(module: Module, method: str) -> Any:
    """What a method of a model returns that takes nothing; None where there is none of that name."""
    if module.source is None or (found := module.source.function(method)) is None:
        return None
    return _Frame(found[0], {"self": module}).returned(found[1].body)


def input_embeddings(model: Module) -> Any:
    """What `get_input_embeddings` gives, by the model's own method or by transformers' rules; None where it gives nothing."""
    if (own := called(model, "get_input_embeddings")) is not None:
        return own
    name = (model.source.value("_input_embed_layer") if model.source else None) or "embed_tokens"
    for path in (name, f"embeddings.{name}", f"model.{name}"):
        if (module := model.at(path)) is not None:
            return module
    for part in ("language_model", model.source.value("base_model_prefix") if model.source else None):
        if isinstance(inner := model.attributes.get(part or ""), Module):
            return input_embeddings(inner)
    return None


def output_embeddings(model: Module) -> Any:
    """What `get_output_embeddings` gives; None where it gives nothing."""
    own = called(model, "get_output_embeddings")
    return own if own is not None else model.attributes.get("lm_head")


# --- constructors -----------------------------------------------------------------------------------------------------

# Of torch: names and shapes of a module's parameters, by its arguments; buffers have a star.
_LINEAR = {"weight": ("out_features", "in_features"), "bias": ("out_features",)}
_NORM = {"weight": ("size",), "bias": ("size",)}
_CONVOLUTION: dict[str, tuple[str, ...] | None] = {"weight": None, "bias": None}
_BATCH_NORM = {**_CONVOLUTION, "running_mean*": None, "running_var*": None, "num_batches_tracked*": ()}
_KINDS: dict[str, tuple[Sequence[str], Mapping[str, Any]]] = {
    "nn.Linear": (("in_features", "out_features", "bias"), _LINEAR),
    "nn.Embedding": (
        ("num_embeddings", "embedding_dim", "padding_idx"),
        {"weight": ("num_embeddings", "embedding_dim")},
    ),
    "nn.LayerNorm": (("size", "eps", "elementwise_affine", "bias"), _NORM),
    "nn.RMSNorm": (("size", "eps", "elementwise_affine"), {"weight": ("size",)}),
    "nn.Conv1d": (("", "", "", "", "", "", "", "bias"), _CONVOLUTION),
    "nn.Conv2d": (("", "", "", "", "", "", "", "bias"), _CONVOLUTION),
    "nn.Conv3d": (("", "", "", "", "", "", "", "bias"), _CONVOLUTION),
    "nn.BatchNorm1d": ((), _BATCH_NORM),
    "nn.BatchNorm2d": ((), _BATCH_NORM),
    "nn.GroupNorm": (("", "size"), _CONVOLUTION),
}
_WITHOUT_TENSORS = re.compile(
    r"nn\.(Module|Identity|Dropout\w*|ReLU6?|GELU|SiLU|Tanh|Sigmoid|Softmax|LogSoftmax|LeakyReLU|GLU|ELU|Softplus|Hardtanh|Mish"
    r"|(Adaptive)?(Avg|Max)Pool\dd|Unfold|Fold|Upsample|Flatten|(Zero|Constant)Pad\dd|\w+Loss)"
)
_IN_A_LIST = ("nn.ModuleList", "nn.Sequential")
# Methods that a constructor calls and that make no tensors.
_HARMLESS = ("post_init", "init_weights", "tie_weights", "_init_weights", "reset_parameters")


def _make(what: "ClassText | str", given: list[Any], named: dict[str, Any]) -> Any:
    """What a class gives that is called; UNKNOWN where it is none that makes modules."""
    module = Module()
    if isinstance(what, ClassText):
        module.source = what
        _run(what, module, given, named)
        return module
    return module if _torch(what, module, given, named) else UNKNOWN


def _run(cls: "ClassText", module: Module, given: list[Any], named: dict[str, Any]) -> None:
    """Runs the constructor that a class has by itself or from one above it, for a module."""
    for each in cls.above():
        if isinstance(each, str):
            if not _torch(each, module, given, named) and each.endswith("PreTrainedModel"):
                module.attributes["config"] = given[0]
            if each.startswith("nn.") or each.endswith("PreTrainedModel"):
                return
            continue
        own = each.own_function("__init__")
        if own is not None:
            frame = _Frame(each, {"self": module})
            frame.bind(own.args, given, named)
            frame.run(own.body)
            return


def _torch(name: str, module: Module, given: list[Any], named: dict[str, Any]) -> bool:
    """Makes a module what a class of torch makes; False where it is no class that is known."""
    name = name.removeprefix("torch.")
    if name in _IN_A_LIST:
        items = given[0] if given and name == "nn.ModuleList" else given
        if not isinstance(items, list | tuple):
            raise Unsure(f"{name} of what is not known")
        module.attributes |= {str(number): item for number, item in enumerate(items)}
    elif name == "nn.ModuleDict":
        if not isinstance(given[0], dict):
            raise Unsure(f"{name} of what is not known")
        module.attributes |= given[0]
    elif name == "nn.MultiheadAttention":
        dim, projection = given[0] if given else named.get("embed_dim"), Module()
        _torch("nn.Linear", projection, [dim, dim], {})
        both = {"in_proj_weight": Leaf((_times(3, dim), dim)), "in_proj_bias": Leaf((_times(3, dim),))}
        module.attributes |= both | {"out_proj": projection}
    elif name in _KINDS:
        arguments, tensors = _KINDS[name]
        values = dict(zip(arguments, given, strict=False)) | named
        module.attributes |= {size: value for size, value in values.items() if size not in tensors}
        is_bare = values.get("affine") is False or values.get("elementwise_affine") is False
        for tensor, sizes in tensors.items():
            if is_bare or (tensor == "bias" and _is_off(values.get("bias", True))):
                module.attributes[tensor] = None
                continue
            shape = None if sizes is None else tuple(values.get(size, UNKNOWN) for size in sizes)
            shape = shape[0] if shape and isinstance(shape[0], tuple) else shape
            trains = not values.get("_freeze")
            module.attributes[tensor.rstrip("*")] = Leaf(shape, is_buffer=tensor.endswith("*"), trains=trains)
    elif not _WITHOUT_TENSORS.fullmatch(name):
        if name.startswith("nn.") and not name.startswith(("nn.init", "nn.functional")):
            raise Unsure(f"{name} is not known")
        return False
    module.kind = module.kind or name
    return True


def _times(factor: int, size: Any) -> Any:
    return UNKNOWN if size is UNKNOWN else factor * size


def _is_off(value: Any) -> bool:
    if value is UNKNOWN:
        raise Unsure("a bias that is there or not")
    return not value


@dataclass(frozen=True)
class Values:
    """Values of a tensor that was made with a shape."""

    shape: tuple[int, ...]


@dataclass(eq=False)
class _Method:
    """What an attribute of something that is no module is called with."""

    of: Any
    name: str


class _Returned(Exception):  # noqa: N818 (no error: it ends a function)
    """What a function returns."""

    def __init__(self, value: Any) -> None:
        super().__init__("returned")
        self.value = value


class _Frame:
    """One function that is run: the class that it stands in, and its variables."""

    def __init__(self, cls: ClassText, variables: dict[str, Any]) -> None:
        self.cls, self.variables = cls, variables

    def bind(self, arguments: ast.arguments, given: list[Any], named: dict[str, Any]) -> None:
        """Gives the parameters of a function their values."""
        names = [argument.arg for argument in arguments.args][1:]
        defaults = dict(zip(reversed(names), map(self.value, reversed(arguments.defaults)), strict=False))
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            defaults[argument.arg] = UNKNOWN if default is None else self.value(default)
        bound = dict(zip(names, given, strict=False))
        self.variables |= defaults | bound | {n: v for n, v in named.items() if n in names or n in defaults}
        if arguments.vararg:
            self.variables[arguments.vararg.arg] = given[len(names) :]
        if arguments.kwarg:
            self.variables[arguments.kwarg.arg] = {n: v for n, v in named.items() if n not in self.variables}

    # --- statements ---

    def run(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            run = getattr(self, f"_run_{type(statement).__name__}", None)
            if run is not None:
                run(statement)
            elif _makes_something(statement):
                raise Unsure(f"{self.cls.name}: {type(statement).__name__}")

    def returned(self, body: Sequence[ast.stmt]) -> Any:
        """What a function returns."""
        try:
            self.run(body)
        except _Returned as returned:
            return returned.value
        return None

    def _run_Return(self, statement: ast.Return) -> None:  # noqa: N802 (names of ast)
        raise _Returned(None if statement.value is None else self.value(statement.value))

    def _run_Assign(self, statement: ast.Assign) -> None:  # noqa: N802
        value = self.value(statement.value)
        for target in statement.targets:
            self.assign(target, value)

    def _run_AnnAssign(self, statement: ast.AnnAssign) -> None:  # noqa: N802
        if statement.value is not None:
            self.assign(statement.target, self.value(statement.value))

    def _run_AugAssign(self, statement: ast.AugAssign) -> None:  # noqa: N802
        self.assign(
            statement.target,
            self._binary(type(statement.op), self.value(statement.target), self.value(statement.value)),
        )

    def assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.variables[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            values = value if isinstance(value, list | tuple) else [UNKNOWN] * len(target.elts)
            for each, its in zip(target.elts, values, strict=True):
                self.assign(each, its)
        elif isinstance(target, ast.Attribute):
            _set(self.value(target.value), target.attr, value)
        elif isinstance(target, ast.Subscript):
            holder = self.value(target.value)
            if isinstance(holder, Module):
                _set(holder, self.value(target.slice), value)
            elif isinstance(holder, dict | list):
                holder[self.value(target.slice)] = value

    def _run_If(self, statement: ast.If) -> None:  # noqa: N802
        test = self.value(statement.test)
        if test is not UNKNOWN:
            self.run(statement.body if test else statement.orelse)
        elif any(map(_matters, (*statement.body, *statement.orelse))):
            raise Unsure(f"{self.cls.name}: if {ast.unparse(statement.test)}")
        else:
            self._forget([*statement.body, *statement.orelse])

    def _forget(self, body: Sequence[ast.stmt]) -> None:
        """What may have been given another value is not known."""
        for statement in body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                    self.assign(node, UNKNOWN)

    def _run_For(self, statement: ast.For) -> None:  # noqa: N802
        items = self.value(statement.iter)
        if items is UNKNOWN or not isinstance(items, list | tuple | range):
            if any(map(_makes_something, statement.body)):
                raise Unsure(f"{self.cls.name}: for … in {ast.unparse(statement.iter)}")
            return
        for item in items:
            self.assign(statement.target, item)
            self.run(statement.body)

    def _run_With(self, statement: ast.With) -> None:  # noqa: N802
        self.run(statement.body)

    def _run_Expr(self, statement: ast.Expr) -> None:  # noqa: N802
        if isinstance(statement.value, ast.Call):
            self.value(statement.value)

    # --- expressions ---

    def value(self, node: ast.expr) -> Any:
        evaluate = getattr(self, f"_of_{type(node).__name__}", None)
        if evaluate is None:
            if _makes_something(node):
                raise Unsure(f"{self.cls.name}: {ast.unparse(node)}")
            return UNKNOWN
        return evaluate(node)

    def _of_Constant(self, node: ast.Constant) -> Any:  # noqa: N802
        return node.value

    def _of_Name(self, node: ast.Name) -> Any:  # noqa: N802
        if node.id in self.variables:
            return self.variables[node.id]
        known = resolve(node.id, self.cls.room)
        if isinstance(known, ast.expr):
            return UNKNOWN if isinstance(known, ast.Call) else self.value(known)
        return known if isinstance(known, ClassText) or known.startswith("nn.") else UNKNOWN

    def _of_JoinedStr(self, node: ast.JoinedStr) -> Any:  # noqa: N802
        parts = [self.value(part.value if isinstance(part, ast.FormattedValue) else part) for part in node.values]
        return UNKNOWN if UNKNOWN in parts else "".join(map(str, parts))

    def _of_Attribute(self, node: ast.Attribute) -> Any:  # noqa: N802
        if (text := _dotted(node).removeprefix("torch.")).startswith("nn."):
            return text
        holder = self.value(node.value)
        if isinstance(holder, Module):
            if node.attr in holder.attributes:
                return holder.attributes[node.attr]
            if holder.source is not None and (known := holder.source.value(node.attr)) is not None:
                return known
            found = None if holder.source is None else holder.source.function(node.attr)
            is_property = found is not None and "property" in map(ast.unparse, found[1].decorator_list)
            return called(holder, node.attr) if is_property else _Method(holder, node.attr)
        if isinstance(holder, Config):
            return _Method(holder, node.attr) if node.attr == "get_text_config" else holder.field(node.attr)
        return UNKNOWN if holder is UNKNOWN else _Method(holder, node.attr)

    def _of_List(self, node: ast.List) -> Any:  # noqa: N802
        values = list[Any]()
        for each in node.elts:
            if isinstance(each, ast.Starred):
                values += self.value(each.value)
            else:
                values.append(self.value(each))
        return values

    _of_Tuple = _of_List  # noqa: N815

    def _of_Dict(self, node: ast.Dict) -> Any:  # noqa: N802
        if any(key is None for key in node.keys):
            return UNKNOWN
        return {self.value(key): self.value(value) for key, value in zip(node.keys, node.values, strict=True) if key}

    def _of_ListComp(self, node: ast.ListComp) -> Any:  # noqa: N802
        (loop,) = node.generators
        items = self.value(loop.iter)
        if items is UNKNOWN or not isinstance(items, list | tuple | range):
            if _makes_something(node.elt):
                raise Unsure(f"{self.cls.name}: for … in {ast.unparse(loop.iter)}")
            return UNKNOWN
        before, made = dict(self.variables), []
        for item in items:
            self.assign(loop.target, item)
            if all(_known(self.value(test)) for test in loop.ifs):
                made.append(self.value(node.elt))
        self.variables = before
        return made

    _of_GeneratorExp = _of_ListComp  # noqa: N815

    def _of_IfExp(self, node: ast.IfExp) -> Any:  # noqa: N802
        test = self.value(node.test)
        if test is UNKNOWN:
            if _makes_something(node.body) or _makes_something(node.orelse):
                raise Unsure(f"{self.cls.name}: {ast.unparse(node)}")
            return UNKNOWN
        return self.value(node.body if test else node.orelse)

    def _of_BoolOp(self, node: ast.BoolOp) -> Any:  # noqa: N802
        is_and, result, unknown = isinstance(node.op, ast.And), None, False
        for each in node.values:
            result = self.value(each)
            if result is UNKNOWN:
                unknown = True
            elif bool(result) is not is_and:
                return result
        return UNKNOWN if unknown else result

    def _of_UnaryOp(self, node: ast.UnaryOp) -> Any:  # noqa: N802
        value = self.value(node.operand)
        if value is UNKNOWN:
            return UNKNOWN
        return not value if isinstance(node.op, ast.Not) else -value if isinstance(node.op, ast.USub) else UNKNOWN

    def _of_BinOp(self, node: ast.BinOp) -> Any:  # noqa: N802
        return self._binary(type(node.op), self.value(node.left), self.value(node.right))

    def _binary(self, kind: type, left: Any, right: Any) -> Any:
        operation = _OPERATIONS.get(kind)
        plain = (int, float, str, list)
        if operation is None or not isinstance(left, plain) or not isinstance(right, plain):
            return UNKNOWN
        return operation(left, right)

    def _of_Compare(self, node: ast.Compare) -> Any:  # noqa: N802
        left = self.value(node.left)
        for comparison, each in zip(node.ops, node.comparators, strict=True):
            right = self.value(each)
            if left is UNKNOWN or right is UNKNOWN or UNKNOWN in (right if isinstance(right, list) else ()):
                return UNKNOWN
            if not _COMPARISONS[type(comparison)](left, right):
                return False
            left = right
        return True

    def _of_Subscript(self, node: ast.Subscript) -> Any:  # noqa: N802
        holder = self.value(node.value)
        if holder is UNKNOWN or isinstance(holder, ClassText | str | _Method):
            return UNKNOWN
        if isinstance(node.slice, ast.Slice):
            ends = [None if end is None else self.value(end) for end in (node.slice.lower, node.slice.upper)]
            return UNKNOWN if UNKNOWN in ends else holder[ends[0] : ends[1]]
        index = self.value(node.slice)
        if index is UNKNOWN:
            return _alike(list(holder.values())) if isinstance(holder, dict) else UNKNOWN
        return holder.attributes[str(index)] if isinstance(holder, Module) else holder[index]

    def _of_Call(self, node: ast.Call) -> Any:  # noqa: N802
        given = self._of_List(ast.List(elts=node.args))
        named: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self.value(keyword.value)
            named |= {keyword.arg: value} if keyword.arg else value if isinstance(value, dict) else {}
        text = _dotted(node.func)
        if text.startswith("super()."):
            if text == "super().__init__":
                self._run_above(given, named)
            return UNKNOWN
        builtin = node.func.id if isinstance(node.func, ast.Name) and node.func.id not in self.variables else ""
        if builtin in _BUILTINS:
            return _BUILTINS[builtin](*given, **named) if UNKNOWN not in given[:1] else UNKNOWN
        if builtin == "setattr":
            return _set(*given)
        if (
            isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id.startswith("Auto")
        ):
            config = given[0] if given else named.get("config")
            if node.func.attr not in ("from_config", "_from_config") or not isinstance(config, Config):
                return UNKNOWN
            cls = ClassText(class_of(node.func.value.id, config["model_type"]), room_of(config["model_type"]))
            return _make(cls, [config], {})
        if text in ("torch.empty", "torch.zeros", "torch.ones", "torch.randn", "torch.rand"):
            sizes = given[0] if given and isinstance(given[0], list | tuple) else given
            return Values(tuple(sizes)) if all(type(size) is int for size in sizes) else UNKNOWN
        if text == "copy.deepcopy":
            return given[0].copied() if isinstance(given[0], Config) else given[0]
        function = self.value(node.func)
        if isinstance(function, _Method):
            return self._called(function, given, named)
        if isinstance(function, ClassText) and not _is_module(function):
            return UNKNOWN
        if function in ("nn.Parameter", "nn.Buffer"):
            is_saved = bool(named.get("persistent", given[1] if len(given) > 1 else True))
            trains = bool(named.get("requires_grad", True))
            return Leaf(_shape(given), is_buffer=function == "nn.Buffer", is_saved=is_saved, trains=trains)
        return _make(function, given, named) if isinstance(function, ClassText | str) else UNKNOWN

    def _run_above(self, given: list[Any], named: dict[str, Any]) -> None:
        module, above = self.variables["self"], list(module_classes(self.variables["self"], self.cls))
        for position, each in enumerate(above):
            if isinstance(each, str):
                if each.endswith("PreTrainedModel"):
                    module.attributes["config"] = given[0] if given else named["config"]
                    return
                if each.startswith(("nn.", "torch.nn.")):
                    _torch(each, module, given, named)
                    return
                continue
            own = each.own_function("__init__")
            if own is not None:
                del above[: position + 1]
                frame = _Frame(each, {"self": module})
                frame.bind(own.args, given, named)
                frame.run(own.body)
                return

    def _called(self, method: _Method, given: list[Any], named: dict[str, Any]) -> Any:
        holder, name = method.of, method.name
        if isinstance(holder, Config):
            return _of_config(holder, name, named)
        if name == "requires_grad_":
            raise Unsure("what trains is set")
        if isinstance(holder, dict | list | str):
            return _of_values(holder, name, given, named)
        if not isinstance(holder, Module) or name in _HARMLESS:
            return UNKNOWN
        if name == "register_buffer":
            value = given[1] if len(given) > 1 else named.get("tensor")
            saved = named.get("persistent", given[2] if len(given) > 2 else True)
            leaf = Leaf(_shape([value]), is_buffer=True, is_saved=bool(saved))
            _set(holder, given[0], None if value is None else leaf)
        elif name in ("register_parameter", "add_module", "append"):
            key = str(len(holder.attributes)) if name == "append" else given[0]
            _set(holder, key, given[-1])
        elif name in ("get_input_embeddings", "get_output_embeddings"):
            return input_embeddings(holder) if name == "get_input_embeddings" else output_embeddings(holder)
        elif holder.source is not None and (found := holder.source.function(name)) is not None:
            return _result(holder, *found, given, named)
        return UNKNOWN


def _of_values(holder: Any, name: str, given: list[Any], named: dict[str, Any]) -> Any:
    """What a method of a list, a dict or a text returns."""
    if name != "append" and UNKNOWN in given:
        if not isinstance(holder, str) and name not in ("get", "index", "count"):
            raise Unsure(f"{name} with what is not known")
        return UNKNOWN
    return getattr(holder, name)(*given, **named)


def _result(module: Module, cls: ClassText, function: ast.FunctionDef, given: list[Any], named: dict[str, Any]) -> Any:
    """What a method returns that makes modules or tensors; UNKNOWN of another one, which is not run."""
    if not any(map(_makes_something, function.body)):
        return UNKNOWN
    frame = _Frame(cls, {"self": module})
    frame.bind(function.args, given, named)
    return frame.returned(function.body)


def module_classes(module: Module, after: ClassText) -> Iterator["ClassText | str"]:
    """The classes of a module that come after one of them, in the order in which attributes are looked up."""
    assert module.source is not None
    order = list(module.source.above())
    return iter(order[order.index(after) + 1 :])


def _shape(given: list[Any]) -> tuple[int, ...] | None:
    return given[0].shape if given and isinstance(given[0], Values) else None


@cache
def _is_module(cls: ClassText) -> bool:
    return any(
        isinstance(each, str)
        and (each.startswith(("nn.", "torch.nn.")) or "PreTrainedModel" in each or each == "GradientCheckpointingLayer")
        for each in cls.above()
    )


def _set(holder: Any, name: Any, value: Any) -> None:
    if isinstance(name, str) and name.startswith("requires_grad"):
        raise Unsure("what trains is set")
    if isinstance(holder, Module):
        if not isinstance(name, str):
            raise Unsure("an attribute whose name is not known")
        if isinstance(holder.attributes.get(name), Leaf) and not isinstance(value, Leaf):
            raise Unsure(f"{name} is given another value")
        holder.attributes[name] = value
    elif isinstance(holder, Config):
        holder.set(name, value)


def _of_config(config: Config, name: str, named: dict[str, Any]) -> Any:
    if name != "get_text_config":
        return UNKNOWN
    parts = [
        config[part] for part in ("text_encoder", "decoder", "generator", "text_config") if config.get(part) is not None
    ]
    if named or len(parts) > 1:
        return UNKNOWN
    return parts[0] if parts else config


def _alike(values: list[Any]) -> Any:
    """One of several classes that have one constructor, as those have that compute in different ways."""
    constructors = {each.function("__init__") if isinstance(each, ClassText) else None for each in values}
    return values[0] if len(constructors) == 1 and None not in constructors else UNKNOWN


def _known(value: Any) -> bool:
    if value is UNKNOWN:
        raise Unsure("a condition depends on what is not known")
    return bool(value)


@cache
def _dotted(node: ast.expr) -> str:
    return ast.unparse(node)


@cache
def _makes_something(node: ast.AST) -> bool:
    """True for code that may make modules or tensors of a model."""
    for each in ast.walk(node):
        if isinstance(each, ast.Call):
            name = _dotted(each.func)
            short = name.rpartition(".")[2]
            if name.startswith(("nn.", "torch.nn.")) or short in (
                "register_buffer",
                "register_parameter",
                "add_module",
                "setattr",
            ):
                return True
            if short[:1].isupper() and not short.endswith(("Error", "Warning", "Config")):
                return True
    return False


def _matters(statement: ast.stmt) -> bool:
    return _makes_something(statement) or any(isinstance(each, ast.Return) for each in ast.walk(statement))


def _getattr(holder: Any, name: str, *default: Any) -> Any:
    if isinstance(holder, Config):
        return holder.field(name) if holder.has(name) else default[0] if default else UNKNOWN
    return holder.attributes.get(name, *default) if isinstance(holder, Module) else UNKNOWN


def _hasattr(holder: Any, name: str) -> Any:
    if isinstance(holder, Config):
        return holder.has(name)
    return UNKNOWN


_BUILTINS: dict[str, Callable[..., Any]] = {
    "getattr": _getattr,
    "hasattr": _hasattr,
    "len": len,
    "range": lambda *ends: UNKNOWN if UNKNOWN in ends else range(*ends),
    "int": int,
    "list": list,
    "enumerate": lambda items: [list(pair) for pair in enumerate(items)],
    "zip": lambda *items: UNKNOWN if UNKNOWN in items else [list(pair) for pair in zip(*items, strict=False)],
    "max": lambda *values: UNKNOWN if UNKNOWN in values else max(*values),
    "min": lambda *values: UNKNOWN if UNKNOWN in values else min(*values),
    "sum": lambda *values: UNKNOWN,
    "round": round,
    "bool": bool,
    "set": lambda items: list(items),
    "sorted": lambda items: sorted(items),
    "isinstance": lambda *_: UNKNOWN,
    "any": lambda *_: UNKNOWN,
    "all": lambda *_: UNKNOWN,
}
_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: lambda left, right: left is right,
    ast.IsNot: lambda left, right: left is not right,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
