"""Bisect: which pass, which place and which nodes break a bound, and a folder that shows it alone."""
