"""One Meta-World v3 task as a robot sees it: 64 x 64 RGB, four proprio numbers, four action numbers.

    env = MetaWorldEnv("button-press-topdown", seed=0)
    observation = env.observe()                  # {"image.front": (64, 64, 3) uint8, "proprio": (4,) float32}
    success = env.act([0.0, 1.0, -0.2, 1.0])     # dx, dy, dz, gripper effort

It is a `mmseq.simulation.base.Simulator` and an environment of Gymnasium: `reset`, `step`, spaces, `render`.

Everything random about an episode (where the object and the goal are) comes from its seed. The object's
position is in the image and nowhere else, and the goal marker that Meta-World draws is hidden.
"""

# mujoco and gymnasium bring no types for what is used here
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false

from __future__ import annotations

import atexit
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseq.embodiment import Axes, Camera, Embodiment, Gripper
from mmseq.errors import ConfigError, did_you_mean, require
from mmseq.simulation.gl import choose_gl
from mmseq.simulation.shifts import SHIFTS, Shifted

if TYPE_CHECKING:
    import gymnasium
else:
    gymnasium = require("gymnasium", "sim")

ROBOT = "metaworld_sawyer"
SIMULATION_HZ = 80  # Meta-World's own control rate: 5 physics steps of 2.5 ms
PROPRIO_NAMES = ("x", "y", "z", "gripper")
ACTION_NAMES = ("dx", "dy", "dz", "gripper")
REACH = ((-0.8, 0.1, -0.2, -0.1), (0.8, 1.3, 1.0, 1.5))  # of proprio: a policy goes where no expert went
METRES_PER_ACTION = 0.01 * 4  # an action of 1, held for one step of 20 Hz, moves the hand's set point this far

# Links of the Sawyer arm behind the wrist. They are outside the picture or cut by its edge, and drawing their
# 50,000 triangles takes more than half of the time of a frame on a CPU.
_FAR_LINKS = (
    *("torso", "pedestal", "pedestal_feet", "controller_box", "head", "screen", "right_arm_base_link"),
    *("right_l0", "right_l1", "right_l1_2", "right_l2", "right_l2_2", "right_l3", "right_l4", "right_l4_2"),
)
_SUPERSAMPLING = 2  # each pixel is the mean of 2 x 2: 1 ms, and thin parts move smoothly instead of flickering
_HIDDEN_GROUP = 5  # a geom group that MuJoCo does not draw


@dataclass(frozen=True, kw_only=True)
class View:
    """A free camera that looks at a point. lookat: x, y, z; azimuth 90 looks along +y, away from the robot."""

    lookat_m: tuple[float, float, float]
    distance_m: float
    azimuth_deg: float
    elevation_deg: float


VIEWS = {
    # over the robot's right shoulder, framed on the workspace: all objects are seen from the side they are
    # worked on, and the arm, which comes from the left edge, does not hide them
    "front": View(lookat_m=(-0.01, 0.69, 0.16), distance_m=0.88, azimuth_deg=132, elevation_deg=-36),
    # where a person filming from the other side would hold a phone
    "human": View(lookat_m=(0.0, 0.68, 0.13), distance_m=1.0, azimuth_deg=48, elevation_deg=-32),
}


def robot(camera: str = "front", size: int = 64, rate_hz: float = 20) -> Embodiment:
    """The contract of the simulated Sawyer. Its quantiles are its limits: the expert saturates on every axis."""

    def axes(names: tuple[str, ...], units: tuple[str, ...], low: tuple[float, ...], high: tuple[float, ...]) -> Axes:
        return Axes(names=names, units=units, low=low, high=high, minimum=low, maximum=high)

    return Embodiment(
        name=ROBOT,
        rate_hz=rate_hz,
        cameras=(Camera(name=camera, height=size, width=size),),
        proprio=axes(PROPRIO_NAMES, ("m", "m", "m", "unitless"), *REACH),
        action=axes(ACTION_NAMES, ("unitless",) * 4, (-1.0,) * 4, (1.0,) * 4),
        action_form="delta",
        grippers=(Gripper(axis="gripper", open=-1.0, closed=1.0),),
    )


