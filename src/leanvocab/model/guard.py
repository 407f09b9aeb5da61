"""Finds code that reads the partial weight around the lookup, where ids of the full vocabulary would give wrong rows.

`F.embedding(ids, module.weight)` in a model's own forward looks up row `id` of the partial matrix, silently where the id
is small. No hook of a module sees that, so the first forward in each mode (training, evaluation) runs under a
`TorchFunctionMode`, which sees every torch function and its arguments. Reads of rows are answered; all else is refused. Later
forwards cost one comparison; where the model's code reads a shrunk weight, in some branch perhaps, which a later batch may
be the first to come to, each forward is watched.
"""

import sys
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from leanvocab.errors import BypassError
from leanvocab.model.full_table import has_forward_of_its_own
from leanvocab.model.growing import extend_table
from leanvocab.model.stand_ins import refuse_merging
from leanvocab.model.trainable_tokens import refuse_tokens_put_on_since
from leanvocab.output.layer import RemapLinear
from leanvocab.output.lazy_logits import LazyLogits
from leanvocab.output.logit_operations import QUESTIONS
from leanvocab.partial.attachments import Weakly, keep_hooks, put_attributes, stood_before
from leanvocab.partial.embedding import RemapLookup
from leanvocab.partial.embedding_bag import RemapEmbeddingBag
from leanvocab.partial.growth import Arrivals
from leanvocab.partial.missing import begin_forward, end_forward
from leanvocab.partial.module import PartialModule, partial_modules, raise_missing, refuse_computed, shrunk_modules
from leanvocab.reads.row_reads import answer
from leanvocab.reads.weight_reads import reads_of

# What else reads none of a parameter's rows.
_HARMLESS = QUESTIONS | {
    Tensor.__repr__, Tensor.data_ptr, Tensor.is_shared, Tensor.register_hook, Tensor.type, Tensor.untyped_storage,
}  # fmt: skip
_SEQUENCES = (list, tuple)
_OWN_ROOMS = {
    each.__module__ for each in (RemapLookup, RemapEmbeddingBag, RemapLinear, LazyLogits, Arrivals, extend_table)
}
# ZeRO-3 brings the rows of all ranks together before a module's forward, and takes them apart after it.
_MOVERS = {"deepspeed.runtime.zero.partition_parameters"}


class Watch(TorchFunctionMode):
    """Sees every torch function of a forward: answers reads of rows of partial matrices, and refuses all else of them."""

    def __init__(self, modules: list[PartialModule], watched: Collection[int] = ()):
        super().__init__()
        self.watched = watched  # ids of the modules whose calls begin a watch
        for module in modules:  # a weight that is made anew at each look has no id to know it by
            refuse_computed(module)
        # Of a matrix that is an input table and an output layer, the table, which can answer.
        in_order = sorted(modules, key=lambda module: isinstance(module, RemapLookup))
        self.modules = {id(module.weight): module for module in in_order}
        self.has_answered = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = (*args, *kwargs.values())
        if self.modules.keys().isdisjoint(map(id, values)) and not any(type(each) in _SEQUENCES for each in values):
            return func(*args, **kwargs)  # nearly always
        for value in _flat(values):
            module = self.modules.get(id(value))
            if module is not None and not _is_harmless(func):
                frames = list(_frames_around())
                if frames[-1].f_globals.get("__name__") in _OWN_ROOMS | _MOVERS:
                    break
                return self._answer_or_refuse(func, args, kwargs, module, frames)
        return func(*args, **kwargs)

    def _answer_or_refuse(
        self, func: Any, args: Any, kwargs: Any, module: PartialModule, frames: list[FrameType]
    ) -> Any:
        rows = answer(func, args, kwargs, module) if isinstance(module, RemapLookup) else None
        if rows is not None:
            self._refuse_recomputing(frames, module)
            self.has_answered = True
            return rows
        raise BypassError(
            f"{_caller(frames)} calls {getattr(func, '__name__', func)} on the weight of {module.table.name} itself, "
            "around the lookup that remaps ids: with a partial vocabulary it would read wrong rows. Call the embedding module "
            "instead of its weight, or do not shrink this table"
        )

    def _refuse_recomputing(self, frames: list[FrameType], module: PartialModule) -> None:
        """Raises where the backward would come to the same read without a call around it that begins a watch."""
        for frame in frames:
            if frame.f_code.co_name == "_call_impl" and id(frame.f_locals.get("self")) in self.watched:
                return
            if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                raise BypassError(
                    f"{_caller(frames)} reads rows of {module.table.name} itself in what is computed again in the backward "
                    "(torch.utils.checkpoint), where nothing remaps its ids. Checkpoint a module that holds the table, or call "
                    "the embedding module instead of its weight"
                )


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The arguments of a call, and what lists among them hold, as torch.cat takes it."""
    for value in values:
        yield from value if type(value) in _SEQUENCES else (value,)


def _frames_around() -> Iterator[FrameType]:
    """The frames around a call of torch, from the inside, up to the first of a room that may read partial rows."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        if frame.f_globals.get("__name__") in _OWN_ROOMS | _MOVERS:
            return
        frame = frame.f_back


