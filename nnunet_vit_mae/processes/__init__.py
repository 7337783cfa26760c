"""Processes: pools of workers, signals, and children that end with their parent."""
