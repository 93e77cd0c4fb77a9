"""Large random models through one device with the host's memory capped; peaks are recorded.

    python docs/benchmarks/load.py write-7b --work /tmp/load --out docs/benchmarks/load.json
    python docs/benchmarks/load.py 7b --work /tmp/load --out docs/benchmarks/load.json --host-gb 16
    python docs/benchmarks/load.py write-70b 70b --work /tmp/load --out docs/benchmarks/load.json --host-gb 16
    python docs/benchmarks/load.py write-tiny tiny --work /tmp/load --out /tmp/load.json --device cpu

`7b` is a model of Llama-2-7B's blocks (13 GB in shards of one block), pruned 2:4 by SparseGPT and quantized to
4 bits by GPTQ; `70b` the first 2 blocks of Llama-3.1-70B's shape. `--blocks` takes fewer of them. A run that is not
done after `--seconds` is stopped with SIGTERM; the same command continues it. The cap is a cgroup's where one can be
made, else the process is watched, twenty times a second, and killed when its own memory is over it: limits of the
kernel count addresses that CUDA reserves (RLIMIT_AS) and weight files that are mapped (RLIMIT_DATA).
Disk for `7b`: model 13 GB, steps 17 GB, export 4 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from sparsekit.models.locate import ASSETS

GB = 10**9
OWN = ("RssAnon", "RssShmem")  # of /proc: private memory, and page-locked buffers
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2, "num_attention_heads": 64,
            "num_key_value_heads": 8},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2},
}  # fmt: skip
RECIPE = """\
name: load-{shape}
output: {work}/run-{shape}
model: {{path: {work}/{shape}, device: {device}}}
data: {{calibration: {{path: builtin:calibration, samples: {samples}, seq_len: 512}}}}
steps:
  - {{method: sparsegpt, pattern: "2:4"}}
  - {{method: gptq, bits: 4, group_size: 128}}
export: {{formats: [gptq]}}
"""


def write_model(shape: str, blocks: int | None, directory: Path, device: str) -> dict[str, Any]:
    """Write a random model in bfloat16, one shard a block, with one block in memory at a time."""
    start = time.monotonic()
    sizes = {**SHAPES[shape], **({"num_hidden_layers": blocks} if blocks else {})}
    config = LlamaConfig(vocab_size=8192, max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16",
                         architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=0, **sizes)  # fmt: skip
    shutil.rmtree(directory, ignore_errors=True)
    config.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny" / name, directory / name)
    width, inner = config.hidden_size, config.intermediate_size
    narrow = width // config.num_attention_heads * config.num_key_value_heads
    inside = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (narrow, width),
              "self_attn.v_proj": (narrow, width), "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width),
              "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}  # fmt: skip
    parts = [{f"model.layers.{index}.{name}.weight": shape for name, shape in inside.items()}
             | {f"model.layers.{index}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
             for index in range(config.num_hidden_layers)]  # fmt: skip
    parts.append({"model.embed_tokens.weight": (8192, width), "lm_head.weight": (8192, width),
                  "model.norm.weight": (width,)})  # fmt: skip
    listed: dict[str, str] = {}
    total = 0
    generator = torch.Generator(device).manual_seed(0)
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: _random(shape, device, generator) for name, shape in part.items()}
        save_file(tensors, directory / file, {"format": "pt"})
        listed |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"bytes": total, "blocks": config.num_hidden_layers, "seconds": round(time.monotonic() - start, 1)}


def _random(shape: tuple[int, ...], device: str, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
    return (values / shape[1] ** 0.5).cpu()


def capped(limit: int) -> tuple[str, Path | None]:
    """How the memory of a child can be capped: (words, the cgroup to put it in or None)."""
    root = Path("/sys/fs/cgroup")
    group = root / f"sparsekit-load-{os.getpid()}"
    if not (root / "cgroup.controllers").is_file():
        return "watched (no cgroup of version 2)", None
    try:
        group.mkdir()
        (group / "memory.max").write_text(str(limit))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        return f"watched (no cgroup: {error.strerror})", None
    return "cgroup memory.max", group


def run(shape: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run, or continue, the recipe in a child under the cap and watch its memory."""
    work: Path = given.work
    recipe = work / f"{shape}.yaml"
    recipe.write_text(RECIPE.format(shape=shape, work=work, device=given.device, samples=given.samples))
    limit = int(given.host_gb * GB)
    words, group = capped(limit)

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    start = time.monotonic()
    peaks = dict.fromkeys(("VmHWM", *OWN), 0)
    with open(work / f"{shape}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sparsekit", "run", str(recipe)], stdout=log, stderr=log, preexec_fn=enter
        )
        while process.poll() is None:
            if watch(process.pid, peaks) > limit:
                process.kill()
            if time.monotonic() - start > given.seconds:
                process.send_signal(signal.SIGTERM)
                process.wait()
            time.sleep(0.05)
    if group is not None:
        group.rmdir()
    found: dict[str, Any] = {
        "exit_code": process.returncode, "stopped": process.returncode == 143, "host_cap_gb": given.host_gb,
        "cap": words, "seconds": round(time.monotonic() - start, 1), "host_peak_resident_gb": peaks["VmHWM"] / GB,
        "host_peak_private_gb": peaks["RssAnon"] / GB, "host_peak_page_locked_gb": peaks["RssShmem"] / GB,
        "blocks_done": _blocks(work / f"run-{shape}"),
    }  # fmt: skip
    report = work / f"run-{shape}" / "report.json"
    if process.returncode == 0:
        steps = json.loads(report.read_text())["steps"]
        kept = ("method", "seconds", "peak_memory", "peak_memory_of", "groups", "violations", "numerics")
        found["steps"] = [{key: step.get(key) for key in kept} for step in steps]
    elif process.returncode != 143:
        found["output"] = (work / f"{shape}.log").read_text()[-2000:]
    return found


def watch(process: int, peaks: dict[str, int]) -> int:
    """Note the peaks of a process; what its own memory is now, without the files that it maps."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0  # it has just ended
    now = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if name in peaks
    }
    for name, size in now.items():
        peaks[name] = max(peaks[name], size)
    return sum(now.get(name, 0) for name in OWN)


def _blocks(directory: Path) -> dict[str, int]:
    return {step.name.rpartition("-")[0]: len(list(step.glob("block-*.json")))
            for step in sorted(directory.glob("steps/*"))}  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [f"{write}{shape}" for shape in SHAPES for write in ("write-", "")]
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON; parts of the same name are replaced")
    parser.add_argument("--host-gb", type=float, default=16.0)
    parser.add_argument("--seconds", type=float, default=80.0, help="after which a run is stopped, to be continued")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--blocks", type=int, help="of the model that is written; default all of the shape")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    given.work = given.work.absolute()
    given.work.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if given.device != "cpu" else "cpu"
    for part in given.parts:
        shape = part.removeprefix("write-")
        if part.startswith("write-"):
            result = write_model(shape, given.blocks, given.work / shape, given.device)
        else:
            result = run(shape, given)
        known = json.loads(given.out.read_text()) if given.out.exists() else {}
        given.out.write_text(json.dumps({**known, part: {"device": card, **result}}, indent=1) + "\n")
        print(part, json.dumps(result))
        if result.get("exit_code") not in (None, 0, 143):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
