"""The files of serve/deploy/ are well formed, and what they run is what mmseq understands."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmseq.cli import build_parser
from mmseq.config import load_config
from mmseq.serving.launch import ServeSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serve" / "deploy"
SETTINGS = load_config(ServeSettings, ROOT / "serve" / "server.yaml", [])
PORT = SETTINGS.port
INSTRUCTIONS = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK"}
INSTRUCTIONS |= {"ENTRYPOINT", "CMD"}


def dockerfile() -> dict[str, list[str]]:
    """The instructions by name, without comments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        name, _, rest = line.partition(" ")
        found.setdefault(name, []).append(rest.strip())
    return found


def serve_arguments(words: list[str]):
    parsed, rest = build_parser().parse_known_args(words[1:])
    assert words[0].rpartition("/")[2] == "mmseq"
    assert parsed.command == "serve"
    return parsed, rest


def test_dockerfile():
    made = dockerfile()
    assert set(made) <= INSTRUCTIONS
    assert made["USER"][-1].split(":")[0].isdigit()  # a number, so that runAsNonRoot can see that it is not root
    assert made["USER"][-1] != "0"
    assert made["EXPOSE"] == [str(PORT)]
    assert not re.search(r"https?://(?!127\.0\.0\.1)", (DEPLOY / "Dockerfile").read_text())
    parsed, _ = serve_arguments(json.loads(made["ENTRYPOINT"][0]) + json.loads(made["CMD"][0]))
    assert parsed.checkpoint == "/checkpoint"
    assert parsed.token_file
    for source in (part for copy in made["COPY"] if "--from" not in copy for part in copy.split()[:-1]):
        assert (ROOT / source).exists()
        assert f"!{source}" in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()


def test_the_health_check_of_the_image_asks_a_real_server(start, policy):
    probe = json.loads(dockerfile()["HEALTHCHECK"][0].partition("CMD")[2])
    assert probe[0] == "python"
    server = start(policy)
    run = lambda port: (
        subprocess.run(
            [sys.executable, *(word.replace(str(PORT), str(port)) for word in probe[1:])],
            capture_output=True,
            check=False,
        ).returncode
    )
    assert run(server.port) == 0
    server.stop()
    assert run(server.port) != 0


def test_kubernetes():
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    labels, spec = pod["metadata"]["labels"], pod["spec"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    (container,) = spec["containers"]
    entry = json.loads(dockerfile()["ENTRYPOINT"][0])
    parsed, rest = serve_arguments(entry + container["args"])
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    assert set(mounts.values()) == {v["name"] for v in spec["volumes"]}
    (hold_file,) = [word.removeprefix("hold_file=") for word in rest]
    assert mounts[str(Path(hold_file).parent)] == "holds"
    assert any(Path(parsed.checkpoint).is_relative_to(path) for path in mounts)
    (secret,) = [v for v in spec["volumes"] if "secret" in v]
    assert mounts[str(Path(parsed.token_file).parent)] == secret["name"]
    assert f"generic {secret['secret']['secretName']} --from-file=token=" in (DEPLOY / "kubernetes.yaml").read_text()
    assert {p["name"]: p["containerPort"] for p in container["ports"]} == {"http": PORT}
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > pause + SETTINGS.grace_s + 6
    assert spec["securityContext"]["runAsUser"] == int(dockerfile()["USER"][-1].split(":")[0])


def unit() -> dict[str, str]:
    text = (DEPLOY / "mmseq.service").read_text()
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def test_systemd_unit():
    found = unit()
    parsed, rest = serve_arguments(shlex.split(found["ExecStart"]))
    assert parsed.config == "/etc/mmseq/server.yaml"
    assert "hold_file=${STATE_DIRECTORY}/holds.json" in (parsed.checkpoint, *rest)
    assert found["StateDirectory"] == "mmseq"
    assert parsed.token_file == "${CREDENTIALS_DIRECTORY}/token"
    assert found["Type"] == "notify"
    assert float(found["TimeoutStopSec"]) > SETTINGS.grace_s + 6
    assert 2 <= float(found["WatchdogSec"]) <= SETTINGS.stuck_s


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    text = (DEPLOY / "mmseq.service").read_text().replace("/opt/mmseq/bin/mmseq", "/bin/true")
    (tmp_path / "mmseq.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "mmseq.service")], capture_output=True, text=True, check=False
    )
    about = [line for line in (done.stdout + done.stderr).splitlines() if "mmseq" in line]
    assert about == []
    broken = text.replace("Type=notify", "Typo=notify")
    (tmp_path / "mmseq.service").write_text(broken)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "mmseq.service")], capture_output=True, text=True, check=False
    )
    assert "Typo" in done.stderr
