"""Which request is answered next, with whom, and which is not answered at all."""

import asyncio
import re
import threading
import time

import pytest

from mmseq.serving.errors import RequestError
from mmseq.serving.scheduler import Job, Scheduler, SchedulerConfig, make_job


class Model:
    """Notes its batches, and waits in the first until it is released."""

    def __init__(self, **config):
        self.batches, self.gate, self.entered = [], threading.Event(), threading.Event()
        self.scheduler = Scheduler(self.run, SchedulerConfig(**config))
        self.scheduler.start()

    def run(self, batch):
        self.batches.append([job.arguments[0] for job in batch])
        self.entered.set()
        assert self.gate.wait(5)
        for job in batch:
            job.outcome = {"name": job.arguments[0]}

    def ask(self, name, *, key="robot", deadline_s=None, order_s=1.0, background=False):
        now = time.monotonic()
        expires = None if deadline_s is None else now + deadline_s
        job = Job(
            call="infer",
            arguments=(name,),
            key=key,
            future=asyncio.get_running_loop().create_future(),
            arrived=now,
            order=expires or now + order_s,
            expires=expires,
            background=background,
        )
        self.scheduler.submit(job)
        return job

    async def first(self):
        job = self.ask("first")
        await asyncio.to_thread(self.entered.wait, 5)
        return job


def run(scenario, **config):
    model = Model(**config)
    try:
        asyncio.run(asyncio.wait_for(scenario(model), 10))
    finally:
        model.gate.set()
        assert model.scheduler.stop(5)
    return model


def test_the_earliest_deadline_is_first_and_then_the_earliest_arrival():
    async def scenario(model):
        jobs = [await model.first()]
        jobs += [model.ask("a"), model.ask("b"), model.ask("urgent", deadline_s=0.5), model.ask("c")]
        model.gate.set()
        assert [(await job.future)["name"] for job in jobs] == ["first", "a", "b", "urgent", "c"]

    assert run(scenario, max_batch=1).batches == [["first"], ["urgent"], ["a"], ["b"], ["c"]]


def test_requests_that_came_meanwhile_share_a_batch_with_their_kind():
    async def scenario(model):
        jobs = [await model.first()]
        jobs += [model.ask(f"{kind}{i}", key=kind) for i in range(3) for kind in "ab"]
        model.gate.set()
        await asyncio.gather(*(job.future for job in jobs))
        assert [job.batch for job in jobs] == [1, 2, 2, 2, 2, 1, 1]
        assert model.scheduler.stats.sizes == {1: 3, 2: 2}

    assert run(scenario, max_batch=2).batches[1:] == [["a0", "a1"], ["b0", "b1"], ["a2"], ["b2"]]


def test_an_idle_model_waits_for_others_but_not_for_long():
    async def scenario(model):
        model.gate.set()
        jobs = [model.ask("a")]
        await asyncio.sleep(0.01)
        jobs.append(model.ask("b"))
        await asyncio.gather(*(job.future for job in jobs))

    assert run(scenario, batch_wait_ms=500, max_batch=3).batches == [["a", "b"]]


def test_nobody_waits_when_a_batch_is_full():
    async def scenario(model):
        model.gate.set()
        full = [model.ask("c"), model.ask("d"), model.ask("e")]
        await asyncio.wait_for(asyncio.gather(*(job.future for job in full)), 60)

    assert run(scenario, batch_wait_ms=60_000, max_batch=3).batches == [["c", "d", "e"]]


def test_nobody_waits_for_more_robots_than_there_are():
    async def scenario(model):
        model.gate.set()
        model.scheduler.robots = 2
        await asyncio.gather(*(model.ask(name).future for name in "ab"))

    assert run(scenario, batch_wait_ms=60_000).batches == [["a", "b"]]


def test_the_time_of_a_call_is_that_of_the_first_and_then_an_average():
    async def scenario(model):
        model.gate.set()
        jobs = [model.ask("a"), model.ask("b"), model.ask("c")]
        await asyncio.gather(*(job.future for job in jobs))
        first, *others = [job.ended - job.begun for job in jobs]
        wanted = first
        for took in others:
            wanted = 0.8 * wanted + 0.2 * took
        assert model.scheduler.stats.batch_s == pytest.approx(wanted)
        assert (model.scheduler.stats.batches, model.scheduler.stats.busy_since) == (3, None)

    run(scenario, max_batch=1)


