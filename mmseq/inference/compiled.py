"""CompiledExtend: the passes that every control step repeats, compiled; on a GPU replayed as CUDA graphs.

A control step of one robot has the same few shapes each time, whatever is committed: what is new since the step before,
then the guesses or the masks of a chunk. Python and kernel launches cost more there than the arithmetic. Shapes that
are seen a second time are compiled, at most `SHAPES` of them and none after `freeze`, since a robot cannot wait for a
compiler. Everything else runs as it is: several robots at once, sampling, other arrows, long prompts.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from mmseq.model.transformer import Cache, Transformer

SHAPES = 32


class CompiledExtend:
    """Stands for `Transformer.extend` of one model. compiled: the shapes (B, S, C) so far. passes: how many ran so,
    and how many as they are."""

    def __init__(self, transformer: Transformer):
        self.transformer = transformer
        self.compiled: set[tuple[int, int, int]] = set()
        self.passes: Counter[str] = Counter()
        self._seen: Counter[tuple[int, int, int]] = Counter()
        self._graphs = transformer.embed.weight.device.type == "cuda"
        self._run = torch.compile(self._extend, dynamic=False, mode="reduce-overhead" if self._graphs else "default")
        self._static: set[int] = set()
        self._frozen = False

    def freeze(self) -> None:
        """Compile nothing new from now on."""
        self._frozen = True

    def _extend(self, x_BSD: Tensor, positions_BS: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        cache = Cache(keys, values)
        return self.transformer.extend(x_BSD, positions_BS, cache, cache.length)  # one mask for every pass

    def __call__(self, x_BSD: Tensor, positions_BS: Tensor, cache: Cache, longest: int) -> Tensor:
        """As `Transformer.extend`. The result is overwritten by the next call."""
        shape = (len(positions_BS), positions_BS.shape[1], cache.length)
        self._seen[shape] += 1
        settled = self._frozen or self._seen[shape] < 2 or len(self.compiled) >= SHAPES
        if shape not in self.compiled and settled:
            self.passes["as they are"] += 1
            return self.transformer.extend(x_BSD, positions_BS, cache, longest)
        self.passes["compiled"] += 1
        self.compiled.add(shape)
        if self._graphs:
            for line in (*cache.keys, *cache.values):
                if id(line) not in self._static:  # a graph may write to it in place
                    torch._dynamo.mark_static_address(line)
                    self._static.add(id(line))
            torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(recompile_limit=2 * SHAPES):
            return self._run(x_BSD, positions_BS, cache.keys, cache.values)
