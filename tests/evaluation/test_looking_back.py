"""Whatever a checkpoint was trained on can be served and driven in closed loop: histories, past frames, demonstrations
and goals. What reaches the model is compared with what an episode of the same steps would give it."""

import time

import numpy as np
import pytest

from mmseq.episode import Episode
from mmseq.evaluation.driver import Driver
from mmseq.inference.decoding import Decoder
from mmseq.serving import Server, ServerConfig
from mmseq.serving.model_policy import ModelPolicy
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens

SETTINGS = {"delay_ms": 0, "jitter_ms": 0, "chunking": "plain", "execute": 1, "max_steps": 12}


class Line:
    """A point that goes to the right; every step has another picture."""

    task, instructions = "right", ("go to the right",)

    def __init__(self):
        self.reset(0)

    def contract(self):
        return tiny.embodiment()

    def reset(self, seed=None):
        self.seed, self.steps, self.succeeded = seed, 0, False

    def observe(self):
        frame = np.full((16, 16, 3), (40 * (self.seed or 0) + 7 * self.steps) % 256, np.uint8)
        return {"image.front": frame, "proprio": np.full(3, 0.02 * self.steps, np.float32)}

    def act(self, action):
        self.steps += 1
        self.succeeded = self.steps >= 10
        return self.succeeded

    def expert(self):
        return lambda: np.array([0.5, 0, 0, -1], np.float32)


def wait_until_warm(server):
    """Chunks of the warm-up are none of the robot's."""
    until = time.monotonic() + 60
    while not server.service.warm and time.monotonic() < until:
        time.sleep(0.01)
    assert server.service.warm


def drive(arrow: str, monkeypatch, *, execute: int = 1, steps: int = 8, seed: int = 1):
    """Each request that the decoder got, and the episode that the robot saw and did by the end."""
    model = tiny.model()
    model.tasks = {"policy": arrow}
    asked, decode = [], Decoder.decode

    def record(self, task, requests):
        if recording:
            asked.extend((task, request) for request in requests)
        return decode(self, task, requests)

    recording = False
    monkeypatch.setattr(Decoder, "decode", record)
    env, seen, did = Line(), [], []
    with Server(ModelPolicy(model), ServerConfig(port=0)) as server:
        from mmseq_client import Client

        with Client("127.0.0.1", server.port) as client:
            wait_until_warm(server)
            recording = True
            env.reset(seed)
            driver = Driver(env, client, {**SETTINGS, "execute": execute}, np.random.default_rng(0), seed)
            assert (env.seed, env.steps) == (seed, 0)
            for _ in range(steps):
                seen.append(env.observe())
                did.append(driver.next_action())
                env.act(did[-1])
            driver.loop.close()
    arrays = {key: np.stack([s[key] for s in seen]) for key in seen[0]}
    episode = Episode.from_arrays(
        "driven", 20.0, {**arrays, "action": np.stack(did)}, texts=["go to the right"], embodiment="arm"
    )
    return asked, EpisodeTokens(episode, model.tokenizers), model


@pytest.mark.parametrize(
    ("arrow", "looks_back", "execute"),
    [
        *(("text, video[4], proprio -> action[4]", 3, execute) for execute in (1, 3)),
        *(("text, image@-2, image, proprio[3] -> action[4]", 2, execute) for execute in (1, 3)),
        ("image.front@-0.1s, image -> action[4]", 2, 3),
        ("text, (image@-2, proprio -> action[1]) * 4", 2, 1),
        ("text, (video[3], proprio -> action[1]) * 4", 2, 1),
        ("text, (image, proprio[3] -> action[2]) * 3", 2, 2),
    ],
)
def test_the_past_is_what_the_robot_saw(arrow, looks_back, execute, monkeypatch):
    asked, episode, model = drive(arrow, monkeypatch, execute=execute)
    assert len(asked) == len(range(0, 8, execute))
    builder = model.tokenizers.builder()
    for step, (task, request) in zip(range(0, 8, execute), asked):
        first = step - len(request.done) * task.stride(20.0)  # of a group, its first repetition
        for placed in (p for p in task.place(20.0) if not p.predicted):
            for camera in builder.expand(placed, request.tokens):
                found = builder.codes(placed, camera, request.tokens, request.now, 0)
                if placed.start is None:
                    continue
                stream = placed.stream if camera is None else f"image.{camera}"
                steps = [
                    max(0, first + at) for at in range(placed.start, placed.stop)
                ]  # before the beginning, the first
                wanted = np.concatenate([episode.codes(stream, s, s + 1) for s in steps])
                np.testing.assert_array_equal(found, wanted)
    assert model.tokenizers.embodiment("arm").rate_hz == 20
    assert looks_back == max(-p.start for p in asked[0][0].place(20.0) if not p.predicted and p.start is not None)


def test_a_history_goes_on_from_what_was_done(monkeypatch):
    asked, episode, model = drive("text, (image, proprio -> action[1]) * 4", monkeypatch)
    builder = model.tokenizers.builder()
    for step, (task, request) in enumerate(asked):
        count = min(4, step + 1)
        assert task.group.count == count
        assert sorted(request.done) == list(range(count - 1))
        for repeat, codes in request.done.items():
            at = step - (count - 1) + repeat
            np.testing.assert_array_equal(codes, episode.codes("action", at, at + 1))
        for placed in (p for p in task.place(20.0) if p.stream == "image"):
            found = builder.codes(placed, "front", request.tokens, request.now, 0)
            at = step - (count - 1) + placed.segment.repeat
            np.testing.assert_array_equal(found, episode.codes("image.front", at, at + 1))


