"""The report of a comparison or a sweep: a table on the terminal and one self-contained HTML file."""

from token_superposition.report.page import write_report
from token_superposition.report.table import print_table

__all__ = ["print_table", "write_report"]
