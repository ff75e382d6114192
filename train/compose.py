"""From Hydra's YAML and command-line overrides to dataclasses, with every fault found in one go.

OmegaConf stops at the first wrong key; here the files are merged without a schema and then set leaf by leaf.
"""

import difflib
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from .secrets import (
    READABLE_PREFIXES,
    READABLE_VARIABLES,
    is_readable_variable,
    refuse_secrets,
    refuse_secrets_in_overrides,
)


def compose_config(
    overrides: list[str], *, config_class: type, config_name: str, schema_name: str, defaults: Any = None
) -> Any:
    """Compose the YAML files with command-line overrides into `config_class`, whose own `faults` are left to the caller.

    What they leave open is as in `defaults`, an object of that class, or else as the class has it.
    Raises ValueError with every unknown key, wrong type and unreadable override in one message, or with the secrets among them.
    """
    refuse_secrets_in_overrides(overrides)  # first: other messages repeat what they are about
    config, faults = _compose_untyped(overrides, config_name=config_name, schema_name=schema_name)
    typed = OmegaConf.structured(config_class if defaults is None else defaults)
    refuse_secrets(_leaves(config))
    for path, value in _leaves(config):
        faults += _set_typed(typed, path, value, config_class)
    result = OmegaConf.to_object(typed)
    if faults:
        # What could be set is set, so rules between fields can already speak; fields in doubt keep their defaults.
        raise ConfigFaults(faults, result)
    return result


def read_settings(path: Path, *, config_class: type) -> Any:
    """The settings of a YAML file whose keys are fields of `config_class`.

    Raises ConfigFaults with every unknown key and wrong type, ValueError for secrets or what is no such file; all name the file.
    """
    try:
        content = _TextLoader(path.read_text(encoding="utf-8")).get_single_data()
        if not isinstance(content, dict):
            raise ValueError("it must hold KEY: VALUE lines")
        leaves = list(_leaves(OmegaConf.create(content)))
        refuse_secrets(leaves)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{path} cannot be used: {line}{error.problem}") from error
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} cannot be used: {str(error).splitlines()[0]}") from error
    typed = OmegaConf.structured(config_class)
    faults = [f"{path}: {fault}" for name, value in leaves for fault in _set_typed(typed, name, value, config_class)]
    result = OmegaConf.to_object(typed)
    if faults:
        raise ConfigFaults(faults, result)
    return result


class _TextLoader(yaml.SafeLoader):
    """Leaves numbers as they stand there, for the type of each setting to read: YAML takes 24:00:00 for the number 86400."""


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _readable_variable(name: str, default: Any = oc._DEFAULT_MARKER_) -> Any:
    """OmegaConf's ${oc.env:NAME}, for variables that are no secrets."""
    if not is_readable_variable(name):
        allowed = ", ".join([*READABLE_VARIABLES, *(f"{prefix}..." for prefix in READABLE_PREFIXES)])
        raise ValueError(f"settings must not hold the environment variable {name} (only {allowed})")
    return oc.env(name, default)


# Wherever settings are resolved, also those that a file brings.
OmegaConf.register_new_resolver("oc.env", _readable_variable, replace=True)


class ConfigFaults(ValueError):
    """Faults found while composing, with the settings as far as they are known."""

    def __init__(self, faults: list[str], partial: Any) -> None:
        self.faults, self.partial = faults, partial
        super().__init__(fault_message(faults))


def fault_message(faults: list[str]) -> str:
    """One message for all faults."""
    lines = "\n".join(f"  - {fault}" for fault in faults)
    return f"the configuration has {len(faults)} fault{'s' if len(faults) > 1 else ''}:\n{lines}"


