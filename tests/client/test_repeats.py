from mmseq_client.repeats import Repeats


def test_what_repeats_is_said_now_and_then():
    said = Repeats()
    assert said.is_news("hold", 0.0, "late")
    assert not said.is_news("hold", 9.0, "late")
    assert said.is_news("hold", 9.0, "gone")
    assert said.is_news("blind", 9.0, "gone")
    assert not said.is_news("hold", 18.5, "gone")
    assert said.is_news("hold", 19.0, "gone")
    assert said.is_news("hold", 1.0, "gone")  # the clock went back


def test_a_flood_of_kinds_is_not_remembered_for_ever():
    said = Repeats(every_s=5)
    assert all(said.is_news(str(i), 0) for i in range(64))
    assert not said.is_news("one more", 4)
    assert said.is_news("one more", 5)
    assert len(said._said) == 1
