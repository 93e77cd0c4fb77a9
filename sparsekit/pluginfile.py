"""Running a plugin's file: whatever goes wrong in it, its name is told."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

from sparsekit.errors import PluginError


def run_file(path: Path) -> None:
    """Run a Python file as a module of its own; its decorators register what it brings.

    Args:
        path: Absolute; two files of one name do not get in each other's way.
    Raises:
        PluginError: The file is missing, is no Python file, or fails.
    """
    if not path.is_file():
        raise PluginError(f"plugin {path} is not a file")
    module_name = f"sparsekit_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way; its file is what to name
        raise PluginError(f"plugin {path} failed to load: {type(error).__name__}: {error}") from error
