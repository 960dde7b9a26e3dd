"""Options of ``fasttricks train`` in a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from . import checkpoint
from .recipe import Recipe, Run

# fields whose option has the opposite meaning
_NEGATED = {"no_bias_decay": "bias_decay"}


class ConfigError(RuntimeError):
    """The configuration cannot be read; the message says why."""


def arguments(path: Path) -> list[str]:
    """The command line that is equivalent to a configuration file.

    Keys are option names without the leading dashes, with ``_`` or ``-`` between words. true sets a switch, false
    clears it, and null omits the option.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping of options to single values.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--config {path}: expected a mapping of options to values, got {type(config).__name__}")
    found = []
    for name, value in config.items():
        if isinstance(value, (dict, list)):
            raise ConfigError(f"--config {path}: {name}: expected one value, got {value!r}")
        option = str(name).replace("_", "-")
        if value is True:
            found.append(f"--{option}")
        elif value is False:
            found.append(f"--no-{option}")
        elif value is not None:
            found.append(f"--{option}={value}")
    return found


def save(path: Path, recipe: Recipe, run: Run, preset: str, device: str) -> None:
    """Writes the options that repeat this run: ``fasttricks train --config PATH --out FOLDER``."""
    options: dict[str, Any] = {"data": run.data, "data_dir": run.data_dir and str(run.data_dir), "preset": preset}
    for name, value in recipe.model_dump().items():
        options[_NEGATED.get(name, name)] = not value if name in _NEGATED else value
    options |= {"device": device, "workers": run.workers, "log_every": run.log_every}
    options |= {"compile": run.compile, "cuda_graph": run.cuda_graph, "save_every": run.save_every}
    options |= {"max_skipped_steps": run.max_skipped_steps, "min_loss_scale": run.min_loss_scale}
    options |= {"max_bad_files": run.max_bad_files}
    checkpoint.write(path, lambda file: file.write(yaml.safe_dump(options, sort_keys=False).encode()))
