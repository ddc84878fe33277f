"""Every task of a tiny model: what is measured, what is left out, and baselines equal to what a hand computes."""

import numpy as np
import pytest

from mmseq.data.mixture import MixConfig, Mixture, SourceConfig, TaskConfig
from mmseq.data.tokens import write_token_shards
from mmseq.embodiment import Embodiment
from mmseq.episode import Episode, TextSpan
from mmseq.evaluation import generation
from mmseq.evaluation.cases import draw, moments_of, predict_cases, readable, shuffle_actions
from mmseq.evaluation.generation import evaluate_generation
from mmseq.evaluation.measures import action_error
from mmseq.evaluation.reader import Readers
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.pictures import psnr, psnr_of_moving

ALL = 10_000  # more samples than there are moments: every moment is measured once


def test_every_task_is_measured_or_said_to_be_left_out(evaluated):
    results, media, *_ = evaluated
    expected = {
        "policy.action_error",
        "forward_dynamics.psnr",
        "forward_dynamics.psnr_over_shuffled",
        "forward_dynamics.psnr_of_ceiling",
        "forward_dynamics.moving_psnr",
        "forward_dynamics.moving_psnr_over_vanished",
        "inverse_dynamics.action_error",
        "video_prediction.psnr",
        "video_prediction.psnr_human",
        "subgoal.psnr",
        "goal_policy.action_error",
        "chain.plan_accuracy",
        "chain.psnr",
        "chain.action_error",
        "caption.accuracy",
        "caption.accuracy_human",
        "plan.accuracy",
        "value.rank_correlation",
        "success.accuracy",
        "imitation.action_error",
        "history.action_error",
        "language.bits_per_token",
        "vision_tokenizer.psnr_robot",
        "vision_tokenizer.psnr_human",
        "vision_tokenizer.codebook_use",
        *(f"action_tokenizer.error_{axis}" for axis in "xyzg"),
    }
    assert expected <= set(results)
    assert set(media["skipped"]) == {"question", "latent_action", "latent_policy", "latent_decoder"}
    assert media["skipped"]["question"] == "no episode has question, answer"
    assert "latent-action tokenizer" in media["skipped"]["latent_policy"]
    assert all(r.n > 0 for r in results.values())


def test_the_same_seed_measures_the_same():
    def run(seed):
        arrows = {"inverse_dynamics": "image, image@+4 -> action[4]"}
        episodes = [tiny.episode(s, 12) for s in range(3)]
        results, _ = evaluate_generation(tiny.model(), episodes, [], arrows, train_episodes=[], samples=4, seed=seed)
        return results

    assert run(1) == run(1)
    assert run(1)[0].value != run(2)[0].value


def test_picture_baselines_by_hand():
    episodes = [tiny.episode(seed, 10) for seed in (0, 1)]
    model = tiny.model()
    arrows = {"forward_dynamics": "image, action[4] -> image@+4", "video_prediction": "text, image -> video[2]"}
    results, media = evaluate_generation(model, episodes, [], arrows, train_episodes=[], samples=ALL)
    found = {r.name: r for r in results}

    pictures = [e["image.front"] for e in episodes]
    pairs = [(f[t + 4], f[t]) for f in pictures for t in range(6)]
    real, last = (np.stack(side) for side in zip(*pairs))
    row = found["forward_dynamics.psnr"]
    assert (row.baseline_name, row.n) == ("repeat_last_frame", 12)
    assert row.baseline_value == pytest.approx(psnr(real, last).mean())
    ceiling = psnr(real, model.tokenizers.vision.reconstruct(real)).mean()
    assert found["forward_dynamics.psnr_of_ceiling"].baseline_value == pytest.approx(ceiling)

    behind = [np.median(f, axis=0).astype(np.uint8) for f in pictures for t in range(6)]
    moving = np.array([psnr_of_moving(r[None], o[None], b)[0] for r, o, b in zip(real, last, behind)])
    row = found["forward_dynamics.moving_psnr"]
    assert (row.baseline_name, row.n) == ("repeat_last_frame", np.isfinite(moving).sum())
    assert row.baseline_value == pytest.approx(np.nanmean(moving))
    vanished = np.array([psnr_of_moving(r[None], b[None], b)[0] for r, b in zip(real, behind)])
    row = found["forward_dynamics.moving_psnr_over_vanished"]
    assert (row.baseline_name, row.baseline_value) == ("background", pytest.approx(np.nanmean(vanished)))

    videos = [(f[t + k], f[t]) for f in pictures for t in range(8) for k in (1, 2)]
    real, last = (np.stack(side) for side in zip(*videos))
    assert found["video_prediction.psnr"].n == 16
    assert found["video_prediction.psnr"].baseline_value == pytest.approx(psnr(real, last).mean())
    example = media["frames"]["video_prediction"][0]
    assert example["real"].shape == example["predicted"].shape == example["last"].shape == (2, 16, 16, 3)


