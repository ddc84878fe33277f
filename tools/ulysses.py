"""Compares attention over the ranks that share a line of tokens: ours, and two ways of DeepSpeed.

python tools/ulysses.py [--ranks 2] [--tokens 4096] [--turns 15]

Every side gets the same packed documents and the same attention within a rank; forward and backward take turns.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, distributed, multiprocessing

from mmseq.model import attention, sequence_parallel
from mmseq.training.distributed import free_port

HEADS, SIZE = 8, 32


def ours(documents: attention.Documents, group, kv_heads: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: sequence_parallel.attend(q, k, v, documents)


def distributed_attention(documents: attention.Documents, group, kv_heads: int):
    from deepspeed.sequence.layer import DistributedAttention

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 1, T, h, K
        return attention.attend(q[0], k[0], v[0], documents)[None]

    layer = DistributedAttention(local, group, scatter_idx=2, gather_idx=1)
    return lambda q, k, v: layer(q[None], k[None], v[None], 0)[0]


def ulysses_hf(documents: attention.Documents, group, kv_heads: int):
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    def local(module, q: Tensor, k: Tensor, v: Tensor, mask, **more):  # 1, h, T, K
        return attention.attend(*(x[0].transpose(0, 1) for x in (q, k, v)), documents)[None], None

    module = torch.nn.Module()
    layer = UlyssesSPAttentionHF(local, 1, HEADS, SIZE, kv_heads, 1, group, seq_length_is_variable=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, _ = layer(module, *heads_first, None, position_ids=torch.arange(len(q))[None])
        return out[0].unflatten(1, (HEADS, SIZE))

    return run


SIDES = {"ours": ours, "DistributedAttention": distributed_attention, "UlyssesSPAttentionHF": ulysses_hf}


def work(rank: int, ranks: int, tokens: int, turns: int, port: int) -> None:
    import deepspeed

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    group = distributed.new_group(list(range(ranks)))
    say = functools.partial(print, flush=True) if rank == 0 else (lambda *_: None)
    for kv_heads in (8, 4, 2, 1, 3):
        heads = HEADS if HEADS % kv_heads == 0 else 2 * kv_heads
        lengths = [300, 17, 1, 911, 64] + [tokens - 1293]
        documents = sequence_parallel.SharedDocuments(lengths, torch.device("cpu"), group)
        torch.manual_seed(rank)
        shapes = [(tokens // ranks, h, SIZE) for h in (heads, kv_heads, kv_heads)]
        inputs = [torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        runs, outputs = {}, {}
        for name, make in SIDES.items():
            if heads != HEADS and name == "UlyssesSPAttentionHF":
                say(f"{heads} heads, {kv_heads} key/value heads  {name}: not tried")
                continue
            try:
                run = make(documents, group, kv_heads)
                out = run(*inputs)
                gradients = torch.autograd.grad(out.float().square().sum(), inputs)
                outputs[name], runs[name] = (out.detach(), *gradients), run
            except Exception as error:
                say(f"{heads} heads, {kv_heads} key/value heads  {name}: {type(error).__name__}: {str(error)[:110]}")
            distributed.barrier()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(turns):
            for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
                distributed.barrier()
                began = time.perf_counter()
                torch.autograd.grad(runs[name](*inputs).float().square().sum(), inputs)
                times[name].append(time.perf_counter() - began)
        for name, taken in times.items():
            same = all(torch.equal(a, b) for a, b in zip(outputs[name], outputs["ours"]))
            say(
                f"{heads} heads, {kv_heads} key/value heads  {name}: {1000 * statistics.median(taken):.1f} ms, "
                f"{statistics.median(taken) / statistics.median(times['ours']):.2f} of ours, "
                f"{'the same to the bit' if same else 'not the same'}"
            )
    distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    multiprocessing.spawn(
        work, (options.ranks, options.tokens, options.turns, free_port()), nprocs=options.ranks, join=True
    )
