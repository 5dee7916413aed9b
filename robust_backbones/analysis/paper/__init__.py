"""Salman et al. 2020: its own values, and its tables and figures for any set of records."""
