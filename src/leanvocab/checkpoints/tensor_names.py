"""Names of tensors in a model, in what it saves, and in its base: found for one another."""

import copy
import functools
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leanvocab.errors import ModelError


class TensorNames:
    """Finds the base's name for a model's tensor: the same, with or without the prefix that a head puts before it, or the name
    that transformers saves it under."""

    def __init__(self, model: nn.Module, base: Mapping[str, tuple[int, ...]]):
        """`base` has the shapes of its tensors."""
        self.base, self.renamed = base, dict[str, str]()
        self.prefix = getattr(model, "base_model_prefix", "") + "."
        groups: dict[int, list[str]] = {}
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        for name, tensor in tensors:
            groups.setdefault(id(tensor), []).append(name)
        self.own = [name for group in groups.values() for name in group]
        self.ties = {name: group for group in groups.values() for name in group}
        self.saved_as = names_when_saved(model)
        self.ties |= {saved: self.ties[name] for name, saved in self.saved_as.items() if name in self.ties}

    def table(self, path: str) -> list[str]:
        """The base's names for the table of the module at `path`."""
        return [base for base in map(self.in_base, self.ties[f"{path}.weight"]) if base is not None]

    def on_disk(self, path: str, saved: Container[str]) -> str:
        """The name under which the model saved that table."""
        names = self.ties[f"{path}.weight"]
        for name in (*names, *(self.saved_as.get(name, "") for name in names)):
            if name in saved:
                return name
        raise ModelError(
            f"{path}.weight: the model saves this table under another name, which a delta cannot hold; use save_full"
        )

    def match(self, saved: Mapping[str, tuple[int, ...]], tables: Container[str]) -> dict[str, list[str]]:
        """Saved name → the base's names, one list for tied names; none where a tensor is new. Fills `renamed`.

        `saved` has the shapes; `tables` are names of tables that hold rows alone.
        """
        matched: dict[str, list[str]] = {}
        taken: set[str] = set()
        for name, shape in saved.items():
            names = [name, *(tied for tied in self.ties.get(name, []) if tied != name)]
            known = next((matched[tied] for tied in names if tied in matched), None)
            matched[name] = self._of_base(names, shape, taken) if known is None else known
            targets = matched[name]
            if targets and not any(tied in tables for tied in names) and self.base[targets[0]] != shape:
                taken.difference_update(targets)  # a head of another size: new, and the base's leaves
                for target in targets:
                    self.renamed.pop(target, None)
                targets.clear()
        return matched

    def _of_base(self, names: list[str], shape: tuple[int, ...], taken: set[str]) -> list[str]:
        targets = []
        for name in names:
            target = self.in_base(name)
            if target is not None and target not in taken and self.base[target][1:] == shape[1:]:
                taken.add(target)
                targets.append(target)
                if target != name:
                    self.renamed[target] = name
        return targets

    def in_base(self, name: str) -> str | None:
        """The base's name for a name of the model's; None where it has none."""
        candidates = (name, name.removeprefix(self.prefix), self.prefix + name, self.saved_as.get(name, name))
        return next((candidate for candidate in candidates if candidate in self.base), None)


def names_when_saved(model: nn.Module) -> dict[str, str]:
    """Name of a tensor → the name in its checkpoint, where transformers renames it when it loads (GPT-NeoX's output layer)."""
    witnesses: dict[str, Any] = {
        name: torch.empty(parameter.shape, device="meta") for name, parameter in model.named_parameters()
    }
    try:
        saved = as_saved(model, witnesses)
    except Exception:  # a conversion that looks at values: those tensors are merged or split, not renamed
        return {}
    names = {id(witness): name for name, witness in saved.items()}
    renamed = {name: names.get(id(witness), name) for name, witness in witnesses.items()}
    return {name: saved_name for name, saved_name in renamed.items() if saved_name != name}


def as_saved(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names that the model saves it by; the very tensors, but for those that are merged or split."""
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
    kept = {name: tensor for name, tensor in state.items() if name not in left_out}
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return kept
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, kept))  # type: ignore[arg-type]


@contextmanager
def saved_names_loaded(model: Any) -> Iterator[None]:
    """Lets `model.load_state_dict` take tensors under the names that `save_pretrained` gives them, for as long as the block runs.

    A Trainer hands over a checkpoint's tensors as they are called there, and leaves what the model calls otherwise (merged
    experts; layer norms, until transformers 5.3) as they were.
    """
    handle = model.register_load_state_dict_pre_hook(_under_held_names)
    try:
        yield
    finally:
        handle.remove()


def _under_held_names(model: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    if prefix or state.keys() <= {name for name, _ in tensors} or not _is_pretrained(model):
        return
    floats = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, floats, torch.float32)  # no value is rounded
    full, told = type(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=dict(state), dtype=dtype, output_loading_info=True
    )
    held = {name: tensor for name, tensor in full.state_dict().items() if name not in told["missing_keys"]}
    state.clear()
    state.update(held)


def _is_pretrained(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)
