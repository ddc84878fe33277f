"""`mmseq serve` as a process of its own: settings, a replay, signals, TLS."""

import base64
import io
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from websockets.sync.client import connect

from mmseq.config import load_config
from mmseq.errors import ConfigError, DataError, MMSeqError
from mmseq.serving import ServerConfig, codec
from mmseq.serving.launch import ServeSettings, launch, loader, replay_policy, server_config
from mmseq.serving.model_policy import ModelPolicy
from mmseq.testing import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    model = tiny.model()
    model.tasks = {"policy": "text, image, proprio -> action[4]", "world": "image, action[4] -> image@+4"}
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.write_episodes(
        tmp_path_factory.mktemp("shards") / "robot", [tiny.episode(i) for i in range(3)], (tiny.embodiment(),)
    )


@pytest.fixture
def command(tmp_path):
    """`command("--replay", ...)`: the process and its address, once it serves."""
    started = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}

    def begin(*arguments, how=("-m", "mmseq")):
        line = [sys.executable, *how, "serve", *map(str, arguments), "--port", "0"]
        with open(tmp_path / "log.txt", "ab") as log:
            process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        started.append(process)
        said = process.stdout.readline()
        assert " at http" in said, (said, (tmp_path / "log.txt").read_text())
        return process, said.split(" at ")[1].strip()

    yield begin
    for process in started:
        process.kill()
        process.wait()


def talk(url, **options):
    return connect(url.replace("http", "ws", 1), compression=None, max_size=None, proxy=None, **options)


def ask(socket, observation):
    socket.send(codec.pack(observation))
    reply = socket.recv(timeout=20)
    return codec.unpack(reply) if isinstance(reply, bytes) else json.loads(reply)["error"]


def observe(episode, t):
    return {
        "observation.images.front": episode["image.front"][t],
        "observation.state": episode["proprio"][t],
        "prompt": episode.texts[0],
    }


def test_the_shipped_settings_are_the_defaults_and_all_of_them():
    shipped = load_config(ServeSettings, ROOT / "serve" / "server.yaml")
    shipped.checkpoint = None
    assert shipped == ServeSettings()
    written, known = yaml.safe_load((ROOT / "serve" / "server.yaml").read_text()), asdict(ServeSettings())
    assert set(written) == set(known)
    for name, group in known.items():
        if isinstance(group, dict):
            assert set(written[name]) == set(group), name


def test_a_checkpoint_with_settings_reloads_and_drains(command, checkpoint, tmp_path):
    settings = tmp_path / "server.yaml"
    settings.write_text(f"checkpoint: {checkpoint}\nchunking: {{mode: realtime, execute: 2}}\n")
    process, url = command("--config", settings, "gate.too_fast=refuse")
    episode = tiny.episode(3)
    with talk(url) as s:
        assert codec.unpack(s.recv())["chunking"]["mode"] == "realtime"
        before = ask(s, observe(episode, 5))["actions"]
        again = tiny.model()
        again.tasks = ModelPolicy.from_pretrained(checkpoint).tasks
        for parameter in again.transformer.parameters():
            parameter.data.add_(0.3 * np.sign(parameter.data.mean().item() or 1))
        again.save_pretrained(checkpoint)
        process.send_signal(signal.SIGHUP)
        until = time.monotonic() + 20
        while httpx.get(f"{url}/v1/status", trust_env=False).json()["reloads"] != 1:
            assert time.monotonic() < until
            time.sleep(0.05)
        status = httpx.get(f"{url}/v1/status", trust_env=False).json()
        assert len(status["sessions"]) == 1
        assert status["safety"]["too_fast"] == "refuse"
        after = ask(s, {**observe(episode, 5), "reset": True})["actions"]
        assert (before != after).any()
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


def test_sigterm_while_a_thread_is_in_torch_is_a_clean_end(command, shards):
    program = """
import sys, torch
from mmseq.cli import main
from mmseq.serving import ReplayPolicy
def predict(self, arrow, observation):
    while True:
        torch.ones(300, 300) @ torch.ones(300, 300)
ReplayPolicy.predict = predict
sys.exit(main(sys.argv[1:]))
"""
    process, url = command("--replay", shards, "grace_s=0", how=["-c", program])
    body, headers = codec.to_json({"arrow": "image -> action", "observation": {}}), {"Content-Type": "application/json"}
    found = []
    ask = lambda: found.append(httpx.post(f"{url}/v1/predict", content=body, headers=headers, trust_env=False))
    asking = Thread(target=ask)
    asking.start()
    until = time.monotonic() + 20
    while httpx.get(f"{url}/v1/status", trust_env=False).json()["in_flight"] != 1:
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0
    asking.join()
    assert found[0].json()["error"]["code"] == "stopping"


