"""Async and batch rewards: calls in flight, limits on the clock, a judge over HTTP that is slow, fails or hangs."""

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from verifiers import own_verifier

from rewards import Grade, GraderError

JUDGE = """
    import asyncio, json, urllib.request

    def request(url, completion):
        return json.load(urllib.request.urlopen(url, json.dumps(completion).encode(), timeout=60))

    async def reward(completion, gold):
        for attempt in range(3):
            try:
                return await asyncio.to_thread(request, gold, completion)
            except OSError:
                if attempt == 2:
                    raise
                await asyncio.sleep(0.05 * 2**attempt)
    """


class Judge(BaseHTTPRequestHandler):
    """A text with "right" in it scores 1. "slow" takes a second, "flaky" fails twice, "broken" always, "dead" waits."""

    lock, tries, now, most = threading.Lock(), {}, 0, 0

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Judge.lock:
            Judge.now += 1
            Judge.most = max(Judge.most, Judge.now)
            Judge.tries[text] = Judge.tries.get(text, 0) + 1
        time.sleep(30 if "dead" in text else 1.0 if "slow" in text else 0.3)
        with Judge.lock:
            Judge.now -= 1
        failed = "broken" in text or ("flaky" in text and Judge.tries[text] < 3)
        self.send_response(500 if failed else 200)
        self.end_headers()
        self.wfile.write(json.dumps(float("right" in text)).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Judge.tries, Judge.now, Judge.most = {}, 0, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("workers", [1, 4])
def test_a_judge_gets_as_many_requests_at_once_as_set(tmp_path, url, workers):
    """64 requests of 0.3 s take 19 s one after the other. Two are slow, two fail twice before they succeed."""
    kinds = ["right", "wrong", "slow right", "flaky right"]
    texts = [f"{kinds[min(n, 3)] if n < 4 else kinds[n % 2]} {n}" for n in range(64)]
    with own_verifier(tmp_path, JUDGE, workers=workers, concurrency=16) as verifier:
        start = time.monotonic()
        grades = verifier.collect([verifier.submit(text, url) for text in texts])
        took = time.monotonic() - start
    assert [grade.score for grade in grades] == [float("right" in text) for text in texts]
    assert 8 < Judge.most <= 16 and took < 15
    assert Judge.tries["flaky right 3"] == 3 and sum(Judge.tries.values()) == 66


@pytest.mark.promise("a judge that fails, or does not reply within reward_timeout_s")
def test_a_judge_that_keeps_failing_ends_the_grading(tmp_path, url):
    with own_verifier(tmp_path, JUDGE, concurrency=4) as verifier:
        tickets = [verifier.submit(text, url) for text in ("right", "broken")]
        with pytest.raises(GraderError, match=r"my_rewards.py:\d+: HTTPError: HTTP Error 500: .*begins '"):
            verifier.collect(tickets)
    assert Judge.tries["broken"] == 3


@pytest.mark.promise("a judge that fails, or does not reply within reward_timeout_s")
def test_a_judge_that_does_not_reply_ends_the_grading(tmp_path, url):
    with own_verifier(tmp_path, JUDGE, concurrency=4, reward_timeout_s=1.5) as verifier:
        start = time.monotonic()
        with pytest.raises(GraderError, match=r"my_rewards.py:reward did not return within reward_timeout_s 1.5; "):
            verifier.grade("dead", url)
        assert 1.5 <= time.monotonic() - start < 10


def test_a_batch_reward_gets_lists_and_returns_one_score_each(tmp_path):
    body = """
        import time
        def reward(completions, answers, rows, response_tokens):
            time.sleep(0.2)
            return [{"score": int(c == a), "size": len(completions), "level": row["level"] + tokens}
                    for c, a, row, tokens in zip(completions, answers, rows, response_tokens)]
        """
    with own_verifier(tmp_path, body, concurrency=8) as verifier:
        abouts = [{"problem": {"row": {"level": n}}, "response_tokens": 100} for n in range(20)]
        tickets = [verifier.submit(str(n), str(n % 7), about) for n, about in enumerate(abouts)]
        grades = verifier.collect(tickets)
    assert [grade.score for grade in grades] == [1.0] * 7 + [0.0] * 13
    assert [grade.parts["level"] for grade in grades] == [100.0 + n for n in range(20)]
    assert max(grade.parts["size"] for grade in grades) == 8


def test_an_async_batch_reward(tmp_path):
    body = """
        import asyncio
        async def reward(completions):
            await asyncio.sleep(0)
            return [len(text) for text in completions]
        """
    with own_verifier(tmp_path, body, concurrency=4) as verifier:
        grades = verifier.collect([verifier.submit("x" * n, "") for n in range(6)])
    assert [grade.score for grade in grades] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        ("[1.0] * (len(completions) + 1)", r"TypeError: returned \d scores for \d completions?"),
        ("[None] * len(completions)", "TypeError: returned NoneType None as score"),
        ("1.0", "TypeError"),
        ("1 / 0", r"my_rewards.py:2: ZeroDivisionError"),
    ],
)
def test_a_batch_reward_that_fails_ends_the_grading(tmp_path, returns, message):
    with own_verifier(tmp_path, f"def reward(completions):\n    return {returns}\n", concurrency=4) as verifier:
        tickets = [verifier.submit("abc", "") for _ in range(4)]
        with pytest.raises(GraderError) as error:
            verifier.collect(tickets)
    assert re.search(message, str(error.value)) and "begins 'abc'" in str(error.value)


@pytest.mark.slow
def test_one_item_that_hangs_or_dies_costs_no_other_of_its_call(tmp_path):
    body = """
        import os
        async def reward(completion):
            if completion == "leave":
                os._exit(3)
            while completion == "hang":
                pass
            return 1
        """
    with own_verifier(tmp_path, body, timeout_s=0.3, concurrency=4) as verifier:
        items = ["fine", "a", "hang", "b", "leave", "c"]
        grades = verifier.collect([verifier.submit(item, "") for item in items])
    reasons = {"hang": "timeout", "leave": "crash"}
    assert [grade.reason for grade in grades] == [reasons.get(item, "match") for item in items]
    assert grades[2] == Grade(False, None, "timeout", 0.0)


def test_a_reward_may_start_an_event_loop_of_its_own(tmp_path):
    body = "import asyncio\ndef reward(completion):\n    return asyncio.run(asyncio.sleep(0, 0.5))\n"
    with own_verifier(tmp_path, body) as verifier:
        assert verifier.grade("", "").score == 0.5
