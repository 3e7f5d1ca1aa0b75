"""Memory of both ends while a large message is carried, as benchmarks.link_memory measures it."""

import json
import sys

import pytest

from benchmarks import link_memory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in /proc")
def test_neither_end_needs_two_and_a_half_times_the_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    link_memory.main(["--mb", "200", "--arrays", "1", "--json"])
    [row] = json.loads(capsys.readouterr().out)
    coordinator, site = row["growth"]
    assert 1.9 < coordinator < link_memory.LARGEST  # model and reply, at least
    assert 0.9 < site < link_memory.LARGEST
