"""Moved to fedaccord/keys.py; this name goes away today."""

from fedaccord.keys import *  # noqa: F403
from fedaccord.keys import SigningKey, create, load, signed  # noqa: F401
