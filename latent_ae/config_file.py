"""Reading and writing the YAML file of a run, and the sentence that refuses a wrong one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from latent_ae.config import PROTOCOLS, Config, Protocol, Section
from latent_ae.errors import UserError

__all__ = ["dump_yaml", "load_config", "load_protocol", "parse_config", "plain"]

AnySection = TypeVar("AnySection", bound=Section)


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice, of which PyYAML would silently keep the last."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"the key {key!r} stands twice, below line {node.start_mark.line}")
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies `key=value` overrides with dotted keys.

    Args:
        path: the YAML file.
        overrides: such as `["training.steps=100", "network.block_out_channels=[32, 64]"]`; values
            are YAML.

    Raises:
        UserError: no such file, no YAML, an unknown key or a wrong value; the sentence names the
            key's path and the valid names.
    """
    content = _read(Path(path))
    for override in overrides or []:
        _apply_override(content, override)
    return parse_config(content, where=str(path))


def load_protocol(name: str | Path, overrides: list[str] | None = None) -> Protocol:
    """A protocol by its name or from a YAML file, with `key=value` overrides.

    Raises:
        UserError: no such name or file, an unknown key or a wrong value.
    """
    if str(name) in PROTOCOLS:
        content = PROTOCOLS[str(name)].model_dump()
    elif Path(name).suffix in (".yaml", ".yml"):
        content = {"name": Path(name).stem, **_read(Path(name))}
    else:
        raise UserError(
            f"protocol {str(name)!r} is unknown; valid: {', '.join(PROTOCOLS)}, or a YAML file"
        )
    where = f"protocol {name}"
    before, changes = _parse(Protocol, dict(content), where), {}
    for override in overrides or []:
        _apply_override(changes, override)
    content |= changes
    if "resolution" in changes and changes["resolution"] is None and "resize" not in changes:
        content["resize"] = "none"
    after = _parse(Protocol, content, where)
    if after != before and after.name == before.name:
        return after.model_copy(update={"name": f"{after.name}, changed"})
    return after


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The content of a YAML file; raises `UserError` where there is none, or no valid one."""
    try:
        return yaml.load(path.read_text(), loader)
    except FileNotFoundError as error:
        raise UserError(f"there is no config file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path, _StrictLoader)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no `key: value` lines")
    return content


def parse_config(content: dict[str, Any], where: str = "config") -> Config:
    """Validates a nested dict; `where` begins the sentence of the `UserError` it may raise."""
    return _parse(Config, content, where)


def _parse(kind: type[AnySection], content: dict[str, Any], where: str) -> AnySection:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        sentences = "; ".join(_sentence(item, kind) for item in error.errors())
        raise UserError(f"{where}: {sentences}") from None


def plain(config: Section) -> dict[str, Any]:
    """The resolved config as plain values, which `parse_config` reads back to an equal one."""
    content = _stated(config, config.model_dump(mode="json"))
    network = content.get("network", {})
    if network.get("path"):  # the folder's own config holds the other keys
        content["network"] = {key: network[key] for key in ("path", "freeze")}
    return content


def _stated(section: BaseModel, content: dict[str, Any]) -> dict[str, Any]:
    """Without what is None and would be None unsaid."""
    kept = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value is None and field.default is None:
            continue
        kept[name] = (
            _stated(value, content[name]) if isinstance(value, BaseModel) else content[name]
        )
    return kept


def dump_yaml(config: Section) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(plain(config), sort_keys=False, width=100)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} is not of the form key=value")
    try:
        value = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML") from error
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(content.get(parent), dict):
            content[parent] = {}
        content = content[parent]
    content[last] = value


def _sentence(item: Any, kind: type[Section]) -> str:
    """One of pydantic's errors in the words of the YAML file."""
    location, section = _place([str(part) for part in item["loc"]], kind)
    key = ".".join(location) or "config"
    if item["type"] == "extra_forbidden":
        valid = list(section.model_fields)
        close = difflib.get_close_matches(location[-1], valid, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"unknown key {key!r}{hint}; valid keys here: {', '.join(valid)}"
    if item["type"] == "missing":
        return f"the key {key!r} is missing"
    if item["type"] == "literal_error":
        return f"{key}: {item['input']!r} is unknown; valid: {item['ctx']['expected']}"
    if item["type"] == "union_tag_invalid":
        tag, valid = item["ctx"]["tag"], item["ctx"]["expected_tags"]
        return f"{key}.kind: {tag!r} is unknown; valid: {valid}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should", "the value should")
    given = item["input"]
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool | None) else ""
    return f"{key}: {message}{shown}"


def _place(location: list[str], section: type[Section]) -> tuple[list[str], type[Section]]:
    """An error's keys as they stand in the file, and the section that holds the last of them.

    Where several sections are possible, pydantic puts the kind of the chosen one between the keys.
    """
    keys: list[str] = []
    choices = {"": section}
    for part in location:
        if part in choices and len(choices) > 1:
            section = choices[part]
            choices = {}
        else:
            keys.append(part)
            field = section.model_fields.get(part)
            choices = _sections(field.annotation) if field else {}
            if len(choices) == 1:
                (section,) = choices.values()
    return keys, section


def _sections(annotation: Any) -> dict[str, type[Section]]:
    """The sections that an annotation allows, by their kind."""
    if isinstance(annotation, type):
        if not issubclass(annotation, Section):
            return {}
        kind = annotation.model_fields.get("kind")
        return {get_args(kind.annotation)[0] if kind else "": annotation}
    found: dict[str, type[Section]] = {}
    for part in get_args(annotation):
        found |= _sections(part)
    return found
