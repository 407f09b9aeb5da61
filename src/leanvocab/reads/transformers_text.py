"""The text of transformers: the class that an auto class makes of a config, what stands in it, defaults; nothing is imported."""

import ast
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from leanvocab.files.presence import is_file


class Unsure(Exception):  # noqa: N818 (no error: it ends a reading that only running can end)
    """What code does is not known from its text."""


UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "unknown"})()

_MAPPINGS = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}
# Files whose classes no constructor needs, or that are read by name.
_NOT_FOLLOWED = re.compile(
    r"(modeling_utils|configuration_utils|utils/.*|generation.*|activations|cache_utils|masking_utils)\.py"
)


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
    """The file with the classes of models of a type."""
    files = (f"models/auto/{file}.py" for file in ("auto_mappings", "configuration_auto"))
    tables = (text_of(file) for file in files if is_file(_root() / file))
    special = "".join(table[table.find("SPECIAL_MODEL_TYPE_TO_MODULE_NAME") :] for table in tables)
    named = re.search(rf'"{re.escape(model_type)}"(?:,|:) "([a-z0-9_]+)"', special)
    folder, file = named[1] if named else model_type.replace("-", "_"), model_type.replace("-", "_")
    has_own = is_file(_root() / f"models/{folder}/modeling_{file}.py")
    return f"models/{folder}/modeling_{file if has_own else folder}.py"


# --- classes ----------------------------------------------------------------------------------------------------------

_BLOCKS = re.compile(r"\n(?=[^\s)\]}#])")  # what begins in the first column
_IMPORT = re.compile(r"from (\.+|(?=torch\.nn ))([\w.]*) import \(?([^)]*)")
_NAMED = re.compile(r"class (\w+)|(\w+) = ")


@dataclass(frozen=True)
class _Room:
    """A file of transformers by what stands in its first column: classes, imports and values, none of them parsed."""

    classes: Mapping[str, str]
    imports: Mapping[str, tuple[str, str]]  # name → file, name there; of torch's, "" and the name with a prefix
    values: Mapping[str, str]


@cache
def _room(path: str) -> _Room:
    classes, imports, values = dict[str, str](), dict[str, tuple[str, str]](), dict[str, str]()
    for block in _BLOCKS.split(text_of(path)):
        if named := _NAMED.match(block):
            (classes if named[1] else values)[named[1] or named[2]] = block
        elif imported := _IMPORT.match(block):
            dots, module, names = imported.groups()
            file = "/".join([*path.split("/")[: -len(dots)], *module.split(".")]) + ".py"
            for alias in re.sub(r"#.*", "", names).split(","):
                name, _, given = (part.strip() for part in alias.strip().partition(" as "))
                imports[given or name] = (file, name) if dots else ("", f"nn.{name}")
    return _Room(classes, imports, values)


@cache
def _parsed(text: str) -> ast.stmt:
    return ast.parse(text).body[0]


@dataclass(frozen=True)
class ClassText:
    """A class by its name in a file of transformers."""

    name: str
    room: str

    @property
    def text(self) -> str:
        """Its own lines."""
        return _room(self.room).classes[self.name]

    @property
    def body(self) -> list[ast.stmt]:
        """Its statements."""
        return _parsed(self.text).body  # type: ignore[attr-defined, no-any-return]

    def above(self) -> "tuple[ClassText | str, ...]":
        """The classes that it is made of, itself first, roughly in the order in which attributes are looked up."""
        return _above(self)

    def own_function(self, name: str) -> ast.FunctionDef | None:
        """A function in its body."""
        named = (each for each in self.body if isinstance(each, ast.FunctionDef) and each.name == name)
        return next(named, None)

    def function(self, name: str) -> "tuple[ClassText, ast.FunctionDef] | None":
        """A function that it has by itself or from a class above it, and which."""
        for each in self.above():
            if isinstance(each, ClassText) and (own := each.own_function(name)) is not None:
                return each, own
        return None

    def value(self, name: str) -> Any:
        """A literal that stands in its body, or in one above; None where there is none, UNKNOWN for another value."""
        for each in self.above():
            if isinstance(each, ClassText) and name in (own := _assigned(each)):
                return own[name]
        return None


