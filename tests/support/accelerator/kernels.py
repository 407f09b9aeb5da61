"""The kernels of the device: each operation of torch's runs on what is inside, and is noted on the way."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accelerator import shapes, streams
from accelerator.memory import (
    NAME,
    Held,
    adopt,
    allocate,
    device,
    device_memory,
    held_by,
    host,
    inside,
    is_on_device,
    new_tensor,
    outside,
    set_,
    switches,
)
from accelerator.random_numbers import device_random_numbers
from accelerator.traffic import bytes_moved
from accelerator.watching import current_line, watches

CPU_KEY = torch._C.DispatchKey.CPU
KEY = "PrivateUse1"
aten = torch.ops.aten

# What the host must know the outcome of, since a size depends on it.
WAITING = frozenset((
    "nonzero", "masked_select", "equal", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "multinomial", "_local_scalar_dense",
))  # fmt: skip
# Operations that take a scalar tensor of the host beside tensors of the device, pointwise ones aside.
TAKING_SCALARS = frozenset((
    "masked_fill_", "fill_", "index_fill_", "_index_put_impl_", "_foreach_mul", "_foreach_mul_",
))  # fmt: skip

VIEWS = (
    "as_strided", "view", "_reshape_alias", "unfold", "view_as_real", "view_as_complex", "set_.source_Storage",
    "set_.source_Storage_storage_offset",
)  # fmt: skip
INDEXING = frozenset(("index", "_index_put_impl_"))


class Form(NamedTuple):
    """What a schema tells of an operation."""

    name: str
    returned: tuple[int | str | None, ...]  # for each result the argument that it is, if it is one
    written: tuple[int | str, ...]  # arguments that are written to
    takes_scalars: bool
    is_random: bool
    wants_tensors: tuple[
        int | str, ...
    ]  # arguments that are tensors and may be given as numbers, which torch has unwrapped


_forms: dict[int, Form] = {}  # by id of the operation, which stays


def form_of(op: Any) -> Form:
    """The form of an operation, looked at once."""
    return _forms.get(id(op)) or _forms.setdefault(id(op), read_form(op))


def read_form(op: Any) -> Form:
    """Arguments are told by position, those of keywords by name."""
    schema = op._schema
    by_alias, written = {}, []
    for position, argument in enumerate(schema.arguments):
        where = argument.name if argument.kwarg_only else position
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(where)
            by_alias.update(dict.fromkeys(argument.alias_info.before_set, where))
    infos = [result.alias_info for result in schema.returns]
    if any(info is not None and not info.is_write for info in infos):
        raise NotImplementedError(f"the device has no kernel for the view {op}")
    returned = tuple(None if info is None else by_alias[next(iter(info.before_set))] for info in infos)
    name = schema.name.removeprefix("aten::")
    takes_scalars = torch.Tag.pointwise in op.tags or name in TAKING_SCALARS
    is_random = torch.Tag.nondeterministic_seeded in op.tags
    tensors = () if torch._C._should_allow_numbers_as_tensors(name) else _tensor_arguments(schema)
    return Form(name, returned, tuple(written), takes_scalars, is_random, tensors)


def _tensor_arguments(schema: Any) -> tuple[int | str, ...]:
    named = [
        (argument.name if argument.kwarg_only else position, argument)
        for position, argument in enumerate(schema.arguments)
    ]
    return tuple(where for where, argument in named if str(argument.type) == "Tensor")


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors, in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of a value, or of all that it has, if it is a list."""
    if isinstance(value, list | tuple):
        return type(value)(mapped(function, part) for part in value)
    return function(value)


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation that has no kernel of its own below."""
    form = form_of(op)
    streams.launched()
    if form.name in INDEXING:
        args = (args[0], as_indices(form.name, *args[1:3]), *args[2:])
    given = [*tensors_in(args), *tensors_in(kwargs.values())]
    refuse_mixed(op, form, args, kwargs, given)
    if form.name in WAITING or (form.name == "repeat_interleave" and not kwargs.get("output_size")):
        streams.wait(form.name.replace("_local_scalar_dense", "item"))
    generator = kwargs.get("generator")
    if generator is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    result = by_computing(op, form, args, kwargs) if switches.computes else by_shapes(op, form, args, kwargs)
    note(form, args, kwargs, given, result)
    return result


def by_computing(op: Any, form: Form, args: Any, kwargs: Any) -> Any:
    """The result of the operation on what is inside."""
    inner_args, inner_kwargs = wrapped(
        form, mapped(_inner, args), {name: mapped(_inner, value) for name, value in kwargs.items()}
    )
    with randomness(form):
        raw = computed(op, form.name, inner_args, inner_kwargs)
    return outer(form, args, kwargs, (inner_args, inner_kwargs), raw)


def by_shapes(op: Any, form: Form, args: Any, kwargs: Any) -> Any:
    """The same on paper; asked once for the same shapes, unless the operation gives both what it was given and something new."""
    only_writes = bool(form.written) and None not in form.returned
    key = shapes.key_of(op, args, kwargs) if only_writes or not form.written else None
    if key is None or form.name in NOTHING_KNOWN:
        return by_computing(op, form, args, kwargs)
    if key in shapes.known:
        raw = shapes.made(shapes.known[key])
        return _results(form, args, kwargs, raw) if only_writes else raw
    result = by_computing(op, form, args, kwargs)
    if key == shapes.key_of(op, args, kwargs):  # it has made no room for what it writes
        shapes.remember(key, None if only_writes else result)
    return result


def as_indices(name: str, indices: list[Tensor | None], value: Tensor | None = None) -> list[Tensor | None]:
    """Indices on the device: from the host they are brought, and masks become indices, which waits; a number needs none of it."""
    if (
        name == "index" and switches.computes
    ):  # torch has brought them, and has asked masks, before it asks for the result
        return indices
    there = [index if index is None or is_on_device(index) else index.to(device()) for index in indices]
    masks = [index for index in there if index is not None and index.dtype in (torch.bool, torch.uint8)]
    if not masks or (value is not None and held_by(value).is_number and switches.computes):
        return there
    return [
        part
        for index in there
        for part in (index.nonzero().unbind(1) if any(index is mask for mask in masks) else [index])
    ]


def randomness(form: Form) -> AbstractContextManager[None]:
    return device_random_numbers() if form.is_random and switches.computes else nullcontext()


def _inner(value: Any) -> Any:
    if isinstance(value, Tensor):
        return inside(value) if value.device.type == NAME else value if switches.computes else value.to("meta")
    return torch.device(host()) if isinstance(value, torch.device) else value


def wrapped(form: Form, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments in which numbers are tensors where the operation takes no numbers."""
    if not any(isinstance(_argument(where, args, kwargs), Number) for where in form.wants_tensors):
        return args, kwargs
    is_wide = any(tensor.dtype == torch.float64 for tensor in tensors_in([*args, *kwargs.values()]))

    def as_tensor(where: int | str, value: Any) -> Any:
        if where not in form.wants_tensors or not isinstance(value, Number):
            return value
        dtype = torch.float64 if is_wide and isinstance(value, float) else None
        return torch.tensor(value, dtype=dtype, device=host())

    new = tuple(as_tensor(position, value) for position, value in enumerate(args))
    return new, {name: as_tensor(name, value) for name, value in kwargs.items()}


