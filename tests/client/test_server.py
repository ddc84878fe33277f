"""The loop against the real server: an operator's hold, overload, a restart."""

import http.client

import numpy as np
import pytest
from mmseq_client import Chunking, Client, ControlLoop

from mmseq.episode import Episode
from mmseq.serving import ReplayPolicy, Server, ServerConfig


@pytest.fixture
def driven(embodiment, robot):
    """(server, policy, loop): 50 Hz, in real time."""
    actions = np.tile(np.linspace(0, 1, 400, dtype=np.float32)[:, None], (1, 4))
    state = np.zeros((400, 3), np.float32)
    episode = Episode.from_arrays("one", 50, {"proprio": state, "action": actions}, texts=["go"], embodiment="arm")
    policy = ReplayPolicy(episode, embodiment, horizon=16, execute=8)
    with (
        Server(policy, ServerConfig(port=0, grace_s=0.5)) as server,
        Client("127.0.0.1", server.port, connect_timeout_s=30) as client,
    ):
        loop = ControlLoop(client, robot, Chunking("realtime", 4), prompt="go")
        yield server, policy, loop
        loop.close()


def drive(loop, steps: int) -> list:
    ticks = []
    for _ in range(steps):
        ticks.append(loop.tick())
        loop._sleep(max(0.0, loop._steps.left_s()))
    return ticks


def goes_on(loop) -> bool:
    """Within ten seconds it acts again, and for a while."""
    return any(not any(tick.held for tick in drive(loop, 10)) for _ in range(50))


def ask(server, method: str, path: str, body: str | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    finally:
        connection.close()


def test_it_drives_and_the_server_echoes_control_steps(driven):
    _, _, loop = driven
    ticks = drive(loop, 60)
    assert sum(tick.held for tick in ticks) < 10
    assert loop.counts["withheld"] == loop.counts["refused"] == loop.counts["broke"] == 0
    assert loop.counts["requests"] > 6


def test_an_operators_hold_stops_it_at_once_and_its_release_lets_it_go_on(driven):
    server, _, loop = driven
    if "chunking" not in loop.client.metadata:
        pytest.skip("this server knows no hold")
    drive(loop, 30)
    assert ask(server, "POST", "/v1/hold", '{"reason": "a person is near"}') == 200
    ticks = drive(loop, 30)
    assert all(tick.held for tick in ticks[10:])
    assert "a person is near" in loop.why
    assert ask(server, "DELETE", "/v1/hold") == 200
    assert goes_on(loop)


@pytest.mark.parametrize("asks", [True, False])
def test_a_hold_is_not_forgotten_by_a_server_that_stops(driven, robot, asks):
    server, _, loop = driven
    drive(loop, 30)
    assert ask(server, "POST", "/v1/hold", '{"reason": "a person is near"}') == 200
    if asks:  # while it drains
        server.service.stopping = True
    else:
        server.stop()
    before = len(robot.actions)
    ticks = drive(loop, 30)
    moved = [tick for tick in ticks if not tick.held]
    assert len(moved) <= loop.buffer.execute + loop.buffer.delay + 2  # when it asks next, it holds
    assert len(robot.actions) == before + 30
    assert loop.counts["refused"] >= 1
    assert loop._connected is asks
    assert "a person is near" in loop.why or "no server" in loop.why
    assert not any(tick.held is False for tick in ticks[len(moved) :])


def test_a_restarted_server_is_found_again(driven):
    server, policy, loop = driven
    drive(loop, 30)
    server.stop()
    assert all(tick.held for tick in drive(loop, 60)[40:])
    with Server(policy, ServerConfig(port=server.port)):
        assert goes_on(loop)


def rows(robot) -> np.ndarray:
    """Which rows of the episode were commanded."""
    return np.round(np.stack(robot.actions)[:, 0] * 399)


def test_a_replay_begins_at_its_beginning_and_goes_on_where_the_robot_is(driven, robot):
    server, policy, loop = driven
    assert ask(server, "POST", "/v1/hold") == 200
    drive(loop, 40)
    assert ask(server, "DELETE", "/v1/hold") == 200
    assert goes_on(loop)
    assert rows(robot)[0] == 0
    server.stop()
    drive(loop, 60)
    with Server(policy, ServerConfig(port=server.port)) as again:
        assert goes_on(loop)
        assert ask(again, "POST", "/v1/hold") == 200
        drive(loop, 30)
        assert ask(again, "DELETE", "/v1/hold") == 200
        assert goes_on(loop)
        moved = np.diff(rows(robot))
        assert moved.min() >= 0
        assert moved.max() < 40  # a busy machine skips some; the server was away for 60
        loop.client.close()  # and an episode begins while the link is away
        loop.reset()
        before = len(robot.actions)
        assert goes_on(loop)
        assert rows(robot)[before] == 0
