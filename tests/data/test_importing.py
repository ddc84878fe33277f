import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from mmseq import Embodiment, plugins
from mmseq.data.importing import EpisodeShardReader, detect_format, import_episodes, open_episodes, square
from mmseq.data.lerobot import LeRobotReader
from mmseq.data.shards import ShardReader
from mmseq.data.tokenize import tokenize_mix
from mmseq.errors import DataError, EmbodimentError, FingerprintError
from mmseq.mp4 import write_video
from mmseq.testing import tiny


def test_a_lerobot_dataset_becomes_episode_shards(written, tmp_path, psnr):
    path, _ = written
    seen = []
    manifest = import_episodes(path, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    source, shards = LeRobotReader(path), EpisodeShardReader(tmp_path / "out")
    robot = source.embodiment()
    assert manifest["samples"] == len(shards) == 3
    assert manifest["embodiments"] == {"toy_arm": robot.fingerprint}
    assert shards.embodiment() == shards.embodiments["toy_arm"] == robot
    shards.shards.verify()
    for ours, theirs in zip(shards, source, strict=True):
        for field in ("id", "rate_hz", "texts", "plans", "embodiment", "success", "source", "metadata"):
            assert getattr(ours, field) == getattr(theirs, field)
        assert set(ours.streams) == set(theirs.streams)
        for stream in ("proprio", "action"):
            np.testing.assert_array_equal(ours[stream], theirs[stream])
            assert ours[stream].dtype == np.float32
        for camera in ("image.top", "image.wrist"):
            assert psnr(ours[camera], theirs[camera]) > 40
    assert shards.metadata[1]["length"] == 7
    assert shards.metadata[1]["streams"] == ["image.top", "image.wrist", "proprio", "action"]
    np.testing.assert_array_equal(np.stack(list(shards.frames(0, "top"))), shards[0]["image.top"])


def test_a_folder_of_videos_becomes_episode_shards(tmp_path, textured, psnr):
    videos = tmp_path / "videos"
    videos.mkdir()
    frames = textured(20, size=96)
    write_video(videos / "a.mp4", frames, 20)
    write_video(videos / "b.mp4", frames[:10], 20)
    (videos / "captions.jsonl").write_text(json.dumps({"file": "a.mp4", "caption": "one", "plan": "do"}) + "\n")
    manifest = import_episodes(videos, tmp_path / "out", rate_hz=10, size=48, name="clips")
    shards = EpisodeShardReader(tmp_path / "out")
    assert (manifest["name"], manifest["embodiments"], shards.embodiment()) == ("clips", {}, None)
    assert [(e.id, len(e), e.texts, e.plans, e.embodiment) for e in shards] == [
        ("a.mp4", 10, ["one"], ["do"], None),
        ("b.mp4", 5, [], [], None),
    ]
    assert shards[0]["image.main"].shape == (10, 48, 48, 3)
    assert psnr(shards[0]["image.main"], np.stack([square(f, 48) for f in frames[::2]])) > 35


def test_a_size_crops_the_centred_square_and_changes_the_contract(written, tmp_path):
    import_episodes(written[0], tmp_path / "out", size=32)
    shards = EpisodeShardReader(tmp_path / "out")
    assert [(c.height, c.width) for c in shards.embodiment().cameras] == [(32, 32)] * 2
    assert shards[0]["image.top"].shape == (12, 32, 32, 3)
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200
    assert (square(wide, 10) == 200).all()
    assert square(np.asarray(Image.new("RGB", (10, 20))), 16).shape == (16, 16, 3)


def test_values_outside_the_contract_are_named(dataset, tmp_path):
    fields = LeRobotReader(dataset).embodiment().to_dict()
    fields["action"]["maximum"] = [9.0, 0.5, 9.0]
    with pytest.raises(DataError, match=r"episode 'dataset/00000\d'.*action axis 'delta_y' is .* at step \d+, outside"):
        import_episodes(dataset, tmp_path / "out", embodiment=Embodiment.from_dict(fields))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_frames_decide_over_the_size_that_is_promised(dataset, tmp_path):
    robot = LeRobotReader(dataset).embodiment()
    info = json.loads((dataset / "meta" / "info.json").read_text())
    info["features"]["observation.images.top"]["shape"] = [32, 48, 3]
    (dataset / "meta" / "info.json").write_text(json.dumps(info))
    said = []
    import_episodes(dataset, tmp_path / "out", say=said.append)
    assert EpisodeShardReader(tmp_path / "out").embodiment() == robot
    assert said[:-1] == ["observation.images.top is 64 x 64, meta/info.json says 32 x 48"]
    assert said[-1].startswith("nobody has said the units of proprio, action (taken as unitless); whether actions are")
    assert EpisodeShardReader(tmp_path / "out").manifest["notes"] == said


def test_a_changed_embodiment_is_refused(written, tmp_path):
    import_episodes(written[0], tmp_path / "out", size=16)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["embodiments"]["toy_arm"] = "0" * 16
    path.write_text(json.dumps(manifest))
    with pytest.raises(FingerprintError, match=r"toy_arm\.json has fingerprint"):
        EpisodeShardReader(tmp_path / "out")


def test_a_damaged_video_in_a_shard_is_named(written, tmp_path):
    import_episodes(written[0], tmp_path / "out")
    offset, size = ShardReader(tmp_path / "out").members(1)["image.top.mp4"]
    shard = tmp_path / "out" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[offset : offset + size] = bytes(size)
    shard.write_bytes(data)
    episode = EpisodeShardReader(tmp_path / "out")[1]
    assert len(episode["action"]) == 7
    with pytest.raises(DataError, match=r"shard-000000\.tar, member 00000001\.image\.top\.mp4"):
        episode["image.top"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["x.txt"], "holds no dataset that is known"),
        (["a/manifest.json", "a/index.parquet", "b/meta/info.json", "c.mp4"], "folder of datasets. Name one .*: b, a"),
        (["train-00000-of-00001.tfrecord", "features.json"], "RLDS.*not supported yet.*LeRobot first"),
        (["a.hdf5", "b.mp4"], "format='hdf5' or format='video'"),
        (["manifest.json", "index.parquet"], "holds shards already"),
    ],
)
def test_what_cannot_be_imported_is_said(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=message):
        detect_format(tmp_path)


