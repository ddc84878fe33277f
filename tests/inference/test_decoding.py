"""Decoding: the cache changes nothing, company changes nothing, and what comes out always has its shape."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmseq.episode import Episode
from mmseq.errors import ConfigError, ModelError, TaskError
from mmseq.inference import decoding
from mmseq.inference.compiled import CompiledExtend
from mmseq.inference.decoding import MAX_TEMPERATURE, MAX_TEXT_TOKENS, MIN_TEMPERATURE, Decoder, Request, _Run
from mmseq.inference.prefixes import Prefixes
from mmseq.packing import collate
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens

ARROWS = [
    "text, image, proprio -> action[3]",
    "image, action[3] -> image@+3",
    "video[2] -> text",
    "text, image, proprio -> plan, image@+2, action[3]",
    "text, (image, proprio -> action[1]) * 3",
    "text, image -> progress, success",
    "demo[2], image -> video[2]",
    "-> text",
]


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def request(model, episode=0, now=4, text=None, **options):
    texts = {"text": text} if text else None
    return Request(EpisodeTokens(tiny.episode(episode), model.tokenizers, texts=texts), now, **options)


@pytest.fixture
def seen(monkeypatch) -> list:
    """(range, logits) of every token that is decoded."""
    found = []
    original = _Run._logits

    def logits(self, hidden, range_name):
        found.append((range_name, original(self, hidden, range_name)))
        return found[-1][1]

    monkeypatch.setattr(_Run, "_logits", logits)
    return found


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("arrow", ARROWS)
def test_the_cache_gives_the_logits_of_a_full_forward_pass(arrow, merge, seen):
    robot = tiny.embodiment("two", ("front", "wrist"))
    bundle = tiny.tokenizers((robot,), merge=merge)
    decodes_as_it_forwards(arrow, bundle, tiny.episode(1, robot=robot), seen)


def test_a_wide_robots_long_chunk_is_the_same_cached_packed_and_guessed(seen):
    names = tuple(f"joint_{i}" for i in range(26))
    axes = replace(tiny.axes("a" * 26), names=names)
    robot = replace(tiny.embodiment("wide"), proprio=axes, action=axes, grippers=())
    rng, plain = np.random.default_rng(0), tiny.episode(1, length=40)
    moves = {stream: rng.uniform(-1, 1, (40, 26)).astype(np.float32) for stream in ("proprio", "action")}
    arrays = {"image.front": plain["image.front"], **moves}
    episode = Episode.from_arrays("wide", 20.0, arrays, texts=["go"], embodiment="wide")
    arrow, bundle = "text, image, proprio -> action[32]", tiny.tokenizers((robot,))
    decodes_as_it_forwards(arrow, bundle, episode, seen)
    assert len(seen) == 32 * 26
    asked = [Request(EpisodeTokens(episode, bundle), 4, prefix=np.full((2, 26), 7))]
    model, task = tiny.model(bundle), Task.parse(arrow)
    (plain_chunk,), (guessed,) = (Decoder(model, speculate=s).decode(task, asked) for s in (False, True))
    np.testing.assert_array_equal(guessed[-1].codes, plain_chunk[-1].codes)


def decodes_as_it_forwards(arrow, bundle, episode, seen):
    model = tiny.model(bundle)
    task, builder = Task.parse(arrow), bundle.builder()
    tokens = EpisodeTokens(episode, bundle)
    decoder = Decoder(model)
    decoded = decoder.decode(task, [Request(tokens, 4)])[0]
    # the same sequence at once: what was given, and what was decoded where it was predicted
    left = list(decoded)
    original = builder.codes
    builder.codes = lambda segment, *rest: left.pop(0).codes if segment.predicted else original(segment, *rest)
    sequence = builder.build(task, tokens, 4)
    builder.codes = original
    assert decoder.stats.passes == len(seen)  # one for each token
    assert decoder.stats.tokens == len(sequence) - 2  # each once, and neither <eos> nor what stands before it
    before = builder.build(task, tokens, 6)
    may_copy = dict(zip(sequence.input.copy_at, sequence.input.copy_ids))
    with torch.inference_mode():
        hidden = model.hidden(collate([before, sequence], bundle.vocabulary))[len(before) :]
        assert len(seen) == len(sequence.target_at)
        for at, (name, found) in zip(sequence.target_at, seen):
            ids = bundle.vocabulary.ranges[name]
            full = hidden[at] @ model.transformer.output_rows(ids.start, ids.stop, model.transformer.code_vectors()).t()
            if at in may_copy:
                full[may_copy[at] - ids.start] += model.transformer.copy_gate(hidden[at])[0]
            torch.testing.assert_close(found[0], full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf"), 1e-300])
def test_a_temperature_that_cannot_be_is_refused(model, temperature):
    with pytest.raises(ConfigError, match="temperature is"):
        Decoder(model, temperature=temperature)


@pytest.mark.parametrize(("end", "beyond"), [(MIN_TEMPERATURE, 0.0), (MAX_TEMPERATURE, np.inf)])
def test_the_ends_of_what_a_temperature_may_be(model, end, beyond):
    assert Decoder(model, temperature=end).temperature == end
    with pytest.raises(ConfigError, match="temperature is"):
        Decoder(model, temperature=float(np.nextafter(end, beyond)))


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_that_cannot_be_is_refused(model, seed):
    with pytest.raises(ConfigError, match="seed is"):
        Decoder(model).decode(Task.parse("-> progress"), [request(model, seed=seed)])
    Decoder(model).decode(Task.parse("-> progress"), [request(model, seed=(1 << 63) - 1)])


def test_a_request_may_be_so_long_and_no_longer(model):
    """In all, with what it predicts: a text counts as the longest that it may become."""
    tokens = request(model).tokens
    for arrow, text in (("text, image, proprio -> action[3]", 0), ("image -> text", MAX_TEXT_TOKENS)):
        task, asked = Task.parse(arrow), [Request(tokens, 4)]
        length = len(model.tokenizers.builder().build(task, tokens, 4))
        length += text and text - len(tokens.codes("text", 4, 5))
        assert Decoder(model, max_tokens=length).decode(task, asked)
        with pytest.raises(TaskError, match=f"takes {length} tokens, at most {length - 1} are decoded at once"):
            Decoder(model, max_tokens=length - 1).decode(task, asked)


def test_the_best_code_is_the_median_bin_the_medoid_of_frames_and_else_the_likeliest(model):
    run = _Run(Decoder(model), [], [], None)  # type: ignore[arg-type]
    share = torch.tensor([[0.3, 0.05, 0.25, 0.4], [0.1, 0.1, 0.1, 0.7]])
    assert run._choose(share.log(), "action", []) == [2, 3]
    assert run._choose(share.log(), "text", []) == [3, 3]
    features = torch.from_numpy(model.tokenizers.vision.code_features())
    share = torch.rand(4, len(features), generator=torch.Generator().manual_seed(0)) ** 8
    expected = (share / share.sum(1, keepdim=True) @ features @ features.t()).argmax(1).tolist()
    assert run._choose(share.log(), "vision", []) == expected
    assert run._choose(share.log(), "text", []) != expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("arrow", ARROWS)
def test_a_batch_equals_its_requests_one_by_one(model, arrow, temperature):
    texts = ["go", "open the window, then close the red drawer and turn the dial", "press"]
    requests = [request(model, i, 4 + i, text, seed=10 + i) for i, text in enumerate(texts)]
    task = Task.parse(arrow)
    together = Decoder(model, temperature=temperature).decode(task, requests)
    for one, out in zip(requests, together):
        alone = Decoder(model, temperature=temperature).decode(task, [one])[0]
        assert len(alone) == len(out)
        for a, b in zip(alone, out):
            assert np.array_equal(a.codes, b.codes)
            if a.expectation is not None:
                assert a.expectation == pytest.approx(b.expectation, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_action_prefix_is_kept_exactly_whatever_the_company(model, temperature):
    rng = np.random.default_rng(0)
    task = Task.parse("text, image, proprio -> action[6]")
    prefixes = [None, rng.integers(0, 32, (2, 4)), rng.integers(0, 32, (5, 4))]
    requests = [request(model, i, 4, prefix=p, seed=i) for i, p in enumerate(prefixes)]
    together = [out[0].codes for out in Decoder(model, temperature=temperature).decode(task, requests)]
    for one, prefix, codes in zip(requests, prefixes, together):
        assert codes.shape == (6, 4)
        if prefix is not None:
            assert np.array_equal(codes[: len(prefix)], prefix)
        alone = Decoder(model, temperature=temperature).decode(task, [one])[0][0].codes
        assert np.array_equal(alone, codes)


def test_a_prefix_belongs_to_the_first_chunk_only(model):
    prefix = np.full((1, 4), 31)
    out = Decoder(model).decode(Task.parse("(image -> action[2]) * 2"), [request(model, prefix=prefix)])[0]
    free = Decoder(model).decode(Task.parse("(image -> action[2]) * 2"), [request(model)])[0]
    assert np.array_equal(out[0].codes[:1], prefix)
    assert out[1].codes.shape == free[1].codes.shape == (2, 4)


@pytest.mark.parametrize("prefix", [np.zeros((3, 4)), np.zeros((1, 3)), np.zeros(4)])
def test_a_prefix_that_does_not_fit_is_refused(model, prefix):
    with pytest.raises(TaskError, match="prefix"):
        Decoder(model).decode(Task.parse("image -> action[3]"), [request(model, prefix=prefix.astype(int))])


def test_of_10000_sampled_chunks_none_is_malformed(model):
    task = Task.parse("proprio -> action[2], progress")
    decoder = Decoder(model, temperature=1.0)
    tokens = request(model).tokens
    bins = model.tokenizers["action"].size
    seen = set()
    for start in range(0, 10_000, 2500):
        for chunk, progress in decoder.decode(task, [Request(tokens, 4, seed=start + i) for i in range(2500)]):
            assert chunk.codes.shape == (2, 4)
            assert chunk.codes.min() >= 0
            assert chunk.codes.max() < bins
            assert progress.codes.shape == (1,)
            seen.update(chunk.codes.ravel().tolist())
    assert len(seen) == bins  # it is sampling, and every bin can come


def test_text_ends(model):
    for out in Decoder(model, temperature=1.0).decode(
        Task.parse("image -> text"), [request(model, seed=i) for i in range(4)]
    ):
        codes = out[0].codes
        assert 1 <= len(codes) <= MAX_TEXT_TOKENS
        assert codes[-1] == model.tokenizers.text.end
        assert (codes[:-1] != model.tokenizers.text.end).all()


def test_requests_that_cannot_share_a_batch_are_refused():
    bundle = tiny.tokenizers((tiny.embodiment(), tiny.embodiment("two", ("front", "wrist"))))
    model = tiny.model(bundle)
    requests = [
        Request(EpisodeTokens(tiny.episode(0, robot=r), bundle), 0) for r in (tiny.embodiment(), tiny.embodiment("two"))
    ]
    with pytest.raises(TaskError, match="cannot share a batch"):
        Decoder(model).decode(Task.parse("image -> action[2]"), requests)
    assert Decoder(model).decode(Task.parse("image -> action[2]"), []) == []


POLICY = "text, image, proprio -> action[4]"


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_a_chunk_in_few_passes_has_the_logits_that_training_sees(model, passes, seen):
    """Each pass sees what is chosen and masks for the rest, as a sample whose chunk is visible up to there."""
    task, tokenizers, asked = Task.parse(POLICY), model.tokenizers, request(model)
    decoder = Decoder(model, passes=passes)
    chunk = decoder.decode(task, [asked])[0][-1].codes
    assert decoder.stats.passes == passes
    builder, done = tokenizers.builder(), 0
    original = builder.codes
    builder.codes = lambda segment, *rest: chunk if segment.predicted else original(segment, *rest)
    ids = tokenizers.vocabulary.ranges["action"]
    rows = model.transformer.output_rows(ids.start, ids.stop, model.transformer.code_vectors())
    for _, found in seen:
        sequence = builder.build(task, asked.tokens, 4, visible=done)
        with torch.inference_mode():
            hidden = model.hidden(collate([sequence], tokenizers.vocabulary))
        if passes == 1:
            assert decoder.stats.tokens == len(sequence) - 2  # no more masks than it needs
        at = sequence.target_at[done * 4 :][: len(found)]
        assert (found - hidden[at] @ rows.t()).abs().max() <= 1e-5
        done += len(found) // 4
    assert done == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("passes", [1, 2, 4, 9])
def test_chunks_in_few_passes_do_not_depend_on_their_company(model, passes, temperature):
    texts = ["go", "open the window, then close the red drawer and turn the dial", "press"]
    prefixes = [np.full((n, 4), 3 * n) for n in (0, 3, 1)]
    requests = [request(model, i, 4 + i, t, seed=i, prefix=p) for i, (t, p) in enumerate(zip(texts, prefixes))]
    decoder = Decoder(model, temperature=temperature, passes=passes)
    for arrow in (POLICY, "text, image, proprio -> plan, image@+2, action[4]"):
        together = decoder.decode(Task.parse(arrow), requests)
        for one, prefix, out in zip(requests, prefixes, together):
            alone = decoder.decode(Task.parse(arrow), [one])[0]
            for a, b in zip(alone, out, strict=True):
                np.testing.assert_array_equal(a.codes, b.codes)
            np.testing.assert_array_equal(out[-1].codes[: len(prefix)], prefix)


def test_a_hidden_token_changes_nothing_that_the_chunk_predicts(model):
    builder, task, tokens = model.tokenizers.builder(), Task.parse(POLICY), request(model).tokens
    sequence = builder.build(task, tokens, 4, visible=1)
    chunk = sequence.segments[-1]
    assert list(sequence.masked) == list(range(chunk.start + 4, chunk.stop - 1))
    loss = lambda s: model.losses(collate([s], model.vocabulary))["action"][0].tolist()
    with torch.inference_mode():
        before = loss(sequence)
        for at in range(chunk.start, chunk.stop):
            ids = sequence.ids.copy()
            ids[at] += 1
            other = replace(sequence, input=replace(sequence.input, ids=ids))
            changed = np.array(loss(other)) != np.array(before)
            index = at - chunk.start  # its own loss changes, and that of what sees it
            expected = {index, *range(index + 1, 16)} if index < 4 else {index}
            assert set(changed.nonzero()[0]) == expected


def test_no_passes_are_refused(model):
    with pytest.raises(ConfigError, match="passes is 0"):
        Decoder(model, passes=0)


@pytest.mark.parametrize("passes", [None, 2])
def test_what_requests_begin_with_is_computed_once(model, passes):
    """The second control step computes neither embodiment nor text, and has the chunk of a fresh decoder."""
    task, prefixes = Task.parse(POLICY), Prefixes()
    long, short = "open the window, then close the red drawer", "go"
    for now, texts in ((4, [long]), (5, [long]), (6, [short, long]), (7, [long, short]), (8, [long, short])):
        requests = [request(model, i, now, t) for i, t in enumerate(texts)]
        decoder = Decoder(model, passes=passes, prefixes=prefixes)
        fresh = Decoder(model, passes=passes)
        found, expected = decoder.decode(task, requests), fresh.decode(task, requests)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a[-1].codes, b[-1].codes)
        assert decoder.stats.passes == fresh.stats.passes
        text = len(model.tokenizers.text.encode(long))
        if now == 5:
            assert fresh.stats.tokens - decoder.stats.tokens == 3 + text  # <bos> <embodiment> <text> and its pieces
        if now in (7, 8):
            assert decoder.stats.tokens < fresh.stats.tokens
    assert prefixes.made == 2  # caches: one for one request and one for two


def test_beginnings_that_were_not_used_for_long_are_forgotten(model):
    task, prefixes = Task.parse("text, image -> progress"), Prefixes(limit=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        Decoder(model, prefixes=prefixes).decode(task, [request(model, text=text)])
        assert len(prefixes._kept) <= 2
    decoder, fresh = Decoder(model, prefixes=prefixes), Decoder(model)
    for d in (decoder, fresh):
        d.decode(task, [request(model, text="a")])
    assert decoder.stats.tokens < fresh.stats.tokens


@pytest.mark.parametrize(
    ("how", "company"),
    [({}, []), ({"passes": 2}, []), ({"passes": 3}, []), ({"speculate": True}, []), ({"speculate": True}, [0])],
)
def test_passes_have_the_same_shapes_whatever_is_committed_where_they_are_compiled(model, how, company):
    """A shape of its own for each length of a prefix would be compiled anew in the middle of a motion."""
    task, prefixes, shapes = Task.parse(POLICY), Prefixes(), []

    def extend(x, *rest):
        shapes[-1].append(x.shape[1])
        return model.transformer.extend(x, *rest)

    for now, committed in enumerate([0, 0, 1, 2, 3]):  # in the first of them the text is not known yet
        shapes.append([])
        asked = [request(model, now=now, prefix=np.full((n, 4), 9)) for n in (committed, *company)]
        found = Decoder(model, prefixes=prefixes, extend=extend, **how).decode(task, asked)
        for mine, theirs in zip(found, Decoder(model, **how).decode(task, asked), strict=True):
            np.testing.assert_array_equal(mine[-1].codes, theirs[-1].codes)
    first, later = {s[0] for s in shapes[1:]}, {n for s in shapes for n in s[1:]}
    if how:
        assert len(first) == 1
    assert len(later) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"passes": 3}, {"speculate": True}])
def test_compiled_passes_decode_the_same(model, how):
    """What control steps repeat is compiled once it has come twice; every chunk stays as it was."""
    task, extend, prefixes = Task.parse(POLICY), CompiledExtend(model.transformer), Prefixes()
    for now in range(4, 9):
        for prefix in (None, np.full((1, 4), 9)):
            asked = [request(model, now=now, prefix=prefix)]
            found = Decoder(model, prefixes=prefixes, extend=extend, **how).decode(task, asked)
            expected = Decoder(model, **how).decode(task, asked)
            np.testing.assert_array_equal(found[0][-1].codes, expected[0][-1].codes)
    assert 1 < len(extend.compiled) <= 8


@pytest.mark.parametrize("window", [1, 5, 64])
@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
def test_a_guessed_and_checked_chunk_is_that_of_one_token_after_the_other(model, monkeypatch, right, window):
    """Whatever share of the guess is right, and however much of it is checked at once, also in a batch; when all of it
    is right and checked at once, two passes are enough."""
    monkeypatch.setattr(decoding, "CHECKED", window)
    monkeypatch.setattr(decoding, "LEAST_CHECKED", min(window, 16))
    task, rng = Task.parse(POLICY), np.random.default_rng(0)
    texts = ["go", "open the window, then close the red drawer", "press"]
    prefixes = [None, np.full((1, 4), 9), np.full((3, 4), 5)]
    requests = [request(model, i, 4 + i, t, prefix=p) for i, (t, p) in enumerate(zip(texts, prefixes))]
    reference = Decoder(model)
    expected = [out[-1].codes.reshape(-1) for out in reference.decode(task, requests)]
    choose, masked = _Run._choose_after, model.vocabulary.structure("<mask>")

    def guess(self, ahead, counts, stream):
        found = choose(self, ahead, counts, stream)
        for row, codes, n, line in zip(found, expected, counts, ahead):
            if masked in line.ids:  # a guess, not a check
                luck = rng.random(n) < right
                row[:n][luck] = codes[len(codes) - n :][luck]
        return found

    monkeypatch.setattr(_Run, "_choose_after", guess)
    monkeypatch.setattr(model, "tasks", {"policy": POLICY})
    monkeypatch.setattr(model, "parallel", ["policy"])
    decoder = Decoder(model, speculate=True)
    found = [out[-1].codes.reshape(-1) for out in decoder.decode(task, requests)]
    np.testing.assert_array_equal(found, expected)
    assert decoder.stats.passes <= reference.stats.passes
    if right == 1.0 and window == 64:
        assert decoder.stats.passes == 2


def test_without_masks_the_guess_is_that_the_committed_action_goes_on(model, monkeypatch):
    """No policy has to learn anything for it; the chunk stays that of one token after the other."""
    task = Task.parse(POLICY)
    requests = [request(model, i, 4 + i, prefix=p) for i, p in enumerate((None, np.full((2, 4), 5)))]
    reference = Decoder(model)
    expected = [out[-1].codes for out in reference.decode(task, requests)]
    choose, asked = _Run._choose_after, []

    def check(self, ahead, counts, stream):
        asked.append([model.vocabulary.decode("action", line.ids) for line in ahead])
        return choose(self, ahead, counts, stream)

    monkeypatch.setattr(_Run, "_choose_after", check)
    decoder = Decoder(model, speculate=True)
    found = [out[-1].codes for out in decoder.decode(task, requests)]
    np.testing.assert_array_equal(found, expected)
    assert decoder.stats.passes == len(asked) <= reference.stats.passes
    middle = model.vocabulary.ranges["action"].size // 2
    assert set(asked[0][0]) == {middle}
    assert set(asked[0][1]) == {5}
    assert [len(line) for line in asked[0]] == [15, 15]  # all at once: after the last one nothing is to be checked


def test_guessing_is_for_the_best_chunk_only(model):
    for more in ({"temperature": 1.0}, {"passes": 2}):
        with pytest.raises(ConfigError, match="temperature 0"):
            Decoder(model, speculate=True, **more)


def test_nothing_of_a_pass_that_failed_is_used_again(model, monkeypatch):
    task, prefixes = Task.parse(POLICY), Prefixes()
    Decoder(model, prefixes=prefixes).decode(task, [request(model)])
    assert prefixes._kept
    for known in (prefixes, None):
        decoder = Decoder(model, prefixes=known)
        monkeypatch.setattr(decoder, "_decode", lambda *_: (_ for _ in ()).throw(ModelError("not finite")))
        with pytest.raises(ModelError, match="not finite"):
            decoder.decode(task, [request(model)])
    assert not prefixes._kept