def test_predicted_pictures_are_read_back():
    episodes, train = [tiny.episode(seed, 10) for seed in (0, 1)], [tiny.episode(seed, 10) for seed in (2, 3)]
    model = tiny.model()
    video = Episode.from_arrays("person", rate_hz=10, arrays={"image.front": tiny.episode(9, 10)["image.front"]})
    arrows = {"forward_dynamics": "image, action[4] -> image@+4", "video_prediction": "image -> video[2]"}
    results, _ = evaluate_generation(
        model, episodes, [video], arrows, train_episodes=train, samples=ALL, reader_steps=5
    )
    found = {r.name: r for r in results}
    assert not [name for name in found if "state" in name and "human" in name]  # nobody knows where a person was
    (robot,) = model.tokenizers.embodiments.values()
    readers = Readers(train, {robot.name: robot}, model.tokenizers.vision.fit, steps=5)
    axes = robot.vectors["proprio"]
    read = lambda frames: readers.of(robot.name, "front").label(frames).state
    at = [(e, t) for e in episodes for t in range(6)]
    true = np.stack([e["proprio"][t + 4] for e, t in at])[:, None]
    by_side = {
        "": read(np.stack([e["image.front"][t] for e, t in at])),
        "_of_ceiling": read(model.tokenizers.vision.reconstruct(np.stack([e["image.front"][t + 4] for e, t in at]))),
        "_of_reader": read(np.stack([e["image.front"][t + 4] for e, t in at])),
    }
    for suffix, states in by_side.items():
        error = action_error(true, states[:, None], axes).mean()
        assert found[f"forward_dynamics.state_error{suffix}"].baseline_value == pytest.approx(error, rel=1e-3)
    assert found["forward_dynamics.state_found"].unit == "share"
    assert found["video_prediction.state_error"].n == 16
    without, _ = evaluate_generation(model, episodes, [], arrows, train_episodes=train, samples=4)
    assert not [r for r in without if "state" in r.name]


def test_training_episodes_outside_of_the_limits_teach_no_reader():
    """A dataset's wild values are left out of training, and must not end the evaluation of what was trained."""
    wild = tiny.episode(3, 10)
    wild["proprio"][2, 0] = 50.0
    both = []
    for train in ([tiny.episode(2, 10), wild], [tiny.episode(2, 10)]):
        results, _ = evaluate_generation(
            *(tiny.model(), [tiny.episode(0, 10)], [], {"forward_dynamics": "image, action[4] -> image@+4"}),
            train_episodes=train,
            samples=4,
            reader_steps=2,
        )
        both.append({r.name: (r.value, r.baseline_value) for r in results if "state" in r.name})
    assert both[0] == both[1]
    assert len(both[0]) == 6


