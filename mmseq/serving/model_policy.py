"""ModelPolicy: a checkpoint as the server sees it.

    policy = ModelPolicy.from_pretrained("runs/demo/checkpoint")
    serve(policy, ServerConfig(port=8000))

An observation holds what is known now: `observation.images.<camera>` uint8 (H, W, 3), or (n, H, W, 3)
with the past frames that end now; `observation.state` float32 (axes,); `prompt`. For other arrows also
`action` float32 (n, axes) from now on, `observation.images.<camera>@+16` (the offset as the arrow writes it,
also `@end`: what a given `image@+16` shows) and `question`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.embodiment import Embodiment
from mmseq.errors import CheckpointError, ConfigError, MMSeqError, ModelError, TaskError, did_you_mean
from mmseq.inference.compiled import CompiledExtend
from mmseq.inference.decoding import Decoder, Request
from mmseq.inference.predict import require_parallel, to_streams
from mmseq.inference.prefixes import Prefixes
from mmseq.model.device import default_device
from mmseq.model.sequence_model import SequenceModel
from mmseq.serving.keys import IMAGES
from mmseq.serving.observation import example_observation
from mmseq.streams import IMAGE_PREFIX, STREAMS, VECTOR, VISION, StreamRow, row_of, stream_row
from mmseq.tasks import ALIASES, Group, Task, parse_offset
from mmseq.tokenization.bundle import Tokenizers

log = logging.getLogger("mmseq.serving")

_FUTURE = 1 << 20  # an observation has no end
PROMPT_TOKENS = 128  # by which a prompt may be longer than that of the warm-up for compiled passes to fit it
SERVED_TOKENS = 2048  # of one request: no client may keep the model from the others for long


class ObservationTokens:
    """The tokens of what is known now. Implements `TokenSource`; step `now` is the present."""

    def __init__(self, observation: dict[str, Any], tokenizers: Tokenizers, embodiment: str | None):
        self.tokenizers, self.embodiment = tokenizers, embodiment
        self.rate_hz = (
            tokenizers.embodiments[embodiment].rate_hz if embodiment else float(observation.get("rate_hz", 20.0))
        )
        self._observation = observation
        images = {k.removeprefix(IMAGES): _stack(v) for k, v in observation.items() if k.startswith(IMAGES)}
        self._frames = {camera: frames for camera, frames in images.items() if "@" not in camera}
        self.now = max((len(f) for f in self._frames.values()), default=1) - 1
        self._elsewhere: dict[tuple[str, int], np.ndarray] = {}  # single frames by camera and step
        for name in (name for name in images if "@" in name):
            camera, _, at = name.partition("@")
            try:
                offset = parse_offset(at)
            except TaskError as error:
                fix = f"write it as the arrow does: {IMAGES}{camera}@+16, @+0.8s or @end"
                raise TaskError(f"'{IMAGES}{name}' has no readable offset", fix=fix) from error
            step = self.now + (_FUTURE - 1 if isinstance(offset, str) else offset.steps(self.rate_hz))
            if (camera, step) in self._elsewhere:
                raise TaskError(f"'{IMAGES}{name}' is given a second time, under another offset of the same step")
            self._elsewhere[camera, step] = images[name]

    def __len__(self) -> int:
        return self.now + _FUTURE

    @property
    def streams(self) -> list[str]:
        present = [f"{IMAGE_PREFIX}{c}" for c in dict.fromkeys([*self._frames, *(c for c, _ in self._elsewhere)])]
        rows = [*STREAMS.values(), *map(stream_row, self._vectors)]
        known = {row.name: row.wire for row in rows if row.wire and row.kind is not VISION}
        return present + [name for name, key in known.items() if self._observation.get(key) is not None]

    @property
    def _vectors(self) -> list[str]:
        robot = self.tokenizers.embodiments.get(self.embodiment or "")
        return list(robot.vectors) if robot is not None else []

    def codes(self, stream: str, start: int, stop: int, variant: int = 0) -> np.ndarray:
        row = row_of(stream)
        if row.kind is VISION:
            return self._vision(stream.removeprefix(IMAGE_PREFIX), start, stop)
        if row.kind is VECTOR:
            return self._vector(row, start, stop)
        if row.wire is None:
            raise TaskError(f"{stream} is predicted, it cannot be given in an observation")
        if not isinstance(self._observation.get(row.wire), str):
            raise TaskError(f"the observation has no {row.wire!r}", fix=f"send {row.wire} as a string")
        return self.tokenizers[row.range].encode(self._observation[row.wire])

    def features(self, camera: str, start: int, stop: int) -> np.ndarray:
        raise TaskError(f"these tokenizers have no encoder for camera {camera!r}")

    def _vision(self, camera: str, start: int, stop: int) -> np.ndarray:
        lone = self._elsewhere.get((camera, start)) if stop - start == 1 else None
        if lone is not None:
            return self.tokenizers.vision.encode(lone[-1:])
        if stop > self.now + 1:
            raise TaskError(
                f"this arrow is given a future image of camera {camera!r} that the observation lacks",
                fix=f"send {IMAGES}{camera}@... with the offset as the arrow writes it, uint8 (H, W, 3)",
            )
        if camera not in self._frames:
            raise TaskError(f"the observation has no image of camera {camera!r}", fix=f"send {IMAGES}{camera}")
        frames = self._frames[camera]
        first = start - (self.now + 1 - len(frames))
        if first < 0:
            raise TaskError(f"camera {camera!r} has {len(frames)} frames, fewer than other cameras")
        return self.tokenizers.vision.encode(frames[first : first + stop - start])

    def _vector(self, row: StreamRow, start: int, stop: int) -> np.ndarray:
        key = row.wire or row.name
        values = np.atleast_2d(np.asarray(self._observation[key]))
        # what is observed ends with now, commands begin with it
        first = start - (self.now + 1 - len(values)) if row.clock == "observed" else start - self.now
        if first < 0 or first + stop - start > len(values):
            raise TaskError(
                f"this arrow needs {key!r} of steps {start - self.now} to {stop - 1 - self.now} from now, "
                f"the observation has {len(values)}"
            )
        values = values[first : first + stop - start]
        return self.tokenizers.encode_vector(row.name, self.embodiment, values, what=key, where="observation")


def _stack(image: Any) -> np.ndarray:
    image = np.asarray(image)
    return image[None] if image.ndim == 3 else image


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
            raise CheckpointError(f"{name} was trained on no policy", fix="name one with arrow=")
        if "->" not in chosen and chosen not in {*self.tasks, *ALIASES}:
            raise ConfigError(f"{name} was trained on no task {chosen!r}: {did_you_mean(chosen, self.tasks)}")
        self.arrow = Task.parse(self.tasks.get(chosen, chosen))
        _check_servable(self.arrow)
        trained = [f"{task} ({arrow})" for task, arrow in self.tasks.items()]
        if trained and self.arrow not in [Task.parse(a) for a in self.tasks.values()]:
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
        horizons = {n: segments[-1].length.steps(e.rate_hz) for n, e in self.robots.items()}  # type: ignore[union-attr]
        if len(set(horizons.values())) > 1:
            raise ConfigError(
                f"the chunks of {self.arrow} have other lengths for other robots: {horizons}",
                fix="name the one to serve with --embodiment",
            )
        self.horizon = next(iter(horizons.values()))

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
        }

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The next chunk, float32 (horizon, axes). `action_prefix` is kept exactly as its bins."""
        streams = self._run(self.arrow, observation)
        return {"actions": np.asarray(streams["action"], dtype=np.float32)}

    def predict(self, arrow: str, observation: dict[str, Any]) -> dict[str, Any]:
        """Every predicted stream of any arrow, by name."""
        return self._run(Task.parse(self.tasks.get(arrow, arrow)), observation)

    def infer_many(self, observations: Sequence[dict[str, Any]]) -> list[dict[str, Any] | MMSeqError]:
        """`infer` for observations of one `batch_key`, decoded together; what one of them fails with is its result."""
        results: list[dict[str, Any] | MMSeqError] = []
        requests: dict[int, Request] = {}
        for i, observation in enumerate(observations):
            results.append({})
            try:
                requests[i] = self._request(self.arrow, observation)
            except MMSeqError as error:
                results[i] = error
        decoded = self._decoder(self.arrow, observations[0]).decode(self.arrow, list(requests.values()))
        for (i, request), segments in zip(requests.items(), decoded):
            streams = to_streams(segments, self.tokenizers, request.tokens)
            results[i] = {"actions": np.asarray(streams["action"], dtype=np.float32)}
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
        request = self._request(task, observation)
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

    def _request(self, task: Task, observation: dict[str, Any]) -> Request:
        """Raises: TaskError when the observation cannot fill what the task is given."""
        name = observation.get("embodiment")
        if name is None and len(self.robots) == 1:
            name = next(iter(self.robots))
        if name is not None and name not in self.robots:
            raise TaskError(f"embodiment {name!r} is not served: {did_you_mean(str(name), self.robots)}")
        if self.blank_images:
            observation = {k: np.full_like(v, 128) if k.startswith(IMAGES) else v for k, v in observation.items()}
        for segment in task.given:
            if segment.stream == "demo" or segment.repeat:
                raise TaskError(f"{task} is given {segment}, which no observation holds", fix="predict on an episode")
        tokens = ObservationTokens(observation, self.tokenizers, name)
        missing = task.missing(tokens.streams, given_only=True)
        if missing:
            raise TaskError(f"the observation cannot fill {task}: it has no {', '.join(missing)}")
        past = max((-p.start for p in task.place(tokens.rate_hz) if not p.predicted and p.start is not None), default=0)
        if past > tokens.now:
            raise TaskError(
                f"{task} needs the last {past + 1} frames, the observation has {tokens.now + 1}",
                fix=f"send {IMAGES}<camera> with shape ({past + 1}, H, W, 3)",
            )
        prefix = observation.get("action_prefix")
        if prefix is not None and len(prefix):
            what = {"what": "action_prefix", "where": "observation"}
            prefix = self.tokenizers.encode_vector("action", str(name), prefix, **what)
        else:
            prefix = None
        seed = int((observation.get("options") or {}).get("seed", 0))
        return Request(tokens, tokens.now, prefix=prefix, seed=seed)


