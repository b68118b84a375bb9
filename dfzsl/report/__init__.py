"""Provide tables and an HTML page of the results of runs (`dfzsl report OUTPUT`)."""

from .formats import FORMATS
from .read_runs import collect, collect_logs
from .sections import Section, sections

__all__ = ["FORMATS", "Section", "collect", "collect_logs", "sections"]