def test_a_history_decodes_what_training_sees(monkeypatch):
    """With the executed actions given, the last repetition is what the whole sequence predicts there."""
    asked, episode, model = drive("text, (image, proprio -> action[1]) * 3", monkeypatch)
    task, request = asked[5]
    from mmseq.packing import collate

    sequence = model.tokenizers.builder().build(task, episode, 3)
    answers = model.teacher_forced(collate([sequence], model.vocabulary))["action"][1]
    decoded = Decoder(model).decode(task, [request])[0]
    assert [d.codes.ravel().tolist() for d in decoded[:2]] == [request.done[0][0].tolist(), request.done[1][0].tolist()]
    assert int(answers[-4]) == int(decoded[-1].codes.ravel()[0])  # the first axis: nothing predicted lies before it


def test_a_demonstration_is_sent_once_and_kept(monkeypatch):
    asked, _, model = drive("demo[3], image, proprio -> action[2]", monkeypatch)
    builder = model.tokenizers.builder()
    expert = [np.full((1, 16, 16, 3), (40 * (1 + 7) + 7 * step) % 256, np.uint8) for step in (1, 6, 10)]
    wanted = np.concatenate([model.tokenizers.vision.encode(frame) for frame in expert])
    assert len(asked) == 8
    for task, request in asked:
        demo = next(p for p in task.place(20.0) if p.stream == "demo")
        found = builder.codes(demo, "front", request.tokens, request.now, 0)
        np.testing.assert_array_equal(found[[0, 2]], wanted[[0, 2]])  # of ten frames the middle one is either of two


@pytest.mark.parametrize(
    ("arrow", "steps_ahead"),
    [
        ("image, proprio, image@+4 -> action[2]", [4]),
        ("image, image@+0.2s -> action[2]", [4]),
        ("image, image@+2, image.front@+0.3s, image@end -> action[2]", [2, 6, 10]),
    ],
)
def test_a_goal_is_what_the_expert_reaches(arrow, steps_ahead, monkeypatch):
    asked, _, model = drive(arrow, monkeypatch)
    builder = model.tokenizers.builder()
    assert len(asked) == 8
    for step, (task, request) in enumerate(asked):
        goals = [p for p in task.place(20.0) if p.stream == "image"][1:]
        for goal, ahead in zip(goals, steps_ahead, strict=True):
            frame = np.full((1, 16, 16, 3), (40 + 7 * min(step + ahead, 10)) % 256, np.uint8)
            found = builder.codes(goal, "front", request.tokens, request.now, 0)
            np.testing.assert_array_equal(found, model.tokenizers.vision.encode(frame))


@pytest.mark.parametrize(
    ("arrow", "execute"), [("image, action[2]@-2 -> action[4]", 1), ("action[3]@-4 -> action[4]", 2)]
)
def test_past_commands_are_what_the_robot_was_sent(arrow, execute, monkeypatch):
    asked, episode, model = drive(arrow, monkeypatch, execute=execute)
    builder = model.tokenizers.builder()
    rest = model.tokenizers.encode_vector("action", "arm", np.float32([[0, 0, 0, -1]]))
    for step, (task, request) in zip(range(0, 8, execute), asked, strict=True):
        given = next(p for p in task.place(20.0) if p.stream == "action" and not p.predicted)
        found = builder.codes(given, None, request.tokens, request.now, 0)
        steps = range(step + given.start, step + given.stop)
        wanted = np.concatenate([rest if at < 0 else episode.codes("action", at, at + 1) for at in steps])
        np.testing.assert_array_equal(found, wanted)  # and before it was sent anything, it stood


def test_a_clip_of_what_is_to_come_is_what_the_expert_does(monkeypatch):
    asked, _, model = drive("image, video[3]@+4, image@+2, proprio@+4 -> action[2]", monkeypatch)
    builder, encode = model.tokenizers.builder(), model.tokenizers.vision.encode
    assert len(asked) == 8
    for step, (task, request) in enumerate(asked):
        _, clip, goal, state = (p for p in task.place(20.0) if not p.predicted)
        reached = [min(max(step + ahead, 1), 10) for ahead in (2, 3, 4)]
        frames = [np.full((1, 16, 16, 3), (40 + 7 * at) % 256, np.uint8) for at in reached]
        found = builder.codes(clip, "front", request.tokens, request.now, 0)
        np.testing.assert_array_equal(found, np.concatenate([encode(frame) for frame in frames]))
        np.testing.assert_array_equal(builder.codes(goal, "front", request.tokens, request.now, 0), encode(frames[0]))
        stands = model.tokenizers.encode_vector("proprio", "arm", np.full((1, 3), 0.02 * reached[2], np.float32))
        np.testing.assert_array_equal(builder.codes(state, None, request.tokens, request.now, 0), stands)


def test_a_client_that_shows_nothing_is_told_what_is_missing():
    from mmseq_client import Client, RefusedError

    model = tiny.model()
    model.tasks = {"policy": "demo[3], image -> action[2]"}
    with Server(ModelPolicy(model), ServerConfig(port=0)) as server, Client("127.0.0.1", server.port) as client:
        observation = {"observation.images.front": np.zeros((16, 16, 3), np.uint8)}
        with pytest.raises(RefusedError, match=r"demo\.images\.front.*first observation of an episode"):
            client.infer(observation)
        shown = {**observation, "demo.images.front": np.zeros((5, 16, 16, 3), np.uint8)}
        assert client.infer(shown)["actions"].shape == (2, 4)
        assert client.infer(observation)["actions"].shape == (2, 4)  # it is kept
        with pytest.raises(RefusedError, match=r"demo\.images\.front"):
            client.infer({**observation, "reset": True})
