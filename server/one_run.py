"""What Flower's Grid wants of a carrier besides carrying: the run, and messages made by hand."""

from __future__ import annotations

from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
FIRST_NODE = 1000


class OneRun(Grid):
    """A Grid of one run in this process; the carriers are its children.

    It relies on names of Flower's that are not documented (`TaskIdentity`, `Run`); the minor
    version is pinned and tests compare the carriers with Flower's own runtime.
    """

    def __init__(self) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = RUN_ID
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self._run = Run.create_empty(run_id=RUN_ID)

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Return the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message (strategies make their own)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
