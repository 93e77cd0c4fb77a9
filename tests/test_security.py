"""What a hostile model, recipe, task or file must not be able to do; SECURITY.md names these tests."""

from __future__ import annotations

import ast
import re
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from test_bad_inputs import RECIPE, base, config, put  # noqa: F401  # `base` is a fixture

from sparsekit.cli import main
from sparsekit.errors import CheckpointError, ModelError
from sparsekit.interchange.imports import load_quantized
from sparsekit.models.locate import offline
from sparsekit.models.view import ModelView

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "sparsekit").rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__"}
DOTTED = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
          "numpy.load", "np.load", "shutil.unpack_archive", "tarfile.open", "zipfile.ZipFile"}  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_source_loads_pickles_or_runs_text(path):
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not MODULES & {alias.name.partition(".")[0] for alias in node.names}, where
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in MODULES, where
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in CALLS | DOTTED, f"{where}: {called}"
            assert not any(word.arg == "shell" for word in node.keywords), f"{where}: a shell"


def test_only_plugins_are_executed_and_only_by_the_registry():
    users = [p.name for p in SOURCES if "exec_module" in p.read_text() or "spec_from_file_location" in p.read_text()]
    assert users == ["pluginfile.py"]  # which the registry calls


CODE = """\
from pathlib import Path
Path(__file__).with_name("ran").write_text("")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize(("key", "flag"), [(False, False), (False, True), (True, False), (True, True)])
def test_code_of_a_checkpoint_needs_the_recipe_and_the_flag(base, key, flag):  # noqa: F811
    config(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})(base)
    marker = base / "ran"
    put("model/own.py", CODE.replace('Path(__file__).with_name("ran")', f"Path({str(marker)!r})"))(base)
    recipe = base / "bad.yaml"
    if key:
        recipe.write_text(recipe.read_text().replace("device: cpu", "device: cpu, trust_remote_code: true"))
    result = CliRunner().invoke(main, ["run", str(recipe), *(["--trust-remote-code"] if flag else [])])
    if key and flag:
        assert marker.exists(), result.output  # the same code, agreed to twice
        return
    assert result.exit_code == 2, result.output
    assert not marker.exists()


def test_no_network_unless_allowed(base, monkeypatch):  # noqa: F811
    asked: list[object] = []

    def connect(self, address):
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **_: asked.append(given) or [])
    result = CliRunner().invoke(main, ["run", str(base / "bad.yaml")])
    assert result.exit_code == 0, result.output
    assert asked == []
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with offline(False):
        assert huggingface_hub.constants.HF_HUB_OFFLINE is True
    with offline(True):
        assert before == huggingface_hub.constants.HF_HUB_OFFLINE
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_marker_cannot_point_outside_its_directory(tmp_path):
    (tmp_path / "m").mkdir()
    put("m/config.json", '{"quantization_config": {"quant_method": "sparsekit-24", "version": 1, "pattern": "2:4", '
        '"bits": 4, "group_size": 16, "symmetric": true, "act_order": false}}')(tmp_path)  # fmt: skip
    for name in ("../secret", "/etc/passwd", "a/../../secret"):
        put("m/sparsekit.json", f'{{"files": {{"{name}": {{"bytes": 1, "sha256": "x"}}}}}}')(tmp_path)
        with pytest.raises(CheckpointError, match="outside the directory"):
            load_quantized(tmp_path / "m")


def test_an_index_cannot_point_outside_its_directory(base):  # noqa: F811
    save_file({"model.norm.weight": torch.ones(64)}, base / "outside.safetensors")
    (base / "model" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"model.norm.weight": "../outside.safetensors"}}'
    )
    with pytest.raises(ModelError, match="outside"):
        ModelView.open(base / "model", device="cpu")


def test_every_line_of_the_threat_model_names_a_test_that_exists():
    text = (ROOT / "SECURITY.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`tests/" in line]
    assert len(rows) >= 15
    for row in rows:
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row):
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), f"{file} has no {name}"
    listed = [line for line in text.splitlines() if line.startswith("| ") and not set(line) <= set("|- ")]
    assert all("`tests/" in line for line in listed[1:]), "a line of the threat model has no test"
