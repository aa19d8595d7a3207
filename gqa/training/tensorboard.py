"""TensorBoard's event files, by tensorboardX.

That imports PyTorch wherever it is installed, without a need for it here: two seconds of the start
of every process.
"""

import sys

_absent = "torch" not in sys.modules
if _absent:
    # None makes an import fail, as if PyTorch were not installed.
    sys.modules["torch"] = None  # type: ignore[assignment]
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar
finally:
    if _absent:
        del sys.modules["torch"]

__all__ = ["Event", "EventsWriter", "SessionLog", "scalar"]