def test_a_full_queue_says_busy_at_once_and_when_to_come_back():
    async def scenario(model):
        await model.first()
        waiting = [model.ask("a"), model.ask("b")]
        for background in (False, True):
            with pytest.raises(RequestError, match="2 requests are waiting") as caught:
                model.ask("c", background=background)
            assert caught.value.code == "busy"
            assert caught.value.retry_after_ms >= 1
        model.gate.set()
        await asyncio.gather(*(job.future for job in waiting))
        assert model.scheduler.waiting == 0

    run(scenario, max_waiting=2)


def test_the_background_takes_half_of_the_queue():
    async def scenario(model):
        await model.first()
        model.ask("a", background=True), model.ask("b", background=True)
        with pytest.raises(RequestError, match=r"requests are waiting"):
            model.ask("c", background=True)
        last = model.ask("robot")
        model.gate.set()
        await last.future

    run(scenario, max_waiting=4)


def test_a_retry_hint_grows_with_the_queue():
    async def scenario(model):
        model.gate.set()
        await model.ask("a").future
        model.scheduler.stats.batch_s = 0.1
        assert model.scheduler.retry_after_ms() == pytest.approx(100)
        model.scheduler.waiting = 7
        assert model.scheduler.retry_after_ms() == pytest.approx(400)
        model.scheduler.waiting = 0

    run(scenario, max_batch=2)


def test_a_deadline_that_passes_in_the_queue_is_told_when_it_passes():
    async def scenario(model):
        first = await model.first()
        late = model.ask("late", deadline_s=0.03)
        begun = time.monotonic()
        with pytest.raises(RequestError, match="deadline") as caught:
            await late.future
        assert caught.value.code == "late"
        assert 29 <= int(re.search(r"after (\d+) ms in the queue", str(caught.value))[1]) < 1000
        assert time.monotonic() - begun < 1  # the model is still busy with the first
        model.gate.set()
        await first.future

    assert run(scenario).batches == [["first"]]


def test_a_deadline_that_passed_while_the_loop_was_busy_is_not_answered():
    async def scenario(model):
        first = await model.first()
        late = model.ask("late", deadline_s=0.02)
        model.gate.set()
        time.sleep(0.1)  # the model is done and the deadline over before the loop sees either
        with pytest.raises(RequestError, match="deadline"):
            await late.future
        await first.future

    assert run(scenario).batches == [["first"]]


def test_what_was_cancelled_never_runs_and_does_not_pile_up():
    async def scenario(model):
        first, sizes = await model.first(), set()
        for _ in range(500):  # a client that connects, asks and vanishes, over and over
            model.scheduler.cancel(model.ask("gone"))
            sizes.add(len(model.scheduler._heap))
        assert max(sizes) == 2 * 4 + 1  # and it is not gone through for each of them
        kept = model.ask("kept")
        model.gate.set()
        await first.future
        assert (await kept.future)["name"] == "kept"

    assert run(scenario, max_waiting=4).batches == [["first"], ["kept"]]


def test_whatever_the_model_raises_reaches_its_caller():
    async def scenario(model):
        model.scheduler._run = lambda batch: 1 / 0
        with pytest.raises(ZeroDivisionError):
            await model.ask("a").future
        with pytest.raises(ZeroDivisionError):
            await model.ask("b").future

    run(scenario)


def test_a_prediction_waits_behind_what_robots_ask_for():
    class Policy:
        def batch_key(self, observation):
            return observation["embodiment"]

    async def scenario():
        arm = {"embodiment": "arm"}
        first, second = (make_job(Policy(), "infer", (arm,), 100.0) for _ in range(2))
        arrow, timed = make_job(Policy(), "predict", (arm,), 100.0), make_job(Policy(), "infer", (arm,), 100.0, 50.0)
        assert not first.background
        assert first.key == second.key == "arm"
        assert arrow.background
        assert arrow.key not in ("arm", make_job(Policy(), "predict", (arm,), 100.0).key)
        assert 100.0 < first.order < arrow.order
        assert timed.order == timed.expires == pytest.approx(100.05)
        assert first.expires is None
        assert make_job(object(), "infer", (arm,), 100.0).key != make_job(object(), "infer", (arm,), 100.0).key

    asyncio.run(scenario())


def test_what_never_started_has_stopped():
    assert Scheduler(lambda batch: None, SchedulerConfig()).stop(1)
