"""What train/launch/ ships is well formed, and the commands in it are commands that mmseq understands."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from mmseq.cli import build_parser
from mmseq.config import load_config
from mmseq.training.config import TrainConfig
from mmseq.training.distributed import EXIT_PREEMPTED

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "train" / "launch"
CELLS = [
    c for c in re.findall(r"`([^`]+)`", (LAUNCH / "README.md").read_text()) if " train/" in c and "RECIPE" not in c
]


def check(arguments: list[str], world: int) -> None:
    """Parse what follows `mmseq`, and check the recipe that it names on so many ranks."""
    args = build_parser().parse_args(arguments)
    assert args.command == "train"
    load_config(TrainConfig, ROOT / args.recipe, args.overrides).check(world)


def mmseq_arguments(words: list[str]) -> list[str]:
    return words[words.index("mmseq") + 1 :]


def test_slurm():
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"], check=False).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert options["signal"].startswith("TERM@")
    assert "requeue" in options
    assert re.search(rf'"\$code" -eq {EXIT_PREEMPTED} \]', text)
    example = re.search(r"^#   sbatch train/launch/slurm.sbatch (.*)$", text, re.MULTILINE)
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    assert example
    check(
        mmseq_arguments(shlex.split(line.replace('"$@"', example[1]))),
        int(options["nodes"]) * int(options["ntasks-per-node"]),
    )


def test_kubernetes():
    spec = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]
    (job,) = spec["replicatedJobs"]
    template = job["template"]["spec"]
    (container,) = template["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    options = dict(word.lstrip("-").split("=", 1) for word in words if word.startswith("--"))
    nodes, ranks = int(options["nnodes"]), int(options["nproc-per-node"])
    assert nodes == template["completions"] == template["parallelism"]
    assert ranks == container["resources"]["limits"]["nvidia.com/gpu"]
    first = f"mmseq-{job['name']}-0-0.{spec['network']['subdomain']}"
    assert options["master-addr"] == first
    codes = [rule["onExitCodes"] for rule in template["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [{"containerName": container["name"], "operator": "In", "values": [EXIT_PREEMPTED]}]
    check(mmseq_arguments(words), nodes * ranks)


def test_hostfile():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(LAUNCH / "hostfile")) == {"node01": 8, "node02": 8}


@pytest.mark.parametrize("command", CELLS)
def test_commands_of_the_page(command):
    words = shlex.split(command)
    worlds = {"torchrun": 8, "deepspeed": 16, "sbatch": 16, "mmseq": 1}
    if words[0] == "kubectl":
        assert (ROOT / words[-1]).is_file()
    elif words[0] == "sbatch":
        check(["train", *words[2:]], 16)
    else:
        check(mmseq_arguments(words), worlds[words[0]] * (2 if "--nnodes" in words else 1))


def test_the_page_has_commands():
    assert {c.split()[0] for c in CELLS} == {"mmseq", "torchrun", "deepspeed", "sbatch", "kubectl"}