def test_wrong_arguments_are_named(tmp_path, textured):
    write_video(tmp_path / "a.mp4", textured(3), 10)
    with pytest.raises(DataError, match="'lerobo' is unknown: did you mean 'lerobot'"):
        open_episodes(tmp_path, format="lerobo")
    with pytest.raises(DataError, match="does not apply"):
        open_episodes(tmp_path, embodiment=Embodiment(name="arm", rate_hz=5))
    with pytest.raises(DataError, match="does not exist"):
        open_episodes(tmp_path / "absent")
    with pytest.raises(DataError, match="size is 2"):
        import_episodes(tmp_path, tmp_path / "out", size=2)
    assert len(open_episodes(tmp_path / "a.mp4")) == 1


class Dots:
    """A reader of others, whose episodes have the rates that its file lists."""

    def __init__(self, path, rate_hz=None, embodiment=None, map=None):
        self.rates = json.loads(path.read_text())

    @staticmethod
    def detects(path):
        return path.suffix == ".dots"

    def __len__(self):
        return len(self.rates)

    def embodiment(self):
        return tiny.embodiment()

    def frames(self, index, camera):
        return iter(tiny.episode(index)[f"image.{camera}"])

    def __getitem__(self, index):
        return replace(tiny.episode(index), rate_hz=self.rates[index])


def test_an_episode_of_another_rate_than_its_contract_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(plugins._registered["readers"], "dots", Dots)
    (tmp_path / "a.dots").write_text("[20.0, 10.0, 20.0]")
    with pytest.raises(DataError, match=r"tiny-1.* has 10 steps per second, its embodiment 'arm' says 20.*resample"):
        import_episodes(tmp_path / "a.dots", tmp_path / "out")
    assert import_episodes(tmp_path / "a.dots", tmp_path / "out", skip_bad=1)["samples"] == 2
    bundle = tiny.tokenizers()
    (tmp_path / "mix.yaml").write_text("sources: {dots: {path: a.dots}}\ntasks: [{task: 'image -> action[2]'}]\n")
    with pytest.raises(DataError, match=r"1 of 3 episodes of source dots .*tiny-1.* 10 steps per second.*skip_bad: 1"):
        tokenize_mix(tmp_path / "mix.yaml", tmp_path / "tokens", bundle)
    (tmp_path / "mix.yaml").write_text((tmp_path / "mix.yaml").read_text().replace("a.dots", "a.dots, skip_bad: 1"))
    said = []
    assert tokenize_mix(tmp_path / "mix.yaml", tmp_path / "tokens", bundle, say=said.append) == {"dots": "written"}
    assert [note for note in said if "bad, left out" in note and "tiny-1" in note]
    assert ShardReader(tmp_path / "tokens/dots", kind="tokens").manifest["samples"] == 2


