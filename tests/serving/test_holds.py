"""Operators' holds: begun by any POST, ended one by one, kept over a restart."""

import json
import os
import shutil
import socket
import threading
import time

import pytest

from mmseq.errors import ServeError
from mmseq.serving import ReplayPolicy, RequestError, codec
from mmseq.serving.holds import MOST, NO_REASON, Holds, reason_of
from mmseq.serving.net import media
from support.wire import ask, dial, http


@pytest.fixture
def server(start, policy):
    return start(policy)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", NO_REASON),
        (b'{"reason": "a person"}', "a person"),
        (b'{"reason": null}', NO_REASON),
        (b'{"reason": 5}', "5"),
        (b'{"reason": " \\n "}', NO_REASON),
        (b"STOP NOW", "STOP NOW"),
        (b"reason=fire", "reason=fire"),
        (b"[]", "[]"),
        (b"{", "{"),
        (b"\xff", "\ufffd"),
        (b"[" * 100_000, "[" * 500),
        (b'{"reason": "x\\n\\u001b[2Kreleased \\ud800"}', "x  [2Kreleased"),
    ],
)
def test_every_body_holds(server, observation, body, reason):
    reply = http(server, "POST", "/v1/hold", content=body)
    assert (reply.status_code, reply.json()["held"], reply.json()["reason"]) == (200, True, reason)
    assert reason_of(body) == reason
    with dial(server) as s:
        s.recv()
        assert ask(s, observation)["reason"] == reason


def test_a_body_that_is_too_large_or_never_comes_holds(start, policy):
    server = start(policy, limits=codec.Limits(max_message_bytes=10))
    assert http(server, "POST", "/v1/hold", content=b"x" * 11).json()["reason"] == NO_REASON
    http(server, "DELETE", "/v1/hold")
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /v1/hold HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
        until = time.monotonic() + 5
        while http(server, "GET", "/v1/status").json()["held"] is None:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_robots_stay_held_until_the_last_hold_ends(server, observation):
    first = http(server, "POST", "/v1/hold", json={"reason": "a person in the cell"}).json()
    second = http(server, "POST", "/v1/hold", json={"reason": "a loose camera"}).json()
    assert second["holds"] == [
        {"id": first["id"], "reason": "a person in the cell"},
        {"id": second["id"], "reason": "a loose camera"},
    ]
    several = http(server, "DELETE", "/v1/hold")
    error = several.json()["error"]
    assert (several.status_code, error["code"], error["holds"]) == (409, "ambiguous", second["holds"])
    for words in ("a person in the cell", first["id"], "?id=", "?all=true"):
        assert words in error["message"]
    for query, status in (("id=nope", 404), ("ids=" + first["id"], 400), ("all=yes", 400)):
        assert http(server, "DELETE", f"/v1/hold?{query}").status_code == status
    ended = http(server, "DELETE", f"/v1/hold?id={second['id']}").json()
    assert ended == {"held": True, "holds": first["holds"], "sessions": 0}
    with dial(server) as s:
        s.recv()
        assert ask(s, observation)["reason"] == "a person in the cell"
        assert http(server, "DELETE", "/v1/hold").json() == {"held": False, "holds": [], "sessions": 1}
        assert "actions" in ask(s, observation)
    for _ in range(3):
        http(server, "POST", "/v1/hold")
    assert len(http(server, "GET", "/v1/status").json()["holds"]) == 3
    assert http(server, "DELETE", "/v1/hold?all=true").json()["held"] is False


def test_any_number_of_holds():
    holds = Holds()
    ids = {holds.begin(f"reason {i}") for i in range(MOST + 5)}
    assert len(ids) == len(holds.reasons) == MOST + 1
    assert str(holds) == "reason 0; reason 1; reason 2; and 998 more"
    holds.end(every=True)
    assert not holds.reasons