def plain(config: Any) -> dict[str, Any]:
    """Settings as plain numbers, strings, lists and dicts, enums by name; what YAML, JSON and W&B take."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # type: ignore[return-value]


def register_schema(name: str, config_class: type) -> None:
    """Make the dataclass known to Hydra, which then shows every field and its default in `--cfg job`."""
    ConfigStore.instance().store(name=name, node=config_class)


def _compose_untyped(overrides: list[str], *, config_name: str, schema_name: str) -> tuple[DictConfig, list[str]]:
    """The YAML files and overrides merged without a schema, so that one wrong key does not hide the next."""
    faults: list[str] = []
    groups, values = [], []
    known_groups = _config_groups(config_name)
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except Exception as error:  # Hydra's parser raises its own and antlr's classes
            faults.append(f"{text!r} is not KEY=VALUE ({str(error).splitlines()[0]})")
            continue
        if override.key_or_group in known_groups:
            groups.append(text)
        else:
            values.append(override)
    store = ConfigStore.instance()
    store.store(name=schema_name, node={})
    with initialize_config_module("muybridge.configs", version_base="1.3"):
        try:
            config = compose(config_name, overrides=groups)
        except Exception as error:  # a missing group member, a YAML error: Hydra's message names file and choices
            raise ValueError(f"the configuration cannot be composed: {error}") from error
    OmegaConf.set_struct(config, False)
    for override in values:
        _apply(config, override, faults)
    return config, faults


def _apply(config: DictConfig, override: Override, faults: list[str]) -> None:
    if override.is_delete():
        faults.append(f"{override.input_line!r}: deleting a key is not supported, set it instead")
    elif override.is_sweep_override():
        faults.append(f"{override.input_line!r}: a sweep needs --multirun")
    else:
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)


def _config_groups(config_name: str) -> set[str]:
    """The groups of files that can be chosen; none where the file is put together from no group, whose names are free then."""
    root = Path(__file__).parents[1] / "configs"
    content = OmegaConf.load(root / f"{config_name}.yaml")
    assert isinstance(content, DictConfig)
    if not any(isinstance(default, DictConfig) for default in content.defaults):
        return set()
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir() and path.name != "__pycache__"}


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in map(str, node):
        path = f"{prefix}{key}"
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
            yield from _leaves(value, f"{path}.")
        elif not OmegaConf.is_missing(node, key):
            yield path, node[key]


def _set_typed(typed: DictConfig, path: str, value: Any, config_class: type) -> list[str]:
    """Set one leaf in the typed settings; returns the faults."""
    parent, known = typed, config_class.__name__
    *sections, leaf = path.split(".")
    for depth, name in enumerate([*sections, leaf]):
        here = ".".join([*sections, leaf][: depth + 1])
        if _is_mapping_of_sections(parent) and name not in parent:
            if depth == len(sections):
                return [
                    f"{here}={value} must be a section with the settings of {parent._metadata.element_type.__name__}"
                ]
            parent[name] = OmegaConf.structured(parent._metadata.element_type)
        if fault := _unknown(parent, name, here, known):
            return [fault]
        if depth < len(sections):
            parent = parent._get_node(name)  # type: ignore[assignment]
            known = here
    node = parent._get_node(leaf)
    if isinstance(node, ListConfig) and is_dataclass(node._metadata.element_type) and isinstance(value, ListConfig):
        return _set_sections(node, path, value)
    try:
        parent[leaf] = value
    except OmegaConfBaseException as error:
        rule = str(error).splitlines()[0]
        return [f"{path}={value}: {rule}"]
    return []


def _is_mapping_of_sections(node: Any) -> bool:
    return isinstance(node, DictConfig) and is_dataclass(node._metadata.element_type)


def _unknown(parent: Any, name: str, here: str, known: str) -> str:
    if isinstance(parent, DictConfig) and name in parent:
        return ""
    options = [str(option) for option in parent] if isinstance(parent, DictConfig) else []
    close = difflib.get_close_matches(name, options, n=1)
    section = here.removesuffix(name)
    return f"{here} is not a setting of {known}" + (f", did you mean {section}{close[0]}?" if close else "")


def _set_sections(target: ListConfig, path: str, values: ListConfig) -> list[str]:
    """Set a list of sections, such as buckets, each key by key; returns the faults."""
    faults = []
    element = target._metadata.element_type
    target.clear()
    for place, value in enumerate(values):
        section = OmegaConf.structured(element)
        if isinstance(value, DictConfig):
            for leaf_path, leaf in _leaves(value):
                found = _set_typed(section, leaf_path, leaf, element)
                faults += [
                    f"{path}[{place}].{fault}".replace("did you mean ", f"did you mean {path}[{place}].")
                    for fault in found
                ]
        else:
            faults.append(f"{path}[{place}]={value} must be a section with the settings of {element.__name__}")
        target.append(section)
    return faults
