"""The text of transformers: which class an auto class makes of a config, what stands in it, and a config's defaults. Nothing is imported."""

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


class Unsure(Exception):  # noqa: N818 (no error: it ends a reading that only running can end)
    """What code does is not known from its text."""


UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "unknown"})()


class Config(dict[str, Any]):
    """A config as JSON has it, with the defaults that its class has in its text."""


_MAPPINGS = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}


@cache
def _root() -> Path:
    spec = importlib.util.find_spec("transformers")  # finds, and imports nothing
    if spec is None or spec.origin is None:
        raise Unsure("transformers is not installed")
    return Path(spec.origin).parent


@cache
def text_of(path: str) -> str:
    """The text of one of transformers' files; raises `Unsure` where it is not there."""
    try:
        return (_root() / path).read_text(encoding="utf-8")
    except OSError as error:
        raise Unsure(f"transformers has no file {path}") from error


def class_of(auto_class: str, model_type: str) -> str:
    """The class that an auto class makes of models of a type; raises `Unsure` where it has none."""
    mapping = _MAPPINGS.get(auto_class, auto_class)
    text = text_of("models/auto/modeling_auto.py")
    start = re.search(rf"^{mapping}\b.*=", text, re.MULTILINE)
    end = text.find("\n)", start.end()) if start else -1
    pattern = rf'\(\s*"{re.escape(model_type)}",\s*"(\w+)"\s*,?\s*\)'
    classes = re.findall(pattern, text[start.end() : end]) if start else []
    if len(classes) != 1:
        raise Unsure(f"{mapping} has no single class for {model_type!r}")
    return str(classes[0])


def room_of(model_type: str) -> str:
    tables = (text_of(f"models/auto/{file}.py") for file in ("auto_mappings", "configuration_auto"))
    special = "".join(table[table.find("SPECIAL_MODEL_TYPE_TO_MODULE_NAME") :] for table in tables)
    named = re.search(rf'"{re.escape(model_type)}"(?:,|:) "([a-z0-9_]+)"', special)
    folder, file = named[1] if named else model_type.replace("-", "_"), model_type.replace("-", "_")
    has_own = (_root() / f"models/{folder}/modeling_{file}.py").is_file()
    return f"models/{folder}/modeling_{file if has_own else folder}.py"


@dataclass(frozen=True)
class _Room:
    """A file of transformers: its classes, what it imports from where, and other names that it gives to values."""

    classes: Mapping[str, ast.ClassDef]
    imports: Mapping[str, tuple[str, str]]  # name → file, name there
    values: Mapping[str, ast.expr]


@cache
def room_at(path: str) -> _Room:
    classes, imports, values = dict[str, ast.ClassDef](), dict[str, tuple[str, str]](), dict[str, ast.expr]()
    for statement in ast.parse(text_of(path)).body:
        if isinstance(statement, ast.ClassDef):
            classes[statement.name] = statement
        elif isinstance(statement, ast.ImportFrom) and statement.level and statement.module:
            above = path.split("/")[: -statement.level]
            file = "/".join([*above, *statement.module.split(".")]) + ".py"
            imports |= {alias.asname or alias.name: (file, alias.name) for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module == "torch.nn":
            values |= {alias.asname or alias.name: ast.parse(f"nn.{alias.name}", mode="eval").body for alias in statement.names}
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            values[statement.targets[0].id] = statement.value
    return _Room(classes, imports, values)


_NOT_FOLLOWED = re.compile(r"(modeling_utils|utils/.*|generation|activations|cache_utils|masking_utils)\.py")


@dataclass(frozen=True)
class ClassText:
    """A class by its name in a file of transformers."""

    name: str
    room: str

    @property
    def syntax(self) -> ast.ClassDef:
        return room_at(self.room).classes[self.name]

    def above(self) -> "Iterator[ClassText | str]":
        """The classes that it is made of, itself first, roughly in the order in which attributes are looked up."""
        yield self
        for base in self.syntax.bases:
            known = resolve(ast.unparse(base), self.room)
            if isinstance(known, ClassText):
                yield from known.above()
            else:
                yield str(known)

    @property
    def text(self) -> str:
        """Its own lines."""
        lines = text_of(self.room).split("\n")
        return "\n".join(lines[self.syntax.lineno - 1 : self.syntax.end_lineno])

    def function(self, name: str) -> "tuple[ClassText, ast.FunctionDef] | None":
        for each in self.above():
            for statement in each.syntax.body if isinstance(each, ClassText) else ():
                if isinstance(statement, ast.FunctionDef) and statement.name == name:
                    return each, statement  # type: ignore[return-value]
        return None

    def value(self, name: str) -> Any:
        """A literal that stands in its body; None where there is none."""
        for each in self.above():
            for statement in each.syntax.body if isinstance(each, ClassText) else ():
                targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    try:
                        return ast.literal_eval(statement.value)  # type: ignore[attr-defined]
                    except ValueError:
                        return UNKNOWN
        return None


def resolve(name: str, room: str) -> "ClassText | ast.expr | str":
    """A class of transformers, or what else a file gives a value, by its name there; or the name itself."""
    known = room_at(room)
    if name in known.classes:
        return ClassText(name, room)
    if name in known.imports:
        file, original = known.imports[name]
        if not _NOT_FOLLOWED.search(file) and (_root() / file).is_file():
            return resolve(original, file)
    value = known.values.get(name, name)
    return ast.unparse(value) if isinstance(value, ast.Attribute) else value


# --- configs ----------------------------------------------------------------------------------------------------------


def as_config(content: Mapping[str, Any]) -> Config:
    """A config with its defaults, the configs in it too."""
    given = {
        name: as_config(value) if isinstance(value, dict) and "model_type" in value else value
        for name, value in content.items()
    }
    config = Config(_defaults(str(content.get("model_type"))) | given)
    id2label = config.get("id2label")
    config["num_labels"] = len(id2label) if isinstance(id2label, dict) else config.get("num_labels", 2)
    return config


def _defaults(model_type: str) -> dict[str, Any]:
    """Defaults of a config's fields, where they are literals, and other names of fields."""
    try:
        room = room_of(model_type).replace("modeling_", "configuration_")
        classes = [ClassText(name, room) for name in room_at(room).classes]
    except Unsure:
        return {}
    of_type = [each for each in classes if each.value("model_type") == model_type]
    if not of_type:
        return {}
    values: dict[str, Any] = {}
    for each in reversed([each for each in of_type[0].above() if isinstance(each, ClassText)]):
        for statement in each.syntax.body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            if isinstance(targets[0], ast.Name) and getattr(statement, "value", None) is not None:
                values[targets[0].id] = each.value(targets[0].id)
    return values | {"attribute_map": of_type[0].value("attribute_map") or {}}
