"""The wire format: the committed code is what protoc makes of link.proto, which explains it all."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedaccord import link_pb2

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "fedaccord" / "link.proto"
MADE = ["link_pb2.py", "link_pb2.pyi", "link_pb2_grpc.py"]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What protoc makes today, by the command of docs/link.md."""
    folder = tmp_path_factory.mktemp("protoc")
    outs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    words = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outs, "fedaccord/link.proto"]
    subprocess.run(words, cwd=ROOT, check=True)
    return folder / "fedaccord"


@pytest.mark.parametrize("name", MADE)
def test_generated_code_is_what_protoc_makes_of_the_committed_definition(
    fresh: Path, name: str
) -> None:
    assert (fresh / name).read_bytes() == (ROOT / "fedaccord" / name).read_bytes()


def test_each_message_and_each_call_is_explained_where_it_is_defined() -> None:
    lines = PROTO.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s*(rpc|message|service) ", line) and not line.startswith("}"):
            assert lines[number - 1].strip().startswith("//"), line


def test_field_numbers_are_those_that_were_first_given() -> None:
    """Sites and coordinator may have different versions: a number keeps its meaning for ever."""
    found = {
        message.name: {field.name: field.number for field in message.fields}
        for message in link_pb2.DESCRIPTOR.message_types_by_name.values()
    }
    assert found == {
        "Sealed": {
            "text": 1,
            "signature": 2,
            "session": 3,
            "objects": 4,
            "shown": 5,
            "hello": 6,
        },
        "Object": {"id": 1, "size": 2},
        "Shown": {"text": 1, "signature": 2},
        "Session": {"id": 1},
        "Wanted": {"session": 1, "message": 2, "ids": 3},
        "Piece": {"id": 1, "data": 2},
        "Pieces": {"session": 1, "message": 2, "pieces": 3},
        "Lacking": {"ids": 1, "known": 2},
        "Receipt": {"whole": 1},
        "Pulse": {"time": 1},
    }
