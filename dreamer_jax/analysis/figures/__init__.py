"""Figures of captures: functions of arrays that return matplotlib figures."""
