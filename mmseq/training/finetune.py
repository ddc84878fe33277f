"""Fine-tune: a checkpoint learns a new robot from a LeRobot dataset, in one command.

    mmseq finetune runs/demo/checkpoint --dataset PATH --embodiment robot.yaml [--lora] [--hours 2]

runs/finetune/episodes/<robot>   tokenizers/   tokens/   mix.yaml   recipe.yaml   what training starts from
             checkpoints/   metrics.jsonl   checkpoint/   finetune.json              what it leaves

What is wrong, missing or left out is said before any work. The dataset is imported under its contract
(`data/contract.py`), tokenized with the checkpoint's tokenizers, and trained on every arrow of the checkpoint that it
can fill. A share of what the checkpoint was trained on goes on being trained, against forgetting. `recipe.yaml` runs
under any launcher of `mmseq train`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmseq.config import load_config, to_yaml
from mmseq.data.contract import complete, questionnaire, read_contract, unknown_units
from mmseq.data.importing import (
    EpisodeShardReader,
    import_episodes,
    notes_of,
    open_episodes,
    stored_contract,
    survey,
    values_of,
)
from mmseq.data.mixture import MixConfig, SourceConfig, TaskConfig, least_holdout, load_mix, save_mix, task_name
from mmseq.data.moments import Moments
from mmseq.data.reader import EpisodeSource
from mmseq.data.sources import streams_of
from mmseq.data.tokenize import tokenize_mix
from mmseq.data.tokens import EpisodePlan, TokenShards, planned_note
from mmseq.embodiment import Embodiment
from mmseq.errors import ConfigError, DataError, EmbodimentError
from mmseq.model.sequence_model import SequenceModel
from mmseq.reading import Reading
from mmseq.streams import TEXT, VECTOR, lacking
from mmseq.tasks import Task
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training.config import DataConfig, DeepSpeedConfig, LoraConfig, TrainConfig
from mmseq.training.row_length import fit_rows

POLICY = "text, image, proprio -> action[16]"  # for a checkpoint that has never acted
FULL_RATE = 0.3  # of the learning rates that the checkpoint was trained with
BEGUN = "begun.json"  # in its folder: what a fine-tuning is of
KEPT = "kept."  # before the names of tasks that are rehearsed
type Notes = list[dict[str, Any]]  # what an index of shards says of each episode


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Reading):
    """What `mmseq finetune` is told, and how the dataset is read."""

    checkpoint: str  # to start from
    dataset: str  # LeRobot of the new robot, or HDF5 files
    out: str = "runs/finetune"  # the folder of it all
    skip_bad: int = 0  # leave out up to so many episodes that cannot be read
    embodiment: str | None = None  # what the dataset does not say: units, gripper; or a whole contract (YAML, JSON)
    rate_hz: float | None = None  # steps per second; default: the dataset's
    tasks: list[str] = field(default_factory=list)  # arrows to train instead of the checkpoint's
    lora: bool = False  # train adapters instead of every weight
    lora_rank: int = 16  # of the adapters
    hours: float = 2.0  # at most
    steps: int = 20_000  # at most
    keep: float = 0.2  # share of the samples that rehearse what the checkpoint knows
    tokens: str | None = None  # the checkpoint's own token shards; default: where they were
    seed: int = 0  # of the data order and of fresh weights
    settings: list[str] = field(default_factory=list)  # `key=value` of the training recipe
    ranks: int = 1  # processes on this machine, which share the rows; default: one per GPU

    def check(self) -> None:
        if not 0 < self.hours <= 24 * 365:
            raise ConfigError(f"--hours is {self.hours:g}", fix="give a positive number")
        if not 0 <= self.keep < 1:
            raise ConfigError(f"--keep is {self.keep:g}", fix="give a share from 0 to below 1")
        if self.steps < 1 or self.lora_rank < 1:
            raise ConfigError(f"--steps {self.steps} and --lora-rank {self.lora_rank} must be at least 1")
        for arrow in self.tasks:
            Task.parse(arrow)


def prepare(config: FinetuneConfig, *, say: Callable[[str], None], on_progress: Callable[[str, int, int], None]) -> str:
    """Everything before the first step, up to `<out>/recipe.yaml`; returns the name of the robot.

    What an interrupted try has finished is kept. Raises: MMSeqError for whatever cannot work, before any
    training; an EmbodimentError leaves `<out>/embodiment.yaml` to be completed.
    """
    config.check()
    out, checkpoint = Path(config.out), Path(config.checkpoint)
    old = SequenceModel.from_pretrained(checkpoint)
    assert old.tokenizers is not None
    recipe = _recipe(config, old, out)
    _refuse_another(out)
    say = _once(say)
    robot, source = _contract(config, old.tokenizers, out, say)
    notes, bad = survey(source, robot, config.skip_bad, config.dataset, say)
    say(f"{config.dataset}: {len(notes)} episodes of {robot.name} at {robot.rate_hz:g} Hz")
    if len(notes) < 4:
        raise DataError(f"{config.dataset} has {len(notes)} episodes", fix="give at least four: one part is held out")
    tokenizers = old.tokenizers
    size = tokenizers.vision.config.size
    name = re.sub(r"[^A-Za-z0-9_-]", "_", robot.name)
    episodes = out / "episodes" / name
    stored = stored_contract(robot, size)
    assert stored is not None
    _say_doubts(stored, say)
    if stored.name not in tokenizers.embodiments:
        tokenizers = tokenizers.with_embodiments([*tokenizers.embodiments.values(), stored])
    plan = EpisodePlan(planned_note(source[i], tokenizers) for i in range(len(source)) if i not in bad.found)
    moments = partial(_moments, plan=plan, tokenizers=tokenizers, name=name)
    _new_tasks(config, old, _old_mix(checkpoint), notes, name, moments)
    identity = _identity(config, robot, len(notes), recipe)
    _refuse_begun(identity, out)
    mix = _mix(config, old, notes, name, moments, say)
    shards = _old_tokens(config)
    folders = {key: shards / key for key in mix.sources if shards is not None and key != name}
    plans = {key: TokenShards(folder, old.tokenizers).plan for key, folder in folders.items()}
    plans[name] = plan
    recipe = fit_rows(recipe, mix, plans, tokenizers, settings=config.settings, say=say)
    _begin(identity, folders, out)  # only now: what was refused until here may be tried again with other tasks
    _import(config, robot, episodes, size, say, on_progress)
    kept = EpisodeShardReader(episodes).metadata
    if len(kept) < len(notes):  # pictures of some could not be decoded
        mix = _mix(config, old, kept, name, moments, say)
    tokenizers.save(out / "tokenizers")
    save_mix(mix, out / "mix.yaml")
    new_only = replace(mix, sources={name: mix.sources[name]}, tasks=[t for t in mix.tasks if t.sources == [name]])
    save_mix(new_only, out / "new.yaml")
    tokenize_mix(out / "new.yaml", out / "tokens", tokenizers, root=out, on_progress=on_progress)
    (out / "recipe.yaml").write_text(to_yaml(recipe))
    return stored.name


def _once(say: Callable[[str], None]) -> Callable[[str], None]:
    """The same, but each text a single time: a dataset is opened more than once."""
    said: set[str] = set()
    return lambda text: None if text in said or said.add(text) else say(text)


def _say_doubts(robot: Embodiment, say: Callable[[str], None]) -> None:
    """What may be a mistake: units that nobody knows, and axes that have one value only, at which a policy will hold
    them and a server want them."""
    if units := unknown_units(robot):
        say(f"note: units of {robot.name} that are spelled as no other: {', '.join(units)}")
    for stream, axes in robot.vectors.items():
        rows = zip(axes.names, axes.units, axes.low, axes.high)
        still = [f"{name} ({low:g} {unit})" for name, unit, low, high in rows if low == high]
        if still:
            say(f"note: {stream} {', '.join(still)} never moves in this dataset; limits in the embodiment widen it")


def _refuse_another(out: Path) -> None:
    """Raises: ConfigError when `out` holds something that no fine-tuning wrote."""
    others = [p.name for p in out.iterdir() if p.name != "embodiment.yaml"] if out.is_dir() else []
    if others and not (out / BEGUN).is_file():
        raise ConfigError(
            f"--out {out} holds {', '.join(sorted(others)[:3])}, which no fine-tuning wrote", fix="name a new folder"
        )


def _identity(config: FinetuneConfig, robot: Embodiment, episodes: int, recipe: TrainConfig) -> dict[str, Any]:
    """What a fine-tuning is of, as `BEGUN` has it."""
    info = Path(config.dataset) / "meta/info.json"
    identity = {
        "checkpoint": str(Path(config.checkpoint).resolve()),
        "dataset": str(Path(config.dataset).resolve()),
        "data": hashlib.sha256(info.read_bytes()).hexdigest()[:16] if info.is_file() else "",
        "episodes": episodes,
        "robot": robot.to_dict(),
        **{f.name: config.said().get(f.name) for f in fields(Reading)},
        "tasks": config.tasks,
        "keep": config.keep,
        "lora": recipe.lora.rank,
        "optimizer": recipe.optimizer.kind,
    }
    return json.loads(json.dumps(identity))


def _refuse_begun(identity: dict[str, Any], out: Path) -> None:
    """Raises: ConfigError when `out` was begun for something else."""
    path, form = out / BEGUN, out / "embodiment.yaml"
    if path.is_file():
        try:
            before = json.loads(path.read_text())
        except ValueError:  # killed while it was written: nothing else stands there yet
            before = identity
        changed = [key for key, value in identity.items() if before.get(key) != value]
        if changed:
            # a form that somebody completed is not to be lost with the folder
            fix = (
                f"name a new folder; {form} stays of use" if form.exists() else "name a new folder, or remove this one"
            )
            raise ConfigError(f"--out {out} was begun with another {', '.join(changed)}", fix=fix)


def _begin(identity: dict[str, Any], rehearsed: dict[str, Path], out: Path) -> None:
    """Write down what this folder is for, and link the token shards that are rehearsed into it."""
    (out / "tokens").mkdir(parents=True, exist_ok=True)
    (out / BEGUN).write_text(json.dumps(identity, indent=1) + "\n")
    for key, folder in rehearsed.items():
        link = out / "tokens" / key
        link.unlink(missing_ok=True)
        link.symlink_to(folder.resolve(), target_is_directory=True)


def _contract(
    config: FinetuneConfig, known: Tokenizers, out: Path, say: Callable[[str], None]
) -> tuple[Embodiment, EpisodeSource]:
    """The contract of the dataset, and a reader that holds it to that."""
    open_as = partial(open_episodes, config.dataset, config, rate_hz=config.rate_hz)
    source = open_as()
    robot = source.embodiment()
    for note in notes_of(source):
        say(f"note: {note}")
    if robot is None or robot.action is None:
        raise DataError(f"{config.dataset} has no actions", fix="fine-tune on episodes of a robot")
    if robot.name in known.embodiments and config.embodiment is None:
        theirs = known.embodiments[robot.name]
        cameras = {"cameras": robot.cameras}  # the checkpoint's are of the size that it was trained with
        robot = replace(theirs, **cameras)
    elif config.embodiment is not None or not (Path(config.dataset) / "meta/embodiment.json").is_file():
        answers = read_contract(config.embodiment) if config.embodiment else {}
        where = config.embodiment or config.dataset
        if isinstance(answers, Embodiment):
            return _unlike(answers, known, where), open_as(embodiment=answers)
        try:
            robot = complete(robot, answers, where=where, values=values_of(source, robot))
        except EmbodimentError as error:
            form = out / "embodiment.yaml"
            if config.embodiment is None and not form.exists():
                out.mkdir(parents=True, exist_ok=True)
                form.write_text(questionnaire(robot))
            fix = f"complete {form} and pass --embodiment {form}" if form.exists() else "complete that file"
            raise EmbodimentError(str(error).rstrip("."), fix=fix) from error
        _unlike(robot, known, where)
    return robot, open_as(embodiment=robot)


def _unlike(robot: Embodiment, known: Tokenizers, where: str) -> Embodiment:
    """The robot. Raises: EmbodimentError when the checkpoint knows another one of its name."""
    theirs = known.embodiments.get(robot.name)
    if theirs is not None and replace(theirs, cameras=robot.cameras).fingerprint != robot.fingerprint:
        raise EmbodimentError(
            f"{where}: the checkpoint knows another robot named {robot.name!r}", fix="give this one another name"
        )
    return robot


def _import(
    config: FinetuneConfig,
    robot: Embodiment,
    episodes: Path,
    size: int,
    say: Callable[[str], None],
    on_progress: Callable[[str, int, int], None],
) -> None:
    mark = episodes.with_name(episodes.name + ".json")
    identity = {"dataset": str(Path(config.dataset).resolve()), "robot": robot.to_dict(), "size": size}
    identity = json.loads(json.dumps(identity | {f.name: getattr(config, f.name) for f in fields(Reading)}))
    try:
        if episodes.is_dir() and json.loads(mark.read_text()) == identity:
            return
    except (OSError, ValueError):  # never finished
        pass
    import_episodes(
        config.dataset,
        episodes,
        config,
        rate_hz=config.rate_hz,
        embodiment=robot,
        size=size,
        name=episodes.name,
        overwrite=True,
        skip_bad=config.skip_bad,
        say=lambda note: say(f"note: {note}"),
        on_progress=lambda done, total: on_progress("importing", done, total),
    )
    mark.write_text(json.dumps(identity))


def _moments(task: Task, notes: Notes, *, plan: EpisodePlan, tokenizers: Tokenizers, name: str) -> Moments:
    """Where the task can be filled, in the episodes that `notes` are of."""
    kept = {note["id"] for note in notes}
    members = [i for i, id_ in enumerate(plan.ids) if id_ in kept]
    return Moments(0, 0, task, name, plan, members, tokenizers.builder())


def _mix(
    config: FinetuneConfig,
    old: SequenceModel,
    notes: Notes,
    name: str,
    moments: Callable[[Task, Notes], Moments],
    say: Callable[[str], None],
) -> MixConfig:
    """The arrows for the new robot, and beside them what is rehearsed."""
    before = _old_mix(Path(config.checkpoint))
    rehearsed = _rehearsed(config, before, name, say)
    share = config.keep if rehearsed else 0.0
    tasks = _new_tasks(config, old, before, notes, name, moments)
    total = sum(t.weight for t in tasks)
    tasks = [replace(t, weight=t.weight / total * (1 - share)) for t in tasks]
    total = sum(t.weight for t in rehearsed)
    tasks += [replace(t, weight=t.weight / total * share) for t in rehearsed]
    least = least_holdout([f"{name}/{note['id']}" for note in notes])
    sources = {name: SourceConfig(path=f"episodes/{name}", holdout=max(before.holdout if before else 0.1, least))}
    if before is None:
        return MixConfig(name=f"{name}_finetune", sources=sources, tasks=tasks)
    used = {s for t in rehearsed for s in t.sources or []}
    sources |= {key: source for key, source in before.sources.items() if key in used}
    # what was held out before still is, and nothing else: forgetting is measured on what was never trained on
    return MixConfig(name=f"{name}_finetune", sources=sources, tasks=tasks, holdout=before.holdout)


def _old_mix(checkpoint: Path) -> MixConfig | None:
    path = checkpoint / "mix.yaml"
    return load_mix(path) if path.is_file() else None


def _new_tasks(
    config: FinetuneConfig,
    old: SequenceModel,
    before: MixConfig | None,
    notes: Notes,
    name: str,
    moments: Callable[[Task, Notes], Moments],
) -> list[TaskConfig]:
    """The arrows that the episodes can fill, be it that only some can. notes: what an index of shards says of each."""
    weights = {task_name(t): t.weight for t in before.tasks} if before else {}
    parallel = {task_name(t): t.parallel for t in before.tasks} if before else {}
    known = dict(old.tasks) or {task_name(t): t.task for t in (before.tasks if before else ())}
    arrows = {Task.parse(a).alias or a: a for a in config.tasks} or known
    if not any(Task.parse(a).names("action", given=False) for a in arrows.values()):
        arrows = {"policy": POLICY, **arrows}
    streams = streams_of(notes)
    chosen, reasons = [], []
    for key, arrow in arrows.items():
        task = Task.parse(arrow)
        spare = {s.stream for s in task.given if s.row.kind in (TEXT, VECTOR) and s.row.clock == "observed"}
        task = task.without(spare - set(streams))
        missing = task.missing(streams)
        if missing:
            reasons.append(f"{key} needs {lacking(missing, streams)}")
        elif not len(found := moments(task, notes)):  # where a text changes on the way, it must lie in one piece
            reasons.append(f"{key} finds {found.why_empty()}")
        else:
            shares = {"weight": weights.get(key, 1.0), "parallel": parallel.get(key, 0.0)}
            chosen.append(TaskConfig(task=str(task), name=key, sources=[name], **shares))
    if not any(Task.parse(t.task).names("action", given=False) for t in chosen):
        raise ConfigError(
            f"{config.dataset} can fill no arrow that predicts actions ({'; '.join(reasons)})",
            fix="name one that it can with --task, such as 'image -> action[8]'",
        )
    return chosen


def _old_tokens(config: FinetuneConfig) -> Path | None:
    """Where the checkpoint's own token shards are, or were."""
    recipe = Path(config.checkpoint) / "train.yaml"
    if config.tokens or not recipe.is_file():
        return Path(config.tokens) if config.tokens else None
    return Path(load_config(TrainConfig, recipe).data.tokens)


