"""Scaling laws from a grid of SAEs: plan the runs, train what is missing, measure, fit, report."""
