"""Stop requests: deferred in the main thread, left to Python elsewhere, and never left behind."""

import signal
import threading

import pytest

from mogeo.dpo.graceful_stop import Interrupted, stop_requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_question_the_second_stops(number):
    before = signal.getsignal(number)
    with stop_requests(deferred=True) as requested:
        assert not requested()
        signal.raise_signal(number)
        assert requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_undeferred_requests_are_pythons():
    with stop_requests(deferred=False) as requested:
        assert not requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_worker_thread_cannot_and_does_not_touch_signals():
    seen = []

    def work():
        with stop_requests(deferred=True) as requested:
            seen.append((requested(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGINT))]


def test_an_interruption_knows_where_it_stopped(tmp_path):
    stop = Interrupted(7, tmp_path)
    assert (stop.step, stop.output) == (7, tmp_path)
    assert "step 7" in str(stop)
