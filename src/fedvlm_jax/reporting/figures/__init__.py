"""Figures of reports, drawn with matplotlib."""
