"""Where a model is trained: a site's own choice, else what the machine has."""

import subprocess
import sys

import pytest
import torch

from fedaccord import devices
from fedaccord.errors import AccordError


def test_a_site_without_an_accelerator_uses_the_cpu(monkeypatch):
    monkeypatch.delenv(devices.DEVICE, raising=False)
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has an accelerator")
    assert devices.device("va", "float32") == torch.device("cpu")


@pytest.mark.parametrize("named", ["cuda:99", "abacus", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_by_name(named, monkeypatch):
    monkeypatch.setenv(devices.DEVICE, named)
    with pytest.raises(AccordError, match=rf'{devices.DEVICE} = "{named}" cannot be used'):
        devices.device("va", "float32")


def test_small_models_run_on_one_thread_and_large_ones_on_all_cores():
    lines = (
        "import os, torch; from fedaccord import devices\n"
        "devices.settle(10); one = torch.get_num_threads()\n"
        "devices.settle(10**7); print(one, torch.get_num_threads() == os.cpu_count())"
    )
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True"]
