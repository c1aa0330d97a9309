"""Errors of simulated programs."""


class PtxError(RuntimeError):
    """A fault of the simulated program."""


class RaceError(PtxError):
    """Unordered conflicting shared-memory accesses / access to data in flight."""


class DeadlockError(PtxError):
    """No thread can make progress."""


class Reconverge(Exception):
    """A warp-collective met with lanes missing: wait until they arrive."""
