import os
import signal
import threading

import pytest

from diffusers_pisdm.utils import stopping
from diffusers_pisdm.utils.stopping import StopSignals


@pytest.fixture(autouse=True)
def usual_signals():
    """Whoever runs the tests, say nohup, may ignore some."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", stopping.STOP_SIGNALS)
def test_a_signal_is_noted_and_told(name, capsys):
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
        os.kill(os.getpid(), number)  # a launcher passes on what the terminal has sent
        assert signals.received == number
    assert name in capsys.readouterr().out
    assert signal.getsignal(number) == before


def test_the_second_one_has_its_usual_effect(monkeypatch):
    monkeypatch.setattr(stopping, "SAME_REQUEST_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_what_a_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_signals_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with StopSignals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
