"""Evaluation: results of rollouts, benchmark suites and scores, comparison of runs, and reports."""
