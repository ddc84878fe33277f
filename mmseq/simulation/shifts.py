"""Controllable shifts: the same physics, filmed otherwise. What robustness is measured on, and what video differs by.

    MetaWorldEnv("window-open", shift="camera")      # each episode from another side, decided by its seed

A shift changes what is drawn and nothing else: actions do what they did. What each episode gets is a function of its
seed and the shift's name.
"""

# mujoco brings no types for what is used here
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

WORKTOP_M = ((-0.38, 0.45), (0.38, 0.95))  # where distractors stand: x, y


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How far each thing is changed, at most; 0 leaves it as it is.

    camera_deg: of azimuth and elevation, to either side; the distance changes by a hundredth for each degree. light:
    share by which lights are dimmed or brightened, and tinted. noise: standard deviation of each pixel's, of 1.
    colours: share of every surface's colour that is replaced by a random one. distractors: objects that stand about.
    """

    camera_deg: float = 0.0
    light: float = 0.0
    noise: float = 0.0
    colours: float = 0.0
    distractors: int = 0


SHIFTS = {
    "plain": Shift(),
    "camera": Shift(camera_deg=8),
    "light": Shift(light=0.5),
    "noise": Shift(noise=0.05),
    "colours": Shift(colours=0.6),
    "distractors": Shift(distractors=5),
}


class Shifted:
    """One episode's draw of a shift."""

    def __init__(self, name: str, seed: int):
        self.shift, self.rng = SHIFTS[name], np.random.default_rng([seed, zlib.crc32(name.encode())])
        turn = lambda: float(self.rng.uniform(-1, 1))
        self._azimuth, self._elevation, self._distance = turn(), turn(), turn()
        self._brightness, self._tint = 1 + self.shift.light * turn(), self.rng.uniform(-1, 1, 3)
        self._key = int(self.rng.integers(1 << 31))
        self._objects = [self._object() for _ in range(self.shift.distractors)]

    def move_camera(self, camera: Any, azimuth: float, elevation: float, distance: float) -> None:
        """Put a free camera of MuJoCo where this episode has it; angles in degrees, distance in metres."""
        by = self.shift.camera_deg
        camera.azimuth, camera.elevation = azimuth + by * self._azimuth, elevation + by * self._elevation
        camera.distance = distance * (1 + 0.01 * by * self._distance)

    def change_scene(self, scene: Any) -> None:
        """Colours, lights and distractors of a MuJoCo scene that has just been updated."""
        if self.shift.colours:
            for geom in scene.geoms[: scene.ngeom]:
                rng = np.random.default_rng([self._key, int(geom.objid) + 1, int(geom.matid) + 1])
                kept = 1 - self.shift.colours
                geom.rgba[:3] = kept * geom.rgba[:3] + self.shift.colours * rng.uniform(0, 1, 3)
        if self.shift.light:
            tint = np.clip(self._brightness * (1 + 0.4 * self.shift.light * self._tint), 0, 2)
            for light in scene.lights[: scene.nlight]:
                light.diffuse[:] = np.clip(light.diffuse * tint, 0, 1)
                light.ambient[:] = np.clip(light.ambient * tint, 0, 1)
        for kind, size, position, rgba in self._objects:
            _add(scene, kind, size, position, rgba)

    def change_picture(self, picture: np.ndarray) -> np.ndarray:
        """Noise on a picture, uint8 (H, W, 3)."""
        if not self.shift.noise:
            return picture
        noise = self.rng.normal(0, 255 * self.shift.noise, picture.shape)
        return np.clip(picture + noise, 0, 255).astype(np.uint8)

    def _object(self) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
        kind = str(self.rng.choice(["mjGEOM_BOX", "mjGEOM_ELLIPSOID", "mjGEOM_CYLINDER"]))
        size = self.rng.uniform(0.015, 0.045, 3)
        place = np.append(self.rng.uniform(*WORKTOP_M), size[1 if kind == "mjGEOM_CYLINDER" else 2])
        return kind, size, place, np.append(self.rng.uniform(0.1, 0.9, 3), 1.0).astype(np.float32)


def _add(scene: Any, kind: str, size: np.ndarray, position: np.ndarray, rgba: np.ndarray) -> None:
    import mujoco

    from mmseq.simulation.human import next_geom

    mujoco.mjv_initGeom(next_geom(scene), getattr(mujoco.mjtGeom, kind), size, position, np.eye(3).ravel(), rgba)
