"""YAML → frozen pydantic models: strict keys, dotted overrides, dependency edges by type."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from bloomery.errors import ConfigError


class Config(BaseModel):
    """Base of every setting object: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=True)


@dataclass(frozen=True)
class Input:
    """Marks a path field as a dependency edge on an artifact of this kind."""

    kind: str


ModelDir = Annotated[Path, Input("model")]
DatasetDir = Annotated[Path, Input("dataset")]
TokenizerDir = Annotated[Path, Input("tokenizer")]
RawPath = Annotated[Path, Input("raw")]

RUN_ONLY: dict[str, Any] = {"run_only": True}
"""`Field(json_schema_extra=RUN_ONLY)`: changes how a stage runs, never what it produces; not part of its key."""

AnyConfig = TypeVar("AnyConfig", bound=Config)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-4` as a number and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
# The integer rule must be tried before the wider float rule above.
for _first, _rules in _Loader.yaml_implicit_resolvers.items():
    _rules.sort(key=lambda rule: rule[0].endswith(":float"))


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice; keep one")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError` naming file and line."""
    if not path.is_file():
        nearest = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise ConfigError(f"{path}: no such file" + (f"; did you mean {path.parent / nearest[0]}?" if nearest else ""))
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {type(data).__name__}, expected a mapping of keys to values")
    return data


def parse_yaml(text: str) -> Any:
    """One YAML value; raises `ConfigError` with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{line}not valid YAML: {error.problem}") from None


def with_setting(text: str, names: Sequence[str], value: Any) -> str:
    """YAML `text` with the setting `names` (outermost key first) set to `value`; everything else stays as written.

    The mappings around it must be there; comments and order are kept. Raises `ConfigError` naming a key that is not.
    """
    node = yaml.compose(text, Loader=_Loader)
    for depth, name in enumerate(names):
        if not isinstance(node, yaml.MappingNode) or not node.value:
            raise ConfigError(f"{'.'.join(names[:depth])}: expected a mapping that {name} can be written into")
        found = next((item for key, item in node.value if key.value == name), None)
        if found is None and depth + 1 < len(names):
            raise ConfigError(f"{'.'.join(names[: depth + 1])}: not in the file, so nothing can be written into it")
        parent, node = node, found
    written = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    if node is not None:
        return text[: node.start_mark.index] + written + text[_end(node) :]
    end = _end(parent.value[-1][1])
    if parent.flow_style:
        return f"{text[:end]}, {names[-1]}: {written}{text[end:]}"
    line = text.find("\n", end)
    end = len(text) if line < 0 else line
    return f"{text[:end]}\n{' ' * parent.value[0][0].start_mark.column}{names[-1]}: {written}{text[end:]}"


def _end(node: yaml.Node) -> int:
    """Where the last character of a node lies; a block's own mark is behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return node.end_mark.index


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with each `a.b.c=value` set; the value is read as YAML."""
    result = _copy(data)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ConfigError(f"{override!r}: expected key=value, for example loop.max_steps=50")
        _set(result, name.split("."), parse_yaml(text), name)
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _set(target: Any, path: list[str], value: Any, name: str) -> None:
    *parents, last = path
    for key in parents:
        target = target[_index(target, key, name)] if isinstance(target, list) else target.setdefault(key, {})
        if not isinstance(target, dict | list):
            raise ConfigError(f"{name}: {key} is {target!r}, not a group of settings")
    target[_index(target, last, name) if isinstance(target, list) else last] = value


def _index(items: list[Any], key: str, name: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"{name}: {key!r} is not a position in a list of {len(items)}; choose 0 to {len(items) - 1}")
    return int(key)