def test_a_prediction_that_is_packed_while_a_hold_begins_does_not_leave(start, episode, embodiment, monkeypatch):
    packing, go_on = threading.Event(), threading.Event()
    as_files = media.as_files

    def slow(*arguments, **options):
        packing.set()
        assert go_on.wait(5)
        return as_files(*arguments, **options)

    monkeypatch.setattr(media, "as_files", slow)
    server, replies = start(ReplayPolicy(episode, embodiment, horizon=8)), []
    body = {"arrow": "image -> action[8], image.front", "observation": {}, "as": "png"}
    asking = threading.Thread(target=lambda: replies.append(http(server, "POST", "/v1/predict", json=body)))
    asking.start()
    assert packing.wait(5)
    http(server, "POST", "/v1/hold")
    http(server, "DELETE", "/v1/hold")
    go_on.set()
    asking.join()
    assert (replies[0].status_code, "prediction" in replies[0].json()) == (423, False)


class TestFile:
    def test_a_hold_outlives_the_process(self, start, policy, observation, tmp_path):
        path = tmp_path / "holds.json"
        server = start(policy, hold_file=str(path))
        begun = http(server, "POST", "/v1/hold", json={"reason": "a person"}).json()
        written = path.read_bytes()  # as it was when the answer came: the process may have been killed then
        server.stop()
        path.write_bytes(written)
        server = start(policy, hold_file=str(path))
        with dial(server) as s:
            s.recv()
            assert ask(s, observation)["reason"] == "a person"
        assert http(server, "DELETE", f"/v1/hold?id={begun['id']}").json()["held"] is False
        assert json.loads(path.read_text()) == {"holds": {}}

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"holds": []}', b'{"holds": {"a": 5}}', b"\xff"])
    def test_what_cannot_be_read_is_a_hold(self, tmp_path, content):
        path = tmp_path / "holds.json"
        path.write_bytes(content)
        holds = Holds(path)
        assert "cannot be read" in str(holds)
        assert path.read_bytes() == content
        holds.end()
        assert json.loads(path.read_text()) == {"holds": {}}

    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
    def test_what_is_no_file_is_refused(self, tmp_path, make):
        make(tmp_path / "holds.json")
        with pytest.raises(ServeError, match="is no file"):
            Holds(tmp_path / "holds.json")

    def test_a_file_belongs_to_one_server(self, start, policy, tmp_path):
        path = tmp_path / "holds.json"
        server = start(policy, hold_file=str(path))
        with pytest.raises(ServeError, match=r"holds.json is used by another server"):
            Holds(path)
        server.stop()
        Holds(path)

    def test_a_link_stays_one_and_names_stay_in_their_line(self, tmp_path):
        path, link = tmp_path / "volume" / "holds.json", tmp_path / "holds.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"holds": {"a\nb": "c\nd"}}))
        link.symlink_to(path)
        holds = Holds(link)
        assert holds.reasons == {"a b": "c d"}
        holds.end()
        assert link.is_symlink()
        assert json.loads(path.read_text()) == {"holds": {}}

    def test_a_file_that_cannot_be_written_is_told_and_the_hold_is_in_force(self, start, policy, tmp_path):
        folder = tmp_path / "state"
        with pytest.raises(ServeError, match="cannot be written"):
            Holds(folder / "holds.json")
        folder.mkdir()
        server = start(policy, hold_file=str(folder / "holds.json"))
        shutil.rmtree(folder)
        reply = http(server, "POST", "/v1/hold").json()
        assert (reply["held"], "cannot be written" in reply["warning"]) == (True, True)

    def test_ends_and_reasons_are_written(self, tmp_path):
        path = tmp_path / "holds.json"
        written = lambda: json.loads(path.read_text())["holds"]
        holds = Holds(path)
        a, b = holds.begin("a"), holds.begin("b")
        holds.begin("another", a)
        assert written() == {a: "another", b: "b"}
        with pytest.raises(RequestError):
            holds.end()
        holds.end(b)
        assert written() == {a: "another"}
        assert {p.name for p in tmp_path.iterdir()} == {"holds.json", "holds.json.lock"}
        holds.close()
        assert Holds(path).reasons == {a: "another"}