def test_action_baselines_by_hand():
    episodes = [tiny.episode(seed, 10) for seed in (0, 1)]
    train = [tiny.episode(seed, 10) for seed in (2, 3)]
    arrows = {"inverse_dynamics": "image, image@+4 -> action[4]"}
    results, media = evaluate_generation(tiny.model(), episodes, [], arrows, train_episodes=train, samples=ALL)
    found = {r.name: r for r in results}

    steps = np.concatenate([e["action"] for e in train]).astype(np.float64)
    true = np.stack([e["action"][t : t + 4] for e in episodes for t in range(6)])
    span = 2.0  # the tiny robot's axes go from -1 to 1
    by_mean = np.abs(true - steps.mean(0)).mean() / span
    by_median = np.abs(true - np.median(steps, axis=0)).mean() / span
    assert found["inverse_dynamics.action_error"].baseline_value == pytest.approx(by_mean, rel=1e-6)
    assert found["inverse_dynamics.action_error_over_median"].baseline_value == pytest.approx(by_median, rel=1e-6)

    shown = media["actions"]["inverse_dynamics"][0]
    error = np.abs(shown["true"] - shown["predicted"]).mean() / span
    assert found["inverse_dynamics.action_error"].value == pytest.approx(error, rel=1e-6)
    assert (shown["axes"], shown["units"]) == (list("xyzg"), ["unitless"] * 4)
    held = np.concatenate([e["action"] for e in episodes])
    assert found["action_tokenizer.error_x"].baseline_value == pytest.approx(np.abs(held - steps.mean(0)).mean(0)[0])


def test_text_and_scalar_baselines_by_hand(evaluated):
    results, media, _, _, train = evaluated
    # the training robots' seeds 6 and 11 are "close the red drawer", 7 is "press the button"
    assert [e.texts[0] for e in train[:3]] == [tiny.TEXTS[1], tiny.TEXTS[2], tiny.TEXTS[1]]
    drawn = media["texts"]["caption"]
    share = np.mean([example["truth"] == tiny.TEXTS[1] for example in drawn])
    assert results["caption.accuracy"].baseline_value == pytest.approx(share) == pytest.approx(1 / 3)
    assert results["value.rank_correlation"].baseline_value == 0
    assert results["success.accuracy"].baseline_value == 0.5  # as many yes as no
    correlations = [curve["correlation"] for curve in media["curves"]["value"]]
    assert results["value.rank_correlation"].value == pytest.approx(np.mean(correlations))
    assert results["vision_tokenizer.codebook_use"].baseline_value == pytest.approx(1 / 64)
    assert results["value.rank_correlation"].n == len(correlations)


def test_intervals_hold_their_value(evaluated):
    results, media, *_ = evaluated
    assert media["intervals"]
    for name, (low, high) in media["intervals"].items():
        assert low - 1e-9 <= results[name].value <= high + 1e-9, name


def test_shuffled_actions_are_those_of_another_sample():
    tokens, _ = readable([tiny.episode(s, 12) for s in range(3)], tiny.tokenizers())
    task, rng = Task.parse("image, action[4] -> image@+4"), np.random.default_rng(0)
    cases = draw(task, tokens, 6, rng)
    sources = shuffle_actions(cases, rng)
    chunks = [c.tokens.codes("action", c.now, c.now + 4) for c in cases]
    moved = [s.codes("action", c.now, c.now + 4) for s, c in zip(sources, cases)]
    for mine, theirs in zip(chunks, moved):
        assert not np.array_equal(mine, theirs)
        assert any(np.array_equal(theirs, other) for other in chunks)
    assert sources[0].codes("proprio", 2, 3).tolist() == cases[0].tokens.codes("proprio", 2, 3).tolist()
    assert shuffle_actions(cases[:1], rng) is None


def test_few_samples_cover_many_episodes():
    tokens, _ = readable([tiny.episode(s, 12) for s in range(5)], tiny.tokenizers())
    cases = draw(Task.parse("image -> action[4]"), tokens, 7, np.random.default_rng(0))
    assert len({case.episode.id for case in cases}) == 5
    assert len({(case.episode.id, case.now) for case in cases}) == 7