def build(cls: type[AnyConfig], data: Mapping[str, Any], where: str = "") -> AnyConfig:
    """`cls(**data)` with every problem named by its dotted key; raises `ConfigError`."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = [_explain(cls, problem, where) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


def _explain(cls: type[Config], problem: Any, where: str) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join([where, *location] if where else location)
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_keys(cls, location[:-1]))
        nearest = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}" if known else "remove it"
        return f"{name}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{name}: missing; a value is required"
    found = problem.get("input")
    shown = "" if isinstance(found, dict) else f" (found {found!r})"
    return f"{name or cls.__name__}: {problem['msg'].removeprefix('Value error, ')}{shown}"


def _known_keys(cls: type[Config], path: Sequence[str]) -> set[str]:
    """Field names at `path`, walking through lists, mappings and unions (whose tags pydantic puts in the path)."""
    owners: list[type[Config]] = [cls]
    for part in path:
        fields = [owner.model_fields[part] for owner in owners if part in owner.model_fields]
        if fields:
            owners = [model for field in fields for model in models_in(field.annotation)]
        else:
            tagged = [owner for owner in owners if part in _tags(owner)]
            owners = tagged or owners
    return {name for owner in owners for name in owner.model_fields}


def _tags(owner: type[Config]) -> set[str]:
    return {str(field.default) for field in owner.model_fields.values() if not field.is_required()}


def models_in(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from models_in(argument)


def load(cls: type[AnyConfig], path: Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """One stage's config from a YAML file, with dotted overrides."""
    return build(cls, apply_overrides(read_yaml(path), overrides), where=str(path))


def dump(config: Config) -> str:
    """The YAML that `load` reads back to an equal config."""
    return to_yaml(config.model_dump(mode="json"))


def to_yaml(data: Any) -> str:
    """Block-style YAML in the given key order."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted key → value of nested mappings."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key, item in value.items() for k, v in flatten(item, f"{name}.{key}" if name else key).items()}


def inputs(config: Config) -> dict[str, tuple[str, Path]]:
    """Every dependency edge of a config: dotted field → (artifact kind, path). `None` fields are no edge."""
    return {name: (edge.kind, value) for name, edge, value in _edges(config, "") if value is not None}


def _edges(value: Any, name: str) -> Iterator[tuple[str, Input, Any]]:
    if isinstance(value, Config):
        for field_name, field in type(value).model_fields.items():
            dotted = f"{name}.{field_name}" if name else field_name
            item = getattr(value, field_name)
            marks = [mark for mark in _metadata(field) if isinstance(mark, Input)]
            if marks and not isinstance(item, Mapping | list | tuple):
                yield dotted, marks[0], item
            elif marks:
                pairs = item.items() if isinstance(item, Mapping) else enumerate(item)
                yield from ((f"{dotted}.{key}", marks[0], path) for key, path in pairs)
            else:
                yield from _edges(item, dotted)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _edges(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _edges(item, f"{name}.{position}")


def _metadata(field: FieldInfo) -> list[Any]:
    """Marks on the field itself and inside `X | None`, `list[X]`, `dict[str, X]`."""
    return [*field.metadata, *_annotations(field.annotation)]


def _annotations(annotation: Any) -> Iterator[Any]:
    yield from getattr(annotation, "__metadata__", ())
    for argument in getattr(annotation, "__args__", ()):
        yield from _annotations(argument)


def identity(config: Config) -> dict[str, Any]:
    """The settings that decide what a stage produces, as JSON values.

    Run-only fields are left out, and so are dependency paths: an input counts by its content, not its place.
    """
    return _identity(config)


def _identity(value: Any) -> Any:
    if isinstance(value, Config):
        return {
            name: _identity(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if not _is_run_only(field) and not any(isinstance(mark, Input) for mark in _metadata(field))
        }
    if isinstance(value, Mapping):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _is_run_only(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("run_only"))


__all__ = [
    "RUN_ONLY", "Config", "DatasetDir", "Field", "Input", "ModelDir", "RawPath", "TokenizerDir",
    "apply_overrides", "build", "dump", "flatten", "identity", "inputs", "load", "parse_yaml", "read_yaml", "to_yaml",
]  # fmt: skip
