"""The names of tensorboardX that write TensorBoard's event files, imported without PyTorch.

tensorboardX imports PyTorch wherever PyTorch is installed. Event files do not need it, and the
import takes two seconds of the start of every process. This file holds that import and nothing
else; `progress.py` writes the events.
"""

import sys

_absent = "torch" not in sys.modules
if _absent:
    # An entry of None makes `import torch` fail as if PyTorch were not installed, which
    # tensorboardX allows for. The entry is removed below, so that other modules can import PyTorch.
    sys.modules["torch"] = None  # type: ignore[assignment]
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar
finally:
    if _absent:
        del sys.modules["torch"]

__all__ = ["Event", "EventsWriter", "SessionLog", "scalar"]