def test_a_batch_predicts_what_predict_does():
    model = tiny.model()
    tokens, _ = readable([tiny.episode(s, 12) for s in range(3)], model.tokenizers)
    task = Task.parse("image, proprio -> action[2]")
    cases = draw(task, tokens, 5, np.random.default_rng(0))
    for case, predicted in zip(cases, predict_cases(model, task, cases)):
        alone = model.predict(str(task), case.episode, case.now, variant=case.variant)
        assert np.array_equal(predicted["action"], alone["action"])


def wide_robot() -> Embodiment:
    """7 axes, 5 Hz, two cameras."""
    robot = tiny.embodiment("wide", cameras=("front", "wrist"))
    return Embodiment.from_dict(
        robot.to_dict() | {"rate_hz": 5.0, "action": tiny.axes("abcdefg").__dict__, "gripper": None}
    )


def wide_episode(seed: int, robot: Embodiment) -> Episode:
    source, rng = tiny.episode(seed, 10, robot), np.random.default_rng(seed)
    arrays = {name: source[name] for name in ("image.front", "image.wrist", "proprio")}
    arrays["action"] = rng.uniform(-1, 1, (10, 7)).astype(np.float32)
    return Episode.from_arrays(f"wide-{seed}", 5.0, arrays, texts=source.texts, embodiment="wide", success=True)


def test_robots_of_different_kinds_are_measured_together():
    robot = wide_robot()
    model = tiny.model(tiny.tokenizers((tiny.embodiment(), robot)))
    episodes = [tiny.episode(0, 14), wide_episode(1, robot), wide_episode(2, robot)]
    arrows = {"inverse_dynamics": "image, image@+0.4s -> action[0.4s]", "subgoal": "text, image -> image@+2"}
    results, media = evaluate_generation(model, episodes, [], arrows, train_episodes=episodes, samples=8)
    names = {r.name for r in results}
    assert {len(robot["axes"]) for robot in media["actions"]["inverse_dynamics"]} == {4, 7}
    assert {"action_tokenizer.error_arm_x", "action_tokenizer.error_wide_a"} <= names
    assert {example["camera"] for example in media["frames"]["subgoal"]} == {"front", "wrist"}


def test_what_cannot_be_measured_is_said():
    stray = tiny.episode(1, 12)
    stray["action"][3] = 7.0  # beyond the robot's limits
    other = tiny.episode(2, 12, tiny.embodiment("other"))
    arrows = {
        "policy": "text, image, proprio -> action[4]",
        "subgoal": "text, image -> image@+50",
        "success": "text, image -> success",
    }
    results, media = evaluate_generation(tiny.model(), [stray, other], [], arrows, train_episodes=[], samples=4)
    assert "outside" in media["excluded"]["tiny-1"]
    assert "does not know the embodiment other" in media["skipped"]["policy"]
    assert "12 steps, which is too short" in media["skipped"]["subgoal"]
    assert {r.name.split(".")[0] for r in results} == {"success", "vision_tokenizer"}
    _, media = evaluate_generation(tiny.model(), [], [], arrows, train_episodes=[])
    assert set(media["skipped"]) == set(arrows)


def by_step(seed: int = 1) -> Episode:
    """24 steps: a plan at steps 0 to 7 and 18 to 21, another text from step 12 on."""
    episode = tiny.episode(seed)
    episode.plans = []
    episode.spans = [
        TextSpan("plan", 0, 8, ("reach",)),
        TextSpan("plan", 18, 22, ("push",)),
        TextSpan("text", 12, 24, ("lift it",)),
    ]
    return episode


