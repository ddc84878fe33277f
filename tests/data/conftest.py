"""A small LeRobot v3 dataset, written by lerobot itself, shared by the tests of the readers."""

import numpy as np
import pytest

LENGTHS = (12, 7, 15)
RATE_HZ = 10
AXES = ["delta_x", "delta_y", "gripper"]


@pytest.fixture(scope="session")
def textured():
    """A function (steps, size, seed) -> uint8 (steps, size, size, 3): a window gliding over a smooth texture."""
    from PIL import Image

    def make(steps: int, size: int = 64, seed: int = 0) -> np.ndarray:
        small = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        wide = np.asarray(Image.fromarray(small).resize((size * 3, size * 3), Image.Resampling.BICUBIC))
        return np.stack([wide[t % size : t % size + size, 2 * t % size : 2 * t % size + size] for t in range(steps)])

    return make


@pytest.fixture(scope="session")
def written(tmp_path_factory, textured):
    """(path, episodes as written): two cameras, one of them as video and one as images in the parquet."""
    pytest.importorskip("lerobot")
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    path = tmp_path_factory.mktemp("lerobot") / "dataset"
    image = {"shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.images.top": {"dtype": "video", **image},
        "observation.images.wrist": {"dtype": "image", **image},
        "observation.state": {"dtype": "float32", "shape": (3,), "names": {"motors": ["x", "y", "gripper"]}},
        "action": {"dtype": "float32", "shape": (3,), "names": AXES},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    encoder = RGBEncoderConfig(vcodec="h264", preset="ultrafast", crf=10, g=4)
    dataset = LeRobotDataset.create(
        "local/toy", RATE_HZ, features, root=path, robot_type="toy_arm", rgb_encoder=encoder, image_writer_threads=2
    )
    episodes = []
    for index, length in enumerate(LENGTHS):
        rng = np.random.default_rng(index)
        episode = {
            "top": textured(length, seed=index),
            "wrist": textured(length, seed=100 + index),
            "state": rng.normal(size=(length, 3)).astype(np.float32),
            "action": rng.normal(size=(length, 3)).astype(np.float32),
            "task": f"push the {'red' if index % 2 else 'blue'} block",
        }
        for t in range(length):
            dataset.add_frame(
                {
                    "observation.images.top": episode["top"][t],
                    "observation.images.wrist": episode["wrist"][t],
                    "observation.state": episode["state"][t],
                    "action": episode["action"][t],
                    "next.success": np.array([index != 1 and t == length - 1]),
                    "task": episode["task"],
                }
            )
        dataset.save_episode()
        episodes.append(episode)
    dataset.finalize()
    return path, episodes


@pytest.fixture
def dataset(written, tmp_path):
    """A copy of the dataset that a test may damage."""
    import shutil

    return shutil.copytree(written[0], tmp_path / "dataset")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 arrays in dB."""
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9)))


@pytest.fixture(name="psnr", scope="session")
def _psnr():
    return psnr
