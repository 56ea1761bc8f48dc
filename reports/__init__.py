"""What people read of a run: on top of adapter, data, support; only eval.py and train.py import it."""
