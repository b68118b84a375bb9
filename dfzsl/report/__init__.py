"""Make tables and one HTML page from the results of runs (`dfzsl report OUTPUT`)."""

from .formats import FORMATS
from .read_runs import collect, collect_logs
from .sections import Section, sections

__all__ = ["FORMATS", "Section", "collect", "collect_logs", "sections"]
