"""Pieces of objects as gRPC messages: what objects.py cuts, packed for the link and unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedaccord import link_pb2


def packed(bundle: list[tuple[str, bytes]], **about: str) -> Any:
    """Put pieces into one message; `about` is the session and reply of a push's first one."""
    held = [link_pb2.Piece(id=bytes.fromhex(name), data=data) for name, data in bundle]
    return link_pb2.Pieces(pieces=held, **about)


def unpacked(message: Any) -> Iterator[tuple[str, bytes]]:
    """Take the pieces out of a message."""
    return ((piece.id.hex(), piece.data) for piece in message.pieces)
