"""How far a stage is: a bar on a terminal, elsewhere a line every half minute, and JSON lines for machines."""

from .log import EventLog, log_event, recording
from .shown import doing, progress_bar, within
from .stage import Stage

__all__ = ["EventLog", "Stage", "doing", "log_event", "progress_bar", "recording", "within"]