def _rehearsed(
    config: FinetuneConfig, before: MixConfig | None, name: str, say: Callable[[str], None]
) -> list[TaskConfig]:
    """The tasks of the old mix whose token shards are still there. With keep=0 they have no weight and show what is
    forgotten."""
    folder = _old_tokens(config)
    if before is None or folder is None or not folder.is_dir():
        if config.tokens:
            raise DataError(f"--tokens {config.tokens} is not a folder of token shards of the checkpoint's mix")
        say(
            f"nothing is rehearsed, and forgetting is not measured: the checkpoint's token shards are not at {folder}; "
            "--tokens says where they are"
        )
        return []
    there = [key for key in before.sources if (folder / key / "manifest.json").is_file()]
    if name in there:
        raise EmbodimentError(f"the old mix has a source named {name!r}", fix="give the new robot another name")
    kept = []
    for task in before.tasks:
        sources = [key for key in task.sources or list(before.sources) if key in there]
        if sources and task.weight > 0:
            kept.append(replace(task, name=KEPT + task_name(task), sources=sources))
    return kept


def _recipe(config: FinetuneConfig, old: SequenceModel, out: Path) -> TrainConfig:
    """The checkpoint's own recipe at lower rates; a new one where it has none. What was chosen for the machine that
    trained the checkpoint is left behind. Raises: ConfigError when it cannot train on `ranks`."""
    path = Path(config.checkpoint) / "train.yaml"
    recipe = load_config(TrainConfig, path) if path.is_file() else TrainConfig(deepspeed=DeepSpeedConfig(zero_stage=0))
    o = recipe.optimizer
    rates = {"learning_rate": o.learning_rate * FULL_RATE, "muon_learning_rate": o.muon_learning_rate * FULL_RATE}
    if config.lora:
        rates = {"kind": "adamw", "learning_rate": o.learning_rate}
    data = replace(
        recipe.data if path.is_file() else DataConfig(),
        **{"mix": str(out / "mix.yaml"), "tokens": str(out / "tokens"), "tokenizers": str(out / "tokenizers")},
    )
    data.rows_per_step = -(-data.rows_per_step // config.ranks) * config.ranks
    each = data.rows_per_step // config.ranks
    data.rows_per_pass = math.gcd(each, min(data.rows_per_pass, each))
    made = replace(
        recipe,
        name=out.name,
        out=str(out),
        seed=config.seed,
        steps=config.steps,
        max_minutes=config.hours * 60,
        stop_after=0,
        init_from=str(config.checkpoint),
        lora=LoraConfig(rank=config.lora_rank if config.lora else 0),
        data=data,
        model=replace(old.config, slots=0, soft=0, vocabulary=0),  # the tokenizers decide: a further stream has more
        optimizer=replace(o, **rates),
        validate_every=recipe.validate_every or 500,
        deepspeed=replace(recipe.deepspeed, settings=None, sequence_parallel=1),
        compile=False,
        loggers=[],
    )
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "recipe.yaml"
        base.write_text(to_yaml(made))
        final = load_config(TrainConfig, base, config.settings)
    if Path(final.out) != out:
        raise ConfigError(f"out={final.out} is not --out {out}", fix="give --out alone")
    final.check(config.ranks)
    return final


def before_and_after(out: Path) -> dict[str, Any]:
    """What training changed: held-out bits per token by task, before it and after; kept in `finetune.json`."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["kind"] == "validation"]
    if not found:
        raise DataError(f"{out / 'metrics.jsonl'} has no validation")
    first, last = found[0], found[-1]
    table = {
        name: {"before": first["bits_per_token"].get(name), "after": bits}
        for name, bits in last["bits_per_token"].items()
    }
    report = {"steps": last["step"], "unit": "held-out bits per token", "tasks": table}
    for folder in (out, out / "checkpoint"):
        if folder.is_dir():
            (folder / "finetune.json").write_text(json.dumps(report, indent=2) + "\n")
    return report