class MetaWorldEnv(gymnasium.Env):
    """One task of Meta-World v3 with a seeded layout, rendered with the fast settings.

    task: a Meta-World name, with or without `-v3`. seed: of the layout. camera: a name in `VIEWS` or a `View`.
    size: height and width of the images in pixels. rate_hz: an action is held for 80 / rate_hz simulation steps.
    body: "robot", or "human" to draw an arm and a hand in the robot's place, in the same physics; "hand" has no arm.
    shift: a name in `shifts.SHIFTS`: each episode is filmed otherwise.
    spread: how far objects are placed from the middle of Meta-World's range, in x and y, relative to it; above 1 the
    image matters more, and it is no longer the standard benchmark.

    Raises: DependencyError without Meta-World or an OpenGL library; ConfigError for an unknown task, camera or rate.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(
        self,
        task: str,
        *,
        seed: int = 0,
        camera: str | View = "front",
        size: int = 64,
        rate_hz: float = 20,
        body: str = "robot",
        spread: float = 1.0,
        shift: str = "plain",
    ):
        if body not in ("robot", "human", "hand"):
            raise ConfigError(f"body is {body!r}", fix="use 'robot', 'human' or 'hand'")
        if shift not in SHIFTS:
            raise ConfigError(f"no shift {shift!r}: {did_you_mean(shift, SHIFTS)}")
        if isinstance(camera, str) and camera not in VIEWS:
            raise ConfigError(f"no camera {camera!r}: {did_you_mean(camera, VIEWS)}")
        hold = SIMULATION_HZ / rate_hz if rate_hz > 0 else 0
        if hold < 1 or hold != int(hold):
            raise ConfigError(f"rate_hz is {rate_hz}", fix=f"use a divisor of {SIMULATION_HZ}: 80, 40, 20, 10, ...")
        self.task, self.size, self.rate_hz = task.removesuffix("-v3"), size, rate_hz
        self.body, self.spread, self.shift = body, spread, shift
        self._hold = int(hold)
        self._env = _make(self.task, spread)
        self._renderer = None  # made when the first image is asked for
        self.camera = camera if isinstance(camera, str) else "custom"
        self._view = VIEWS[camera] if isinstance(camera, str) else camera
        self._camera = _make_camera(self._view)
        self._options = _make_options()
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,))
        self.observation_space = gymnasium.spaces.Dict(
            {
                f"image.{self.camera}": gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8),
                "proprio": gymnasium.spaces.Box(*np.array(REACH, np.float32)),
            }
        )
        self.begin(seed)

    @staticmethod
    def tasks() -> tuple[str, ...]:
        """Those that there are words for."""
        from mmseq.simulation.experts import TASKS

        return tuple(TASKS)

    @property
    def instructions(self) -> tuple[str, ...]:
        from mmseq.simulation.experts import task_language

        return task_language(self.task).instructions

    def contract(self) -> Embodiment:
        return robot(self.camera, self.size, self.rate_hz)

    def expert(self, gain: float = 1.0) -> Callable[[], np.ndarray]:
        """The scripted expert's action for the state that this is in, see `Expert`."""
        from mmseq.simulation.experts import Expert

        expert = Expert(self.task, gain)
        return lambda: expert.action(self)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Begin the episode of `seed`; it does not depend on what ran before. Returns: the observation, and {}."""
        super().reset(seed=seed)
        self.begin(int(self.np_random.integers(1 << 31)) if seed is None else seed)
        return self.observe(), {}

    def begin(self, seed: int) -> None:
        """`reset` without a picture."""
        self.seed = int(seed)
        self._env.seed(self.seed)
        state, _ = self._env.reset()
        self._state = np.clip(state, self._env.observation_space.low, self._env.observation_space.high)
        self.steps = 0
        self.succeeded = False
        self._shifted = Shifted(self.shift, self.seed)
        self._shifted.move_camera(self._camera, self._view.azimuth_deg, self._view.elevation_deg, self._view.distance_m)

    def observe(self) -> dict[str, np.ndarray]:
        """What the robot may know: `image.<camera>` uint8 (size, size, 3) and `proprio` float32 (4,).

        Proprio is the hand's x, y, z in metres and the opening of the gripper, 0 (closed) to 1 (open).
        """
        return {f"image.{self.camera}": self.render(), "proprio": self.proprio()}

    def proprio(self) -> np.ndarray:
        """The hand's x, y, z in metres and the opening of the gripper from 0 to 1, float32 (4,)."""
        return self._state[:4].astype(np.float32)

    def privileged_state(self) -> np.ndarray:
        """Meta-World's full state (39,), object and goal positions included: for scripted experts only."""
        return self._state.copy()

    def render(self) -> np.ndarray:
        """The scene now, uint8 (size, size, 3) RGB, the first row at the top."""
        if self._renderer is None:
            self._renderer = _make_renderer(self._env, self.size * _SUPERSAMPLING, self.body)
            _close_all_at_exit()
            _open.add(self)
        self._renderer.update_scene(self._env.data, camera=self._camera, scene_option=self._options)
        self._shifted.change_scene(self._renderer.scene)
        if self.body != "robot":
            from mmseq.simulation.human import draw_arm

            draw_arm(
                self._renderer.scene,
                hand_m=self._env.data.body("hand").xpos,
                fingertips_m=self._env.tcp_center,
                opening=float(self._state[3]),
                forearm=self.body == "human",
            )
        n = _SUPERSAMPLING
        blocks = self._renderer.render().reshape(self.size, n, self.size, n, 3)
        picture = ((blocks.sum(axis=(1, 3), dtype=np.uint16) + n * n // 2) // (n * n)).astype(np.uint8)
        return self._shifted.change_picture(picture)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """As Gymnasium has it: observation, reward (1 where the task succeeds), terminated, truncated, info."""
        success = self.act(action)
        return self.observe(), float(success), success, False, {"success": success}

    def act(self, action: Sequence[float] | np.ndarray) -> bool:
        """Hold `action` (4,), each in [-1, 1], for one control step. Returns whether the task succeeded in it.

        dx, dy, dz move the hand's set point by up to `METRES_PER_ACTION` each; the last is the gripper's effort,
        -1 opens and +1 closes. Values outside the limits are clipped.
        """
        action = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ConfigError(f"an action is 4 finite numbers {ACTION_NAMES}, got {action}")
        success = False
        for _ in range(self._hold):
            self._state, _, _, _, info = self._env.step(action)
            success |= bool(info["success"])
        self.steps += 1
        self.succeeded |= success
        return success

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
            _open.discard(self)


_open: weakref.WeakSet[MetaWorldEnv] = weakref.WeakSet()


@functools.cache
def _close_all_at_exit() -> None:
    """Registered after MuJoCo's own hook, hence run before it takes OpenGL away."""
    atexit.register(lambda: [env.close() for env in list(_open)])


def _make(task: str, spread: float):
    """Meta-World's environment of `task`, ready to be seeded, with the goal in its (privileged) state."""
    if not 0 <= spread <= 3:
        raise ConfigError(f"spread is {spread}", fix="use a number from 0 to 3; 1 is Meta-World's own")
    choose_gl()
    require("metaworld", "sim")
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    if f"{task}-v3" not in ALL_V3_ENVIRONMENTS:
        names = [name.removesuffix("-v3") for name in ALL_V3_ENVIRONMENTS]
        raise ConfigError(f"no Meta-World task {task!r}: {did_you_mean(task, names)}")
    gymnasium.logger.min_level = 50
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)
        env.observation_space = env.sawyer_observation_space
    box = env._random_reset_space  # x, y, z of the object, in some tasks followed by those of the goal
    middle, half = (box.low + box.high) / 2, (box.high - box.low) / 2
    half = half * np.where(np.arange(len(half)) % 3 == 2, 1.0, spread)
    env._random_reset_space = gymnasium.spaces.Box(middle - half, middle + half, dtype=np.float64)  # type: ignore[arg-type]
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    env.max_path_length = sys.maxsize
    return env


def _make_renderer(env, size: int, body: str):
    import mujoco

    model = env.model
    # the 4096 shadow map and multisampling make a software frame ten times slower
    model.vis.quality.shadowsize = 0
    model.vis.quality.offsamples = 0
    model.vis.global_.offwidth = model.vis.global_.offheight = size
    robot = model.body_rootid[model.body("hand").id]
    for geom in range(model.ngeom):
        link = model.geom_bodyid[geom]
        hidden = model.body_rootid[link] == robot if body != "robot" else model.body(link).name in _FAR_LINKS
        if hidden or model.geom_rgba[geom, 3] == 0:
            model.geom_group[geom] = _HIDDEN_GROUP
    renderer = mujoco.Renderer(model, size, size)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
    return renderer


def _make_camera(view: View):
    import mujoco

    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    camera.lookat[:] = view.lookat_m
    camera.distance = view.distance_m
    camera.azimuth = view.azimuth_deg
    camera.elevation = view.elevation_deg
    return camera


def _make_options():
    import mujoco

    options = mujoco.MjvOption()
    options.sitegroup[:] = 0  # sites mark the goal: drawn, they would give it away
    options.geomgroup[_HIDDEN_GROUP] = 0
    return options
