"""The real, unmodified openpi client against a live server, when one can be had.

    pip install <openpi>/packages/openpi-client typing_extensions    # into any environment, numpy 1
    MMSEQ_OPENPI_PYTHON=/that/bin/python pytest tests/serving/test_openpi_parity.py

Without it, `test_codec.py` holds the bytes and `test_server.py` the order of the messages.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mmseq.serving import codec

PROGRAM = """
import json, sys
import numpy as np
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
port, calls = int(sys.argv[1]), int(sys.argv[2])
client = WebsocketClientPolicy("127.0.0.1", port, api_key="s3cret")
random = np.random.RandomState(0)
actions = []
for _ in range(calls):
    reply = client.infer({
        "observation/image": random.randint(0, 256, (16, 24, 3)).astype(np.uint8),
        "observation/wrist_image": random.randint(0, 256, (16, 16, 3)).astype(np.uint8),
        "observation/state": random.uniform(-1, 1, 4),
        "prompt": "pick up the cup",
    })
    assert reply["actions"].dtype == np.float32 and reply["server_timing"]["infer_ms"] >= 0
    actions.append(reply["actions"])
try:
    client.infer({"prompt": "nothing else"})
    refused = ""
except RuntimeError as error:
    refused = str(error)
golden = {"observation/state": np.array([0, 1], np.float32), "prompt": "go", "n": np.int64(3), "g": np.float32(0.5)}
print(json.dumps({
    "actions": np.stack(actions).tolist(),
    "name": client.get_server_metadata()["name"],
    "refused": refused,
    "packed": msgpack_numpy.packb(golden).hex(),
}))
"""


@pytest.fixture(scope="module")
def openpi_python() -> str:
    python = os.environ.get("MMSEQ_OPENPI_PYTHON", sys.executable)
    probe = subprocess.run([python, "-c", "import openpi_client.websocket_client_policy"], capture_output=True)
    if probe.returncode:
        pytest.skip("openpi-client is not installed; set MMSEQ_OPENPI_PYTHON to a Python that has it")
    return python


def test_the_unmodified_openpi_client_gets_the_same_actions(openpi_python, start, policy):
    server = start(policy, token="s3cret")
    environment = {key: value for key, value in os.environ.items() if key.lower() != "pythonpath"} | {"NO_PROXY": "*"}
    command = [openpi_python, "-c", PROGRAM, str(server.port), "1000"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    expected = [policy.chunk(4 * call, 8) for call in range(1000)]
    np.testing.assert_array_equal(np.float32(found["actions"]), expected)
    assert found["name"] == "replay of pick-3"
    assert "missing_key" in found["refused"]
    golden = {"observation/state": np.array([0, 1], np.float32), "prompt": "go", "n": np.int64(3), "g": np.float32(0.5)}
    assert found["packed"] == codec.pack(golden).hex()
