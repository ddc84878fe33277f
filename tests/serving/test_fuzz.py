"""Hostile messages: each is refused by a RequestError, soon, and leaves nothing behind.

MMSEQ_FUZZ=1000000 pytest tests/serving/test_fuzz.py -s -m slow     # a few minutes
"""

import contextlib
import gc
import json
import os
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from mmseq.serving import ObservationRules, ReplayPolicy, RequestError, codec
from mmseq.serving.chunking import take_turn
from mmseq.serving.observation import check_given, check_observation
from mmseq.serving.policy import Contract
from support.hostile import hostile
from support.wire import ask, dial, http

SLOW = int(os.environ.get("MMSEQ_FUZZ", "100000"))


@pytest.fixture
def corpus(observation):
    prefix = np.zeros((2, 4), np.float32)
    turn = {"step": 3, "sent_at": 1.5, "deadline_ms": 50.0, "delay": 2, "reset": False, "chunking": "plain"}
    images = {"front": observation["observation.images.front"], "wrist": observation["observation.images.wrist"]}
    made = [
        observation,
        {**observation, "action_prefix": prefix, **turn},
        {"images": images, "state": [0.0] * 4, "prompt": "go", "options": {"temperature": 0.5, "seed": 3}},
        {"observation.state": np.zeros(4), "prompt": np.array("go"), "embodiment_fingerprint": "0" * 16},
    ]
    return [codec.pack(one) for one in made]


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def batter(count, corpus, contract, seed):
    """(messages that passed, codes of refusals, the longest in seconds, growth in MiB)."""
    random, rules = Random(seed), ObservationRules()
    passed, codes, longest, before = 0, {}, 0.0, None
    for i in range(count):
        data = hostile(random, corpus)
        begun = time.perf_counter()
        try:
            _, observation = take_turn(codec.message(codec.unpack(data)))
            try:
                check_observation(observation, contract, rules)
                passed += 1
            except RequestError as error:
                codes[error.code] = codes.get(error.code, 0) + 1
                json.loads(error.to_json())
                check_given(observation, contract, rules)
        except RequestError as error:
            codes[error.code] = codes.get(error.code, 0) + 1
            error.to_json().encode()
        longest = max(longest, time.perf_counter() - begun)
        if i == min(count // 10, 20_000):
            gc.collect()
            before = resident_mb()
    gc.collect()
    return passed, codes, longest, resident_mb() - (before or 0)


def test_ten_thousand_in_process(corpus, policy):
    passed, codes, longest, _ = batter(10_000, corpus, Contract.from_policy(policy), 0)
    assert longest < 1
    assert {"malformed", "too_large", "unknown_key", "missing_key", "wrong_type", "out_of_range"} <= set(codes)
    assert 0 < passed < 5_000  # the changes neither break everything nor nothing


@pytest.mark.slow
def test_many_in_process(corpus, policy):
    begun = time.perf_counter()
    passed, codes, longest, growth_mb = batter(SLOW, corpus, Contract.from_policy(policy), 1)
    print(
        f"\n{SLOW:,} messages in {time.perf_counter() - begun:.0f} s: {passed:,} passed, refused {codes}; the longest "
        f"{1000 * longest:.0f} ms, memory +{growth_mb:.1f} MiB"
    )
    assert longest < 1
    assert growth_mb < 64


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_over_a_socket(start, embodiment, episode, corpus, observation, count):
    server = start(ReplayPolicy(episode, embodiment, horizon=8))
    random, answered, s = Random(2), 0, None
    for _ in range(count):
        if s is None:
            s = dial(server)
            s.recv()
        try:
            reply = ask(s, hostile(random, corpus))
            assert "actions" in reply or reply["code"] not in ("internal", "policy_failed"), reply
            answered += 1
        except ConnectionClosed:
            s = None
    assert answered == count
    assert "actions" in ask(s, {**observation, "reset": True})
    s.close()
    for path, kind in (("/v1/predict", "application/msgpack"), ("/v1/predict", "application/json"), ("/v1/hold", "x")):
        for _ in range(count // 10):
            data = hostile(random, corpus)
            if kind == "application/json":
                with contextlib.suppress(RequestError):
                    data = codec.to_json(codec.unpack(data))
            reply = http(server, "POST", path, content=data, headers={"Content-Type": kind})
            assert reply.status_code < 500, (reply.status_code, reply.text)


def test_half_of_a_surrogate_pair_is_refused(start, policy, observation):
    server = start(policy)
    for body in (
        b'{"arrow": "\\ud800", "observation": {}}',
        b'{"arrow": "-> text", "observation": {"prompt": "\\udfff"}}',
    ):
        reply = http(server, "POST", "/v1/predict", content=body, headers={"Content-Type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "malformed")
