"""Settings files: YAML into a settings dataclass, refusing what the dataclass doesn't know."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from llmrec.errors import MissingPartError, SettingsError

Settings = TypeVar("Settings")


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of `name: value` lines.

    Raises:
        MissingPartError: No such file.
        SettingsError: Not YAML, or not a mapping.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise MissingPartError(f"no settings file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold settings, one 'name: value' a line")
    return content


def settings_from(settings_class: type[Settings], values: Mapping[str, Any], what: str) -> Settings:
    """Builds a settings dataclass from a mapping read out of YAML.

    Args:
        settings_class: The dataclass.
        values: Field names and values.
        what: Where they come from, for the message.

    Raises:
        SettingsError: A key that is no field, a required one that is missing, or text where a number belongs.
    """
    known = {entry.name: entry for entry in dataclasses.fields(settings_class)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in known:
            raise SettingsError(f"{what}: unknown setting {name!r}; known: {', '.join(known)}")
        default = known[name].default
        if isinstance(default, int | float) and isinstance(value, str):
            raise SettingsError(f"{what}: {name} is the text {value!r}, not a number; in YAML write 1.0e-4, not 1e-4")
    missing = [
        name
        for name, entry in known.items()
        if name not in values and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SettingsError(f"{what}: {', '.join(missing)} must be set")
    return settings_class(**values)
