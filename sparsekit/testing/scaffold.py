"""`sparsekit new-method`: a plugin file that works, and its test, from the two templates of a kind."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from importlib.resources import files
from pathlib import Path

from sparsekit.errors import PluginError, nearest
from sparsekit.files import write_text
from sparsekit.testing import SUITES

KINDS = ("prune", "quantize", "allocate", "format", "evaluator", "section")  # `templates/KIND.py`, test_KIND.py


def new_method(name: str, kind: str, directory: Path) -> tuple[Path, Path]:
    """Write `NAME.py` and `test_NAME.py`; existing files are never overwritten.

    Returns:
        The plugin and its test.
    Raises:
        PluginError: The name is taken, that of a module or no lower-case identifier, or a file is there already.
    """
    if kind not in KINDS:
        raise PluginError(f"no kind {kind!r}; there are {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise PluginError(
            f"name {name!r} must be lower case letters, digits and _, and no word of Python, as in my_pruner"
        )
    if name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise PluginError(f"a module {name!r} is installed, which {name}.py would hide; choose another name")
    for suite in SUITES:
        if name in suite.names():
            raise PluginError(f"the name {name!r} is taken ({suite.noun}); choose another one")
    plugin, test = directory / f"{name}.py", directory / f"test_{name}.py"
    for path in (plugin, test):
        if path.exists():
            raise PluginError(f"{path} exists already; choose another name or --directory")
    for path, template in ((plugin, f"{kind}.py"), (test, f"test_{kind}.py")):
        written = (files("sparsekit.testing.templates") / template).read_text(encoding="utf-8")
        title = name.replace("_", " ").capitalize()
        write_text(path, written.replace("given_name", name).replace("Given name", title))
    return plugin, test
