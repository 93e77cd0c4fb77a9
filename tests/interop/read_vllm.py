"""Serve an export with vLLM over HTTP on the loopback, and read log-probabilities back.

    python read_vllm.py EXPORT_DIR REFERENCE.npz          in the environment of requirements-vllm.txt

Log-probabilities of the text's own tokens and of the most likely ones are compared; they are the
logits up to one number a position. Its integer kernels compute in float16 or bfloat16, never in
float32, which sets the tolerance.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
from common import answer, arguments, log_softmax, picked, read_reference, versions

HOST, START = "127.0.0.1", 300  # seconds
QUIET = {
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def post(port: int, tokens: list[int]) -> list[dict]:
    """Log-probabilities of a prompt, one mapping from token to {logprob} a position but the first."""
    asked = {"model": "model", "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 5}
    request = urllib.request.Request(
        f"http://{HOST}:{port}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["prompt_logprobs"][1:]


def wait(server: subprocess.Popen, port: int) -> None:
    """Until the server is healthy."""
    for _ in range(START):
        if server.poll() is not None:
            sys.exit(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    sys.exit(f"the server was not healthy after {START} s")


def main() -> None:
    """Serve, ask, answer."""
    options = arguments(__doc__, tolerance=0.005)
    known = read_reference(options.reference)
    tokens, expected = known["tokens"], log_softmax(known["logits"][:, :-1])
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.directory]
    command += ["--served-model-name", "model", "--host", HOST, "--port", str(port), "--enforce-eager"]
    command += ["--dtype", "float16", "--max-model-len", str(tokens.shape[1] + 8), "--max-logprobs", "5"]
    with subprocess.Popen(command, env={**os.environ, **QUIET}, stdout=sys.stderr) as server:
        try:
            wait(server, port)
            found = [post(port, row.tolist()) for row in tokens]
        finally:
            server.terminate()
    own = np.array(
        [
            [at[str(token)]["logprob"] for at, token in zip(row, window[1:], strict=True)]
            for row, window in zip(found, tokens, strict=True)
        ]
    )
    difference = max(
        abs(entry["logprob"] - expected[window, place, int(token)])
        for window, row in enumerate(found)
        for place, at in enumerate(row)
        for token, entry in at.items()
    )
    difference = max(difference, float(np.abs(own - picked(expected, tokens[:, 1:])).max()))
    largest = float(np.abs(known["logits"]).max())
    score = float(np.exp(-own.mean()))
    about = versions("vllm-cpu", "transformers", "torch", "compressed-tensors")
    answer(
        "vllm", float(difference), largest, score, float(known["perplexity"]), options.tolerance, versions=about,
        compared="log-probabilities of the text's tokens and of the 5 most likely",
    )  # fmt: skip


if __name__ == "__main__":
    main()
