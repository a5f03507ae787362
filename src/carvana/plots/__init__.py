"""Figures and pages; for notebooks only."""
