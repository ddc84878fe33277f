"""Decoding: fill the predicted segments of a task, token by token, over a static key/value cache.

The task supplies every header, and each token is chosen within its segment's own range, so what
comes out always has the right shape. Several requests with the same task decode as one batch.

The chunk of actions that a task ends with can also be decoded in a few passes: each pass chooses the next
steps all at once, seeing those that are chosen already and `<mask>` for the rest (`sequence.py`). Or the chunk is
guessed, and each pass checks a part of the guess and corrects it from the first mistake on: what comes out is then what
one token after the other gives, in fewer passes the better the guess (speculative decoding, Leviathan et al. 2023,
with the model as its own draft; corrections as in Jacobi decoding, Santilli et al. 2023). In bf16 a pass of many
tokens rounds otherwise than a pass of one, so there a code that lies between two bins may be the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mmseq.errors import ConfigError, ModelError, TaskError
from mmseq.inference.compiled import CompiledExtend
from mmseq.inference.prefixes import Prefixes
from mmseq.inputs import ModelInput
from mmseq.layout import sequence_length
from mmseq.model.range_loss import add_copies
from mmseq.model.readout import best_codes, mean_codes
from mmseq.model.sequence_model import SequenceModel
from mmseq.model.transformer import Cache
from mmseq.sequence import NOTHING, Draft, SequenceBuilder, TokenSource
from mmseq.streams import TEXT, VECTOR
from mmseq.tasks import PlacedSegment, Task

MAX_TEXT_TOKENS = 128
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3  # beyond, numbers overflow before anything changes
CHECKED = 64  # guessed tokens that a pass checks, of all requests together: wider passes take longer than they save
LEAST_CHECKED = 8  # and of each
MAX_TOKENS = 32_768  # of one request: a typing error must not occupy a server for hours


@dataclass
class Request:
    """One sequence to complete. prefix: codes that the predicted action must begin with (n, axes).

    seed: for sampling. done: in a group, codes (n, axes) that its actions must begin with, by repetition: those that
    were executed already.
    """

    tokens: TokenSource
    now: int
    variant: int = 0
    prefix: np.ndarray | None = None
    seed: int = 0
    done: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass
class Decoded:
    """A predicted segment: codes (n,), (frames, tokens) or (steps, axes).

    expectation: for scalars, the mean code under the model.
    """

    segment: PlacedSegment
    camera: str | None
    codes: np.ndarray
    expectation: float | None = None


@dataclass
class DecodeStats:
    """What a call cost: passes through the transformer and tokens computed in them."""

    passes: int = 0
    tokens: int = 0


@dataclass
class _Row:
    """The state of one request while it decodes."""

    draft: Draft
    position: int = 0
    out: list[Decoded] = field(default_factory=list)


class Decoder:
    """Completes tasks with one model. temperature 0 takes the best code (`readout.best_codes`)."""

    def __init__(
        self,
        model: SequenceModel,
        *,
        temperature: float = 0.0,
        passes: int | None = None,
        speculate: bool = False,
        prefixes: Prefixes | None = None,
        extend: CompiledExtend | None = None,
        max_tokens: int = MAX_TOKENS,
    ):
        """passes: forward passes that a final chunk of actions takes, the given side included; None: one per token.

        speculate: guess the final chunk and check the guess, instead; wants temperature 0 and no `passes`.
        prefixes: keeps what requests begin with from one call to the next. extend: the model's passes, compiled; wants
        prefixes, whose caches stay. max_tokens: of a request, given and
        predicted. Raises: ConfigError for a temperature or passes that cannot be.
        """
        if passes is not None and passes < 1:
            raise ConfigError(f"passes is {passes}", fix="use 1 or more")
        if speculate and (passes is not None or temperature):
            raise ConfigError(
                "speculate gives the chunk of one token after the other at temperature 0",
                fix="leave out passes and the temperature",
            )
        assert model.tokenizers is not None
        if not (temperature == 0 or MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE):
            raise ConfigError(
                f"temperature is {temperature}", fix=f"use 0, or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
            )
        self.model, self.max_tokens = model, max_tokens
        self.temperature, self.passes, self.speculate, self.prefixes = temperature, passes, speculate, prefixes
        self.extend = model.transformer.extend if extend is None else extend
        self.compiled = extend is not None
        self.builder: SequenceBuilder = model.tokenizers.builder()
        self.stats = DecodeStats()

    @torch.inference_mode()
    def decode(self, task: Task, requests: Sequence[Request]) -> list[list[Decoded]]:
        """The predicted segments of each request, in the order of the arrow.

        Raises: TaskError when a request cannot fill the given side, ModelError when logits are not finite.
        """
        try:
            return self._decode(task, requests) if requests else []
        except (ModelError, torch.OutOfMemoryError):
            if self.prefixes is not None:
                self.prefixes.clear()  # nothing of a pass that failed is used again
            raise

    def _decode(self, task: Task, requests: Sequence[Request]) -> list[list[Decoded]]:
        for r in requests:
            if not 0 <= r.seed < 1 << 63:
                raise ConfigError(f"seed is {r.seed}", fix="use 0 to 2^63 - 1")
        kinds = {(r.tokens.rate_hz, r.tokens.embodiment, tuple(self._cameras(r.tokens))) for r in requests}
        if len(kinds) > 1:
            raise TaskError(f"requests of different rates, embodiments or cameras cannot share a batch: {kinds}")
        task.require_fixed()
        rows = [_Row(Draft(self.builder, r.tokens, r.now)) for r in requests]
        run = _Run(self, rows, requests, self._cache(task, requests))
        beginning = True  # texts that are given before all else
        for segment in task.place(requests[0].tokens.rate_hz):
            if beginning and (segment.predicted or segment.row.kind is not TEXT):
                run.recall()
                beginning = False
            for camera in self.builder.expand(segment, requests[0].tokens):
                for row in rows:
                    row.draft.header(segment, camera)
                if segment.segment is task.final_chunk and (self.passes or self.speculate):
                    if self.passes:
                        run.predict_chunk(segment, self.passes)
                    else:
                        run.guess_chunk(segment, masks=self.model.decodes_in_parallel(task))
                    continue
                if segment.predicted:
                    run.predict(segment, camera)
                    continue
                for row, r in zip(rows, requests):
                    codes = self.builder.codes(segment, camera, r.tokens, r.now, r.variant)
                    row.draft.content(segment, camera, codes)
        return [row.out for row in rows]

    def _cameras(self, tokens: TokenSource) -> Sequence[str]:
        return self.builder.views(tokens.embodiment, tokens.streams)

    def _cache(self, task: Task, requests: Sequence[Request]) -> Cache:
        placed, tokens = task.place(requests[0].tokens.rate_hz), requests[0].tokens
        texts = {p.stream: MAX_TEXT_TOKENS for p in placed if p.row.kind is TEXT}
        for p in placed:
            if p.row.kind is TEXT and not p.predicted:
                texts[p.stream] = max(len(r.tokens.codes(p.stream, r.now, r.now + 1, r.variant)) for r in requests)
        total = sequence_length(
            placed,
            self.builder.layout,
            cameras=len(self._cameras(tokens)),
            numbered=len(self.builder.numbered(tokens.embodiment, tokens.streams)) > 1,
            axes={p.stream: self.builder.axes(p, tokens.embodiment) for p in placed if p.row.kind is VECTOR},
            text_lengths=texts,
        )
        if total > self.max_tokens:
            raise TaskError(
                f"{task} takes {total} tokens, at most {self.max_tokens} are decoded at once", fix="shorten it"
            )
        parameter = self.model.transformer.embed.weight
        make = Cache.empty if self.prefixes is None else self.prefixes.cache
        return make(self.model.config, len(requests), total, dtype=parameter.dtype, device=parameter.device)

    def _shape(self, segment: PlacedSegment, tokens: TokenSource) -> tuple[int, ...]:
        """The shape of the codes; () for text, whose length the model decides."""
        return self.builder.shape(segment, tokens.embodiment) or ()

    @staticmethod
    def _prefix(segment: PlacedSegment, request: Request, shape: tuple[int, ...]) -> np.ndarray:
        repeat = segment.segment.repeat
        prefix = request.done.get(repeat, request.prefix if repeat == 0 else None)
        if prefix is None or segment.stream != "action":
            return np.zeros(0, dtype=np.int64)
        prefix, most = np.asarray(prefix), shape[0] - (repeat not in request.done)
        if prefix.ndim != 2 or prefix.shape[1] != shape[1] or len(prefix) > most:
            raise TaskError(f"an action prefix of shape {prefix.shape} does not fit a chunk of shape {shape}")
        return prefix.reshape(-1)


class _Run:
    """One `decode` call under way: its sequences, what the model computed of them, and what is chosen."""

    def __init__(self, decoder: Decoder, rows: list[_Row], requests: Sequence[Request], cache: Cache):
        self.decoder, self.model, self.rows, self.requests, self.cache = decoder, decoder.model, rows, requests, cache
        assert self.model.tokenizers is not None
        self.tokenizers = self.model.tokenizers
        self.readout = self.tokenizers.readout
        self.generators = [torch.Generator().manual_seed(r.seed) for r in requests]
        self.codes = self.model.transformer.code_vectors()
        self.to_keep: dict[int, np.ndarray] = {}  # by row, the ids that it begins with, of which nothing is kept yet
        self.copies = torch.full((len(rows),), NOTHING)  # the vision id that the next id of each row may repeat

    def recall(self) -> None:
        """Take what is kept of the beginnings that were drafted so far; the others are kept once they are computed."""
        prefixes = self.decoder.prefixes
        if prefixes is None:
            return
        for b, row in enumerate(self.rows):
            ids = row.draft.input().ids
            if prefixes.recall(ids, self.cache, b):
                row.position = len(ids)
            else:
                self.to_keep[b] = ids

    def predict(self, segment: PlacedSegment, camera: str | None) -> None:
        """Fill a predicted segment of every row, whose header was added last."""
        range_name = segment.row.range
        readout = self.readout(range_name)
        shape = self.decoder._shape(segment, self.requests[0].tokens)
        count = int(np.prod(shape)) if shape else MAX_TEXT_TOKENS
        prefixes = [self.decoder._prefix(segment, r, shape) for r in self.requests]
        forced = min(len(p) for p in prefixes)
        chosen = [list(p[:forced]) for p in prefixes]
        end = self.tokenizers[range_name].end if segment.row.kind is TEXT else None
        for row, codes in zip(self.rows, chosen):
            row.draft.write(np.asarray(codes, dtype=np.int64))
        hidden = self._flush()[:, -1]
        expectations: list[float | None] = [None] * len(self.rows)
        done = [False] * len(self.rows)
        for i in range(forced, count):
            logits = self._logits(hidden, range_name)
            drawn_by = [None if done[b] or i < len(p) else b for b, p in enumerate(prefixes)]
            codes = self._choose(logits, range_name, drawn_by)
            if readout == "mean":
                expectations = mean_codes(logits).tolist()
            for b, row in enumerate(self.rows):
                if done[b]:
                    continue
                code = int(prefixes[b][i]) if i < len(prefixes[b]) else codes[b]
                if end is not None and i == count - 1:
                    code = end
                chosen[b].append(code)
                row.draft.write(np.array([code]))
                done[b] = code == end
            if all(done):
                break
            if i + 1 < count:
                hidden = self._flush()[:, -1]
        for row, codes, expectation in zip(self.rows, chosen, expectations):
            codes = np.asarray(codes).reshape(shape) if shape else np.asarray(codes)
            row.out.append(Decoded(segment, camera, codes, expectation))

    def _committed(self, segment: PlacedSegment, shape: tuple[int, ...]) -> list[list[int]]:
        """Begin the chunk of every row with its committed codes, and return these."""
        chosen = [list(self.decoder._prefix(segment, r, shape)) for r in self.requests]
        for row, codes in zip(self.rows, chosen):
            row.draft.write(np.asarray(codes, dtype=np.int64))
        return chosen

    def predict_chunk(self, segment: PlacedSegment, passes: int) -> None:
        """Fill the final chunk of every row in `passes` passes at most, equally many steps in each."""
        steps, axes = shape = self.decoder._shape(segment, self.requests[0].tokens)
        chosen = self._committed(segment, shape)
        fresh, width = max(map(len, chosen)), steps * axes  # of the chunk: tokens that the next pass computes, at most
        for left in range(passes, 0, -1):
            rest = [steps - len(codes) // axes for codes in chosen]
            if not any(rest):
                break
            counts = [-(-n // left) * axes for n in rest]
            # compiled: one shape, whatever is committed
            ahead = max(width - fresh if self.decoder.compiled else 0, max(counts)) - 1
            found = self._choose_after([row.draft.masks(ahead) for row in self.rows], counts, segment.row.range)
            fresh, width = max(counts), 2 * -(-steps // passes) * axes
            for row, codes, new, count in zip(self.rows, chosen, found, counts):
                codes.extend(new[:count])
                row.draft.write(new[:count])
        for row, codes in zip(self.rows, chosen):
            row.out.append(Decoded(segment, None, np.asarray(codes).reshape(shape)))

    def guess_chunk(self, segment: PlacedSegment, *, masks: bool) -> None:
        """Fill the final chunk of every row with what `predict` would: a guess, then passes that check it.

        masks: guess what the model says to masks, in a pass of its own; else the last committed action goes on, or the
        middle of every axis. What a check says after its first correction is the next guess.
        """
        steps, axes = shape = self.decoder._shape(segment, self.requests[0].tokens)
        chosen = self._committed(segment, shape)
        rest = [steps * axes - len(codes) for codes in chosen]
        window = max(CHECKED // len(self.rows), LEAST_CHECKED)
        if masks:
            ahead = max(rest) - 1
            guess = self._choose_after([row.draft.masks(ahead) for row in self.rows], rest, segment.row.range)
        else:
            middle = self.model.vocabulary.ranges[segment.row.range].size // 2
            lasts = [codes[-axes:] if codes else [middle] * axes for codes in chosen]
            guess = np.stack([np.resize(last, max(rest)) for last in lasts])
        guess = np.pad(guess, ((0, 0), (0, window)))
        fresh = 0 if masks else max(map(len, chosen))  # committed tokens that the next pass computes
        while any(rest):
            # compiled: one shape, whatever is committed or left
            ahead = max(0, window - fresh) if self.decoder.compiled else min(window, max(rest) - 1)
            seen, fresh = [min(n, 1 + ahead) for n in rest], 0
            true = self._choose_after(
                [row.draft.guesses(g[:ahead]) for row, g in zip(self.rows, guess)], seen, segment.row.range
            )
            for b, (row, n) in enumerate(zip(self.rows, seen)):
                right = guess[b, :n] == true[b, :n]
                kept = n if right.all() else int(right.argmin())
                taken = min(n, kept + 1)  # the first that was wrong is put right
                chosen[b].extend(true[b, :taken])
                row.draft.write(true[b, :taken])
                row.position += min(kept, ahead, max(rest[b] - 1, 0))  # these lie in the cache already
                guess[b, :n] = true[b, :n]
                guess[b] = np.roll(guess[b], -taken)
                rest[b] -= taken
        for row, codes in zip(self.rows, chosen):
            row.out.append(Decoded(segment, None, np.asarray(codes).reshape(shape)))

    def _choose_after(self, ahead: list[ModelInput], counts: list[int], range_name: str) -> np.ndarray:
        """The best or drawn codes (B, 1 + n) after each last token and after n tokens `ahead` of it.

        counts: how many of them each row wants.
        """
        hidden = self._flush(ahead)
        B, n, D = hidden.shape
        logits = self._logits(hidden.reshape(B * n, D), range_name)
        drawn_by = [b if i < counts[b] else None for b in range(B) for i in range(n)]
        return np.array(self._choose(logits, range_name, drawn_by), dtype=np.int64).reshape(B, n)

    def _flush(self, ahead: list[ModelInput] | None = None) -> Tensor:
        """Run what was added to each draft since the last call, and n tokens after it, which are not added.

        ahead: these, by row. Returns: hidden states (B, 1 + n, D) of each last token and of those.
        """
        extra = len(ahead[0]) if ahead else 0
        device = self.model.device
        counts = [row.draft.length - row.position for row in self.rows]
        B, width = len(self.rows), max([1, *counts]) + extra
        pad = self.model.vocabulary.structure("<pad>")
        positions = np.zeros((B, width), dtype=np.int64)
        lines = []
        for b, row in enumerate(self.rows):
            start = row.position
            if counts[b] == 0:  # this row is finished; recompute its last token in place
                counts[b], start = 1, row.position - 1
            line = row.draft.input(start)
            lines.append((ModelInput.join([line, ahead[b]]) if ahead else line).padded(width, pad))
            # padding takes later positions: real tokens overwrite them before they are seen; the last has none
            positions[b] = np.minimum(start + np.arange(width), self.cache.length - 1)
            row.position = row.draft.length
        line = ModelInput.join(lines).tensors().to(device)
        x = self.model.transformer.inputs(line, self.codes).view(B, width, -1)
        self.copies = torch.tensor([row.draft.may_repeat for row in self.rows], device=device)
        hidden = self.decoder.extend(x, torch.from_numpy(positions).to(device), self.cache, int(positions.max()) + 1)
        if self.decoder.prefixes is not None:
            for b, ids_n in self.to_keep.items():
                self.decoder.prefixes.keep(ids_n, self.cache, b)
            self.to_keep = {}
        self.decoder.stats.passes += 1
        self.decoder.stats.tokens += B * width
        last = torch.tensor(counts, device=device)[:, None] - 1 + torch.arange(1 + extra, device=device)
        return hidden[torch.arange(B, device=device)[:, None], last]

    def _logits(self, hidden_BD: Tensor, range_name: str) -> Tensor:
        ids = self.model.vocabulary.ranges[range_name]
        rows = self.model.transformer.output_rows(ids.start, ids.stop, self.codes)
        logits = (hidden_BD @ rows.t()).float()
        if range_name != "vision" or not self.model.config.copying:
            return logits
        gate = self.model.transformer.copy_gate(hidden_BD).float().squeeze(-1) * (self.copies != NOTHING)
        return add_copies(logits, (self.copies - ids.start).clamp_min(0), gate)

    def _choose(self, logits_NC: Tensor, range_name: str, drawn_by: Sequence[int | None]) -> list[int]:
        """One code each: sampled, or with temperature 0 the best one.

        drawn_by: the request that each belongs to, None where it is settled or nobody's. Only the others draw,
        so that what a request samples does not depend on its company.
        """
        if not logits_NC.isfinite().all():  # the best of them would be code 0, the minimum of an axis
            what = f"the model's {range_name} logits are not finite"
            raise ModelError(what, fix="its weights are damaged, or overflow")
        if self.decoder.temperature <= 0:
            return best_codes(logits_NC, self.readout(range_name), self.model.features_of(range_name)).tolist()
        codes = [0] * len(logits_NC)
        share = (logits_NC / self.decoder.temperature).softmax(-1).cpu()
        for i, b in enumerate(drawn_by):
            if b is not None:
                codes[i] = int(torch.multinomial(share[i], 1, generator=self.generators[b]))
        return codes