def outer(form: Form, args: Any, kwargs: Any, inner: tuple[Any, Any], raw: Any) -> Any:
    """The results as tensors of the device: arguments that were written to as they were given, others new."""
    for where in form.written:
        given, within = (_argument(where, *both) for both in ((args, kwargs), inner))
        for tensor, now in zip(tensors_in([given]), tensors_in([within]), strict=True):
            if tensor.shape != now.shape or tensor.stride() != now.stride():
                set_(tensor, adopt(now.untyped_storage()), now.storage_offset(), now.size(), now.stride())
    return _results(form, args, kwargs, raw)


def _results(form: Form, args: Any, kwargs: Any, raw: Any) -> Any:
    if len(form.returned) > 1:
        values = raw or [None] * len(form.returned)
        return tuple(_result(where, args, kwargs, value) for where, value in zip(form.returned, values, strict=True))
    return _result(form.returned[0], args, kwargs, raw) if form.returned else raw


def _argument(where: int | str, args: Any, kwargs: Any) -> Any:
    return kwargs.get(where) if isinstance(where, str) else args[where] if where < len(args) else None


def _result(where: int | str | None, args: Any, kwargs: Any, raw: Any) -> Any:
    if where is not None:
        return _argument(where, args, kwargs)
    return mapped(lambda value: outside(value) if isinstance(value, Tensor) else value, raw)


