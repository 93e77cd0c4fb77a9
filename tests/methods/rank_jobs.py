"""What the ranks of `test_ast_ranks.py` do."""

import hashlib
import json
import os
from dataclasses import replace

import torch
from safetensors.torch import save_file
from test_ast import SETTING, make_job

from sparsekit.methods.ast import ast
from sparsekit.training.world import ALONE, World

KEPT = 7
SETTINGS = {**SETTING, "second_moment": "momentum", "kl": 0.6667, "temperature": 2.0, "checkpoint_every": 1}
SETTINGS |= {"micro_batch": 1, "mask_every": 2}
BITS = {"bits": 4, "group_size": 8, "quantize_from": 0.2}  # from step 5 on


class Stopped(Exception):
    """Ends a run in the middle."""


def stopping(done, total):
    if done == KEPT * 64:
        raise Stopped


def watched(model, linears):
    """Digests of the masks that a training forward computes with, one for each change."""
    seen = []

    def look(module, arguments):
        if torch.is_grad_enabled():
            mask = (module.weight.detach() != 0).to(torch.uint8)
            digest = hashlib.sha256(mask.numpy().tobytes()).hexdigest()
            if not seen or seen[-1] != digest:
                seen.append(digest)

    dict(model.named_modules())[name_of_last(linears)].register_forward_pre_hook(look)
    return seen


def name_of_last(linears):
    return list(linears)[-1]


def precise_job(directory, world=ALONE, stop=False):
    """A float64 Llama with tied embeddings."""
    job = make_job(directory, family="llama", tied=True)
    job.student.double()
    job.teacher.double()
    return replace(job, world=world, progress=stopping if stop else job.progress)


def finished(directory, world=ALONE, **options):
    """Train to the end; write losses, masks and weights."""
    job = precise_job(directory / "checkpoint", world)
    log, seen = [], watched(job.student, job.linears)
    trained = ast(replace(job, log=log.append), **SETTINGS, **options)
    (directory / f"masks-{world.rank}.json").write_text(json.dumps(seen))
    if world.first:
        tensors = {f"weight/{name}": state.weight for name, state in trained.linears.items()}
        tensors |= {f"mask/{name}": state.mask for name, state in trained.linears.items()}
        if "bits" in options:
            tensors |= {f"codes/{name}": state.quantized.codes for name, state in trained.linears.items()}
        tensors |= {f"param/{name}": value.clone() for name, value in trained.params.items()}
        save_file(tensors, directory / "result.safetensors")
        (directory / "log.json").write_text(json.dumps(log))


def stopped(directory, world=ALONE, **options):
    """Train a while."""
    try:
        ast(precise_job(directory / "checkpoint", world, stop=True), **SETTINGS, **options)
    except Stopped:
        return
    raise AssertionError("the run was to be stopped")


def ranked(rank, port, directory):
    """The work of one rank of two, which meet at a port as `torch.distributed.run` would let them."""
    meet = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in meet.items()}
    world = World.join("cpu")
    finished(directory / "two", world)
    stopped(directory / "two-then-one", world)
    finished(directory / "one-then-two", world)
    stopped(directory / "bits-two-then-one", world, **BITS)
