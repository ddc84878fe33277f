"""An environment of LeRobot: a point that moves by the action, and a picture as bright as it is far."""

from dataclasses import dataclass, field

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

STEPS = 12


class Square(gymnasium.Env):
    metadata = {"render_fps": 20, "render_modes": ["rgb_array"]}  # noqa: RUF012
    render_mode, task, task_description, _max_episode_steps = "rgb_array", "square", "open the window", STEPS
    observation_space = Dict(
        {"pixels": Dict({"cam": Box(0, 255, (32, 32, 3), np.uint8)}), "agent_pos": Box(-1, 1, (3,), np.float32)}
    )
    action_space = Box(-1, 1, (4,), np.float32)

    def look(self):
        return {"pixels": {"cam": self.render()}, "agent_pos": self.at.astype(np.float32)}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = self.np_random.uniform(-0.5, 0.5, 3), 0
        return self.look(), {"is_success": False}

    def step(self, action):
        self.at, self.steps = np.clip(self.at + 0.05 * action[:3], -1, 1), self.steps + 1
        return self.look(), float(self.at[0]), False, self.steps >= STEPS, {"is_success": False}

    def render(self):
        return np.full((32, 32, 3), int(127 + 100 * self.at[0]), np.uint8)


@EnvConfig.register_subclass("square")
@dataclass
class SquareConfig(EnvConfig):
    task: str = "square"
    fps: int = 20
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (4,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (3,)),
            "pixels/cam": PolicyFeature(FeatureType.VISUAL, (32, 32, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            "pixels/cam": "observation.images.cam",
        }
    )

    @property
    def gym_kwargs(self):
        return {}

    def create_envs(self, n_envs, use_async_envs=False):
        return {"square": {0: gymnasium.vector.SyncVectorEnv([Square] * n_envs)}}
