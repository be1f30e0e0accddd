import json
import sys

import pytest
import torch

from diffusers_pisdm.ops import causal_conv, conv, scan, selective_scan, use_hub_kernels
from diffusers_pisdm.ops.common import backends
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


HUB_KERNEL = """
def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    return u + 1

def causal_conv1d_fn(x, weight, bias=None, activation=None):
    return x + 2
"""
ON_THE_HUB = {"mamba_ssm": ("kernels-community/mamba-ssm", 4), "causal_conv1d": ("kernels-community/causal-conv1d", 1)}


@pytest.fixture
def hub_kernels(tmp_path, monkeypatch):
    """Makes the `kernels` package find kernels in folders laid out as on the Hub."""

    def make(backend, file="__init__.py"):
        repo_id, version = ON_THE_HUB[backend]
        folder = tmp_path / backend / "build" / "torch-cpu"
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(HUB_KERNEL)
        if "/" in file:
            (folder / "__init__.py").write_text("from .ops import selective_scan_interface\n")
        name = repo_id.rpartition("/")[2]
        metadata = {"name": name, "id": f"{tmp_path.name}_{backend}", "version": version, "license": "Apache-2.0"}
        metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
        (folder / "metadata.json").write_text(json.dumps(metadata))
        places.append(f"{repo_id}={tmp_path / backend}")
        monkeypatch.setenv("LOCAL_KERNELS", ":".join(places))

    places = []
    monkeypatch.setattr(backends, "_from_hub", {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    backends.missing_backend.cache_clear()
    yield make
    backends.missing_backend.cache_clear()


def test_kernels_of_the_hub_become_backends(hub_kernels):
    hub_kernels("mamba_ssm", "ops/selective_scan_interface.py")
    hub_kernels("causal_conv1d")
    with pytest.raises(ImportError, match="pip install mamba-ssm"):
        run_scan(backend="mamba_ssm")
    use_hub_kernels()
    assert torch.equal(run_scan(backend="mamba_ssm"), X + 1)
    assert torch.equal(run_conv(backend="causal_conv1d"), X + 2)


def test_one_kernel_of_the_hub_leaves_the_other(hub_kernels):
    hub_kernels("causal_conv1d")
    use_hub_kernels("causal_conv1d")
    assert torch.equal(run_conv(backend="causal_conv1d"), X + 2)
    with pytest.raises(ImportError, match="pip install mamba-ssm"):
        run_scan(backend="mamba_ssm")


def test_kernels_that_cannot_be_had_are_refused(hub_kernels, monkeypatch):
    with pytest.raises(ValueError, match="mamba_ssm, causal_conv1d, not for triton"):
        use_hub_kernels("triton")
    hub_kernels("mamba_ssm")  # another layout than the Hub's
    with pytest.raises(ImportError, match=r"kernels-community/mamba-ssm cannot be used.*ops.*our own kernels"):
        use_hub_kernels("mamba_ssm")
    with pytest.raises(ImportError, match="kernels-community/causal-conv1d cannot be used"):  # nor a network
        use_hub_kernels("causal_conv1d")
    with pytest.raises(ImportError, match="pip install causal-conv1d"):
        run_conv(backend="causal_conv1d")
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="pip install kernels"):
        use_hub_kernels()


@pytest.mark.parametrize("operator", OPERATORS)
def test_unknown_names_are_refused(operator):
    with force_backends(**{operator: "nmba"}), pytest.raises(ValueError, match=r"`backend` must be .* not 'nmba'"):
        OPERATORS[operator]()
    with (
        pytest.raises(ValueError, match="forced for selective_scan, causal_conv, modulation, not for scan"),
        force_backends(scan="torch"),
    ):
        pass
