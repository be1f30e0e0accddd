import pytest
import torch

from diffusers_pisdm.ops import causal_conv, conv, scan, selective_scan
from diffusers_pisdm.ops.common.backends import force_backends, forced_backend


X = torch.ones(1, 2, 3)


def run_scan(**options):
    return selective_scan(X, X, -torch.ones(2, 4), torch.ones(1, 4, 3), torch.ones(1, 4, 3), **options)


def run_conv(**options):
    return causal_conv(X, torch.ones(2, 3), **options)


OPERATORS = {"selective_scan": run_scan, "causal_conv": run_conv}


@pytest.fixture
def calls(monkeypatch):
    """The backends that run, of both operators; none of them computes anything."""
    calls = []
    for dispatch in (scan.dispatch, conv.dispatch):
        functions = {name: lambda x, *_, name=name: calls.append(name) or x for name in dispatch._FUNCTIONS}
        monkeypatch.setattr(dispatch, "_FUNCTIONS", functions)
        monkeypatch.setattr(dispatch, "choose_backend", lambda *_: "numba")
    return calls


@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_is_the_forced_backend_inside_only(operator, calls):
    run = OPERATORS[operator]
    run()
    with force_backends(**{operator: "torch"}):
        run()
        run(backend="numba")  # named, not chosen
    run()
    assert calls == ["numba", "torch", "numba", "numba"]


def test_an_operator_that_is_not_named_stays_free(calls):
    with force_backends(selective_scan="reference"):
        run_scan()
        run_conv()
    assert calls == ["reference", "numba"]


def test_what_was_forced_outside_comes_back_even_after_an_error():
    with force_backends(selective_scan="torch", causal_conv="torch"):
        with pytest.raises(KeyError), force_backends(selective_scan="reference"):
            assert (forced_backend("selective_scan"), forced_backend("causal_conv")) == ("reference", "torch")
            raise KeyError
        assert forced_backend("selective_scan") == "torch"
    assert (forced_backend("selective_scan"), forced_backend("causal_conv")) == (None, None)


def test_a_forced_backend_need_not_be_installed(calls, monkeypatch):
    """On fake tensors, no kernel runs."""
    monkeypatch.setattr("diffusers_pisdm.ops.common.backends.missing_backend", lambda name: "no x: pip install x")
    with force_backends(selective_scan="mamba_ssm"):
        run_scan()
    assert calls == ["mamba_ssm"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_unknown_names_are_refused(operator):
    with force_backends(**{operator: "nmba"}), pytest.raises(ValueError, match=r"`backend` must be .* not 'nmba'"):
        OPERATORS[operator]()
    with (
        pytest.raises(ValueError, match="forced for selective_scan, causal_conv, not for scan"),
        force_backends(scan="torch"),
    ):
        pass