def test_pictures_that_do_not_decode_count_among_the_bad_of_a_mix(tmp_path, monkeypatch):
    class Torn(Dots):
        def __getitem__(self, index):
            episode = super().__getitem__(index)
            if index == 1:
                episode.streams["image.front"].values = self._torn
            return episode

        def _torn(self):
            raise DataError("frame 3 of tiny-1 is torn")

    monkeypatch.setitem(plugins._registered["readers"], "dots", Torn)
    (tmp_path / "a.dots").write_text("[20.0, 20.0, 20.0]")
    mix = tmp_path / "mix.yaml"
    mix.write_text("sources: {dots: {path: a.dots}}\ntasks: [{task: 'image -> action[2]'}]\n")
    with pytest.raises(DataError, match=r"1 of 3 episodes of source dots .*frame 3 of tiny-1 is torn"):
        tokenize_mix(mix, tmp_path / "tokens", tiny.tokenizers())
    assert not (tmp_path / "tokens/dots").exists()
    mix.write_text(mix.read_text().replace("a.dots", "a.dots, skip_bad: 1"))
    tokenize_mix(mix, tmp_path / "tokens", tiny.tokenizers())
    assert ShardReader(tmp_path / "tokens/dots", kind="tokens").manifest["samples"] == 2
    tiny.write_episodes(tmp_path / "shards", [tiny.episode(0)], (tiny.embodiment(),))
    mix.write_text(mix.read_text().replace("a.dots", "shards"))
    with pytest.raises(DataError, match="is shards, which hold no bad episodes"):
        tokenize_mix(mix, tmp_path / "other", tiny.tokenizers())


def test_a_contract_is_taken_whole_or_as_a_form_by_what_the_file_holds(written, tmp_path):
    path, _ = written
    form = {"name": "widow", "proprio": {"units": "m"}, "action": {"units": "m"}, "gripper": None}
    robots = []
    for name, text in (("form.yaml", yaml.safe_dump(form)), ("form.json", json.dumps(form))):
        (tmp_path / name).write_text(text)
        said = []
        import_episodes(path, tmp_path / "out", embodiment=tmp_path / name, overwrite=True, say=said.append)
        robots.append(EpisodeShardReader(tmp_path / "out").embodiment())
        assert not any("nobody has said" in note for note in said)
    assert robots[0].name == "widow"
    assert robots[0].action.units == ("m",) * 3
    robots[0].save(tmp_path / "whole.txt")
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(robots[0].to_dict()))
    for name in ("whole.txt", "whole.yaml"):
        import_episodes(path, tmp_path / "out", embodiment=str(tmp_path / name), overwrite=True)
        robots.append(EpisodeShardReader(tmp_path / "out").embodiment())
    assert len({robot.fingerprint for robot in robots}) == 1
    (tmp_path / "open.yaml").write_text("name: widow\n")
    with pytest.raises(EmbodimentError, match=r"open.yaml leaves open the units of proprio .*which value of gripper"):
        import_episodes(path, tmp_path / "no", embodiment=tmp_path / "open.yaml")
    (tmp_path / "half.yaml").write_text("name: widow\nrate_hz: 10\nproprio: {units: m}\n")
    with pytest.raises(
        EmbodimentError, match=r"half.yaml: not a valid embodiment.*leave out rate_hz, which a form has not"
    ):
        import_episodes(path, tmp_path / "no", embodiment=tmp_path / "half.yaml")


def test_what_an_inferred_contract_takes_for_granted_is_noted(written, tmp_path):
    said = []
    import_episodes(written[0], tmp_path / "out", say=said.append)
    (note,) = [note for note in said if "nobody has said" in note]
    for part in (
        "units of proprio, action (taken as",
        "(taken as delta)",
        "value of gripper is open",
        "--embodiment FILE",
    ):
        assert part in note
    assert note in EpisodeShardReader(tmp_path / "out").manifest["notes"]
