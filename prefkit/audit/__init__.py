"""The audit: what gives the answer away without being the answer. Pure functions on frames; `report.py` runs and prints it."""
