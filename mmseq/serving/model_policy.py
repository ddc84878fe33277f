"""ModelPolicy: a checkpoint as the server sees it.

    policy = ModelPolicy.from_pretrained("runs/demo/checkpoint")
    serve(policy, ServerConfig(port=8000))

What an observation may hold is said in `observed.py`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.embodiment import Embodiment
from mmseq.errors import CheckpointError, ConfigError, MMSeqError, ModelError, TaskError, did_you_mean
from mmseq.grammar import ALIASES
from mmseq.inference.compiled import CompiledExtend
from mmseq.inference.decoding import Decoder, Request
from mmseq.inference.predict import require_parallel, to_streams
from mmseq.inference.prefixes import Prefixes
from mmseq.model.device import default_device
from mmseq.model.sequence_model import SequenceModel
from mmseq.serving.keys import DEMO, IMAGES
from mmseq.serving.observation import example_observation
from mmseq.serving.observed import (
    ObservationTokens,
    check_rest,
    check_servable,
    commands_before,
    kept_keys,
    lookback,
    past_commands,
    prolonged,
    required_keys,
)
from mmseq.streams import lacking
from mmseq.tasks import Task

log = logging.getLogger("mmseq.serving")

PROMPT_TOKENS = 128  # by which a prompt may be longer than that of the warm-up for compiled passes to fit it
SERVED_TOKENS = 2048  # of one request: no client may keep the model from the others for long


class ModelPolicy:
    """Serves one checkpoint. Implements `mmseq.serving.Policy`.

    arrow: the task that `infer` runs, or the name it was trained under; default: the one named `policy`,
    else the first with the shape of a policy. embodiment: the one robot to serve, whose clients then need not
    name it; default: all that the checkpoint knows. passes: forward passes that `infer` decodes a chunk in, of an
    arrow that was trained for it; default: the chunk of one pass per token. speculate: guess that chunk and check the
    guess, which takes a fraction of the passes. compile: compiles what every control step
    repeats while it warms up; on a GPU as CUDA graphs. blank_images: replaces every frame by mid-grey, for measuring
    what a policy does without seeing.
    """

    def __init__(
        self,
        model: SequenceModel,
        *,
        arrow: str | None = None,
        embodiment: str | None = None,
        passes: int | None = None,
        speculate: bool = True,
        compile: bool = False,
        name: str = "model",
        checkpoint: str | None = None,
        blank_images: bool = False,
    ):
        tokenizers = model.tokenizers
        assert tokenizers is not None
        self.model, self.tokenizers, self.name, self.blank_images = model, tokenizers, name, blank_images
        self.tasks = dict(model.tasks)
        chosen = (
            arrow
            or self.tasks.get("policy")
            or next((a for a in self.tasks.values() if Task.parse(a).alias == "policy"), None)
        )
        if chosen is None:
            raise CheckpointError(f"{name} was trained on no policy", fix="name one with --policy, or arrow=")
        if "->" not in chosen and chosen not in {*self.tasks, *ALIASES}:
            raise ConfigError(f"{name} was trained on no task {chosen!r}: {did_you_mean(chosen, self.tasks)}")
        self.arrow = Task.parse(self.tasks.get(chosen, chosen))
        trained = [f"{task} ({arrow})" for task, arrow in self.tasks.items()]
        if trained and not any(Task.parse(a).covers(self.arrow) for a in self.tasks.values()):
            log.warning("%s was not trained on %s; it was trained on %s", name, self.arrow, ", ".join(trained))
        self.checkpoint = checkpoint
        self.passes, self.speculate = passes, speculate and passes is None
        self.prefixes = Prefixes(spare=PROMPT_TOKENS if compile else 0)
        self.extend = CompiledExtend(model.transformer) if compile else None
        self.reloadable = not compile
        if passes is not None:
            Decoder(model, passes=passes)  # refuses what cannot be
            require_parallel(model, self.arrow)
        segments = [s for s in self.arrow.predicted if s.stream == "action"]
        if not segments:
            raise ConfigError(f"the arrow {self.arrow} predicts no action, so it is no policy")
        self.robots = {n: e for n, e in tokenizers.embodiments.items() if e.action is not None}
        if not self.robots:
            raise CheckpointError(f"{name} knows no embodiment with actions")
        if embodiment is not None:
            if embodiment not in self.robots:
                raise ConfigError(f"{name} has no robot {embodiment!r}: {did_you_mean(embodiment, self.robots)}")
            self.robots = {embodiment: self.robots[embodiment]}
        for robot in self.robots.values():
            check_servable(self.arrow, robot.rate_hz)
            check_rest(self.arrow, robot)
        horizons = {n: segments[-1].length.steps(e.rate_hz) for n, e in self.robots.items()}  # type: ignore[union-attr]
        if len(set(horizons.values())) > 1:
            raise ConfigError(
                f"the chunks of {self.arrow} have other lengths for other robots: {horizons}",
                fix="name the one to serve with --embodiment",
            )
        self.horizon = next(iter(horizons.values()))
        self.history = max(lookback(self.arrow, robot.rate_hz) for robot in self.robots.values())

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: str | None = None, **options: Any) -> ModelPolicy:
        """Load a checkpoint directory. device: default a GPU where there is one."""
        path = Path(directory).resolve()
        checkpoint = checkpoint_id(path)  # before: what is replaced while it loads is not what it says
        model = SequenceModel.from_pretrained(directory, device=device or default_device())
        log.info("%s is on %s", directory, model.device)
        return cls(model, name=f"{path.parent.name}/{path.name}", checkpoint=checkpoint, **options)

    def contract(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "embodiments": {n: e.to_dict() for n, e in self.robots.items()},
            "tasks": self.tasks or {"policy": str(self.arrow)},
            "policy": str(self.arrow),
            "options": ["temperature", "seed"],
            "checkpoint": self.checkpoint,
            "horizon": self.horizon,
            "prefix": True,
            "fingerprint": self.tokenizers.vocabulary.fingerprint,
            "required_keys": {n: required_keys(self.arrow, e) for n, e in self.robots.items()},
            "kept_keys": {n: kept_keys(self.arrow, e) for n, e in self.robots.items()},
            "history": self.history,
        }

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The next chunk, float32 (horizon, axes). `action_prefix` is kept exactly as its bins."""
        (result,) = self.infer_many([observation])
        if isinstance(result, MMSeqError):
            raise result
        return result

    def predict(self, arrow: str, observation: dict[str, Any]) -> dict[str, Any]:
        """Every predicted stream of any arrow, by name."""
        return self._run(Task.parse(self.tasks.get(arrow, arrow)), observation)

    def infer_many(self, observations: Sequence[dict[str, Any]]) -> list[dict[str, Any] | MMSeqError]:
        """`infer` for observations of one `batch_key`, decoded together; what one of them fails with is its result."""
        results: list[dict[str, Any] | MMSeqError] = []
        together: dict[Task, dict[int, Request]] = {}
        for i, observation in enumerate(observations):
            results.append({})
            try:
                task, request = self._request(self.arrow, observation)
                together.setdefault(task, {})[i] = request
            except MMSeqError as error:
                results[i] = error
        for task, requests in together.items():
            decoded = self._decoder(self.arrow, observations[0]).decode(task, list(requests.values()))
            for (i, request), segments in zip(requests.items(), decoded):
                actions = to_streams(segments, self.tokenizers, request.tokens)["action"]
                results[i] = {"actions": np.asarray(actions[-self.horizon :], dtype=np.float32)}
        return results

    def batch_key(self, observation: dict[str, Any]) -> Hashable:
        """Observations with equal keys can be decoded together: one robot's, the same cameras, one temperature."""
        images = tuple(sorted((key, value.shape) for key, value in observation.items() if key.startswith(IMAGES)))
        return observation.get("embodiment"), images, (observation.get("options") or {}).get("temperature", 0.0)

    def warm_up(self) -> None:
        """A chunk for each robot, as far as a random observation can have one; all that is compiled is compiled now."""
        # all robots in turn, as the longest makes the cache: new, known, known again: compiled; and once at speed
        for turn in range(1 if self.extend is None else 5):
            for name, robot in self.robots.items():
                try:
                    self.infer(example_observation(robot))
                except ModelError:
                    raise
                except MMSeqError as error:  # such as a goal that no random observation has
                    if not turn:
                        log.info("no warm-up for %s: %s", name, error)
        for name, robot in self.robots.items():
            with suppress(MMSeqError):  # as above
                self._time_chunk(name, robot)
        if self.extend is not None:
            self.extend.freeze()
            self.prefixes.freeze()

    def _time_chunk(self, name: str, robot: Embodiment) -> None:
        """Say how long a chunk takes, and whether robots wait for the next one."""
        began = time.perf_counter()
        self.infer(example_observation(robot, seed=1))
        took, lasts = time.perf_counter() - began, self.horizon / robot.rate_hz
        log.info("%s: a chunk takes %.0f ms and lasts %.0f ms", name, 1000 * took, 1000 * lasts)
        if took > lasts / 2:
            log.warning(
                "%s will stand still between chunks: use a GPU, fewer passes, or a policy of a longer action[...]", name
            )

    def _run(self, task: Task, observation: dict[str, Any]) -> dict[str, Any]:
        task, request = self._request(task, observation)
        decoded = self._decoder(task, observation).decode(task, [request])[0]
        return to_streams(decoded, self.tokenizers, request.tokens)

    def _decoder(self, task: Task, observation: dict[str, Any]) -> Decoder:
        temperature = float((observation.get("options") or {}).get("temperature", 0.0))
        return Decoder(
            self.model,
            temperature=temperature,
            passes=self.passes if task == self.arrow else None,
            speculate=self.speculate and not temperature,
            prefixes=self.prefixes,
            extend=self.extend,
            max_tokens=SERVED_TOKENS,
        )

    def _request(self, task: Task, observation: dict[str, Any]) -> tuple[Task, Request]:
        """What to decode: the task, of whose group the last repetition is now, and the request.

        Raises: TaskError when the observation cannot fill what the task is given.
        """
        name = observation.get("embodiment")
        if name is None and len(self.robots) == 1:
            name = next(iter(self.robots))
        if name is not None and name not in self.robots:
            raise TaskError(f"embodiment {name!r} is not served: {did_you_mean(str(name), self.robots)}")
        if self.blank_images:
            seen = lambda key: key.startswith((IMAGES, DEMO))
            observation = {k: np.full_like(v, 128) if seen(k) else v for k, v in observation.items()}
        robot = self.robots.get(str(name))
        commands = past_commands(task, robot.rate_hz) if robot is not None else 0
        if commands and observation.get("past_actions") is None:
            observation = {**observation, "past_actions": np.zeros((0, len(robot.action)), np.float32)}  # type: ignore
        tokens = ObservationTokens(observation, self.tokenizers, name)
        missing = task.missing(tokens.streams, given_only=True)
        if missing:
            raise TaskError(f"the observation cannot fill {task}: it has no {lacking(missing, tokens.streams)}")
        encode = lambda values, what: self.tokenizers.encode_vector(
            "action", str(name), values, what=what, where="observation"
        )
        prefix, done, now, asked = observation.get("action_prefix"), {}, tokens.now, task
        prefix = encode(prefix, "action_prefix") if prefix is not None and len(prefix) else None
        if task.group is not None:
            task, done = self._group_so_far(task, observation, tokens, encode)
            now -= len(done) * task.stride(tokens.rate_hz)
            done, prefix = done | ({len(done): prefix} if prefix is not None else {}), None
        placed = task.place(tokens.rate_hz)
        given = [p for p in placed if not p.predicted and p.start is not None]
        past = max((-p.start for p in given), default=0)  # type: ignore[operator]
        seen = max((-p.start for p in given if p.row.clock == "observed"), default=0)  # type: ignore[operator]
        did = observation.get("past_actions")
        unknown = commands + tokens.now - now - len(did) if commands and did is not None else 0
        if robot is not None and unknown > 0:
            if asked != self.arrow:
                raise TaskError(
                    f"{task} needs the last {commands + tokens.now - now} commands, the observation has {len(did)}",  # type: ignore[arg-type]
                    fix="send them as past_actions, float32 (n, axes), the last one before now",
                )
            rest = commands_before(robot, observation, unknown)
            observation = {**observation, "past_actions": np.concatenate([rest, did])}  # type: ignore[list-item]
        if seen > now and asked != self.arrow:
            raise TaskError(
                f"{task} needs the last {seen + 1} frames, the observation has {tokens.now + 1}",
                fix=f"send {IMAGES}<camera> with shape ({seen + 1}, H, W, 3)",
            )
        if past > now:
            # the episode begins: what was seen first was seen before, too
            observation = prolonged(observation, past + tokens.now - now + 1)
            now = past
        tokens = ObservationTokens(observation, self.tokenizers, name)
        seed = int((observation.get("options") or {}).get("seed", 0))
        return task, Request(tokens, now, prefix=prefix, done=done, seed=seed)

    @staticmethod
    def _group_so_far(
        task: Task, observation: dict[str, Any], tokens: ObservationTokens, encode: Callable[[Any, str], np.ndarray]
    ) -> tuple[Task, dict[int, np.ndarray]]:
        """The task with as many repetitions as have been, and the codes of what was done in those before now."""
        assert task.group is not None
        stride, did = task.stride(tokens.rate_hz), observation.get("past_actions")
        count = min(task.group.count, 1 + (0 if did is None else min(len(did), tokens.now) // stride))
        codes = None if count == 1 else encode(did[-(count - 1) * stride :], "past_actions")  # type: ignore[index]
        return task.with_count(count), {i: codes[i * stride : (i + 1) * stride] for i in range(count - 1)}  # type: ignore[index]


def checkpoint_id(directory: Path) -> str:
    """16 hexadecimal digits that change with the weights in a folder: of its files' names, sizes and times."""
    files = sorted(path for pattern in ("*.json", "*.safetensors") for path in directory.glob(pattern))
    stated = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stated).encode()).hexdigest()[:16]