def _caller(frames: list[FrameType]) -> str:
    """The method of a module that made a call."""
    owners = ((frame.f_locals.get("self"), frame.f_code.co_name) for frame in frames)
    return next(
        (f"{type(owner).__name__}.{name}" for owner, name in owners if isinstance(owner, nn.Module)), "the model"
    )


def _is_harmless(func: Any) -> bool:
    # Attributes arrive as the __get__ or __set__ of their descriptors; `.T` and the like give the rows themselves.
    if getattr(func, "__name__", "") in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", "") not in ("T", "mT", "H", "mH", "data")
    return func in _HARMLESS


def _forward_of(module: nn.Module) -> tuple[Any, ...]:
    """The mode, and the code that a library has put in the place of the forward: a new one is watched anew."""
    forward = module.__dict__.get("forward")
    return module.training, getattr(getattr(forward, "__func__", forward), "__code__", None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_compiling(read: str) -> None:
    raise BypassError(
        f"{read} itself, where some forwards come to it, and a compiled forward cannot be watched: it would read wrong rows of "
        "a partial vocabulary. Compile the layers below (each of model.layers, say), or do not compile"
    )


class Guard:
    """Watches the forwards of the modules above the shrunk tables, and of tables with a lookup of their own, until one has
    passed in each mode.

    The hooks hold it, and it holds the model weakly: both are freed together.
    """

    def __init__(self, root: nn.Module, modules: dict[str, PartialModule]):
        self._modules = [Weakly(module) for module in modules.values()]
        self._passed: set[tuple[Any, ...]] = set()
        self._watch: Watch | None = None
        self._owner: nn.Module | None = None
        self._calls: dict[int, int] = {}
        reads = reads_of(root, modules.values())
        replaced = [
            f"{path}: the forward that was put on it reads"
            for path, each in modules.items()
            if has_forward_of_its_own(each)
        ]
        self._may_come_later = bool(reads or replaced)
        # Forwards of peft's adapters call the layer; their other methods read it to merge, which is refused by itself.
        named = [f"{read} {', '.join(modules)}" for read in reads if read.library != "peft"]
        self._unseen_if_compiled = [*named, *(f"{words} the weight" for words in replaced)]
        self._sites: list[tuple[Weakly[nn.Module], str, Weakly[nn.Module]]] = []  # (parent, name there, child)
        self._watched: list[Weakly[nn.Module]] = []  # whose calls begin a watch
        above: dict[nn.Module, None] = {}
        for path, module in modules.items():
            parts = path.split(".")
            ancestors = [root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
            above.update(dict.fromkeys(ancestors))
            has_own_lookup = bool(reads_of(module, [module])) or has_forward_of_its_own(module)
            if isinstance(module, RemapLookup) and has_own_lookup:  # called by itself, it is watched too
                put_attributes(module, {"forward": partial(self._look_up, Weakly(module))})
                self._watched.append(Weakly(module))
            self._sites.append((Weakly(ancestors[-1]), parts[-1], Weakly(module)))
        self._watched += map(Weakly, above)
        for ancestor in above:
            keep_hooks(
                ancestor,
                ancestor.register_forward_pre_hook(self._enter),
                ancestor.register_forward_hook(self._leave, always_call=True),
            )

    def has_passed(self, module: nn.Module) -> bool:
        """True where a forward of `module`, in the mode that it is in, needs no watching any more."""
        return not self._may_come_later and _forward_of(module) in self._passed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passed": set()}  # a copy is watched anew: code is not pickled

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            if self._unseen_if_compiled:
                _refuse_compiling(self._unseen_if_compiled[0])
            return
        if begin_forward(module):
            raise_missing({*self._held(), *(shrunk for shrunk in shrunk_modules() if shrunk.missing.model is module)})
        if self._owner is not None:
            return
        if any(_child(*site) is not site[2]() for site in self._sites):
            self._rearm()
        if self.has_passed(module):
            return
        held = self._held()
        if not held:  # merged from within
            return
        if _forward_of(module) not in self._passed:
            _refuse_strangers(module)
        self._owner, self._watch = module, Watch(held, {id(weakly()) for weakly in self._watched})
        self._calls = self._num_calls(module)
        self._watch.__enter__()

    def _look_up(self, held: Weakly[nn.Module], *args: Any, **kwargs: Any) -> Any:
        """The forward of a table with a lookup of its own, watched like those of the modules above it."""
        (module, usual), output = stood_before(held, "forward"), None
        self._enter(module, args)
        try:
            output = usual(*args, **kwargs)
        finally:
            self._leave(module, args, output)
        return output

    def _held(self) -> list[PartialModule]:
        return [partial for weakly in self._modules if isinstance(partial := weakly(), PartialModule)]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            end_forward(module)
        if self._owner is not module or self._watch is None:
            return
        self._watch.__exit__(None, None, None)
        self._may_come_later |= self._watch.has_answered
        self._owner = self._watch = None
        if output is not None:  # an always-called hook gets None where the forward raised
            self._refuse_other_losses(module, output)
            self._passed.add(_forward_of(module))

    def _num_calls(self, module: nn.Module) -> dict[int, int]:
        """Calls of each output layer in a module, by its id."""
        return {id(layer): layer.num_calls for layer in module.modules() if isinstance(layer, RemapLinear)}

    def _refuse_other_losses(self, module: nn.Module, output: Any) -> None:
        """A loss that was computed from the weight of the output layer, and not by calling it, is of the wrong rows."""
        if self._calls and self._calls == self._num_calls(module) and getattr(output, "loss", None) is not None:
            layer = next(layer for layer in module.modules() if isinstance(layer, RemapLinear))
            raise BypassError(
                f"{type(module).__name__} gave a loss without calling its output layer {layer.table.name}, as fused losses do "
                "(Liger, CCE): they would read the rows of a partial vocabulary as those of the full one. "
                "Switch that loss off: leanvocab's own is computed in chunks too"
            )

    def _rearm(self) -> None:
        """Something has been wrapped around a table since (an adapter, say): watch again, and know the wrapper by then."""
        children = [_child(*site) for site in self._sites]
        for child in children:
            refuse_tokens_put_on_since(child)
        self._passed.clear()
        self._sites = [
            (parent, name, Weakly(child)) for (parent, name, _), child in zip(self._sites, children, strict=True)
        ]
        for child in children:
            refuse_merging(child)


def _child(parent: Weakly[nn.Module], name: str, child: Weakly[nn.Module]) -> nn.Module | None:
    """The module that stands now where `child` stood; `child` itself where nothing else does."""
    module = parent()
    return (None if module is None else module._modules.get(name)) or child()


def _refuse_strangers(root: nn.Module) -> None:
    """A module of another kind that shares a partial matrix, tied to it since, would take its rows for those of all ids."""
    partial = {id(module.weight): module for module in partial_modules(root).values()}
    for path, module in root.named_modules():
        held = partial.get(id(module._parameters.get("weight")))
        if held is not None and not isinstance(module, PartialModule):
            raise BypassError(
                f"{path or type(module).__name__}: a {type(module).__name__} was given the partial weight of "
                f"{held.table.name}, and would take its rows for those of all token ids, as peft's ensure_weight_tying does "
                'with modules_to_save; name both matrices instead: modules_to_save=["embed_tokens", "lm_head"]'
            )
