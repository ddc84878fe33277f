"""Generated datasets, plain and odd, of v2.1 and v3, read as LeRobot's own reader reads the plain one."""

import shutil

import numpy as np
import pytest

from mmseq.data.lerobot import LeRobotReader
from support.lerobot_sets import LOSSLESS, ODD, Made, make, oddities, shown

FAST, ALL = 20, 200


@pytest.fixture(scope="module")
def lerobots():
    """A function (path of v3, fps) -> items as LeRobot gives them."""
    pytest.importorskip("lerobot")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return lambda path: LeRobotDataset("local/made", root=path, video_backend="pyav")


def converted(path):
    """v3 of a v2.1 dataset, by LeRobot's converter, in its place."""
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    convert_dataset("local/made", root=path, push_to_hub=False)
    return path


def text_at(episode, t: int) -> list[str]:
    spans = [span.texts for span in episode.spans if span.stream == "text" and span.start <= t < span.stop]
    return list(spans[0]) if spans else episode.texts


def differences(reader: LeRobotReader, theirs, made: Made) -> list[str]:
    """Where our items are not LeRobot's."""
    found, row = [], 0
    if len(reader) != len(made.episodes):
        return [f"{len(reader)} episodes for {len(made.episodes)}"]
    for index, episode in enumerate(reader):
        if len(episode) != len(made.episodes[index]):
            found.append(f"episode {index} has {len(episode)} steps")
        for t in range(len(episode)):
            item, where = theirs[row], f"episode {index} step {t}"
            row += 1
            if text_at(episode, t) != [item["task"]]:
                found.append(f"{where}: {text_at(episode, t)} for {item['task']!r}")
            if abs(next(iter(episode.streams.values())).times[t] - float(item["timestamp"])) > 1e-4:
                found.append(f"{where}: another time")
            for stream, names in reader.streams.items():
                ours = episode[stream][t]
                if stream.startswith("image."):
                    image = (item[names[0]].numpy().transpose(1, 2, 0) * 255).round()
                    if ours.shape != image.shape or np.abs(image - ours).max() > 2:
                        found.append(f"{where}: {stream} shows {shown(ours)}, LeRobot's {shown(image)}")
                elif not np.array_equal(ours, np.ravel(item[names[0]].numpy())):
                    found.append(f"{where}: {stream} is {ours}")
    return found + ([f"{row} rows for {len(theirs)}"] if row != len(theirs) else [])


def check(seed: int, folder, lerobots) -> str | None:
    made, version = make(seed), ("v2", "v3")[seed % 2]
    odd = oddities(seed, version, made)
    plain = made.write(folder / "plain", version)
    readers = [LeRobotReader(plain)]
    strange = made.write(folder / "odd", version, odd)
    extra = {"observation.ft_sensor": "force"}
    given = {extra[n]: (n,) for n in made.vectors if n in extra}
    twin = plain
    if version == "v2":
        if LOSSLESS in made.cameras.values():
            twin = made.write(folder / "twin", "v3")
        else:
            twin = converted(shutil.copytree(plain, folder / "twin"))
        readers.append(LeRobotReader(twin))
    readers.append(LeRobotReader(strange, map=given))
    theirs = lerobots(twin)
    for name, reader in zip(("plain", "twin", "odd") if version == "v2" else ("plain", "odd"), readers, strict=True):
        if found := differences(reader, theirs, made):
            return f"seed {seed} {version} {name} {sorted(odd)} {made.cameras}: {found[:3]}"
    robot = readers[-1].embodiment()
    assert {c.name: (c.height, c.width) for c in robot.cameras} == dict.fromkeys(readers[0].cameras, made.size)
    widths = {name: values[0].shape[1] for name, (_, values) in made.vectors.items()}
    assert [len(axes) for axes in robot.vectors.values()] == [widths[reader_of(readers[-1], s)] for s in robot.vectors]
    return None


def reader_of(reader: LeRobotReader, stream: str) -> str:
    return reader.streams[stream][0]


@pytest.mark.parametrize("seed", range(FAST))
def test_items_are_lerobots(seed, tmp_path, lerobots):
    assert check(seed, tmp_path, lerobots) is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FAST, ALL))
def test_items_are_lerobots_in_all_variants(seed, tmp_path, lerobots):
    assert check(seed, tmp_path, lerobots) is None


def test_the_variants_cover_every_oddity_in_both_versions():
    kinds = {seed: ("v2", "v3")[seed % 2] for seed in range(ALL)}
    used = {version: set() for version in ("v2", "v3")}
    for seed, version in kinds.items():
        used[version] |= oddities(seed, version, make(seed))
    assert used == {"v2": set(ODD), "v3": set(ODD)}
    assert len(set().union(*(oddities(seed, kinds[seed], make(seed)) for seed in range(FAST)))) >= len(ODD) - 3