def note(form: Form, args: Any, kwargs: Any, given: list[Tensor], result: Any) -> None:
    """Notes an operation for those who watch, and whether streams agree on it."""
    if not watches() and streams.Stream.num_streams == 1:
        return
    written = list(tensors_in(_argument(where, args, kwargs) for where in form.written))
    results = list(tensors_in([result]))
    streams.used(form.name, all_held_by(given), all_held_by([*written, *results]))
    if watches():
        others = [value for where, value in [*enumerate(args), *kwargs.items()] if where not in form.written]
        moved = bytes_moved(
            form.name, *(list(filter(is_on_device, tensors)) for tensors in (tensors_in(others), written, results))
        )
        line = current_line()
        for seen in watches():
            seen.operations[form.name] += 1
            seen.traffic[form.name, line] += moved


def all_held_by(tensors: Iterable[Tensor]) -> list[Held]:
    return [held_by(tensor) for tensor in tensors if is_on_device(tensor)]


def refuse_mixed(op: Any, form: Form, args: Any, kwargs: Any, given: list[Tensor]) -> None:
    """Tensors of another device are refused, scalars aside where one number goes to a kernel."""
    others = [tensor for tensor in given if tensor.device.type != NAME]
    if not others:
        return
    is_index = form.name == "index"  # whose indices torch has brought to the device already
    others = [
        tensor
        for tensor in others
        if not (form.takes_scalars and tensor.dim() == 0 and tensor.device.type == "cpu")
        and not (is_index and any(tensor is index for index in args[1]))
    ]
    if not others:
        return
    names = [argument.name for argument in op._schema.arguments]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    name = next(name for name, value in named.items() if any(other is others[0] for other in tensors_in([value])))
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {device()} and {others[0].device}! "
        f"(when checking argument for argument {name} in method {form.name})"
    )


def computed(op: Any, name: str, args: Any, kwargs: Any) -> Any:
    """What the operation gives, where a CPU or a device that computes nothing needs help."""
    if not switches.computes and name in NOTHING_KNOWN:
        return NOTHING_KNOWN[name](*args)
    if name in ("_softmax", "_log_softmax") and args[2]:  # half to float, which a CPU has no kernel for
        return op(args[0].float(), args[1], False, **kwargs)
    if name in ("_softmax_backward_data", "_log_softmax_backward_data") and args[3] != args[0].dtype:
        out = kwargs["out"] if "out" in kwargs else torch.empty_like(args[0], dtype=args[3])
        return out.copy_(op.overloadpacket.default(*args[:3], args[0].dtype))
    return op(*args, **kwargs)


def _every_index(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.numel(), tensor.dim(), dtype=torch.int64, device=tensor.device)


NOTHING_KNOWN: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": lambda tensor: torch.zeros((), dtype=tensor.dtype).item(),
    "nonzero": _every_index,
    "masked_select": lambda tensor, mask: torch.empty_like(tensor.expand_as(mask)).flatten(),
    "equal": lambda first, second: True,
}

# --- kernels of their own ---------------------------------------------------------------------------------------------


def empty(size: Any, *, dtype: Any = None, memory_format: Any = None, pin_memory: Any = None, **_: Any) -> Tensor:
    if pin_memory:
        raise RuntimeError(f"cannot pin '{NAME}' memory: only dense CPU tensors can be pinned")
    form = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format)
    return new_tensor(form.shape, form.stride(), dtype or torch.get_default_dtype())


