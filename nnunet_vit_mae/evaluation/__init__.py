"""Segmentations against references: measures, statistics, clinical groups, figures and a report."""
