from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whichever test that is

ASSETS = Path(__file__).parents[1] / "sparsekit" / "assets"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Bit-identity is promised for a fixed number of threads; small models are fastest with one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _imported_for_good():
    """Every step of a run collects garbage before its memory is measured: not through what was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """A directory with a random Llama of 2 blocks (GQA) and the embedded tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=64,  # key and value heads together 32 wide: GPTQ packs 32 outputs a word row
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    directory = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny" / name, directory / name)
    return directory
