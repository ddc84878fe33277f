"""Where the chunks come from: a server, or the checkpoint in this process."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from mmseq_client import Client, ContractError, RefusedError
from mmseq_client.contract import differences

from lerobot_policy_mmseq.configuration_mmseq import MmseqConfig

_BUSY_S = 1.0  # the robot stands still meanwhile


class Backend(Protocol):
    def infer(self, observations: list[dict[str, Any]], step: int | None) -> list[np.ndarray]:
        """Of each observation the chunk, float32 (horizon, axes); row i always belongs to the same robot.

        step: control steps of the episode that were executed, where they are known.
        """
        ...

    def reset(self) -> None:
        """The next observations are of new episodes."""
        ...


class Served:
    """A server; each row has its own connection, since each is a robot of its own.

    Raises: ContractError when it serves another contract or chunks of another length, ClientError when there is none.
    """

    def __init__(self, config: MmseqConfig, contract: dict[str, Any]):
        host, _, port = (config.server or "").rpartition(":")
        if not host or not port.isdigit():
            raise ContractError(f"server is {config.server!r}; write HOST:PORT")
        self.token = Path(config.token_file).read_text().strip() if config.token_file else None
        self.host, self.port, self.config, self.contract = host.strip("[]"), int(port), config, contract
        self.clients = [self._connect()]
        self.fresh = [True]

    def _connect(self) -> Client:
        config = self.config
        client = Client(self.host, self.port, self.token, 10.0, config.timeout_s, ca_file=config.ca_file)
        try:
            client.check_contract(self.contract)
            if client.horizon != config.horizon:
                raise ContractError(f"chunks have {config.horizon} steps here, {client.horizon} on the server")
            wanted = client.metadata["required_keys"][self.contract["name"]]
            unknown = [key for key in wanted if "@" in key]
            if unknown:
                raise ContractError(f"the server's policy needs {unknown}, which LeRobot does not have")
        except ContractError:
            client.close()
            raise
        return client

    def reset(self) -> None:
        self.fresh = [True] * len(self.clients)

    def infer(self, observations: list[dict[str, Any]], step: int | None) -> list[np.ndarray]:
        while len(self.clients) < len(observations):
            self.clients.append(self._connect())
            self.fresh.append(True)
        if len(observations) == 1:
            return [self._ask(0, observations[0], step)]
        with ThreadPoolExecutor(len(observations)) as threads:  # at once, so that the server can batch them
            return list(threads.map(lambda row: self._ask(row, observations[row], step), range(len(observations))))

    def _ask(self, row: int, observation: dict[str, Any], step: int | None) -> np.ndarray:
        asked, until = {**observation, "chunking": "plain"}, time.monotonic() + _BUSY_S
        if step is not None:
            asked["step"] = step
        if step is None or self.fresh[row]:  # whose steps may begin again at 0
            asked["reset"] = True
        while True:
            try:
                reply = self.clients[row].infer(asked)
                self.fresh[row] = False
                return reply["actions"]
            except RefusedError as error:
                wait_s = (error.retry_after_ms or 20.0) / 1000
                if error.code != "busy" or time.monotonic() + wait_s > until:
                    raise
                time.sleep(wait_s)


class Local:
    """The checkpoint in this process, with the server's checks of an observation. Needs mmseq.

    Raises: ContractError when the checkpoint has another contract of the robot.
    """

    def __init__(self, config: MmseqConfig, contract: dict[str, Any], checkpoint: Path):
        try:
            from mmseq.serving.model_policy import ModelPolicy
            from mmseq.serving.policy import Contract
        except ImportError as error:
            raise ImportError("this policy needs mmseq; install it, or give --policy.server") from error

        if not checkpoint.is_dir():
            raise FileNotFoundError(
                f"{checkpoint} is not there: the policy was exported with --server; give --policy.server=HOST:PORT"
            )
        name, device = contract["name"], config.device or "cpu"
        self.policy = ModelPolicy.from_pretrained(
            checkpoint, device=device, arrow=config.arrow, embodiment=name, passes=config.passes
        )
        self.contract = Contract.from_policy(self.policy)
        lines = differences(contract, self.contract.embodiments[name].to_dict())
        if lines:
            raise ContractError(f"embodiment {name!r} differs from its checkpoint's: {'; '.join(lines)}")

    def reset(self) -> None:
        pass

    def infer(self, observations: list[dict[str, Any]], step: int | None) -> list[np.ndarray]:
        from mmseq.serving.observation import ObservationRules, check_observation

        checked = [check_observation(o, self.contract, ObservationRules())[0] for o in observations]
        if len({self.policy.batch_key(observation) for observation in checked}) > 1:
            return [self.policy.infer(observation)["actions"] for observation in checked]
        results = self.policy.infer_many(checked)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return [result["actions"] for result in results]  # type: ignore[index]