def test_a_dry_run_with_a_recorded_episode(command, shards):
    _, url = command("--replay", f"{shards}:2")
    episode = tiny.episode(2)
    with talk(url) as s:
        contract = codec.unpack(s.recv())
        assert contract["name"] == f"replay of {episode.id}"
        for step in (0, 4, 9):
            actions = ask(s, {**observe(episode, step), "step": step})["actions"]
            expected = episode["action"][step : step + contract["horizon"]]
            np.testing.assert_allclose(actions[: len(expected)], expected, atol=1e-6)


def test_pictures_come_as_files(command, checkpoint):
    _, url = command(checkpoint)
    episode = tiny.episode(1)
    body = {"arrow": "image -> image@+2", "observation": {"observation.images.front": episode["image.front"][3]}}

    def predict(**more):
        headers = {"Content-Type": "application/json", **more.pop("headers", {})}
        return httpx.post(f"{url}/v1/predict", content=codec.to_json(body | more), headers=headers, trust_env=False)

    array = codec.from_json(predict().content)["prediction"]["image"]
    sent = predict(**{"as": "png"}).json()["prediction"]["image"]
    assert sent["content_type"] == "image/png"
    np.testing.assert_array_equal(read_png(base64.b64decode(sent["data"])), array)
    raw = predict(headers={"Accept": "image/png"})
    assert raw.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(read_png(raw.content), array)
    body["arrow"] = "image -> video[2]"
    assert predict(headers={"Accept": "video/mp4"}).content[4:8] == b"ftyp"
    assert predict(**{"as": "mp4"}).json()["prediction"]["video"]["content_type"] == "video/mp4"
    assert len(predict(**{"as": "png"}).json()["prediction"]["video"]["data"]) == 2
    refused = predict(headers={"Accept": "image/png"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported")
    assert predict(**{"as": "gif"}).json()["error"]["key"] == "as"


def read_png(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    try:
        subprocess.run([*line.split(), *names, *files], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl cannot make a certificate here")
    return folder


def test_tls(command, shards, certificate):
    cert, key = certificate / "cert.pem", certificate / "key.pem"
    _, url = command("--replay", shards, "--tls-cert", cert, "--tls-key", key)
    assert url.startswith("https://")
    trust = ssl.create_default_context(cafile=cert)
    with talk(url, ssl=trust) as s:
        s.recv()
        big = {**observe(tiny.episode(0), 1), "step": 0, "options": {"more": np.zeros(100_000, np.uint8)}}
        assert "actions" in ask(s, big)
    assert httpx.get(f"{url}/healthz", verify=trust, trust_env=False).text == "OK\n"
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url.replace('https', 'http')}/healthz", trust_env=False)


def test_a_public_address_without_a_token_must_be_asked_for():
    assert ServerConfig(host="0.0.0.0", insecure_public=True).token is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing to serve"),
        ({"checkpoint": "a", "replay": "b"}, "cannot both be served"),
        ({"checkpoint": "a", "host": "0.0.0.0"}, "no token.*--token-file.*--insecure-public"),
        ({"checkpoint": __file__}, "is a file. Name the checkpoint's folder"),
        ({"checkpoint": "a", "tls_cert": "cert.pem"}, "belong together"),
        ({"checkpoint": "a", "token_file": "missing"}, "--token-file missing"),
        ({"checkpoint": "a", "grace_s": 1e10}, "grace_s is"),
        ({"checkpoint": "a", "max_connections": 0}, "max_connections is 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(changes, message):
    with pytest.raises(MMSeqError, match=message):
        launch(ServeSettings(**changes))


def test_files_that_are_no_certificate(tmp_path, shards):
    (tmp_path / "a.pem").write_text("no certificate")
    settings = ServeSettings(replay=str(shards), port=0, tls_cert=str(tmp_path / "a.pem"), tls_key="b.pem")
    with pytest.raises(MMSeqError, match=r"cannot use tls_cert .*a\.pem"):
        launch(settings)


def test_an_encrypted_key_does_not_ask_for_its_passphrase(tmp_path, shards, certificate):
    key = tmp_path / "key.pem"
    line = ["openssl", "pkey", "-aes256", "-passout", "pass:secret", "-in", certificate / "key.pem", "-out", key]
    subprocess.run(line, check=True, capture_output=True)
    settings = ServeSettings(replay=str(shards), tls_cert=str(certificate / "cert.pem"), tls_key=str(key))
    with pytest.raises(MMSeqError, match=r"key\.pem is encrypted.*openssl pkey"):
        launch(settings)


def test_replays_that_are_not_there(shards):
    for address, kind, message in (
        (f"{shards}:9", DataError, "has 3 episodes"),
        (f"{shards}:x", ConfigError, "'x' is no episode's number"),
    ):
        with pytest.raises(kind, match=message):
            replay_policy(address)
    assert loader(ServeSettings(replay=str(shards)))().horizon == 16
    assert server_config(ServeSettings()).port == 8000
