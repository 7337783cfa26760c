"""Evaluation of segmentations against references: measures, statistics, risk groups, figures and a report."""
