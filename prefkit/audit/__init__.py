"""What gives the answer away without being the answer: pure functions on frames, run and printed by `report.py`."""