@pytest.mark.parametrize(
    "arrow",
    [
        "image, plan -> proprio@+2",
        "text, image@-3, plan -> image@+4",
        "text, image -> plan",
        "image -> image@+1",
        "plan, image -> progress",
    ],
)
def test_the_moments_are_those_of_training(arrow, tmp_path):
    model = tiny.model()
    write_token_shards([by_step()], tmp_path / "robot", model.tokenizers, name="robot")
    mix = MixConfig(sources={"robot": SourceConfig(path="robot")}, tasks=[TaskConfig(task=arrow)], holdout=0.0)
    (trained,) = Mixture(mix, tmp_path, model.tokenizers, row_tokens=512, seed=0).moments
    task, (tokens,) = Task.parse(arrow), readable([by_step()], model.tokenizers)[0]
    found = moments_of(task, tokens).tolist()
    assert found == [trained.moment(i).now for i in range(len(trained))]
    assert sorted(case.now for case in draw(task, [tokens], ALL, np.random.default_rng(0))) == found


def test_texts_by_step_are_measured_at_their_steps():
    episodes = [by_step(1), by_step(2), tiny.episode(3, 14)]
    arrows = {
        "by_plan": "image, plan -> action[4]",
        "plan": "text, image -> plan",
        "value": "image, plan -> progress",
        "success": "image, plan -> success",
        "language": "-> plan",
    }
    results, media = evaluate_generation(tiny.model(), episodes, [], arrows, train_episodes=episodes, samples=ALL)
    found = {r.name: r for r in results}
    assert found["by_plan.action_error"].n == 2 * (8 + 3) + 11
    assert found["plan.accuracy"].n == found["language.bits_per_token"].n == 2 * (8 + 4) + 14
    assert {"value.rank_correlation", "success.accuracy"} <= found.keys()
    assert {e["truth"] for e in media["texts"]["plan"]} <= {"reach", "push", "reach for it, then move it"}
    for example in media["texts"]["plan"]:
        if example["episode"] != "tiny-3":
            assert example["truth"] == ("reach" if example["step"] < 8 else "push")
            assert (example["asked"] == "lift it") == (example["step"] >= 12)


def test_a_text_of_its_step_is_right(monkeypatch):
    said = lambda model, task, cases: [{"plan": case.episode.texts_of("plan", case.now)[0]} for case in cases]
    monkeypatch.setattr(generation, "predict_cases", said)
    arrows = {"plan": "image -> plan"}
    ((row, *_), _) = evaluate_generation(tiny.model(), [by_step()], [], arrows, train_episodes=[by_step()], samples=ALL)
    assert (row.name, row.value, row.n) == ("plan.accuracy", 1.0, 12)
    assert row.baseline_value == pytest.approx(8 / 12)  # "reach": each of the two is once in the episode


def test_texts_that_no_moment_has_are_said():
    alone = tiny.episode(1)
    alone.plans, alone.spans = [], [TextSpan("plan", 20, 24, ("push",))]
    arrows = {"late": "text, image, plan -> action[8]", "question": "question, image -> answer"}
    _, media = evaluate_generation(tiny.model(), [alone], [], arrows, train_episodes=[], samples=4)
    assert media["skipped"]["late"] == "no step with room for it has text and plan"
    assert media["skipped"]["question"] == "no episode has question, answer"


def test_an_episode_without_the_cameras_of_its_robot_is_left_out():
    other = tiny.episode(1, 12)
    other.streams["image.side"] = other.streams.pop("image.front")
    arrows = {"policy": "image -> action[4]", "side": "image.side -> action[4]"}
    results, media = evaluate_generation(
        tiny.model(), [other, tiny.episode(2, 12)], [], arrows, train_episodes=[], samples=ALL
    )
    assert {r.name: r.n for r in results}["policy.action_error"] == 9
    assert media["skipped"]["side"] == "no episode has image.side"


def test_progress_is_reported():
    seen = []
    arrows = {"policy": "text, image, proprio -> action[1]"}
    evaluate_generation(
        tiny.model(),
        [tiny.episode()],
        [],
        arrows,
        train_episodes=[],
        samples=2,
        on_progress=lambda *a: seen.append(a),
    )
    assert seen == [("policy", 0, 2), ("tokenizers", 1, 2), ("done", 2, 2)]
