"""SIGTERM to a robot's process, as systemd and `kill` send it: the robot comes to rest before the process ends."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from mmseq_client import robot

PROGRAM = """
import os, signal, sys, threading, time
sys.path[:0] = {path!r}
from mmseq_client import ControlLoop, Chunking
from conftest import CountingServer, RecordingRobot
from mmseq.embodiment import Embodiment, Camera, Axes

axes = Axes(names=tuple("xyzg"), units=("m",) * 4, low=(-1,) * 4, high=(1,) * 4, minimum=(-9,) * 4, maximum=(9,) * 4)
arm = Embodiment(name="arm", rate_hz=50, cameras=(Camera(name="front", height=8, width=8),), proprio=axes, action=axes)

class Robot(RecordingRobot):
    def act(self, action):
        super().act(action)
        if len(self.actions) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(self):
        print("stopped after", len(self.actions), flush=True)

{more}
try:
    ControlLoop(CountingServer(arm), Robot(arm.to_dict()), Chunking("plain")).run(seconds={seconds})
    print("went on", flush=True)
finally:
    print("ended", flush=True)
"""


def run(more: str, seconds: float) -> subprocess.CompletedProcess:
    program = PROGRAM.format(path=[os.path.dirname(__file__), *sys.path], more=textwrap.dedent(more), seconds=seconds)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_the_robot_stops_and_what_is_open_is_closed():
    done = run("", 30)
    assert done.stdout == "stopped after 3\nended\n", done.stderr
    assert done.returncode == 128 + signal.SIGTERM


def test_a_handler_of_the_users_is_left_alone():
    done = run("signal.signal(signal.SIGTERM, lambda *_: print('mine', flush=True))", 0.3)
    assert done.stdout.startswith("mine\nstopped after"), done.stderr
    assert done.stdout.endswith("went on\nended\n")
    assert done.returncode == 0


@pytest.mark.parametrize("thread", [False, True])
def test_handlers_are_as_before(thread):
    before, inside = signal.getsignal(signal.SIGTERM), []

    def use():
        with robot.ended_by_sigterm(lambda: None):
            inside.append(signal.getsignal(signal.SIGTERM))

    if thread:
        other = threading.Thread(target=use)
        other.start()
        other.join()
    else:
        use()
    assert (inside[0] is before) == (thread or before is not signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) is before
