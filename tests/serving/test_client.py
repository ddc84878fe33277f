import ast
import dataclasses
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mmseq.serving import ReplayPolicy, Server, ServerConfig, codec

SOURCES = sorted((Path(__file__).parents[2] / "serve" / "client" / "mmseq_client").glob("*.py"))


@pytest.fixture
def dial(client_package):
    clients = []

    def connect(server, **options):
        clients.append(client_package.Client("127.0.0.1", server.port, connect_timeout_s=5, timeout_s=5, **options))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_client_is_python_3_9_and_imports_three_packages(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.partition(".")[0])
    allowed = {"numpy", "msgpack", "websockets", "mmseq_client"}
    if path.name == "images.py":  # for robots whose cameras have another size
        assert "PIL" not in {
            line.split()[1] for line in path.read_text().splitlines() if line.startswith(("import", "from"))
        }
        allowed |= {"PIL"}
    assert roots - sys.stdlib_module_names <= allowed


def test_both_codecs_write_the_same_bytes(client_package, observation):
    from mmseq_client import codec as small

    assert small.pack(observation) == codec.pack(observation)
    np.testing.assert_array_equal(small.unpack(codec.pack(np.eye(3))), np.eye(3))
    for data in (b"", b"\xc1", codec.pack({"a": np.zeros(2)})[:-1]):
        with pytest.raises(ValueError, match=r".*"):
            small.unpack(data)
    with pytest.raises(TypeError):
        small.pack(np.array([object()]))


def test_fingerprints_agree(client_package, embodiment):
    assert client_package.fingerprint(embodiment.to_dict()) == embodiment.fingerprint


def test_infer_and_health(start, policy, dial, client_package, embodiment, episode):
    server = start(policy, token="s3cret")
    client = dial(server, token="s3cret")
    assert client.healthz()
    assert client.horizon == 8
    reply = client.infer(client_package.example_observation(client.metadata["embodiments"]["arm"]))
    np.testing.assert_array_equal(reply["actions"], episode["action"][:8])
    with pytest.raises(client_package.RefusedError, match="unauthorized"):
        dial(server, token="wrong")
    assert not client_package.healthz("127.0.0.1", free_port())


def test_refusals_carry_code_and_key_and_leave_the_connection(start, policy, dial, client_package, observation):
    client = dial(start(policy))
    with pytest.raises(client_package.RefusedError) as caught:
        client.infer({**observation, "observation.state": np.zeros(3)})
    assert (caught.value.code, caught.value.key) == ("wrong_shape", "observation.state")
    assert "actions" in client.infer(observation)


def test_check_contract(start, policy, dial, client_package, observation, embodiment):
    client = dial(start(policy))
    client.check_contract(embodiment.to_dict())
    assert "actions" in client.infer(observation)
    for other, words in [
        (dataclasses.replace(embodiment, rate_hz=50).to_dict(), "rate_hz: 50 here, 20 on the server"),
        (dataclasses.replace(embodiment, name="leg").to_dict(), "'leg' is not served; there is arm"),
    ]:
        with pytest.raises(client_package.ContractError, match=words):
            client.check_contract(other)


def test_it_waits_for_a_server_that_starts_late(policy, client_package, observation):
    port = free_port()
    server = Server(policy, ServerConfig(port=port))
    late = threading.Timer(0.3, server.start)
    late.start()
    try:
        with client_package.Client("127.0.0.1", port, connect_timeout_s=10) as client:
            assert "actions" in client.infer(observation)
    finally:
        late.join()
        server.stop()
    begun = time.monotonic()
    with pytest.raises(client_package.ClientError, match="no server at"):
        client_package.Client("127.0.0.1", port, connect_timeout_s=0.3)
    assert time.monotonic() - begun < 2


def test_it_comes_back_after_a_restart_but_not_to_another_policy(
    policy, episode, embodiment, client_package, observation
):
    first = Server(policy, ServerConfig(port=0)).start()
    client = client_package.Client("127.0.0.1", first.port, connect_timeout_s=5)
    try:
        client.infer(observation)
        first.stop()
        with Server(policy, ServerConfig(port=first.port)):
            assert "actions" in client.infer(observation)
        other = ReplayPolicy(episode, embodiment, horizon=4)
        with (
            Server(other, ServerConfig(port=first.port)),
            pytest.raises(client_package.ContractError, match="another policy"),
        ):
            client.infer(observation)
    finally:
        client.close()
        first.stop()
