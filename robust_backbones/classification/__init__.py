"""Classifiers: training under attack, and how robust they are."""
