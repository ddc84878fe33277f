"""Compares attention over ranks that share a line of tokens: two ways of DeepSpeed, and one exchange of our own.

python tools/ulysses.py [--ranks 2] [--tokens 4096] [--turns 15]

Every side gets the same packed documents and the same attention within a rank; forward and backward take turns.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, distributed, multiprocessing

from mmseq.model import attention, sequence_parallel
from mmseq.training.distributed import free_port

HEADS, SIZE = 8, 32


class Exchange(torch.autograd.Function):
    """Row n of (N, ...) goes to rank n, and row n of the result came from rank n; gradients go the same way back."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group, out = group, torch.empty_like(x)
        distributed.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.contiguous()
        out = torch.empty_like(gradient)
        distributed.all_to_all_single(out, gradient, group=ctx.group)
        return out, None


def one_exchange(documents: attention.Documents, group, kv_heads: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What mmseq had: queries, keys and values travel together."""
    parts = distributed.get_world_size(group)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(math.lcm(kv_heads, parts) // kv_heads, 1) for x in (k, v))
        heads = [q.shape[1] // parts, k.shape[1] // parts, k.shape[1] // parts]
        sent = torch.cat([x.unflatten(1, (parts, -1)) for x in (q, k, v)], 2).transpose(0, 1).contiguous()
        mine = Exchange.apply(sent, group).flatten(0, 1).split(heads, 1)
        out = attention.attend(*mine, documents)
        return Exchange.apply(out.unflatten(0, (parts, -1)).contiguous(), group).transpose(0, 1).flatten(1, 2)

    return run


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


SIDES = {
    "one exchange": one_exchange,
    "DistributedAttention": distributed_attention,
    "UlyssesSPAttentionHF": ulysses_hf,
}


def work(rank: int, ranks: int, tokens: int, turns: int, port: int) -> None:
    import deepspeed

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    group = distributed.new_group(list(range(ranks)))
    say = functools.partial(print, flush=True) if rank == 0 else (lambda *_: None)
    for kv_heads in (8, 4, 2, 1):
        lengths = [300, 17, 1, 911, 64] + [tokens - 1293]
        documents = sequence_parallel.SharedDocuments(lengths, torch.device("cpu"), group)
        torch.manual_seed(rank)
        shapes = [(tokens // ranks, h, SIZE) for h in (HEADS, kv_heads, kv_heads)]
        inputs = [torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        runs, outputs = {}, {}
        for name, make in SIDES.items():
            try:
                run = make(documents, group, kv_heads)
                out = run(*inputs)
                gradients = torch.autograd.grad(out.float().square().sum(), inputs)
                outputs[name], runs[name] = (out.detach(), *gradients), run
            except Exception as error:
                say(f"{HEADS} heads, {kv_heads} key/value heads  {name}: {type(error).__name__}: {str(error)[:110]}")
            distributed.barrier()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(turns):
            for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
                distributed.barrier()
                began = time.perf_counter()
                torch.autograd.grad(runs[name](*inputs).float().square().sum(), inputs)
                times[name].append(time.perf_counter() - began)
        for name, taken in times.items():
            pairs = zip(outputs[name], outputs["one exchange"])
            apart = max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)
            say(
                f"{HEADS} heads, {kv_heads} key/value heads  {name}: {1000 * statistics.median(taken):.1f} ms, "
                f"{statistics.median(taken) / statistics.median(times['one exchange']):.2f} of one exchange, "
                f"at most {apart:.1e} apart"
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