def checkpoint_id(directory: Path) -> str:
    """16 hexadecimal digits that change with the weights in a folder: of its files' names, sizes and times."""
    files = sorted(path for pattern in ("*.json", "*.safetensors") for path in directory.glob(pattern))
    stated = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stated).encode()).hexdigest()[:16]


def _check_servable(task: Task) -> None:
    """Raises: ConfigError when an observation of now cannot fill what the arrow is given."""
    repeats = any(isinstance(part, Group) for part in task.parts)
    for segment in task.given:
        known = segment.stream in ("text", "image") or (segment.stream == "proprio" and segment.offset is None)
        if repeats or not known:
            raise ConfigError(
                f"the arrow {task} cannot be served as the policy: it is given {segment}",
                fix="use one that is given text, image, proprio and goals such as image@+16; "
                "any other arrow runs with predict",
            )


def required_keys(task: Task, body: Embodiment) -> list[str]:
    """The keys of an observation that the given side of a task reads, the prompt aside."""
    keys: dict[str, None] = {}
    for segment in task.given:
        if segment.row.kind is VISION:
            cameras = [c.name for c in body.cameras]
            if segment.camera and segment.camera not in cameras:
                raise ConfigError(f"{task} is given {segment}; robot {body.name!r} has the cameras {cameras}")
            for camera in [segment.camera] if segment.camera else cameras:
                keys[f"{IMAGES}{camera}{segment.at}"] = None
        elif segment.row.kind is VECTOR and segment.row.wire:
            keys[segment.row.wire] = None
    return list(keys)
