"""The checkpoints of one job in the store: which are written, and which are too large for it."""

from __future__ import annotations

from tessera.errors import Unavailable
from tessera.queue.leases import JobLeases, Lease
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.reporter import JobReporter

#: The store takes strings of 512 MiB, and must not be busy with one for long. A LoRA form of rank 16 on an 8B
#: model has 704 MB, of rank 4 176 MB; cores have 1 to 15 MB.
MAX_BYTES = 256 * 1024**2
#: Of one job into the store, on average: large checkpoints are written less often.
MAX_BYTES_PER_S = 8 * 1024**2


class JobCheckpoints:
    """Writes what another attempt would go on from. Every write is fenced by the lease."""

    def __init__(
        self,
        lease: Lease,
        leases: JobLeases,
        reporter: JobReporter,
        *,
        metrics: TrainerMetrics,
        every_s: float,
    ) -> None:
        self.are_wanted = True
        self._lease, self._leases, self._reporter = lease, leases, reporter
        self._metrics, self._every_s = metrics, every_s
        self._num_bytes = 0

    @property
    def interval_s(self) -> float:
        """Seconds between two checkpoints."""
        return max(self._every_s, self._num_bytes / MAX_BYTES_PER_S)

    async def keep(self, content: bytes, *, step: int) -> None:
        """Write one that matters. Raises `Unavailable`, `StaleLease`."""
        self._num_bytes = len(content)
        if len(content) <= MAX_BYTES:
            await self._leases.checkpoint(self._lease, content, step=step)
            self._metrics.checkpoints.inc()
            self._metrics.checkpoint_bytes.set(len(content))
        elif self.are_wanted:
            self.are_wanted = False
            message = f"checkpoints of {len(content)} bytes are too large: an interrupted job begins afresh"
            await self._reporter.warn("no_checkpoints", message)

    async def try_to_keep(self, content: bytes, *, step: int) -> None:
        """Write one that the next replaces. Raises `StaleLease`."""
        try:
            await self.keep(content, step=step)
        except Unavailable as error:
            self._reporter.note_outage(error)
