"""What the demo is told, and how much it records and trains for that."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmseq.errors import ConfigError
from mmseq.reading import Reading


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Reading):
    """What `mmseq demo` is told, and how your own dataset is read."""

    out: str = "runs/demo"  # the run's folder; what an earlier demo left there is replaced
    seed: int = 0  # of everything that is recorded, trained and measured
    # its size, by how long it takes on two quiet CPU cores; a slower machine takes longer and trains as many steps
    minutes: float = 10.0
    tasks: list[str] = field(default_factory=list)  # Meta-World tasks; default: six in which the image matters
    data: str | None = None  # your own dataset in place of the simulator
    episodes: int = 20  # closed-loop episodes per task
    execute: int = 1  # control steps of each chunk before the next request

    @property
    def steps(self) -> int:
        """Of training."""
        return max(50, round(110 * self.minutes))

    @property
    def demonstrations(self) -> int:
        """Per task."""
        return max(4, round(10 * self.minutes))

    @property
    def videos(self) -> int:
        """Of human hands, per task."""
        return max(2, round(2.4 * self.minutes))

    @property
    def vision_steps(self) -> int:
        """Of the vision tokenizer, which has learned enough in a demo of ten minutes."""
        return max(40, min(800, round(80 * self.minutes)))

    def check(self) -> None:
        """Raises: ConfigError naming the field."""
        if not 0.5 <= self.minutes <= 24 * 60:
            raise ConfigError(f"minutes is {self.minutes:g}", fix="give at least 0.5 (10 is the intended size)")
        if not 0 <= self.seed < 1 << 31:
            raise ConfigError(f"seed is {self.seed}", fix="give 0 to 2147483647")
        if self.episodes < 1:
            raise ConfigError(f"episodes is {self.episodes}", fix="give at least 1")
        if self.said() and not self.data:
            raise ConfigError(
                f"{', '.join(self.said())} would change how data is read", fix="name your data with --data"
            )
        if self.data and self.tasks:
            raise ConfigError(
                "tasks are of the simulator and do not go together with data", fix="leave one of them out"
            )
