"""The exceptions a user can meet, each with the exit code of the command line.

=====  =====================================================================
code   meaning
=====  =====================================================================
0      done
1      an error of our own: a defect, please report it
2      wrong usage (an option, a value)
3      the model is not found or not valid
4      the device is not available
5      out of memory
6      the GPU, or a process of several, failed while running
130    interrupted
=====  =====================================================================

A message is one sentence that says what is wrong, where (file, tensor, option) and what to do.

An error that ended some requests of several carries what all of them gave: its attribute `outputs` is the list of
`RequestOutput`, in the order of the prompts; a failed one has the finish reason "error" and the text it had by then.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hayate.runtime.outputs import RequestOutput


class HayateError(Exception):
    """Base of all errors meant for the user."""

    exit_code = 1
    outputs: Sequence[RequestOutput] = ()  # of all requests, when some of several failed


class UsageError(HayateError, ValueError):
    """An option or argument is wrong; the message names it and its value."""

    exit_code = 2


class ImageError(UsageError):
    """A picture cannot be read or used; the message names it and the cause."""


class ModelError(HayateError, ValueError):
    """The model folder is missing, incomplete, corrupt, or of a kind we do not run."""

    exit_code = 3


class DeviceError(HayateError, RuntimeError):
    """The device asked for is not there or cannot be used."""

    exit_code = 4


class OutOfMemory(HayateError, MemoryError):
    """More memory is needed than there is; the message says need, have, and what would fit."""

    exit_code = 5


class RequestTooLarge(OutOfMemory):
    """A request alone would need more than the engine has for all; the message says what to change."""


class GpuFault(HayateError, RuntimeError):
    """A kernel failed on the GPU; the process must be restarted."""

    exit_code = 6


class WorkerFault(GpuFault):
    """One of the processes that share a model failed or was killed; load the model, or resume the run, again."""


def to_raise(error: BaseException, outputs: Sequence[RequestOutput] = ()) -> BaseException:
    """A copy of `error` with `outputs` attached and `error` as its cause.

    Several callers may meet the same failure: each raises an exception of its own, so that tracebacks and outputs
    are not mixed.
    """
    try:
        result = copy.copy(error)
        result.__cause__ = error
    except Exception:  # a class whose constructor takes something else than `args`
        result = error
    result.outputs = list(outputs)  # type: ignore[attr-defined]
    return result
