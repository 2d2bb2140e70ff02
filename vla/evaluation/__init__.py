"""Evaluation: results of rollouts, benchmark suites and their scores, comparison of runs, reports."""
