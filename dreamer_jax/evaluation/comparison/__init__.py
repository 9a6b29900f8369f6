"""Runs compared: what is read of them, what it proves, and the tables and figures that say so.

results.py reads evaluations; side_by_side.py puts them side by side, with statistics.py; compare.py writes what comes
of it: tables.py as Markdown, record.py as JSON, panels.py and figures.py as pictures.
"""