@cache
def _above(cls: ClassText) -> "tuple[ClassText | str, ...]":
    above: list[ClassText | str] = [cls]
    for base in _parsed(cls.text).bases:  # type: ignore[attr-defined]
        known = resolve(ast.unparse(base), cls.room)
        above += known.above() if isinstance(known, ClassText) else [str(known)]
    return tuple(above)


@cache
def _assigned(cls: ClassText) -> dict[str, Any]:
    """Names in a class's body and their literal values."""
    values = dict[str, Any]()
    for statement in cls.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if isinstance(targets[0], ast.Name) and value is not None:
            values[targets[0].id] = _literal(value)
    return values


def resolve(name: str, room: str) -> "ClassText | ast.expr | str":
    """A class of transformers, or what else a file gives a value, by its name there; or the name itself."""
    known = _room(room)
    if name in known.classes:
        return ClassText(name, room)
    if name in known.imports:
        file, original = known.imports[name]
        if not file:
            return original
        if not _NOT_FOLLOWED.search(file) and is_file(_root() / file):
            return resolve(original, file)
    if name not in known.values:
        return name
    value: ast.expr = _parsed(known.values[name]).value  # type: ignore[attr-defined]
    return ast.unparse(value) if isinstance(value, ast.Attribute) else value


# --- configs ----------------------------------------------------------------------------------------------------------


class Config(dict[str, Any]):
    """A config as JSON has it, with the defaults that its class has in its text; fields go by their other names too."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        given = {
            name: Config(value) if isinstance(value, dict) and "model_type" in value else value
            for name, value in content.items()
        }
        super().__init__(given)
        self._defaults, self._names = _defaults(str(content.get("model_type")))
        id2label = self.get("id2label")
        self["num_labels"] = len(id2label) if isinstance(id2label, dict) else self.get("num_labels", 2)

    def has(self, name: str) -> bool:
        """True for a field that the config has, be it by default."""
        name = self._names.get(name, name)
        return name in self or name in self._defaults or name in _common()

    def field(self, name: str) -> Any:
        """The value of a field; UNKNOWN where neither the config nor its class says it."""
        name = self._names.get(name, name)
        return self[name] if name in self else self._defaults.get(name, _common().get(name, UNKNOWN))

    def set(self, name: str, value: Any) -> None:
        """Gives a field a value."""
        self[self._names.get(name, name)] = value

    def copied(self) -> "Config":
        """The same again, to be changed."""
        return Config(self)


@cache
def _defaults(model_type: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Defaults of a config's fields, where they are literals, and other names of fields."""
    room = room_of(model_type).replace("modeling_", "configuration_")
    marks = re.compile(rf'^    model_type = "{re.escape(model_type)}"$', re.MULTILINE)
    try:
        of_type = [ClassText(name, room) for name, text in _room(room).classes.items() if marks.search(text)]
    except Unsure:
        return {}, {}
    above = of_type[0].above() if of_type else ()
    if any(isinstance(each, ClassText) and each.own_function("__init__") for each in above):
        raise Unsure(f"the config of {model_type!r} is made by running code, as all were in transformers 5.0 to 5.3")
    values = dict[str, Any]()
    for each in reversed(above):
        values |= _assigned(each) if isinstance(each, ClassText) else {}
    return values, values.get("attribute_map") or {}


@cache
def _common() -> dict[str, Any]:
    """Defaults that all configs have. Their class is long, and is not parsed for them."""
    text = ClassText("PreTrainedConfig", "configuration_utils.py").text
    return {name: _literal(value) for name, value in re.findall(r"^    (\w+): [^=\n]+ = (.+)$", text, re.MULTILINE)}


def _literal(text: str | ast.expr) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return UNKNOWN
