"""What the readers here share: the question, and how an answer is told. Nothing of sparsekit is imported.

A reference is an .npz that `reference.py` writes: `tokens` int64 [windows, seq_len], `logits` float32
[windows, seq_len, vocabulary], `text` and `perplexity`.
"""

import argparse
import json
import lzma
import math
import sys
from importlib import metadata

import numpy as np

DIGITS = 4  # of a perplexity that must agree
WINDOWS, SEQ_LEN = 6, 256  # of the text a reference is about


def arguments(doc: str, tolerance: float = 0.002) -> argparse.Namespace:
    """DIRECTORY REFERENCE [--tolerance]."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("directory", help="an export")
    parser.add_argument("reference", help="of reference.py")
    parser.add_argument("--tolerance", type=float, default=tolerance, help="of the largest logit")
    return parser.parse_args()


def read_reference(path: str) -> dict[str, np.ndarray]:
    """The arrays of a reference."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Of the next tokens, float64: logits [windows, seq_len, vocabulary], tokens [windows, seq_len]."""
    return float(np.exp(-picked(log_softmax(logits[:, :-1]), tokens[:, 1:]).mean()))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def picked(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The entries of the last axis that `index` names."""
    return np.take_along_axis(values, index[..., None], -1)[..., 0]


def versions(*packages: str) -> dict[str, str]:
    """Of installed distributions."""
    return {package: metadata.version(package) for package in packages}


def answer(reader: str, difference: float, largest: float, found: float, expected: float, tolerance: float, **more):
    """Print one JSON line and leave, with 1 when the answer is wrong."""
    close = difference <= tolerance * largest  # False for NaN
    unit = 10 ** (math.floor(math.log10(expected)) + 1 - DIGITS)  # of the last digit that must agree
    same = abs(found - expected) <= unit / 2
    about = {
        "reader": reader,
        "passed": bool(close and same),
        "largest_difference": difference,
        "largest_logit": largest,
        "tolerance": tolerance * largest,
        "perplexity": found,
        "reference_perplexity": expected,
        **more,
    }
    print("ANSWER " + json.dumps(about))
    sys.exit(int(not about["passed"]))


def answer_logits(reader: str, forward, tokenizer, options: argparse.Namespace, **more):
    """Ask a model in this process.

    Args:
        reader: Name and versions go into the answer.
        forward: From tokens int64 [1, seq_len] to logits [seq_len, vocabulary], NumPy both.
        tokenizer: Of the directory; it must give the reference's tokens.
        options: Of `arguments`.
        more: Further facts for the answer.
    """
    known = read_reference(options.reference)
    tokens = known["tokens"]
    own = tokenizer(str(known["text"]), add_special_tokens=False)["input_ids"]
    if list(own[: tokens.size]) != tokens.flatten().tolist():
        sys.exit(f"{options.directory}: its tokenizer gives other tokens")
    found = np.stack([forward(row[None]) for row in tokens])
    difference = float(np.abs(found - known["logits"]).max())
    expected, largest = float(known["perplexity"]), float(np.abs(known["logits"]).max())
    answer(reader, difference, largest, perplexity(found, tokens), expected, options.tolerance, **more)


def text_of(path: str) -> str:
    """A text file's content, packed or not."""
    with open(path, "rb") as file:
        data = file.read()
    return (lzma.decompress(data) if path.endswith(".xz") else data).decode()


def compare_with(model, tokenizer, content: str, directory: str) -> None:
    """Write reference.npz beside a checkpoint: what the software that wrote it computes (PyTorch, float32)."""
    import torch  # NumPy is enough for the rest

    ids = tokenizer(content[: WINDOWS * SEQ_LEN * 8], add_special_tokens=False)["input_ids"]
    tokens = np.array(ids[: WINDOWS * SEQ_LEN]).reshape(WINDOWS, SEQ_LEN)
    with torch.inference_mode():
        logits = np.stack([model(input_ids=torch.from_numpy(row[None])).logits[0].float().numpy() for row in tokens])
    write_reference(f"{directory}.npz", tokens, logits, content)


def write_reference(path: str, tokens: np.ndarray, logits: np.ndarray, content: str) -> None:
    """See the module."""
    found = perplexity(logits, tokens)
    text = np.array(content[: WINDOWS * SEQ_LEN * 8])
    np.savez(path, tokens=tokens, logits=logits, text=text, perplexity=np.array(found))
    print(f"{path}: perplexity {found:.6f}, largest logit {np.abs(logits).max():.3f}")