def empty_strided(size: Any, stride: Any, *, dtype: Any = None, pin_memory: Any = None, **_: Any) -> Tensor:
    if pin_memory:
        raise RuntimeError(f"cannot pin '{NAME}' memory: only dense CPU tensors can be pinned")
    return new_tensor(size, stride, dtype or torch.get_default_dtype())


def scalar_tensor(number: Any, **options: Any) -> Tensor:
    """A number of Python's as a tensor: for CUDA torch makes those that go to a kernel on the host, which is no wait either."""
    made = aten.scalar_tensor.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, number, **options)
    held_by(made).is_number = True
    return made


def resize_(tensor: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
    """New memory where the old is too small; what was there goes with it."""
    form = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format)
    needed = (tensor.storage_offset() + form.numel()) * tensor.dtype.itemsize
    storage = tensor.untyped_storage()
    if storage.nbytes() < needed:
        old, storage = storage, allocate(needed)
        if switches.computes:
            device_memory.held[storage._cdata].raw[: old.nbytes()] = device_memory.held[old._cdata].raw
    return set_(tensor, storage, tensor.storage_offset(), form.shape, form.stride())


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Within the device, or between it and the host: other dtypes and strides take a copy on the device, as on CUDA."""
    if is_on_device(target) and is_on_device(source):
        inside(target).copy_(inside(source))
        note(form_of(aten.copy_.default), (target, source), {}, [target, source], target)
        return target
    if source.dtype == target.dtype and source.shape == target.shape and source.stride() == target.stride():
        transfer(target, source, non_blocking)
        return target
    room = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
    transfer(room, source.to(target.dtype).expand_as(target).contiguous(), non_blocking)
    return target if room is target else target.copy_(room)


def transfer(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    """Between the host and the device, bytes as they are."""
    to_host = is_on_device(source)
    on_host, on_device = (target, source) if to_host else (source, target)
    if switches.computes:
        _inner(target).copy_(_inner(source))
    elif to_host:
        on_host.zero_()
    note(form_of(aten.copy_.default), (target, source), {}, [target, source], target)
    if on_device.numel():
        streams.copied(on_host, to_host, non_blocking)


def to_copy(tensor: Tensor, **options: Any) -> Tensor:
    """A copy in another dtype or on another device; one to the host that does not block goes to pinned memory."""
    where = options.get("device")
    if where is not None and torch.device(where).type == "cpu" and options.get("non_blocking"):
        dtype = options.get("dtype") or tensor.dtype
        return streams.pin(torch.empty_like(tensor, dtype=dtype, device="cpu")).copy_(tensor, non_blocking=True)
    return aten._to_copy.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, tensor, **options)


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    return streams.is_pinned(tensor)


def pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    if not switches.in_use:
        raise RuntimeError("Need to provide pin_memory allocator to use pin memory.")
    return streams.pin(tensor.clone())


def register() -> list[torch.library.Library]:
    """Gives torch these kernels, for as long as what is returned lives."""
    library, everything = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    everything.fallback(run, KEY)
    own = {
        "empty.memory_format": empty,
        "empty_strided": empty_strided,
        "scalar_tensor": scalar_tensor,
        "resize_": resize_,
        "copy_": copy_,
        "_to_copy": to_copy,
        "record_stream": lambda tensor, stream: None,
    }
    for name, kernel in own.items():
        library.impl(name, kernel, KEY)
    for name in (
        "native_layer_norm",
        "native_group_norm",
        "addr",
    ):  # which CUDA has kernels for, beside torch's composites
        library.impl(name, functools.partial(run, getattr(aten, name).default), KEY)
    for name in VIEWS:  # a CPU's kernels make them out of sizes and strides alone
        packet, _, overload = name.partition(".")
        library.impl(
            name, functools.partial(getattr(getattr(aten, packet), overload or "default")._op_dk, CPU_KEY), KEY
        )
    library.impl("is_pinned", is_pinned, "CPU")
    library.impl("_pin_memory", pin_memory, "CPU")
    return [library, everything]
