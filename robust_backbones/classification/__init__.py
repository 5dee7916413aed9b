"""Classifiers: adversarial training and evaluation of robustness."""
