"""The vision tokenizer: codes and their vectors, exactness, files, errors, training."""

import json

import numpy as np
import pytest
import torch

from mmseq.errors import CheckpointError, ConfigError, DataError, EpisodeError
from mmseq.tokenization.quality import vision_quality
from mmseq.tokenization.vision import FSQAutoencoder, VisionConfig, VisionTokenizer, fit_frames
from mmseq.tokenization.vision_training import train_vision

TINY = VisionConfig(width=32, hidden=64, decoder_depth=1)


def scenes(n: int, seed: int = 0, size: int = 64) -> np.ndarray:
    """A fixed background with a coloured square at a random place, uint8 (n, size, size, 3)."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 180, size).astype(np.uint8)
    frames = np.repeat(np.stack([np.add.outer(ramp // 2, ramp // 2)] * 3, -1)[None], n, 0)
    for frame, (row, column) in zip(frames, rng.integers(0, size - 14, (n, 2)), strict=True):
        frame[row : row + 14, column : column + 14] = rng.choice([[200, 30, 30], [30, 60, 200]])
    return frames


@pytest.fixture(scope="module")
def trained() -> VisionTokenizer:
    return train_vision(scenes(256), config=TINY, steps=60, batch_images=16, threads=1)


@pytest.fixture(scope="module")
def wide() -> VisionTokenizer:
    """The default size with random weights."""
    torch.manual_seed(0)
    return VisionTokenizer(VisionConfig(), FSQAutoencoder(VisionConfig()))


def test_shapes_and_types(trained):
    codes = trained.encode(scenes(5))
    assert codes.dtype == np.int32
    assert codes.shape == (5, 64)
    assert trained.grid == (8, 8)
    assert trained.tokens_per_frame == 64
    assert trained.size == 1000
    frames = trained.decode(codes)
    assert frames.dtype == np.uint8
    assert frames.shape == (5, 64, 64, 3)
    assert trained.encode(scenes(3)[:0]).shape == (0, 64)
    assert trained.decode(codes[:0]).shape == (0, 64, 64, 3)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2,), (3, 4)])
def test_features_tell_codes_apart_and_say_which_are_alike(levels):
    config = VisionConfig(levels=levels, width=8, hidden=8)
    tokenizer = VisionTokenizer(config, FSQAutoencoder(config))
    features = tokenizer.code_features()
    assert features.shape == (tokenizer.size, len(levels) + sum(levels))
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    assert len(np.unique(features.round(4), axis=0)) == tokenizer.size
    # code 0 and code 1 differ by one step of the first level, code 0 and the last one in every level
    assert features[0] @ features[1] >= features[0] @ features[-1]


def test_a_code_means_the_same_everywhere(trained):
    codes = np.full((1, 64), 7)
    image = trained.decode(codes)[0]
    middle = image[16:48, 16:48].reshape(4, 8, 4, 8, 3)
    assert (middle == middle[:1, :, :1]).all()


def test_patches_and_images_are_inverse():
    network = FSQAutoencoder(TINY)
    x = torch.randn(2, 64, 64, 3)
    assert torch.equal(network.images(network.patches(x)), x)


def test_codes_do_not_depend_on_the_batch(wide):
    frames = np.random.default_rng(0).integers(0, 256, (150, 64, 64, 3), dtype=np.uint8)
    codes = wide.encode(frames)
    alone = np.concatenate([wide.encode(frames[i : i + 1]) for i in range(0, 150, 10)])
    assert (alone == codes[::10]).all()
    order = np.random.default_rng(1).permutation(150)
    assert (wide.encode(frames[order]) == codes[order]).all()
    assert (wide.encode(frames[3:80]) == codes[3:80]).all()


def test_codes_do_not_depend_on_the_callers_settings(wide):
    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    codes = wide.encode(frames)
    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert (wide.encode(frames) == codes).all()
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_num_threads(1 if threads > 1 else 2)
        assert (wide.encode(frames) == codes).all()
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(threads)


def test_a_token_sees_its_own_neighbourhood_only(wide):
    frames = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    changed = frames.copy()
    changed[:, 24:32, 24:32] ^= 255  # the patch of row 3, column 3
    moved = np.argwhere((wide.encode(frames) != wide.encode(changed)).reshape(8, 8))
    assert len(moved) > 0
    assert abs(moved - 3).max() <= 1


def test_any_size_is_cropped_to_its_central_square_and_resized(trained):
    frame = scenes(1, size=128)
    broad = np.pad(frame, ((0, 0), (0, 0), (40, 40), (0, 0)))
    assert (fit_frames(broad, 64) == fit_frames(frame, 64)).all()
    assert (trained.encode(broad) == trained.encode(frame)).all()
    assert fit_frames(scenes(2, size=32), 64).shape == (2, 64, 64, 3)
    flat = np.full((1, 480, 640, 3), 77, np.uint8)
    assert (fit_frames(flat, 64) == 77).all()


def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path)
    loaded = VisionTokenizer.load(tmp_path)
    assert loaded.config == trained.config
    assert loaded.fingerprint == trained.fingerprint
    assert len(loaded.fingerprint) == 16
    assert (loaded.encode(scenes(4)) == trained.encode(scenes(4))).all()
    assert (loaded.reconstruct(scenes(4)) == trained.reconstruct(scenes(4))).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vision.json", "vision.safetensors"]


def test_a_damaged_file_is_named(trained, tmp_path):
    def expect(match: str):
        with pytest.raises(CheckpointError, match=match):
            VisionTokenizer.load(tmp_path)

    expect("vision.json")
    trained.save(tmp_path)
    weights, config = tmp_path / "vision.safetensors", tmp_path / "vision.json"
    whole, text = weights.read_bytes(), config.read_text()

    weights.write_bytes(whole[: len(whole) // 2])
    expect("vision.safetensors cannot be read")
    weights.write_bytes(b"")
    expect("vision.safetensors cannot be read")
    weights.unlink()
    expect("vision.safetensors cannot be read")
    weights.write_bytes(whole[:-4] + b"\x00\x00\x80\x3f")
    expect("vision.safetensors is damaged or was exchanged")
    weights.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")
    expect("not finite")
    weights.write_bytes(whole)

    for broken in ("", "{", "[]", "{}", '{"format": 2, "kind": "fsq", "config": {}, "fingerprint": ""}'):
        config.write_text(broken)
        expect("vision.json is not a vision tokenizer")
    config.write_text(text.replace('"width"', '"widht"'))
    expect("did you mean 'width'")
    settings = json.loads(text)
    settings["config"]["levels"] = 5
    config.write_text(json.dumps(settings))
    expect("vision.json is not a vision tokenizer")
    settings = json.loads(text)
    settings["config"]["width"] = 48
    config.write_text(json.dumps(settings))
    expect("has shape")
    settings["config"] |= {"width": 32, "decoder_depth": 2}
    config.write_text(json.dumps(settings))
    expect("one side only")


def test_frames_that_are_refused(trained):
    for frames, match in [
        (scenes(2).astype(np.float32) / 255, "float32, not uint8"),
        (scenes(1)[0], "Add a leading axis"),
        (scenes(2)[..., :1], "channels last"),
        (scenes(2)[:, :0], "shape"),
        (scenes(2).astype(np.int64), "int64, not uint8"),
    ]:
        with pytest.raises(EpisodeError, match=match):
            trained.encode(frames)


def test_codes_that_are_refused(trained):
    codes = trained.encode(scenes(3))
    for value in (-1, 1000):
        bad = codes.copy()
        bad[2, 7] = value
        with pytest.raises(DataError, match=rf"code {value} \(frame 2, token 7\) is outside 0..999"):
            trained.decode(bad)
    with pytest.raises(DataError, match="not whole numbers"):
        trained.decode(codes.astype(np.float32))
    with pytest.raises(DataError, match="shape"):
        trained.decode(codes[:, :63])
    with pytest.raises(DataError, match="shape"):
        trained.decode(codes[0])


@pytest.mark.parametrize(
    "wrong", [{"patch": 7}, {"levels": ()}, {"levels": (1, 5)}, {"levels": (2,) * 30}, {"width": 0}, {"margin": -1}]
)
def test_settings_that_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)) + "="):
        VisionConfig(**wrong)


def test_training_learns_and_is_measured(trained):
    held_out = {"robot": scenes(40, seed=9), "human": scenes(30, seed=10)}
    before = vision_quality(VisionTokenizer(TINY, FSQAutoencoder(TINY)), held_out)
    after = vision_quality(trained, held_out)
    assert after["psnr"]["robot"] > max(24, before["psnr"]["robot"] + 7)
    assert after["psnr"].keys() == after["psnr_image"].keys() == after["psnr_foreground"].keys() == held_out.keys()
    error = np.square(trained.reconstruct(held_out["robot"]).astype(float) - held_out["robot"]).mean()
    assert after["psnr"]["robot"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
    assert after["psnr_image"]["human"] == pytest.approx(after["psnr_images"]["human"].mean())
    assert np.array_equal(after["decoded"]["robot"], trained.reconstruct(held_out["robot"]))
    assert after["codebook"]["tokens"] == 70 * 64
    assert 1 < after["codebook"]["perplexity"] <= after["codebook"]["used"] <= after["codebook"]["size"]
    assert after["tokens_per_frame"] == 64
    assert after["images_per_s"] > 0


def test_a_static_source_has_no_foreground(trained):
    measured = vision_quality(trained, {"still": np.repeat(scenes(1), 5, 0)})
    assert measured["psnr_foreground"]["still"] is None


def test_the_same_seed_gives_the_same_weights():
    def fingerprint(seed: int) -> str:
        torch.manual_seed(np.random.default_rng().integers(2**31))  # the global state must not matter
        return train_vision(scenes(32), config=TINY, steps=3, batch_images=8, threads=1, seed=seed).fingerprint

    assert fingerprint(4) == fingerprint(4)
    assert fingerprint(4) != fingerprint(5)


def test_sources_are_balanced_by_weight():
    dark, light = np.zeros((30, 64, 64, 3), np.uint8), np.full((3, 64, 64, 3), 255, np.uint8)
    only_light = train_vision([dark, light], config=TINY, steps=1, weights=(0, 1), threads=1)
    assert only_light.reconstruct(light).mean() > 250
    equal = train_vision({"dark": dark, "light": light}, config=TINY, steps=1, threads=1)
    assert abs(equal.reconstruct(light).mean() - 127.5) < 20


def test_progress_and_the_time_limit():
    calls = []
    threads = torch.get_num_threads()
    train_vision(scenes(16), config=TINY, steps=3, batch_images=4, threads=1, on_progress=lambda *a: calls.append(a))
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)]
    assert all(isinstance(call[2], float) for call in calls)
    assert torch.get_num_threads() == threads
    calls.clear()
    train_vision(
        scenes(16), config=TINY, steps=50, batch_images=4, max_seconds=0, on_progress=lambda *a: calls.append(a)
    )
    assert [call[:2] for call in calls] == [(1, 50)]


@pytest.mark.parametrize("frames", [[], {}, scenes(1)[:0], [scenes(1), scenes(1)[:0]]])
def test_training_without_frames_is_refused(frames):
    with pytest.raises(DataError, match="no frames"):
        train_vision(frames, config=TINY)


def test_training_settings_that_are_refused():
    with pytest.raises(ConfigError, match="weights"):
        train_vision(scenes(4), config=TINY, weights=(1, 1))
    with pytest.raises(ConfigError, match="weights"):
        train_vision([scenes(4), scenes(4)], config=TINY, weights=(0, 0))
    with pytest.raises(ConfigError, match="steps"):
        train_vision(scenes(4), config=TINY, steps=0)
    with pytest.raises(ConfigError, match="foreground"):
        train_vision(scenes(4), config=TINY, foreground=-1)
    with pytest.raises(EpisodeError, match="uint8"):
        train_vision(scenes(4).astype(float), config=TINY)
